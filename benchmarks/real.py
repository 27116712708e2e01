"""Real vignettes, a small real model, a CPU: does GRPO change what the model writes?

    python benchmarks/real.py --model SMOLLM2_DIR --data-dir DIR --out runs/real --json F

SmolLM2-135M writes no well-formed completion by itself and then has nothing to be rewarded for. So
three steps of supervised fine-tuning come first (24 answers), and GRPO starts from there: 10 steps
of 2 prompts x 8 samples, direct prompts, three seeds. A run whose folder is complete is not
repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.statistics import wilson

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    *"--dataset medqa --template chat --stop-answer on --style direct --max-new 32".split(),
    *"--max-prompt 500 --eval-limit 8 --eval-samples 0 --eval-every 0 --warmup 1".split(),
    *("--lr", "3e-4"),
]
SFT = "--algo sft --prompts 8 --steps 3".split()
GRPO = "--algo grpo --prompts 2 --samples 8 --steps 10".split()
A_STEP = 16  # completions
TEXT = (
    "Without help none of 96 samples was well formed, so nothing is rewarded; after three steps of "
    "supervised fine-tuning on 24 answers, GRPO raises the share of well-formed completions in ten "
    "steps of 2 prompts x 8 samples (`python benchmarks/real.py`; Wilson intervals over 80 "
    "completions, which are not independent):"
)


def train(out: Path, args, flags: list[str]) -> None:
    results = out / "eval.json"
    if results.exists() and "after" in json.loads(results.read_text(encoding="utf-8")):
        return
    given = ["--model", args.model, "--data-dir", args.data_dir, "--out", str(out)]
    subprocess.run([sys.executable, ROOT / "train.py", *COMMON, *given, *flags], check=True)


def lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def formed(steps: list[dict]) -> dict:
    """The share of well-formed completions."""
    n = A_STEP * len(steps)
    right = round(sum(step["part_format"] for step in steps) * A_STEP)
    return {"share": right / n, "ci95": list(wilson(right, n)), "n": n}


def accuracy(steps: list[dict]) -> float:
    return sum(step["accuracy"] for step in steps) / len(steps)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--data-dir", required=True)
    p.add_argument("--out", default="runs/real", type=Path)
    p.add_argument("--json")
    args = p.parse_args()
    train(args.out / "sft", args, SFT)
    rows = []
    for seed in (0, 1, 2):
        out = args.out / f"grpo-{seed}"
        train(out, args, [*GRPO, "--init", str(args.out / "sft"), "--seed", str(seed)])
        steps = lines(out / "metrics.jsonl")
        row = {
            "seed": seed,
            "formed_first": formed(steps[:5]),
            "formed_last": formed(steps[-5:]),
            "accuracy_first": accuracy(steps[:5]),
            "accuracy_last": accuracy(steps[-5:]),
            "formed": [step["part_format"] for step in steps],
            "step_s": [step["step_s"] for step in lines(out / "timing.jsonl")],
        }
        rows.append(row)
        print(row)
    if args.json:
        text = json.dumps({"text": TEXT, "rows": rows}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
