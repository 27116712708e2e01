"""Med-RLVR's table on the demo: supervised and reinforcement learning from one start, and the hack.

    python benchmarks/demo.py --out FOLDER --json benchmarks/results/demo.json

Questions, rule, arms and seeds stand in demo_study.json and were fixed before the runs. Every run
is a `python train.py` of its own, one thread each, from the same warm start of its seed; then it is
looked at on fresh vignettes. A run that is in the JSON already is not done again, so the script
goes on where it was killed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
from support import demo_task, loading, runs
from support.config import Config

ROOT = Path(__file__).resolve().parent.parent
STUDY = json.loads((ROOT / "benchmarks/demo_study.json").read_text(encoding="utf-8"))
FRESH = {"fresh": ((2, 3, 4), "test"), "longer": ((5, 6), "test"), "dev": ((2, 3, 4), "dev")}
ITEMS, SAMPLES = 300, 2
KEPT = ("accuracy", "sampled_accuracy", "n", "think_words", "faithful", "faithful_labels")
# What a run looks at by itself counts for the alarms of the hack alone.
QUIET, WATCHED = "--eval-limit 1 --eval-samples 0", "--eval-limit 100 --eval-samples 0"
# While transformers loads a model, others that threads of this process make would be without data.
LOADING = Lock()


def fresh(name: str, dataset: str) -> list[data.Item]:
    """New vignettes of courses that are in no training item."""
    courses, part = FRESH[name]
    rng = random.Random(f"study {name}")
    reliable = 0.0 if dataset == "demo-referral" else None
    rows = (demo_task.vignette(rng, courses, part, reliable) for _ in range(ITEMS))
    limits = data.LOADERS[dataset].limits
    return [data.Item(f"{name}-{i}", limits=limits, **row) for i, row in enumerate(rows)]


def looked_at(policy, config: Config) -> dict:
    found = {}
    for name in FRESH:
        items = fresh(name, config.dataset)
        result, _ = evaluation.evaluate(policy, items, config, samples=SAMPLES, seed=12345)
        found[name] = {key: result[key] for key in KEPT}
    return found


def trained(out: Path, arm: str, seed: int) -> dict:
    """One run -> its rows of the table: the arm's, and that of the start which it was first on."""
    run = out / f"{arm.replace(', ', '-')}-{seed}"
    first = "hack" if arm in ("hack", "guard") else "grpo"
    begun = out / f"{first}-{seed}"  # whose warm start it takes
    looks = WATCHED if first == "hack" else QUIET
    flags = [*STUDY["arms"][arm].split(), "--seed", str(seed), *looks.split()]
    if run != begun:
        flags += ["--model", str(begun / "model")]
    if run.exists():
        shutil.rmtree(run)  # it was killed, and is done again so that its seconds are whole
    out.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *flags, "--out", run],
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(process.pid, 0)  # the only call that tells one child's seconds
    if status:
        raise SystemExit(f"demo.py: {run} failed: see {said.name}")
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    with LOADING:
        policy, config = runs.open_policy(str(run), "cpu")
    row = {"arm": arm, "seed": seed, "steps": metrics[-1]["step"]}
    row |= {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "alone": run == begun}
    row |= looked_at(policy, Config(**config))
    row["train_accuracy"] = sum(m["accuracy"] for m in metrics[-5:]) / 5
    row["train_reward"] = [
        sum(m["reward"] for m in five) / 5 for five in (metrics[:5], metrics[-5:])
    ]
    row["alarms"] = sorted({text for m in metrics for text in m.get("alarms", [])})[:3]
    if explained := [m["explained_variance"] for m in metrics if "explained_variance" in m]:
        fives = [explained[i : i + 5] for i in range(len(explained) - 4)]
        row["explained_variance_best5"] = max(sum(five) / 5 for five in fives)
    return row


def start(out: Path, seed: int) -> dict:
    """The warm start of a seed, before any of the arms."""
    with LOADING:
        policy = runs.Policy.load(str(out / f"grpo-{seed}" / "model"), lora=0)
    config = Config(**data.LOADERS["demo"].defaults)
    return {"arm": "start", "seed": seed, "cpu_seconds": 0.0, **looked_at(policy, config)}


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
    p.add_argument("--arms", nargs="+", choices=STUDY["arms"], default=list(STUDY["arms"]))
    p.add_argument("--seeds", type=int, nargs="+", default=STUDY["seeds"])
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    p.add_argument("--json", required=True, type=Path, help="what is done already, and the rest")
    args = p.parse_args()
    loading.quiet()
    torch.set_num_threads(1)
    found = facts(args.jobs) | {"study": STUDY["fixed"], "rows": []}
    if args.json.exists():
        found = json.loads(args.json.read_text(encoding="utf-8"))
    if found.get("study") != STUDY["fixed"]:
        raise SystemExit(f"demo.py: {args.json} holds another study; name a new file")
    writing = Lock()

    def keep(row: dict) -> None:
        with writing:
            found["rows"].append(row)
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        figures = (f"{row[name]['accuracy']:.3f}" for name in ("fresh", "longer"))
        print(f"{row['arm']:24} {row['seed']} {' '.join(figures)}", flush=True)

    def of_seed(seed: int) -> None:
        for arm in args.arms:
            done = {(row["arm"], row["seed"]) for row in found["rows"]}
            if (arm, seed) not in done:
                keep(trained(args.out, arm, seed))
            if arm == "grpo" and ("start", seed) not in done:
                keep(start(args.out, seed))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(of_seed, args.seeds))


if __name__ == "__main__":
    main()
