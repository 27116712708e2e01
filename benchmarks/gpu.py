"""What one GPU makes of it, at Qwen2.5-3B's and Qwen2.5-VL-3B's size.

    python benchmarks/gpu.py [--parts sampling update memory gap vision equal] [--json F]

One command for all that only a GPU can tell: decoding against the bandwidth limit, replayed and
eager; updates with and without cuDNN's attention; memory against the table; sampler against scorer;
a step of VRFT-Aug; two equal runs compared byte for byte. A part that fails leaves the others.
The models are made from configs with random weights, and every row has its full length. Limits are
measured on the same GPU: bytes a second of a copy (read and written), bf16 FLOPs a second of a
matrix product. GB are 10^9 bytes. Without a GPU it says so and measures nothing.
"""

import argparse
import datetime
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from benchmarks import memory_table, one_step
from benchmarks.one_step import sampled_and_graded
from benchmarks.shapes import (
    DEVICE,
    FULL,
    TINY,
    forced,
    items_of,
    text_policy,
    vision_policy,
    written,
)
from policy import Policy, collate
from support.cli import make_config
from support.demo_model import demo_policy
from support.loading import quiet

ROOT = Path(__file__).resolve().parent.parent
RANK = 16  # of the adapters, as in train.py
KINDS = (
    ("lora", RANK, torch.bfloat16),
    ("full", 0, torch.float32),
)  # what is trained, with the type that Policy.load gives its weights on a GPU


