"""VRFT-Aug's augmentations, each on pictures that leave it room, beside a control of equal compute.

    python benchmarks/augmentations.py --out FOLDER --setting fuzzy [--seeds 0 1 2] [--json F]

Questions, rule, settings, arms and seeds stand in augmentations.json and were fixed before the
runs. All arms of a seed go on from one base, a tiny Qwen2.5-VL after a short supervised run. Each
phase is one `train.py` in a process of its own. A killed study goes on where it was: run the same
command again. After each arm the rows so far are written to --json, and their curves to --png.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from benchmarks import drawn
from benchmarks.student import decided
from support import cli
from support.demo_model import tiny_vl_policy
from support.seeds import fold
from support.warm_start import lesion_start

ROOT = Path(__file__).resolve().parent.parent
STUDY = json.loads((ROOT / "benchmarks" / "augmentations.json").read_text(encoding="utf-8"))
KEPT = ("accuracy", "sampled_accuracy", "kappa", "off_by_one", "think_words")
CURVES = ("accuracy", "dev_accuracy", "dev_kappa", "part_recite", "part_iou", "think_words")


# ---------------------------------------------------------------------------------------- the runs
def run_phase(run: Path, flags: list[str]) -> None:
    """One train.py to its end: begun, or resumed where it was killed."""
    results = run / "eval.json"
    if results.exists() and "after" in json.loads(results.read_text(encoding="utf-8")):
        return
    if (run / "run.json").exists():
        command = ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)
        command = ["--out", str(run), *flags]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{run}: train.py ended with {done.returncode}:\n{done.stderr[-2000:]}")


def flags_of(out: Path, name: str, seed: int, flags: str) -> list[str]:
    setting = STUDY["settings"][name]
    data_set = setting.get("dataset", out / f"data-{setting.get('pictures')}")
    filled = flags.format(data=data_set)
    return shlex.split(f"--dataset {data_set} --eval-samples 2 {filled} --seed {seed}")


def base(out: Path, name: str, seed: int) -> list[str]:
    """What all arms of a seed go on from -> the flags that say so."""
    setting = STUDY["settings"][name]
    if "spoilt" in setting:
        folder = out / f"{name}-base-{seed}"
        spoilt_base(folder, setting["spoilt"], seed)
        return ["--model", str(folder)]
    pictures = out / f"data-{setting['pictures']}"
    if not (pictures / "test.jsonl").exists():
        drawn.write(pictures, setting["pictures"])
    run = out / f"{name}-base-{seed}"
    tiny = shlex.split(STUDY["tiny"])
    run_phase(run, flags_of(out, name, seed, setting["base"]) + tiny)
    return [*tiny, "--init", str(run)]


def spoilt_base(folder: Path, setting: dict, seed: int) -> None:
    """A model folder: taught several tasks of the demo's lesions, then spoilt.

    Written beside and renamed, so that a killed one is made anew.
    """
    if folder.exists():
        return
    torch.set_num_threads(1)
    config = cli.make_config({"dataset": "demo-images", "seed": seed})
    items, texts = [], []
    for task, n in setting["items"].items():
        items += data.load("demo-images", "train", task=task)[:n]
    for item in items[:200] + items[-200:]:
        texts += [data.messages(item)[1]["content"], data.completion(item)]
    policy = tiny_vl_policy(fold(seed, "model"), texts, train_vision=True)
    lesion_start(policy, items, config, setting["clean_steps"], setting["spoilt_steps"])
    beside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_folder(beside)
    beside.rename(folder)


def run_arm(out: Path, name: str, arm: str, seed: int) -> dict:
    """An arm of one seed -> what it started from and came to, on the test split, and its curves."""
    setting = STUDY["settings"][name]
    start = base(out, name, seed)
    for number, phase in enumerate(setting["arms"][arm]):
        run = out / f"{name}-{arm.replace(' ', '_').replace(',', '')}-{seed}-{number}"
        run_phase(run, flags_of(out, name, seed, f"{setting['flags']} {phase}") + start)
        start = [*start, "--init", str(run)]
    found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    return {
        "arm": arm,
        "seed": seed,
        "start": {k: found["before"][k] for k in KEPT if k in found["before"]},
        "after": {k: found["after"][k] for k in KEPT if k in found["after"]},
        "curves": {k: [[m["step"], m[k]] for m in metrics if k in m] for k in CURVES},
    }


# ------------------------------------------------------------------------------- curves, command
def draw(rows: list[dict], curves: list[str], path: Path) -> None:
    """Each curve in a panel of its own: means over the seeds and their range."""
    import matplotlib  # noqa: PLC0415 (not among the packages that a run needs)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 (after the choice of how to draw)

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4))
    for axis, name in zip(axes, curves):
        axis.set(xlabel="step", title=name)
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            of_arm = [row["curves"].get(name) for row in rows if row["arm"] == arm]
            if not all(of_arm):
                continue  # sft samples nothing
            steps = [step for step, _ in of_arm[0]]
            at = list(zip(*([value for _, value in curve] for curve in of_arm)))
            label = f"{arm} ({len(of_arm)} seeds)"
            means, colour = [statistics.fmean(values) for values in at], f"C{number}"
            axis.plot(steps, means, color=colour, label=label)
            low, high = [min(values) for values in at], [max(values) for values in at]
            axis.fill_between(steps, low, high, color=colour, alpha=0.1)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = "folder for the runs; it is gone on with"
    p.add_argument("--out", required=True, type=Path, help=folder)
    p.add_argument("--setting", required=True, choices=list(STUDY["settings"]))
    p.add_argument("--seeds", type=int, nargs="+", default=STUDY["seeds"])
    p.add_argument("--json", type=Path, help="file for the rows so far")
    p.add_argument("--png", type=Path, help="file for the learning curves")
    return p


def main() -> None:
    args = parser().parse_args()
    setting, rows = STUDY["settings"][args.setting], []
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"commit": commit, "seeds": STUDY["seeds"], "setting": setting, "rows": rows}
    for seed in args.seeds:
        for arm in setting["arms"]:
            rows.append(run_arm(args.out, args.setting, arm, seed))
            print(seed, arm, rows[-1]["start"], "->", rows[-1]["after"], flush=True)
            if args.json:
                args.json.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    for question in setting["questions"]:
        print(decided(rows, question, len(STUDY["seeds"])))
    if args.png:
        draw(rows, setting["curves"], args.png)


if __name__ == "__main__":
    main()
