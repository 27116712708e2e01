"""The demo by algorithm and seed, from clean warm start to trained policy: the README's table.

    python benchmarks/demo.py --out FOLDER --json benchmarks/results/demo.json

Every run is `python train.py --algo A --seed S` in a process of its own, one thread each, as many at a time as there are cores; the accuracies are those of
its eval.json, on 300 held-out vignettes. FOLDER keeps the runs, for eval.py to compare.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def trained(out: Path, algo: str, seed: int) -> dict:
    start, run = time.perf_counter(), out / f"{algo}-{seed}"
    done = subprocess.run([sys.executable, ROOT / "train.py", "--algo", algo, "--seed", str(seed), "--out", run],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"demo.py: {run}: {done.stderr.strip() or 'ended without a word'}")
    seconds = time.perf_counter() - start
    result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    explained = [m["explained_variance"] for m in metrics if "explained_variance" in m]
    row = {"algo": algo, "seed": seed, "steps": metrics[-1]["step"], "seconds": round(seconds, 1),
           **{stage: {k: result[stage][k] for k in ("accuracy", "ci95", "sampled_accuracy", "n")} for stage in result}}
    if explained:
        row["explained_variance_best5"] = max(sum(explained[i:i + 5]) / 5 for i in range(len(explained) - 4))
    cells = [f"{result[stage]['sampled_accuracy']:.3f} / {result[stage]['accuracy']:.3f}" for stage in ("clean", "before", "after")]
    print(f"| {algo} | {seed} | {' | '.join(cells)} | {seconds:.0f} s |" + (f" explained variance {row['explained_variance_best5']:.2f}" if explained else ""), flush=True)
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, type=Path, help="folder for the runs")
    p.add_argument("--algos", nargs="+", default=["grpo", "dapo", "ppo", "sft"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    p.add_argument("--json")
    args = p.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda of: trained(args.out, *of), product(args.algos, args.seeds)))
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        facts = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": f"{platform.machine()} CPU of {os.cpu_count()} cores, one thread a run, {args.jobs} runs at a time",
                 "commit": commit, "rows": rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
