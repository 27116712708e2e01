"""What one GPU makes of it, at Qwen2.5-3B's and Qwen2.5-VL-3B's size.

Sampling, updates, memory, sampler against scorer, and a step of VRFT-Aug.

    python benchmarks/gpu.py [--parts sampling update memory gap vision] [--json F]

The models are made from configs with random weights: nothing is downloaded, and speed and memory
are those of the real ones. Every row has its full length (nothing stops it). Limits are measured on
the same GPU: bytes a second of a copy (read and written), bf16 FLOPs a second of a matrix product
of 8192 x 8192. GB are 10^9 bytes. Without a GPU it says so and measures nothing.
"""

import argparse
import datetime
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from benchmarks import one_step
from benchmarks.one_step import sampled_and_graded
from policy import Policy, collate
from support.cli import make_config
from support.demo_model import demo_policy, tiny_vl_policy
from support.loading import quiet
from support.vision import ImageProcessor

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROPE = {"rope_type": "default", "rope_theta": 1e6}
RANK = 16  # of the adapters, as in train.py
KINDS = (
    ("lora", RANK, torch.bfloat16),
    ("full", 0, torch.float32),
)  # what is trained, with the type that Policy.load gives its weights on a GPU

# `length`: tokens of a prompt. New tokens a completion: max_new in sampling and update, the others
# in the part of their name; peer_new: HF `generate` at two lengths.
FULL = SimpleNamespace(
    prompts=16,
    samples=8,
    length=300,
    max_new=512,
    peer_new=(8, 64),
    memory_new=1024,
    gap_new=128,
    vision_new=256,
    matrix=8192,
    copy_bytes=4 * 10**9,
)
FULL.text = dict(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)
FULL.mrope = [16, 24, 24]  # how many of a head's frequencies follow time, height, width
FULL.vision = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    fullatt_block_indexes=[7, 15, 23, 31],
    out_hidden_size=2048,
)
TINY = SimpleNamespace(
    prompts=4,
    samples=2,
    length=20,
    max_new=16,
    peer_new=(2, 8),
    memory_new=24,
    gap_new=8,
    vision_new=8,
    matrix=128,
    copy_bytes=10**6,
)
TINY.text = dict(
    vocab_size=2000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINY.mrope = [2, 3, 3]
TINY.vision = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    fullatt_block_indexes=[1],
    out_hidden_size=64,
)


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


def items_of(size) -> list:
    return data.load("demo", "train", limit=size.prompts)


def text_policy(size, lora: int, dtype: torch.dtype = torch.bfloat16, **kwargs) -> Policy:
    config = Qwen2Config(
        **size.text,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="prompt_once",
    )
    # Made where it stays: a CPU draws 3 billion random numbers in minutes.
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return forced(Policy(model, demo_policy(0).tokenizer, lora=lora, **kwargs), size)


def forced(policy: Policy, size) -> Policy:
    """Prompts of random ids, all of one length, and completions that nothing stops."""
    ids = {}
    for i, item in enumerate(items_of(size)):
        generator = torch.Generator().manual_seed(i)
        drawn = torch.randint(size.text["vocab_size"], (size.length,), generator=generator)
        ids[item.id] = drawn.tolist()
    policy.prompt = lambda item, style="think": ids[item.id]
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


def vision_policy(size, texts: list[str], **kwargs) -> Policy:
    """The demo's tokenizer, made from `texts`, and its ids for images.

    Words are tokens, so that prompts are about as long as with Qwen's.
    """
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **size.text,
            tie_word_embeddings=True,
            rope_parameters=ROPE | {"mrope_section": size.mrope},
            bos_token_id=None,
            eos_token_id=None,
        ),
        vision_config=dict(
            **size.vision,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
        ),
        vision_start_token_id=2,
        image_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
        attn_implementation={"text_config": "prompt_once"},
    )
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    processor = ImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
    policy = Policy(model, tiny_vl_policy(0, texts).tokenizer, image_processor=processor, **kwargs)
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


def written(policy: Policy, items: list, G: int, T: int) -> list:
    """Rollouts of random ids, for an update that no sampling precedes. Rewards are 0 and 1."""
    generator, vocabulary = torch.Generator().manual_seed(0), policy.model.config.vocab_size

    def draw():
        return torch.randint(vocabulary, (T,), generator=generator).tolist()

    starts = [policy.start(item, p, "think") for p, item in enumerate(items)]
    return [
        replace(start, completion_ids=draw(), sample_logps=[0.0] * T, reward=g % 2)
        for start in starts
        for g in range(G)
    ]


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

    for name in ("plain", "lora"):
        if name == "lora":  # what training samples with: adapters beside the weights, not merged
            policy = forced(Policy(policy.model, policy.tokenizer, lora=RANK), size)
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


