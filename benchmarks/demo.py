"""The demo by algorithm and seed, before and after training: the README's table.

    python benchmarks/demo.py --out FOLDER --json benchmarks/results/demo.json

Every run is `python train.py --algo A --seed S` in a process of its own, one thread each, as many
at a time as there are cores; the figures are those of its eval.json. FOLDER keeps the runs, for
eval.py to compare.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("accuracy", "ci95", "sampled_accuracy", "n", "think_words", "faithful", "faithful_labels")


def trained(out: Path, algo: str, seed: int) -> dict:
    """One run -> its row of the table, which is also printed."""
    run = out / f"{algo}-{seed}"
    command = [sys.executable, ROOT / "train.py", "--algo", algo, "--seed", str(seed)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{algo}-{seed}.log").open("w") as said:
        process = subprocess.Popen(
            [*command, "--out", run],
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(process.pid, 0)  # the only call that tells one child's seconds
    if status:
        raise SystemExit(f"demo.py: {run} failed: see {said.name}")
    result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    row = {"algo": algo, "seed": seed, "steps": metrics[-1]["step"]}
    row["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
    for when, found in result.items():
        row[when] = {name: found[name] for name in KEPT}
        row[when]["ood"] = {name: found["ood"][name] for name in KEPT}
    if explained := [m["explained_variance"] for m in metrics if "explained_variance" in m]:
        fives = [explained[i : i + 5] for i in range(len(explained) - 4)]
        row["explained_variance_best5"] = max(sum(five) / 5 for five in fives)
    show(row)
    return row


def show(row: dict) -> None:
    cells = [row["algo"], str(row["seed"])]
    for when in ("before", "after"):
        for found in (row[when], row[when]["ood"]):
            cells.append(f"{found['sampled_accuracy']:.3f} / {found['accuracy']:.3f}")
    line = f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} s |"
    if "explained_variance_best5" in row:
        line += f" explained variance {row['explained_variance_best5']:.2f}"
    print(line, flush=True)


def facts(jobs: int) -> dict:
    """Where the numbers come from."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()} CPU of {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{machine}, one thread a run, {jobs} runs at a time",
        "commit": commit,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, type=Path, help="folder for the runs")
    p.add_argument("--algos", nargs="+", default=["grpo", "dapo", "ppo", "sft"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    p.add_argument("--json")
    args = p.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = product(args.algos, args.seeds)
        rows = list(pool.map(lambda of: trained(args.out, *of), runs))
    if args.json:
        text = json.dumps(facts(args.jobs) | {"rows": rows}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
