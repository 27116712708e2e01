"""Items a CPU second of an evaluation: prompts read together, ordered by length, or few at a time.

    python benchmarks/eval_speed.py --model SmolLM2=DIR Qwen=DIR --data-dir DIR --json F

Together: all prompts of a batch in one pass, padded to the longest. Ordered: the same in batches of
8 of about one length, for which the prompts need less padding. In parts: as `Policy` does it on a
CPU, batches as they come. They take turns in one process of one thread, whose CPU time is measured;
the ratio is the median over the turns. A model that F has is not measured again.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
from policy import Policy
from support import eval_cli

WAYS = ("together", "ordered", "in parts")


def measured(policy: Policy, items: list, config, turns: int) -> dict:
    in_parts, took, said = policy.prefill_tokens, {way: [] for way in WAYS}, {}
    by_length = sorted(items, key=lambda item: len(data.messages(item)[1]["content"]))
    evaluation.answer(policy, items[:1], replace(config, max_new=4))  # warms up
    for _ in range(turns):
        for way in WAYS:
            policy.prefill_tokens = in_parts if way == "in parts" else Policy.prefill_tokens
            asked, rows = (by_length, 8) if way == "ordered" else (items, 128)
            began = time.process_time()
            rollouts = evaluation.answer(policy, asked, config, rows=rows)
            took[way].append(time.process_time() - began)
            said[way] = {rollout.item.id: rollout.completion_ids for rollout in rollouts}
    found = {"n": len(items), "max_new": config.max_new, "turns": turns, "seconds": took}
    for way in WAYS[1:]:
        ratios = [before / after for before, after in zip(took["together"], took[way])]
        differ = sum(said["together"][name] != ids for name, ids in said[way].items())
        found[way] = {"ratio": statistics.median(ratios), "ratios": ratios, "differ": differ}
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", nargs="+", required=True, metavar="NAME=DIR")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--limit", type=int, default=32, help="questions")
    p.add_argument("--max-new", type=int, default=128)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--json", required=True, type=Path)
    args = p.parse_args()
    items = data.load("medqa", "test", args.data_dir, limit=args.limit)
    config = replace(eval_cli.ALONE, max_new=args.max_new)
    found = {"models": {}}
    if args.json.exists():
        found = json.loads(args.json.read_text(encoding="utf-8"))
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__}
    for one in args.model:
        name, folder = one.split("=", 1)
        if name not in found["models"]:
            policy = Policy.load(folder, template="chat", stop_answer="on", lora=0)
            found["models"][name] = measured(policy, items, config, args.turns)
            print(name, found["models"][name], flush=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
