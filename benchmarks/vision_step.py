"""One GRPO step on images: prompt and image once per group, against once per sample.

    python benchmarks/vision_step.py --data-dir DIR [--json F]

A random Qwen2.5-VL of 61 million weights on BCCD photographs, the same prompts, numbers of samples
and forced tokens, one update without KL, all weights but the vision tower's trained with AdamW,
gradient checkpointing, fp32. The other side is transformers' own: `generate`, then its forward pass
on G copies. Each measurement is a process of its own (so that its peak memory is its own), the two
sides alternate, and the second step of each is timed.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from benchmarks.one_step import sampled_and_graded, update
from policy import Policy, collate
from support.demo_model import tiny_vl_policy
from support.vision import ImageProcessor

TEXT = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=20_000,
    layer_types=["full_attention"] * 12,
    initializer_range=0.02,
)
TOWER = dict(
    depth=6,
    hidden_size=256,
    intermediate_size=768,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[2, 5],
    out_hidden_size=512,
    initializer_range=0.02,
)


def model_and_policy(items) -> Policy:
    """The tiny model's tokenizer, the real family's image processor, and a wider model."""
    texts = [data.messages(item)[1]["content"] + data.completion(item) for item in items]
    small = tiny_vl_policy(0, texts)
    config = small.model.config
    for name, value in TEXT.items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    for name, value in TOWER.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    processor = ImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
    policy = Policy(model, small.tokenizer, processor, lora=0, checkpointing=True)
    # A forced length: nothing stops a row.
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


def replicated_step(policy: Policy, items, G: int, T: int, optimizer) -> None:
    """The same step with transformers' own calls, a prompt at a time: a batch is its G samples."""

    def types(x):
        return {"mm_token_type_ids": (x == policy.vision.image_token).int()}

    model = policy.model
    for p, item in enumerate(items):
        start = policy.start(item, p, "direct")
        ids = torch.tensor([start.prompt_ids]).repeat(G, 1)
        pixels = dict(
            pixel_values=start.pictures.pixels.repeat(G, 1),
            image_grid_thw=start.pictures.grids.repeat(G, 1),
        )
        model.eval()
        model.model.rope_deltas = None
        rows = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=T,
            min_new_tokens=T,
            suppress_tokens=policy.forbidden.tolist(),
            pad_token_id=0,
            **pixels,
            **types(ids),
        )
        model.train()
        model.model.rope_deltas = None
        logits = model(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            use_cache=False,
            logits_to_keep=T + 1,
            **pixels,
            **types(rows),
        ).logits[:, :-1]
        logps = logits.gather(-1, rows[:, -T:, None])[..., 0] - logits.logsumexp(-1)
        advantages = torch.linspace(-1, 1, G)[:, None]
        (-(logps * advantages).sum() / (len(items) * G * T)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def one_side(args) -> dict:
    items = data.load("bccd", "train", args.data_dir, limit=args.prompts)
    policy = model_and_policy(items)
    config = replace(
        train.Config(),
        full=True,
        prompts=args.prompts,
        samples=args.samples,
        max_new=args.max_new,
        style="direct",
        lr=1e-5,
    )
    optimizer = train.make_optimizer(policy, config)
    seconds = []
    for step in range(2):
        start = time.perf_counter()
        if args.side == "ours":
            rollouts = sampled_and_graded(policy, items, config, step)
            for i, rollout in enumerate(rollouts):
                rollout.reward = float(i % args.samples)
            update(policy, optimizer, rollouts, config, step)
        else:
            replicated_step(policy, items, args.samples, args.max_new, optimizer)
        seconds.append(time.perf_counter() - start)
    prompt = [policy.start(item, 0, "direct") for item in items]
    return {
        "seconds": seconds[1],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "prompt_tokens": [len(r.prompt_ids) for r in prompt],
        "image_tokens": [r.prompt_ids.count(policy.vision.image_token) for r in prompt],
        "weights": sum(p.numel() for p in policy.model.parameters()),
        "longest": collate(prompt).prompt_ids.shape[1],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", required=True, help="folder with BCCD")
    p.add_argument("--prompts", type=int, default=2)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--max-new", type=int, default=64)
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--json")
    p.add_argument("--side", choices=("ours", "replicated"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.side:
        return print(json.dumps(one_side(args)))
    pairs = []
    for _ in range(args.pairs):
        a, b = run("ours"), run("replicated")
        pairs.append((a, b))
        print(
            f"once {a['seconds']:6.2f} s {a['peak_gb']:.2f} GB, "
            f"{args.samples} times {b['seconds']:6.2f} s {b['peak_gb']:.2f} GB: "
            f"{b['seconds'] / a['seconds']:.2f} times faster, "
            f"memory {b['peak_gb'] / a['peak_gb']:.2f} times less",
            flush=True,
        )
    result = summary(args, pairs)
    print(
        f"tokens a pass {result['tokens']} against {result['peer_tokens']}; "
        f"median ratio of the step {result['ratio']:.2f}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(side: str) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(args, pairs: list[tuple[dict, dict]]) -> dict:
    def middle(side: int, key: str) -> float:
        return statistics.median(pair[side][key] for pair in pairs)

    first, G, T = pairs[0][0], args.samples, args.max_new
    once = sum(L + G * T for L in first["prompt_tokens"])
    copies = sum(G * (L + T) for L in first["prompt_tokens"])
    return {
        "model": f"random Qwen2.5-VL, {first['weights'] / 1e6:.0f} million weights",
        "prompts": args.prompts,
        "samples": G,
        "max_new": T,
        "prompt_tokens": first["prompt_tokens"],
        "image_tokens": first["image_tokens"],
        "tokens": once,
        "peer_tokens": copies,
        "tower_runs": args.prompts,
        "peer_tower_runs": 2 * G * args.prompts,
        "seconds": middle(0, "seconds"),
        "peer_seconds": middle(1, "seconds"),
        "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
        "ratios": [b["seconds"] / a["seconds"] for a, b in pairs],
        "peak_gb": middle(0, "peak_gb"),
        "peer_peak_gb": middle(1, "peak_gb"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
