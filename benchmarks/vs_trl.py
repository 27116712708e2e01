"""One whole GRPO step against TRL's GRPOTrainer, on a CPU; then part by part.

    python benchmarks/vs_trl.py [--model DIR] [--data-dir DIR] [--sweep] [--json F]

It needs `pip install trl`. A step is: sample, grade, reference log-probs, gradient, optimiser.
SmolLM2-135M on training prompts of MedQA of about 400 tokens, with the same samples and forced
tokens on both sides; SETTINGS below, printed first, says what else is equal and what is not. Every
run is a process of its own, so that its peak memory is its own; the sides take turns, and the
second step of each is timed. TRL runs as installed, whose head scores prompt positions too where
there is no Triton (a CPU), and once with completion positions only, as it does on a GPU.
"""

import argparse
import datetime
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import rewards
import train
from benchmarks.one_step import sampled_and_graded, update
from policy import Policy, Rollout, collate
from support import loading
from support.demo_model import demo_policy
from support.errors import UsageError
from support.tokens import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BETA, LR, BETA2 = 0.04, 1e-6, 0.95
SETTINGS = {
    "both": f"all weights trained, fp32, AdamW (lr {LR}, betas 0.9 {BETA2}, no decay), gradient "
    f"norm 1, gradient checkpointing, beta {BETA} (k3) with a frozen copy as reference, one update "
    "a rollout and so old log-probs on neither side, each sequence weighs the same, all rows in "
    "one batch (--micro-batch 1: a prompt's), temperature 1, no top-k or top-p",
    "grading": "rewards.grade, plus (index in the group) / G: SmolLM2 earns -1 everywhere, and a "
    "step whose gradient is 0 would be no example",
    "EOS": "stops no row: it is taken off both sides' lists (min_new_tokens would cost TRL a pass "
    "over the logits a token)",
    "TRL": "generate without vLLM, loss_type grpo, num_iterations 1, one generation an optimiser "
    "step, use_bias_correction_kl off, sdpa; else its defaults, such as a chunked head; AdamW is "
    "fused on both sides",
    "timed": "the second step, from its first prompt to its zeroed gradients, without loading; "
    "peak memory is ru_maxrss of the process, loading included",
    "parts": "sampling against HF generate on G copies of each prompt; log-probs and backward "
    "against G copies, a group at a time, full logits, no entropy",
    "head": "our chunked head, entropy included, against full logits and log_softmax, forward and "
    "backward, hidden size 576; peak above that of 16 tokens",
    "sweep": "a random Qwen2 (hidden 256, 4 layers, so the head weighs more than in a real model), "
    "2 prompts; one number varies, the others stay at BASE",
}
BASE = dict(samples=8, length=256, max_new=128, vocabulary=8192)
AXES = dict(
    samples=(1, 2, 4, 8, 16),
    length=(64, 256, 512, 1024),
    max_new=(64, 128, 256, 512, 1024),
    vocabulary=(2048, 8192, 32768, 131072),
)
HEADS = [(vocabulary, length) for vocabulary in (16384, 49152, 151936) for length in (1024, 4096)]


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check(holds: bool, fault: str) -> None:
    if not holds:
        raise SystemExit(f"vs_trl.py: {fault}")


def vignettes(args) -> list:
    """The training items whose prompt is nearest to --length tokens.

    All sides take the same, and sort them alike.
    """
    tokenizer = load_tokenizer(args.model)

    def apart(item):
        texts = [message["content"] for message in data.messages(item)]
        return abs(sum(len(tokenizer(text).input_ids) for text in texts) - args.length)

    return sorted(data.load("medqa", "train", args.data_dir), key=apart)[: args.prompts]


# ----------------------------------------------------------------------------- one process each
def our_step(args) -> dict:
    items = vignettes(args)
    policy = Policy.load(args.model, lora=0, checkpointing=True, keep_reference=True)
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    config = train.Config(
        dataset="medqa",
        full=True,
        prompts=args.prompts,
        samples=args.samples,
        max_new=args.max_new,
        kl_coef=BETA,
        lr=LR,
        micro_batch=args.micro_batch,
    )
    optimizer = train.make_optimizer(policy, config)
    for step in range(2):  # the first warms up
        start = time.perf_counter()
        rollouts = sampled_and_graded(policy, items, config, step)
        sampled = time.perf_counter()
        for i, rollout in enumerate(rollouts):
            rollout.reward += i % args.samples / args.samples
        metrics = update(policy, optimizer, rollouts, config, step)
        end = time.perf_counter()
    return {
        "seconds": end - start,
        "sample_seconds": sampled - start,
        "loss": metrics["loss"],
        "grad_norm": metrics["policy_grad_norm"],
        "lengths": [len(r.completion_ids) for r in rollouts],
        "prompt_ids": sorted(r.prompt_ids for r in rollouts),
    }