def flops(
    model, P: int, L: int, G: int, T: int, full: bool, once: bool = True
) -> tuple[float, float]:
    """(model FLOPs, hardware FLOPs) of forward and backward.

    Of attention only the pairs that are seen count, though kernels with a mask compute them all.
    Backward: gradients of what comes in, as many FLOPs as forward, and those of the weights, as
    many again, but not for frozen ones. Attention has no weights, and its backward is twice its
    forward. Hardware adds what checkpointing computes again: the head, and every layer up to the
    last tensor that its backward saved; that is the input of down_proj where it is trained, so its
    own product is not done again.
    """
    config, decoder = model.config, model.get_decoder()
    linear = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    base = sum(m.in_features * m.out_features for m in linear)
    adapters = 0 if full else sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    S = L + T - 1  # a completion's last token is not fed: nothing is predicted from it
    tokens = P * (L + G * (T - 1)) if once else P * G * S
    pairs = P * (L * (L + 1) / 2 + G * (T - 1) * (L + T / 2)) if once else P * G * S * (S + 1) / 2
    frozen = 2 * tokens * base + 2 * P * G * T * config.hidden_size * config.vocab_size
    trained = 2 * tokens * adapters
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    needed = frozen * (3 if full else 2) + 3 * trained + 3 * attention
    down = [m for name, m in decoder.named_modules() if full and name.endswith("down_proj")]
    spared = 2 * tokens * sum(m.weight.numel() for m in down)
    return needed, needed + frozen - spared + trained + attention


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
    """An update without a reference pass, AdamW included.

    Two prompts (or their samples) a forward pass on both sides.
    """
    P, L, G, T = size.prompts, size.length, size.samples, size.max_new
    out |= {
        "prompts": P,
        "prompt_tokens": L,
        "samples": G,
        "max_new": T,
        "token_ratio": G * (L + T - 1) / (L + G * (T - 1)),
    }
    for name, lora, dtype in KINDS:
        tidy()
        out[name] = found = one_kind(size, lora, dtype, machine["matrix_flops_per_s"])
        share = found["ours"]["hardware_share"]
        check(out, f"{name}: hardware FLOPs as a share of the matrix rate", share, least=0.45)
        print(
            f"update    {name}: {found['ratio']:.2f} times the replicated layout's speed, "
            f"tokens {out['token_ratio']:.2f} to 1",
            flush=True,
        )


def one_kind(size, lora: int, dtype: torch.dtype, rate: float) -> dict:
    """The update of adapters, or of all weights. rate: FLOPs a second of a matrix product."""
    P, L, G, T = size.prompts, size.length, size.samples, size.max_new
    full = not lora
    policy = text_policy(size, lora, dtype, checkpointing=True)
    config = make_config(
        dict(
            dataset="medqa",
            full=full,
            kl_coef=0.0,
            prompts=P,
            samples=G,
            max_new=T,
            micro_batch=2,
        )
    )
    optimizer = train.make_optimizer(policy, config)
    rollouts = written(policy, items_of(size), G, T)
    batch = collate(rollouts, policy.device)

    def ours():
        one_step.update(policy, optimizer, rollouts, config)

    def theirs():
        replicated_update(policy, optimizer, batch, 2 * G, config)

    found = {"cold_seconds": timed(ours), "peer_cold_seconds": timed(theirs)}
    pairs = [(peak(ours), peak(theirs)) for _ in range(2)]
    for side, which in enumerate(("ours", "peer")):
        seconds = statistics.median(pair[side]["seconds"] for pair in pairs)
        both = flops(policy.model, P, L, G, T, full, once=side == 0)
        needed, done = (count / seconds for count in both)
        found[which] = pairs[-1][side] | {
            "seconds": seconds,
            "model_flops_per_s": needed,
            "hardware_flops_per_s": done,
            "model_share": needed / rate,
            "hardware_share": done / rate,
        }
    # torch's own count, which takes attention for full rectangles
    with FlopCounterMode(display=False) as counter:
        policy.score(batch.take(slice(2))).logps.sum().backward()
    counted = counter.get_total_flops() / flops(policy.model, 2, L, G, T, full)[1]
    return found | {
        "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
        "micro_batch": config.micro_batch,
        "counted_over_formula": counted,
        **weights_of(policy.model),
    }


def memory(size, out: dict, machine: dict) -> None:
    """A step with KL.

    All prompts are sampled at once; the update is of two prompts, a prompt a pass: more passes take
    time, not memory.
    """
    out |= {
        "prompts_sampled": size.prompts,
        "prompts_updated": 2,
        "prompt_tokens": size.length,
        "samples": size.samples,
        "max_new": size.memory_new,
    }
    for (name, lora, dtype), most in zip(KINDS, (24, 80)):
        tidy()
        out[name] = memory_of(size, lora, dtype)
        check(out, f"{name}: peak GB of a step", out[name]["peak_gb"], most=most)


def memory_of(size, lora: int, dtype: torch.dtype) -> dict:
    G, T, items = size.samples, size.memory_new, items_of(size)
    policy = text_policy(size, lora, dtype, checkpointing=True, keep_reference=True)
    given = dict(dataset="medqa", full=not lora, micro_batch=1, prompts=2, samples=G, max_new=T)
    config = make_config(given)
    optimizer, rollouts = train.make_optimizer(policy, config), written(policy, items[:2], G, T)

    def update():
        one_step.update(policy, optimizer, rollouts, config)

    update()  # so that Adam's state is there, as in every step but the first
    tidy()
    of_update = peak(update)
    tidy()
    of_sampling = peak(lambda: policy.sample(items, G, T, 1.0, seed=0))
    most = max(of_update["peak_gb"], of_sampling["peak_gb"])
    phases = {"update": of_update, "sampling": of_sampling}
    return {"kl_coef": config.kl_coef, "peak_gb": most, **phases}


@torch.no_grad()
def gap(size, out: dict, machine: dict) -> None:
    """In bf16: sampler against scorer, and greedy tokens against transformers.

    Recorded log-probs stand against the scorer's; greedy tokens against an eager forward pass and
    `generate`.
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
    theirs = policy.model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=T,
        min_new_tokens=T,
        pad_token_id=0,
    )
    until_another = (theirs[:, -T:] == tokens).long().cumprod(1).sum(1)
    out |= {
        "greedy_agreement": float((below == 0).float().mean()),
        "greedy_largest_shortfall": float(below.max()),
        "greedy_tokens_as_generate": float(until_another.float().mean()),
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


PARTS = {"sampling": sampling, "update": update, "memory": memory, "gap": gap, "vision": vision}


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