def timed(work) -> float:
    sync = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def peak(work) -> dict:
    """Seconds, and the most memory held.

    Allocated is what tensors take, reserved what torch holds for them and a card must have.
    """
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(work)
    allocated, reserved = (
        (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        if DEVICE == "cuda"
        else (0, 0)
    )
    return {"seconds": seconds, "peak_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


def tidy() -> None:
    """What is no longer used is given back; gc, since lambdas and policies refer to each other."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def check(
    out: dict, name: str, value: float, least: float = -math.inf, most: float = math.inf
) -> None:
    """Note a value beside its target."""
    target = f"at least {least:g}" if math.isfinite(least) else f"at most {most:g}"
    out.setdefault("targets", {})[name] = {
        "value": value,
        "target": target,
        "met": least <= value <= most,
    }


def limits(size) -> dict:
    """What this GPU can do: a copy, and a bf16 matrix product until the clock has settled."""
    a, b = (torch.zeros(size.copy_bytes // 2, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")
    x, y = (torch.randn(size.matrix, size.matrix, device=DEVICE).bfloat16() for _ in "xy")

    def rate(work, n):
        """Calls a second; the first of the two measurements warms up."""
        return n / min(timed(lambda: [work() for _ in range(n)]) for _ in range(2))

    return {
        "copy_bytes_per_s": 2 * a.nbytes * rate(lambda: b.copy_(a), 20),
        "matrix_flops_per_s": 2 * size.matrix**3 * rate(lambda: x @ y, 200),
    }


def weights_of(model) -> dict:
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def bytes_read(model, P: int, L: int, G: int, T: int) -> float:
    """By the T-1 decoding steps of a call, at the least.

    All weights (the embedding is the head), each prompt's K/V once, every completion's own so far.
    """
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size  # K and V
    token = 2 * numbers  # bytes in bf16
    weights = sum(p.nbytes for p in model.parameters())
    return (T - 1) * (weights + token * P * L) + token * P * G * sum(range(1, T))


def sampling(size, out: dict, machine: dict) -> None:
    P, L, G, T, items = size.prompts, size.length, size.samples, size.max_new, items_of(size)
    policy = text_policy(size, lora=0)
    out |= {
        "prompts": P,
        "prompt_tokens": L,
        "samples": G,
        "max_new": T,
        **weights_of(policy.model),
    }

    def run(new):
        return policy.sample(items, G, new, 1.0, seed=0)

    replays = hasattr(policy, "replay")  # a step as a graph, which can be switched off
    for name in ("plain", "lora", "lora, eager") if replays else ("plain", "lora"):
        if name == "lora":  # what training samples with: adapters beside the weights, not merged
            policy = forced(Policy(policy.model, policy.tokenizer, lora=RANK), size)
        if name == "lora, eager":
            policy.replay = False
        cold = timed(lambda: run(T))
        found = peak(lambda: run(T))
        seconds, prompt_seconds = found["seconds"], min(timed(lambda: run(1)) for _ in range(2))
        limit = bytes_read(policy.model, P, L, G, T) / machine["copy_bytes_per_s"]
        out[name] = found | {
            "cold_seconds": cold,
            "prompt_seconds": prompt_seconds,
            "tokens_per_s": P * G * T / seconds,
            "ms_per_step": 1000 * (seconds - prompt_seconds) / (T - 1),
            "limit_seconds": limit,
            "share_of_limit": limit / seconds,
            "share_of_limit_without_prompt": limit / (seconds - prompt_seconds),
        }
        if name == "plain":
            check(out, "share of the bandwidth limit, whole call", limit / seconds, least=0.70)
            out["peer"] = generate(policy, items, size)
            check(out, "times HF generate", out["peer"]["seconds"] / seconds, least=8)


def generate(policy: Policy, items: list, size) -> dict:
    """HF `generate`, every sample behind a prompt of its own.

    Measured at two short lengths and scaled to T by its time a step. Steps grow slower with T: that
    favours it.
    """
    model, T, (few, more) = policy.model, size.max_new, size.peer_new
    prompts = torch.tensor(policy.encode(items), device=DEVICE)
    ids = prompts.repeat_interleave(size.samples, 0)  # [P*G, L]

    def run(new):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )

    model.set_attn_implementation("sdpa")
    run(few)
    short, long = timed(lambda: run(few)), timed(lambda: run(more))
    model.set_attn_implementation("prompt_once")
    step = (long - short) / (more - few)
    seconds = long + (T - more) * step
    return {
        "measured_new": [few, more],
        "measured_seconds": [short, long],
        "scaled_to": T,
        "ms_per_step": 1000 * step,
        "seconds": seconds,
        "tokens_per_s": len(ids) * T / seconds,
    }


def replicated_update(policy: Policy, optimizer, batch, rows_at_once: int, config) -> None:
    """An update with every completion behind a prompt of its own.

    It takes transformers' own forward pass: without padding, that is causal flash attention.
    """
    P, G, T = batch.completion_ids.shape
    prompts = batch.prompt_ids.repeat_interleave(G, 0)
    ids = torch.cat([prompts, batch.completion_ids.flatten(0, 1)], 1)  # [P*G, L+T]
    advantages = (torch.arange(P * G, device=ids.device) % 2 * 2.0 - 1)[:, None].expand(-1, T)
    policy.model.train()
    for rows in torch.arange(P * G).split(rows_at_once):
        with policy.autocast():
            decoded = policy.model.get_decoder()(input_ids=ids[rows, :-1], use_cache=False)
            hidden = decoded.last_hidden_state[:, -T:].flatten(0, 1)
            # The same head: only the layout differs.
            logps, _ = policy.token_logps(hidden, ids[rows, -T:].flatten(), 1.0)
        (-(logps * advantages[rows].flatten()).sum() / (P * G * T)).backward()
    torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def update(size, out: dict, machine: dict) -> None:
    """An update without a reference pass, AdamW included, with and without cuDNN's attention.

    cuDNN plans for every new shape: what it costs shows in the first update of a kind ("cold").
    """
    L, G, T = size.length, size.samples, size.max_new
    out["token_ratio"] = G * (L + T - 1) / (L + G * (T - 1))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for name, lora, dtype in KINDS:
        for cudnn in (False, True):
            tidy()
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            kind = f"{name}, cuDNN" if cudnn else name
            out[kind] = found = one_kind(size, lora, dtype, machine["matrix_flops_per_s"])
            print(
                f"update    {kind}: {found['ratio']:.2f} times the replicated layout's speed, "
                f"tokens {out['token_ratio']:.2f} to 1",
                flush=True,
            )
        share = out[name]["ours"]["hardware_share"]
        check(out, f"{name}: hardware FLOPs as a share of the matrix rate", share, least=0.45)
    torch.backends.cuda.enable_cudnn_sdp(before)


def one_kind(size, lora: int, dtype: torch.dtype, rate: float) -> dict:
    """The update of adapters, or of all weights. rate: FLOPs a second of a matrix product.

    Two prompts (or their samples) a forward pass on both sides. FLOPs are torch's own count, which
    takes attention for full rectangles and counts what checkpointing computes again.
    """
    G, T = size.samples, size.max_new
    policy = text_policy(size, lora, dtype, checkpointing=True)
    given = dict(dataset="medqa", full=not lora, kl_coef=0.0, prompts=size.prompts, samples=G)
    config = make_config(given | dict(max_new=T, micro_batch=2))
    optimizer = train.make_optimizer(policy, config)
    rollouts = written(policy, items_of(size), G, T)
    batch = collate(rollouts, policy.device)

    def ours():
        one_step.update(policy, optimizer, rollouts, config)

    def theirs():
        replicated_update(policy, optimizer, batch, 2 * G, config)

    found = {"cold_seconds": timed(ours), "peer_cold_seconds": timed(theirs)}
    pairs = [(peak(ours), peak(theirs)) for _ in range(2)]
    for side, (which, work) in enumerate((("ours", ours), ("peer", theirs))):
        seconds = statistics.median(pair[side]["seconds"] for pair in pairs)
        with FlopCounterMode(display=False) as counter:
            work()
        share = counter.get_total_flops() / seconds / rate
        found[which] = pairs[-1][side] | {"seconds": seconds, "hardware_share": share}
    ratio = statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs)
    return found | {"ratio": ratio, "micro_batch": config.micro_batch, **weights_of(policy.model)}


def memory(size, out: dict, machine: dict) -> None:
    """What a step holds at most, beside the table: of cases of benchmarks/memory_table.py."""
    names = ("grpo 8 x 1,024 on 24 GB", "med-rlvr on 24 GB", "full with KL on 80 GB")
    for name in names:
        tidy()
        case = memory_table.CASES[name]
        if size is TINY:
            small = f" --prompts {size.prompts} --max-new {size.max_new}"
            case = case._replace(flags=case.flags + small, prompt=size.length)
        out[name] = memory_table.measured(case, size)
        for phase in case.phases:
            check(out, f"{name}, {phase}", out[name][phase]["measured_gb"], most=case.card)


@torch.no_grad()
def gap(size, out: dict, machine: dict) -> None:
    """In bf16: sampler against scorer, and greedy tokens against transformers.

    Recorded log-probs stand against the scorer's; greedy tokens against an eager forward pass.
    """
    G, T, items = size.samples, size.gap_new, items_of(size)
    policy = text_policy(size, lora=RANK)
    for name, p in policy.trainable().items():
        if ".B." in name:
            # 0 at first; now adapters add about a tenth of what their layer says.
            p.normal_(0, 0.02)
    rollouts = policy.sample(items, G, T, 1.0, seed=1)
    batch = collate(rollouts, policy.device)
    recorded = batch.sample_logps
    scored, _ = train.score(policy, batch, make_config(dict(dataset="medqa", micro_batch=2)))
    off = scored - recorded
    out |= {
        "prompts": len(items),
        "samples": G,
        "max_new": T,
        "mean_logp": float(recorded.mean()),
        "max_gap": float(off.abs().max()),
        "mean_gap": float(off.abs().mean()),
        "mean_signed_gap": float(off.mean()),
    }
    # A prompt's samples are alike: the first of each.
    greedy = collate(policy.sample(items, G, T, 0.0, seed=0)[::G], policy.device)
    prompts, tokens = greedy.prompt_ids, greedy.completion_ids[:, 0]
    shortfalls = []  # [T] each: how far a picked token is from the best
    for row, own in zip(torch.cat([prompts, tokens], 1), tokens):
        eager = policy.model(input_ids=row[None], use_cache=False, logits_to_keep=T + 1)
        logits = eager.logits[0, :-1].float()
        shortfalls.append(logits.amax(-1) - logits.gather(1, own[:, None])[:, 0])
    below = torch.stack(shortfalls)
    out |= {
        "greedy_agreement": float((below == 0).float().mean()),
        "greedy_largest_shortfall": float(below.max()),
    }
    # Logits between 4 and 8 are 1/32 apart in bf16, and random weights have many near the best: so
    # what is asked is that no picked token lies far below it.
    what = "greedy: how far a picked token's logit is below eager's best"
    check(out, what, out["greedy_largest_shortfall"], most=0.25)


QUESTION = (
    "Which grade of diabetic retinopathy does this fundus photograph show, from 0 (none) to 4 "
    "(proliferative)?"
)


def vision(size, out: dict, machine: dict) -> None:
    """Two steps of --recipe vrft-aug on random pictures; the second is the one to quote."""
    config = make_config(
        dict(
            recipe="vrft-aug",
            prompts=size.prompts,
            samples=size.samples,
            max_new=size.vision_new,
            micro_batch=4,
        )
    )
    grades = tuple("01234")
    shape = (2 * size.prompts, 224, 224, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    items = [
        data.Item(f"picture-{i}", "grade", QUESTION, grades, grades[i % 5], image=picture)
        for i, picture in enumerate(pictures)
    ]
    items = data.with_knowledge(items, config.dataset, config.knowledge)
    texts = [data.messages(items[0], config.style)[1]["content"]]
    policy = vision_policy(
        size,
        texts,
        lora=config.lora,
        checkpointing=config.checkpointing,
    )
    optimizer, ids = train.make_optimizer(policy, config), policy.prompt(items[0], config.style)
    out |= {
        "prompts": config.prompts,
        "samples": config.samples,
        "max_new": config.max_new,
        "kl_coef": config.kl_coef,
        "prompt_tokens": len(ids),
        "image_tokens": ids.count(policy.vision.image_token),
        **weights_of(policy.model),
        "steps": [],
    }
    for step in range(2):
        out["steps"].append(image_step(policy, optimizer, items, config, step))
    phases = out["steps"][-1].values()
    out |= {
        "micro_batch": config.micro_batch,
        "seconds": sum(phase["seconds"] for phase in phases),
        "peak_gb": max(phase["peak_gb"] for phase in phases),
    }
    print(f"vision    {out['seconds']:.1f} s a step, peak {out['peak_gb']:.1f} GB", flush=True)


def image_step(policy: Policy, optimizer, items: list, config, step: int) -> dict:
    rollouts: list = []

    def sampled():  # with the images' preparation, and grading
        rollouts.extend(sampled_and_graded(policy, items, config, step))

    of_sampling = peak(sampled)
    of_update = peak(lambda: one_step.update(policy, optimizer, rollouts, config, step))
    return {"sampling": of_sampling, "update": of_update}


def equal(size, out: dict, machine: dict) -> None:
    """Two equal runs of the demo's model, ten steps each: are they equal byte for byte?"""
    with tempfile.TemporaryDirectory() as folder:
        demo_policy(0).save_folder(f"{folder}/model")
        flags = f"--model {folder}/model --steps {2 if size is TINY else 10} --eval-limit 8"
        flags += f" --eval-every 0 --kl-coef 0.1 --device {DEVICE}"
        for kind in ("--full", "--no-full"):
            weights = []
            for n in "12":
                run = Path(folder) / f"run{kind}-{n}"
                train.main([*flags.split(), kind, "--out", str(run)])
                [*_, newest] = sorted(run.glob("checkpoints/0*"))
                weights.append((newest / "policy.safetensors").read_bytes())
            out[kind] = {"equal": weights[0] == weights[1]}
            print(f"equal     {kind}: {out[kind]['equal']}", flush=True)


PARTS = {
    "sampling": sampling,
    "update": update,
    "memory": memory,
    "gap": gap,
    "vision": vision,
    "equal": equal,
}


def facts() -> dict:
    def git(*args):
        done = subprocess.run(
            ["git", *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return done.stdout.strip()

    gpu = torch.cuda.get_device_properties(0) if DEVICE == "cuda" else None
    return {
        "device": gpu.name if gpu else "cpu",
        "device_memory_gb": gpu.total_memory / 1e9 if gpu else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted": bool(git("status", "--porcelain")),
        "date": datetime.date.today().isoformat(),
    }


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--json")
    # Toy sizes, on a CPU too: tries this script, measures nothing.
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if DEVICE == "cpu" and not args.tiny:
        return print("benchmarks/gpu.py: skipped, torch sees no CUDA GPU here")
    quiet()
    size = TINY if args.tiny else FULL
    machine = limits(size)
    result = facts() | {"tiny": args.tiny, "machine": machine}
    print(
        f"{result['device']}: copy {machine['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matrix product {machine['matrix_flops_per_s'] / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    for name in args.parts:
        part, start = result.setdefault(name, {}), time.perf_counter()
        tidy()
        try:
            PARTS[name](size, part, machine)
        except Exception as error:  # GPU time is scarce: whatever else can be measured is
            part |= {
                "error": f"{type(error).__name__}: {error}"[:2000],
                "where": traceback.format_exc().splitlines()[-12:],
            }
        part["wall_seconds"] = time.perf_counter() - start
        for target, found in part.get("targets", {}).items():
            met = "met" if found["met"] else "NOT MET"
            print(f"{name:9s} {target}: {found['value']:.3g} ({found['target']}: {met})")
        print(
            f"{name:9s} took {part['wall_seconds']:.0f} s"
            + (f", FAILED: {part['error'].splitlines()[0]}" if "error" in part else ""),
            flush=True,
        )
        if args.json:  # after every part, so that a kill leaves what there is
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