def trl_step(args) -> dict:
    import trl  # noqa: PLC0415 (optional, and minutes to import)
    from datasets import Dataset  # noqa: PLC0415 (comes with trl)

    if args.side == "trl-completions":
        # Read at this one place: the kernels, which need Triton, ask their own module.
        trl.trainer.utils._use_triton = lambda device: True
    items, G, T = vignettes(args), args.samples, args.max_new
    passes = args.prompts // (args.micro_batch or args.prompts)
    tokenizer, graded = load_tokenizer(args.model), train.Config()

    def prompt(item):
        chat = data.messages(item)
        return chat if tokenizer.chat_template else data.plain_text(chat)

    def reward(completions, row, **_):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [
            rewards.grade(items[r], text, graded, False, T).total + i % G / G
            for i, (r, text) in enumerate(zip(row, texts))
        ]

    clock, seen = transformers.TrainerCallback(), {}
    clock.on_step_begin = lambda *_, **__: seen.update(start=time.perf_counter())
    clock.on_step_end = lambda *_, **__: seen.update(seconds=time.perf_counter() - seen["start"])
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            out,
            per_device_train_batch_size=args.prompts * G // passes,
            gradient_accumulation_steps=passes,
            steps_per_generation=passes,
            num_generations=G,
            num_iterations=1,
            max_steps=2,
            max_completion_length=T,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=BETA,
            loss_type="grpo",
            scale_rewards="group",
            use_bias_correction_kl=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=BETA2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=False,
            fp16=False,
            use_cpu=True,
            use_vllm=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            seed=0,
        )
        rows = [{"prompt": prompt(item), "row": i} for i, item in enumerate(items)]
        trainer = trl.GRPOTrainer(
            args.model,
            reward,
            config,
            Dataset.from_list(rows * 2),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        generate = trainer._generate

        def watched(prompts):
            trainer.eos_token_ids = []
            for config in (trainer.generation_config, trainer.model.generation_config):
                config.eos_token_id = None
            start = time.perf_counter()
            out = generate(prompts)
            seen.update(
                sample_seconds=time.perf_counter() - start,
                prompt_ids=sorted(map(list, out[0])),
                lengths=[len(ids) for ids in out[1]],
            )
            return out

        trainer._generate = watched
        trainer.train()
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    return {"loss": float(last["loss"]), "grad_norm": float(last["grad_norm"]), **seen}


def replicated_backward(model, batch, rows_at_once: int) -> None:
    """Log-probs and their gradient with every completion behind a prompt of its own."""
    P, G, T = batch.completion_ids.shape
    ids = torch.cat(
        [batch.prompt_ids.repeat_interleave(G, 0), batch.completion_ids.flatten(0, 1)], 1
    )
    seen = torch.cat([batch.prompt_mask.repeat_interleave(G, 0), batch.mask.flatten(0, 1)], 1)
    for rows in torch.arange(P * G).split(rows_at_once):
        logits = model(
            input_ids=ids[rows],
            attention_mask=seen[rows].long(),
            position_ids=(seen[rows].cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=T + 1,
        ).logits[:, :-1]
        logps = logits.gather(-1, ids[rows, -T:, None])[..., 0] - logits.logsumexp(-1)
        (logps * seen[rows, -T:]).sum().backward()


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_policy(vocabulary: int, hidden: int, layers: int) -> Policy:
    """A random Qwen2 with the demo's tokenizer, whose few words do for decoding."""
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="prompt_once",
    )
    torch.manual_seed(0)
    return Policy(
        transformers.Qwen2ForCausalLM(config),
        demo_policy(0).tokenizer,
        lora=0,
        checkpointing=True,
    )


def parts(args) -> dict:
    """Sampling, then log-probs and backward, of one side.

    Both sides have the same prompts and, for scoring, the same (random) completions.
    """
    P, G, T = args.prompts, args.samples, args.max_new
    rng = torch.Generator().manual_seed(0)
    if args.vocabulary:
        policy, items = random_policy(args.vocabulary, 256, 4), list(range(P))
        prompts = torch.randint(3, args.vocabulary, (P, args.length), generator=rng).tolist()
        policy.start = lambda item, group, style: Rollout(item, group, prompts[item], [], [], False)
    else:
        policy, items = Policy.load(args.model, lora=0, checkpointing=True), vignettes(args)
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    model, started = policy.model, [policy.start(item, p, "think") for p, item in enumerate(items)]
    written = torch.randint(3, model.config.vocab_size, (P * G, T), generator=rng).tolist()
    rollouts = [
        replace(started[i // G], completion_ids=ids, sample_logps=[0.0] * T)
        for i, ids in enumerate(written)
    ]
    batch = collate(rollouts)
    if args.side == "parts-plain":
        model.set_attn_implementation("sdpa")  # the same model as transformers has it
        model.generation_config.eos_token_id = None

    def sampling():
        if args.side == "parts-ours":
            return {len(r.completion_ids) for r in policy.sample(items, G, T, 1.0, seed=0)}
        model.eval()
        rows = model.generate(
            input_ids=batch.prompt_ids.repeat_interleave(G, 0),
            attention_mask=batch.prompt_mask.repeat_interleave(G, 0).long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            max_new_tokens=T,
            pad_token_id=0,
        )
        return {rows.shape[1] - batch.prompt_ids.shape[1]}

    def scoring():
        model.zero_grad()
        if args.side == "parts-ours":
            return policy.score(batch).logps.sum().backward()
        model.train()
        replicated_backward(model, batch, G)

    # This call and the next warm up.
    check(sampling() == {T}, f"{args.side} did not sample {T} tokens a row")
    scoring()
    return {
        "sampling": timed(sampling),
        "scoring": timed(scoring),
        "grad_norm": float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()),
    }


def head(args) -> dict:
    policy = random_policy(args.vocabulary, 576, 1)
    hidden, targets = torch.randn(args.length, 576), torch.randint(args.vocabulary, (args.length,))

    def head_pass(n):
        h, target = hidden[:n].clone().requires_grad_(), targets[:n]
        if args.side == "head-ours":
            logps, _ = policy.token_logps(h, target, 1.0)
        else:
            logps = policy.model.lm_head(h).log_softmax(-1).gather(1, target[:, None])
        logps.sum().backward()

    head_pass(16)
    head_pass(16)  # twice: the weight's gradient is there, and once more while it is added up
    before = peak_gb()
    return {"seconds": timed(lambda: head_pass(args.length)), "above_gb": peak_gb() - before}


SIDES = {
    "ours": our_step,
    "trl": trl_step,
    "trl-completions": trl_step,
    "parts-ours": parts,
    "parts-plain": parts,
    "head-ours": head,
    "head-plain": head,
}


def one_side(args) -> dict:
    torch.set_num_threads(args.threads)
    loading.quiet()
    found = SIDES[args.side](args)
    check(
        torch.get_num_threads() == args.threads,
        f"{args.side} ran on {torch.get_num_threads()} threads, not {args.threads}",
    )
    return found | {"peak_gb": peak_gb()}


# ----------------------------------------------------------------------------------- the parent
def run(args, side: str, **changes) -> dict:
    spec = vars(args) | {"side": side, "vocabulary": 0} | changes
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "TOKENIZERS_PARALLELISM": "false"}
    both = ["--model", args.model, "--data-dir", args.data_dir]
    done = subprocess.run(
        [sys.executable, __file__, *both, "--side", json.dumps(spec)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | quiet,
    )
    if done.returncode:
        if done.returncode > 0:
            raise SystemExit(done.returncode)
        signal = -done.returncode
        raise SystemExit(f"vs_trl.py: {side} was ended by signal {signal}: out of memory?")
    return json.loads(done.stdout.splitlines()[-1])


def compared(pairs: list[tuple[dict, dict]], key: str, unit: str = "seconds") -> dict:
    """The peer's figure over ours, pair by pair, and the medians: more is better."""
    ratios = [b[key] / a[key] for a, b in pairs]
    return {
        unit: statistics.median(a[key] for a, _ in pairs),
        f"peer_{unit}": statistics.median(b[key] for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def whole_step(args) -> dict:
    runs, total = [], args.prompts * args.samples * args.max_new
    for pair in range(args.pairs):
        sides = ["ours", "trl"]
        if pair == 0 and "completions" not in args.skip:  # once: it takes as long
            sides.append("trl-completions")
        runs.append({side: run(args, side) for side in sides})
        for side, r in runs[-1].items():
            print(
                f"step {pair + 1}, {side:15s} {r['seconds']:7.2f} s "
                f"(sampling {r['sample_seconds']:.2f} s), {total / r['seconds']:6.1f} tokens/s, "
                f"peak {r['peak_gb']:5.2f} GB, loss {r['loss']:.1e}, "
                f"gradient norm {r['grad_norm']:.3f}",
                flush=True,
            )
            check(
                math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]),
                f"{side}: the loss or its gradient is not finite",
            )
            check(
                r["lengths"] == [args.max_new] * args.prompts * args.samples,
                f"{side} sampled rows of {sorted(set(r['lengths']))} tokens",
            )
            check(
                r["prompt_ids"] == runs[0]["ours"]["prompt_ids"],
                f"{side} saw other prompts than ours",
            )
    found: dict = {
        "prompt_tokens": sorted(map(len, runs[0]["ours"]["prompt_ids"][:: args.samples])),
        "losses": {side: [r[side]["loss"] for r in runs if side in r] for side in runs[0]},
    }
    for peer, suffix in (("trl", ""), ("trl-completions", "_completions")):
        pairs = [(r["ours"], r[peer]) for r in runs if peer in r]
        if not pairs:
            continue
        step = compared(pairs, "seconds")
        rates = {unit + "tokens_per_s": total / step[unit + "seconds"] for unit in ("", "peer_")}
        found["step" + suffix] = step | rates | {"in_sampling": compared(pairs, "sample_seconds")}
        found["memory" + suffix] = compared(pairs, "peak_gb", "gb")
    return found


def part_pairs(args, pairs: int = 0, **changes) -> dict:
    runs = []
    for pair in range(pairs or args.pairs):
        runs.append((run(args, "parts-ours", **changes), run(args, "parts-plain", **changes)))
        if not changes:
            a, b = runs[-1]
            print(
                f"parts {pair + 1}: "
                f"sampling {a['sampling']:.2f} s, the other {b['sampling']:.2f} s, "
                f"scoring {a['scoring']:.2f} s, the other {b['scoring']:.2f} s",
                flush=True,
            )
    a, b = (side["grad_norm"] for side in runs[0])
    check(
        math.isclose(a, b, rel_tol=1e-3),
        f"the two sides of scoring disagree: gradient norms {a} and {b}",
    )
    return {
        "sampling": compared(runs, "sampling"),
        "scoring": compared(runs, "scoring"),
        "part_memory": compared(runs, "peak_gb", "gb"),
    }


def heads(args) -> dict:
    rows = []
    for vocabulary, length in HEADS:
        a, b = (
            run(args, side, vocabulary=vocabulary, length=length)
            for side in ("head-ours", "head-plain")
        )
        rows.append(
            {
                "vocabulary": vocabulary,
                "length": length,
                "seconds": a["seconds"],
                "peer_seconds": b["seconds"],
                "gb": a["above_gb"],
                "peer_gb": b["above_gb"],
            }
        )
        print(
            f"head, vocabulary {vocabulary:6d}, {length} tokens: {a['seconds']:6.2f} s, "
            f"{a['above_gb']:.2f} GB; full logits {b['seconds']:6.2f} s, {b['above_gb']:.2f} GB",
            flush=True,
        )
    for short, long in zip(rows[::2], rows[1::2]):
        grown = [f"{long[side] - short[side]:.2f} GB" for side in ("gb", "peer_gb")]
        print(
            f"head, vocabulary {short['vocabulary']:6d}: from {short['length']} to "
            f"{long['length']} tokens ours grows by {grown[0]}, full logits by {grown[1]}"
        )
    return {"head": rows}


def sweep(args) -> dict:
    rows, done = [], {}
    points = [(axis, BASE | {axis: value}) for axis, values in AXES.items() for value in values]
    for axis, point in points:
        G, L, T, V = key = tuple(point.values())
        if key not in done:  # BASE lies on every axis
            done[key] = part_pairs(args, args.sweep, prompts=2, **point)
        rows.append({"axis": axis, **point, "token_ratio": G * (L + T) / (L + G * T), **done[key]})
        cells = [
            f"{name} {r['seconds']:6.2f} s, the other {r['peer_seconds']:6.2f} s, "
            f"ratio {r['ratio']:.2f}"
            for name, r in done[key].items()
            if "seconds" in r
        ]
        print(
            f"sweep of {axis:10s} G {G:2d}, L {L:4d}, T {T:4d}, vocabulary {V:6d}: "
            f"token ratio {rows[-1]['token_ratio']:.2f}; {'; '.join(cells)}",
            flush=True,
        )
    return {"sweep": rows}


UNITS = {"seconds": "{:.1f} s", "tokens_per_s": "{:.1f} tokens/s", "gb": "{:.2f} GB"}


def cell(figures: dict, side: str) -> str:
    """side: "" for ours, "peer_" for the other."""
    there = [unit for unit in UNITS if unit in figures]
    return ", ".join(UNITS[unit].format(figures[side + unit]) for unit in there)


def table(found: dict) -> str:
    """Step, memory and parts as a markdown table."""
    rows = ["| what | ours | the other | ratio (median; pair by pair) |", "|---|---|---|---|"]
    names = {
        "step": "step, TRL as installed",
        "memory": "peak memory, TRL as installed",
        "step_completions": "step, TRL's head on completions only",
        "memory_completions": "peak memory, TRL's head on completions only",
        "sampling": "sampling, HF generate",
        "scoring": "log-probs and backward, replicated",
    }
    for key, name in names.items():
        if key in found:
            r = found[key]
            each = ", ".join(f"{ratio:.2f}" for ratio in r["ratios"])
            rows.append(
                f"| {name} | {cell(r, '')} | {cell(r, 'peer_')} | **{r['ratio']:.2f}** ({each}) |"
            )
    return "\n".join(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a Hugging Face folder, such as SmolLM2-135M")
    p.add_argument("--data-dir", required=True, help="folder with MedQA's data_clean")
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--samples", type=int, default=8, help="at least 2: TRL refuses 1")
    p.add_argument("--max-new", type=int, default=64, help="forced tokens a sample")
    p.add_argument(
        "--length",
        type=int,
        default=400,
        help="prompt tokens, about: a vignette of MedQA has 300 to 400",
    )
    p.add_argument(
        "--micro-batch", type=int, default=0, help="prompts a scoring pass, on both sides; 0 = all"
    )
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument(
        "--sweep",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="PAIRS",
        help="also vary samples, lengths and vocabulary on a small random model, PAIRS (1) a point",
    )
    p.add_argument(
        "--skip",
        nargs="+",
        choices=("step", "completions", "parts", "head"),
        default=[],
        help="leave these out",
    )
    p.add_argument("--json")
    p.add_argument("--side", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.side:
        return print(json.dumps(one_side(argparse.Namespace(**json.loads(args.side)))))
    if args.micro_batch and args.prompts % args.micro_batch:
        raise UsageError(
            f"--micro-batch {args.micro_batch} does not divide --prompts {args.prompts}, and TRL's "
            "batches are all of one size"
        )
    if util.find_spec("trl") is None:
        raise UsageError("TRL is not installed: pip install trl")
    if len(data.load("medqa", "train", args.data_dir, limit=args.prompts)) < args.prompts:
        raise UsageError(f"{args.data_dir} has fewer than {args.prompts} training items")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout.strip()
    result = {
        "model": Path(args.model).name,
        **{
            key: getattr(args, key)
            for key in (
                "prompts",
                "samples",
                "max_new",
                "length",
                "micro_batch",
                "pairs",
                "threads",
            )
        },
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")},
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }
    print("\n".join(f"{key}: {value}" for key, value in (result | SETTINGS).items()), flush=True)
    result["settings"] = SETTINGS
    for name, work in {
        "step": whole_step,
        "parts": part_pairs,
        "head": heads,
        "sweep": sweep,
    }.items():
        if name not in args.skip and (name != "sweep" or args.sweep):
            result |= work(args)
        if args.json:  # after each: what is measured is not lost
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"vs_trl.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
