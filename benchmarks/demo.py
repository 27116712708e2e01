"""The demo by algorithm and seed, from clean warm start to trained policy: the README's table.

    python benchmarks/demo.py --json benchmarks/results/demo.json

Every run is `python train.py --algo A --seed S` in a process of its own; the accuracies are those of its eval.json, on 300 held-out vignettes.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--algos", nargs="+", default=["grpo", "dapo", "ppo", "sft"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--json")
    args = p.parse_args()
    rows = []
    for algo in args.algos:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                subprocess.run([sys.executable, ROOT / "train.py", "--algo", algo, "--seed", str(seed), "--out", f"{folder}/run"], check=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                result = json.loads(Path(folder, "run/eval.json").read_text())
                metrics = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
            explained = [m["explained_variance"] for m in metrics if "explained_variance" in m]
            row = {"algo": algo, "seed": seed, "seconds": round(seconds, 1), **{stage: {k: result[stage][k] for k in ("accuracy", "ci95", "sampled_accuracy", "n")} for stage in result}}
            if explained:
                row["explained_variance_best5"] = max(sum(explained[i:i + 5]) / 5 for i in range(len(explained) - 4))
            rows.append(row)
            cells = [f"{result[stage]['sampled_accuracy']:.3f} / {result[stage]['accuracy']:.3f}" for stage in ("clean", "before", "after")]
            print(f"| {algo} | {seed} | {' | '.join(cells)} | {seconds:.0f} s |" + (f" explained variance {row['explained_variance_best5']:.2f}" if explained else ""), flush=True)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(), "commit": commit, "rows": rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
