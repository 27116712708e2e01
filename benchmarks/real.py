"""Real vignettes, small real models, a CPU: does reinforcement learning change what they write?

    python benchmarks/real.py --smollm2 DIR --qwen DIR --data-dir DIR --out runs/real --json F

Qwen2.5-Coder-0.5B-Instruct begins as it is: GRPO for 20 steps, then PPO for 10 from the same model.
SmolLM2-135M writes no well-formed completion by itself and then has nothing to be rewarded for. So
three steps of supervised fine-tuning come first (24 answers), and GRPO starts from there: 10 steps
of 2 prompts x 8 samples, direct prompts, three seeds. A run goes on where it was killed; a model
whose folder is not given keeps what F says of it. `--collect` starts nothing and writes what the
runs have so far.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.statistics import wilson

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--dataset medqa --template chat --stop-answer on --warmup 1 --eval-samples 0".split()
COMMON += "--eval-every 0 --save-every 2".split()
SMOLLM2 = "--style direct --max-new 32 --max-prompt 500 --eval-limit 8 --lr 3e-4".split()
SFT = "--algo sft --prompts 8 --steps 3".split()
GRPO = "--algo grpo --prompts 2 --samples 8 --steps 10".split()
# Prompts up to 220 tokens, answers up to 80: 20 steps within an hour on one thread.
QWEN = "--style think --max-new 80 --max-prompt 220 --eval-limit 4 --lr 2e-4".split()
QWEN += "--no-checkpointing --kl-coef 0 --log-groups 2".split()
QWEN_RUNS = {
    "grpo": "--algo grpo --prompts 2 --samples 6 --steps 20".split(),
    # Med-RLVR's algorithm, gamma, lambda and clips, in small.
    "ppo": "--algo ppo --prompts 2 --samples 3 --minibatches 2 --value-lr 1e-3 --steps 10".split(),
}
SMOLLM2_TEXT = (
    "SmolLM2-135M-Instruct: without help none of 96 samples was well formed, so nothing is "
    "rewarded; after three steps of supervised fine-tuning on 24 answers, GRPO raises the share of "
    "well-formed completions in ten steps of 2 prompts x 8 samples (Wilson intervals over the "
    "completions, which are not independent):"
)
QWEN_TEXT = (
    "Qwen2.5-Coder-0.5B-Instruct (4-bit weights, widened to fp32), adapters, the think prompt as "
    "it stands in data.py, without supervised fine-tuning before; questions of at most 220 tokens, "
    "80 new tokens, so an answer that is too long is cut and malformed (Wilson intervals over the "
    "completions, which are not independent):"
)


def train(out: Path, model: str, data_dir: str, flags: list[str]) -> None:
    results = out / "eval.json"
    if results.exists() and "after" in json.loads(results.read_text(encoding="utf-8")):
        return
    given = ["--model", model, "--data-dir", data_dir, "--out", str(out), *COMMON, *flags]
    if (out / "run.json").exists():
        given = ["--resume", str(out)]
    subprocess.run([sys.executable, ROOT / "train.py", *given], check=True)


def lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def formed(steps: list[dict], a_step: int) -> dict:
    """The share of well-formed completions."""
    n = a_step * len(steps)
    right = round(sum(step["part_format"] for step in steps) * a_step)
    return {"share": right / n, "ci95": list(wilson(right, n)), "n": n}


def mean(steps: list[dict], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def figures(out: Path, a_step: int) -> dict:
    """Of a run, finished or not: its first against its last five steps."""
    steps = lines(out / "metrics.jsonl")
    found = {"steps": len(steps)}
    for when, part in (("first", steps[:5]), ("last", steps[-5:])):
        found[f"formed_{when}"] = formed(part, a_step)
        for name in ("accuracy", "reward", "part_truncated", "length"):
            found[f"{name}_{when}"] = mean(part, name)
    found["formed"] = [step["part_format"] for step in steps]
    return found | {"step_s": [step["step_s"] for step in lines(out / "timing.jsonl")]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--smollm2")
    p.add_argument("--qwen")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--out", default="runs/real", type=Path)
    p.add_argument("--collect", action="store_true")
    p.add_argument("--json", required=True, type=Path)
    args = p.parse_args()
    found = {}
    if args.json.exists():
        found = json.loads(args.json.read_text(encoding="utf-8"))
    if args.qwen:
        found["qwen"] = {"text": QWEN_TEXT, "rows": []}
        for name, flags in QWEN_RUNS.items():
            out = args.out / f"qwen-{name}"
            if not args.collect:
                train(out, args.qwen, args.data_dir, [*QWEN, *flags])
            if (out / "timing.jsonl").exists():
                row = {"algo": name} | figures(out, 12 if name == "grpo" else 6)
                found["qwen"]["rows"].append(row)
                write(args.json, found)
    if args.smollm2 and not args.collect:
        train(args.out / "sft", args.smollm2, args.data_dir, [*SMOLLM2, *SFT])
        found["smollm2"] = {"text": SMOLLM2_TEXT, "rows": []}
        for seed in (0, 1, 2):
            out = args.out / f"grpo-{seed}"
            init = ["--init", str(args.out / "sft"), "--seed", str(seed)]
            train(out, args.smollm2, args.data_dir, [*SMOLLM2, *GRPO, *init])
            found["smollm2"]["rows"].append({"seed": seed} | figures(out, 16))
            write(args.json, found)


def write(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
