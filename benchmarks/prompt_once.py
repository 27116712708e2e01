"""The prompt once against the prompt G times: sampling against HF `generate`, log-probs with backward against the model's own replicated forward.

    python benchmarks/prompt_once.py --model DIR --data-dir DIR [--json F]

Same model, prompts, tokens and threads; all weights trained, gradient checkpointing on both sides. The two sides alternate; printed is the ratio pair by pair.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from policy import Policy, collate


def prompts_near(policy, items, length: int, n: int) -> list:
    """The n items whose prompts are nearest to `length` tokens."""
    return sorted(items, key=lambda item: abs(len(policy.prompt(item)) - length))[:n]


def replicated_backward(model, batch, rows_at_once: int) -> None:
    """Log-probs and their gradient with every completion behind a prompt of its own."""
    P, G, T = batch.completion_ids.shape
    ids = torch.cat([batch.prompt_ids.repeat_interleave(G, 0), batch.completion_ids.flatten(0, 1)], 1)
    seen = torch.cat([batch.prompt_mask.repeat_interleave(G, 0), batch.mask.flatten(0, 1)], 1)
    for rows in torch.arange(P * G).split(rows_at_once):
        logits = model(input_ids=ids[rows], attention_mask=seen[rows].long(), position_ids=(seen[rows].cumsum(1) - 1).clamp(min=0),
                       use_cache=False, logits_to_keep=T + 1).logits[:, :-1]
        logps = logits.gather(-1, ids[rows, -T:, None])[..., 0] - logits.logsumexp(-1)
        (logps * seen[rows, -T:]).sum().backward()


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a Hugging Face folder or hub name; SmolLM2-135M in the README's table")
    p.add_argument("--data-dir", required=True, help="folder with MedQA's data_clean")
    p.add_argument("--prompts", type=int, default=2)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--length", type=int, default=400, help="prompt tokens, about")
    p.add_argument("--max-new", type=int, default=64)
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--json")
    args = p.parse_args()
    policy = Policy.load(args.model, lora=0, checkpointing=True)
    policy.eos_ids, policy.stop_answer = [], False                            # forced length: nothing stops a row
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain.generation_config.eos_token_id = None
    items = prompts_near(policy, data.load("medqa", "train", args.data_dir), args.length, args.prompts)
    rollouts = policy.sample(items, args.samples, args.max_new, 1.0, seed=0)
    batch = collate(rollouts)
    P, G, T = batch.completion_ids.shape

    def ours_sampling():
        policy.sample(items, G, T, 1.0, seed=0)

    def theirs_sampling():
        plain.eval()
        plain.generate(input_ids=batch.prompt_ids.repeat_interleave(G, 0), attention_mask=batch.prompt_mask.repeat_interleave(G, 0).long(),
                       do_sample=True, top_k=0, temperature=1.0, max_new_tokens=T, min_new_tokens=T, pad_token_id=0)

    def ours_scoring():
        policy.model.zero_grad()
        policy.score(batch).logps.sum().backward()

    def theirs_scoring():
        plain.train()
        plain.zero_grad()
        replicated_backward(plain, batch, G)

    result = {"model": Path(args.model).name, "prompts": P, "prompt_tokens": batch.prompt_ids.shape[1], "samples": G, "max_new": T, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor() or platform.machine(),
              "token_ratio": G * (batch.prompt_ids.shape[1] + T) / (batch.prompt_ids.shape[1] + G * T)}
    for name, ours, theirs in (("sampling", ours_sampling, theirs_sampling), ("scoring", ours_scoring, theirs_scoring)):
        pairs = [(timed(ours), timed(theirs)) for _ in range(args.pairs)]
        for a, b in pairs:
            print(f"{name:9s} prompt once {a:6.2f} s, prompt {G} times {b:6.2f} s, ratio {b / a:.2f}", flush=True)
        result[name] = {"seconds": statistics.median(a for a, _ in pairs), "peer_seconds": statistics.median(b for _, b in pairs),
                        "ratio": statistics.median(b / a for a, b in pairs), "ratios": [b / a for a, b in pairs]}
        print(f"{name:9s} median ratio {result[name]['ratio']:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
