"""VRFT-Aug's four augmentations on the demo's images, and the controls that reviewers missed.

    python benchmarks/ablation.py --out FOLDER [--task grade|classify] [--seeds 0 1 2]
        [--arms v-rft fuzzy ...] [--arm NAME "FLAGS"] [--json F] [--png F]

Each augmentation alone, and all together. All arms of a seed start from one base: a tiny Qwen2.5-VL
taught two tasks, grades (or outlines) and boxes (arms with knowledge: a base of their own, taught
with it in the prompt). Each phase of an arm is one `train.py` in a process of its own. The settings
and the questions stand in benchmarks/study.json, fixed before the runs. A killed study goes on
where it was: run the same command again.
`--arm` adds an arm, for weights: --arm "recite -1" "--knowledge class --recite -1".
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from benchmarks.student import interval
from support import cli
from support.demo_model import tiny_vl_policy
from support.seeds import fold
from support.warm_start import lesion_start

ROOT = Path(__file__).resolve().parent.parent
STUDY = json.loads((ROOT / "benchmarks" / "study.json").read_text(encoding="utf-8"))
BOXES, KNOWLEDGE = "--task localize", "--knowledge class"
# name: phases, each the flags in which it differs from plain V-RFT; a later phase starts from the
# one before.
ARMS = {
    "sft": ["--algo sft --prompts {prompts}"],
    "v-rft": [""],
    # As many samples and updates as "boxes first".
    "v-rft, twice the steps": ["--steps {twice}"],
    "boxes first": [BOXES, ""],
    # The baseline that gets the box task too.
    "boxes by sft first": [BOXES + " --algo sft --prompts {prompts}", ""],
    "fuzzy": ["--reward fuzzy"],
    "fuzzy, sixteenth": ["--reward fuzzy --fuzzy sixteenth"],
    "fuzzy, asymmetric": ["--reward fuzzy --fuzzy asymmetric"],
    "knowledge": [KNOWLEDGE],
    "knowledge, recite -0.5": [f"{KNOWLEDGE} --recite -0.5"],
    "knowledge, recite +0.5": [f"{KNOWLEDGE} --recite 0.5"],
    "all four": [f"{BOXES} {KNOWLEDGE}", f"{KNOWLEDGE} --recite -0.5 --reward fuzzy"],
}
KEPT = ("accuracy", "sampled_accuracy", "kappa", "mae", "off_by_one", "sampled_length")
CURVES = ("reward", "accuracy", "part_recite", "think_words")  # of what was sampled
DEV_CURVES = ("dev_accuracy", "dev_kappa")


# ---------------------------------------------------------------------------------------- the runs
def knowledge_of(phases: list[str]) -> str:
    return "class" if KNOWLEDGE in phases[-1] else "none"


def make_base(folder: Path, task: str, seed: int, knowledge: str) -> None:
    """A model folder: taught the task and boxes, then spoilt.

    Written beside and renamed, so that a killed one is made anew.
    """
    if folder.exists():
        return
    torch.set_num_threads(1)
    config = cli.make_config({"dataset": "demo-images", "seed": seed})
    setting = STUDY["tasks"][task]
    items, texts = [], []
    for taught, share in setting["items"].items():
        of_task = data.load("demo-images", "train", task=taught)[:share]
        items += data.with_knowledge(of_task, "demo-images", knowledge)
    for item in items:
        texts += [data.messages(item)[1]["content"], data.completion(item)]
    some = texts[:400] + texts[-400:]
    policy = tiny_vl_policy(fold(seed, "model"), some, train_vision=True)
    steps = setting["clean_steps"], setting["diluted_steps"]
    lesion_start(policy, items, config, *steps)
    beside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_folder(beside)
    beside.rename(folder)


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


def run_arm(out: Path, task: str, name: str, phases: list[str], seed: int) -> dict:
    """An arm of one seed -> what it started from and came to, on the test split, and its curves."""
    base = out / f"base-{task}-{seed}-{knowledge_of(phases)}"
    common = f"--dataset demo-images --task {task} --steps {STUDY['steps']} {STUDY['flags']} "
    common += STUDY["tasks"][task].get("flags", "")
    before: list[str] = []
    for number, phase in enumerate(phases):
        run = out / f"{task}-{name.replace(' ', '_').replace(',', '')}-{seed}-{number}"
        filled = phase.format(prompts=STUDY["prompts"], twice=2 * STUDY["steps"])
        flags = shlex.split(f"{common} {filled}") + ["--seed", str(seed), "--model", str(base)]
        run_phase(run, flags + before)
        before = ["--init", str(run)]
    found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    names = DEV_CURVES if "sft" in phases[-1] else CURVES + DEV_CURVES
    return {
        "arm": name,
        "seed": seed,
        "start": {k: found["before"][k] for k in KEPT if k in found["before"]},
        "after": {k: found["after"][k] for k in KEPT if k in found["after"]},
        "curves": {k: [[m["step"], m[k]] for m in metrics if k in m] for k in names},
    }


def run_seed(out: Path, task: str, arms: dict, seed: int) -> list[dict]:
    for knowledge in sorted({knowledge_of(phases) for phases in arms.values()}):
        command = [sys.executable, __file__, "--out", str(out), "--task", task]
        subprocess.run([*command, "--base", str(seed), knowledge], check=True)
    rows = []
    for name, phases in arms.items():
        row = run_arm(out, task, name, phases, seed)
        rows.append(row)
        changes = []
        for key in ("sampled_accuracy", "accuracy", "kappa"):
            if key in row["after"]:
                changes.append(f"{key} {row['start'][key]:.3f} -> {row['after'][key]:.3f}")
        print(f"seed {seed} {name}: {', '.join(changes)}", flush=True)
    return rows


# ------------------------------------------------------------------------------ what they say
def after(key: str) -> Callable[[dict], float]:
    return lambda row: row["after"][key]


def over_steps(curve: str) -> Callable[[dict], float]:
    """The mean of a curve's values."""
    return lambda row: statistics.fmean(value for _, value in row["curves"][curve])


def measures(rows: list[dict]) -> dict[str, Callable[[dict], float]]:
    """What is read off an arm of one seed."""
    found = {
        "start": lambda row: row["start"]["sampled_accuracy"],
        "sampled": after("sampled_accuracy"),
        "greedy": after("accuracy"),
        "accuracy_over_steps": over_steps("dev_accuracy"),
    }
    if all("kappa" in row["after"] for row in rows):
        found |= {"kappa": after("kappa"), "kappa_over_steps": over_steps("dev_kappa")}
    return found


CONTROLS = {"v-rft": "against_v-rft", "v-rft, twice the steps": "against_twice"}


def summarise(rows: list[dict]) -> list[dict]:
    """A line an arm: means over seeds with intervals.

    And the differences from V-RFT, and from V-RFT of twice the steps, paired by seed.
    """
    of, values = {(row["arm"], row["seed"]): row for row in rows}, measures(rows)
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        line = {"arm": arm, "seeds": len(mine)}
        line |= {name: interval([f(row) for row in mine]) for name, f in values.items()}
        for control, key in CONTROLS.items():
            others = [of.get((control, row["seed"])) for row in mine]
            if arm == control or None in others:
                continue
            pairs = list(zip(mine, others))
            line[key] = {
                name: interval([f(a) - f(b) for a, b in pairs]) for name, f in values.items()
            }
        lines.append(line)
    return lines


def cell(x: list[float], sign: str = "") -> str:
    return f"{x[0]:{sign}.3f} [{x[1]:{sign}.3f}, {x[2]:{sign}.3f}]"


TITLES = {"start": "start, sampled", "sampled": "sampled", "greedy": "greedy", "kappa": "kappa"}
DIFFERENCES = {
    "sampled": "sampled",
    "accuracy_over_steps": "greedy over the steps",
    "kappa_over_steps": "kappa over the steps",
}


def table(lines: list[dict]) -> str:
    """Markdown."""
    titles = [name for name in TITLES if name in lines[0]]
    differences = [name for name in DIFFERENCES if name in lines[0]]
    head = ["arm", "seeds", *(TITLES[name] for name in titles)]
    head += [f"{DIFFERENCES[name]}, minus v-rft" for name in differences]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        row = [line["arm"], str(line["seeds"]), *(cell(line[name]) for name in titles)]
        for name in differences:
            against = line.get("against_v-rft")
            row.append(cell(against[name], "+") if against else "-")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


PANELS = {
    "reward": "reward of the rollouts (mean of 5 steps)",
    "accuracy": "sampled accuracy of the rollouts (mean of 5 steps)",
    "dev_kappa": "quadratic kappa, greedy, dev",
    "dev_accuracy": "accuracy, greedy, dev",
}


def smoothed(curve: list[list[float]], window: int) -> list[float]:
    """Each value with those before it: their mean."""
    values = [value for _, value in curve]
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def draw(rows: list[dict], path: str) -> None:
    """Reward and sampled accuracy of each step's rollouts, and kappa or accuracy on dev.

    Means over seeds and their range.
    """
    import matplotlib  # noqa: PLC0415 (not among the packages that a run needs)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 (after the choice of how to draw)

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    of_dev = "dev_kappa" if rows[0]["curves"]["dev_kappa"] else "dev_accuracy"
    for axis, key in zip(axes, ("reward", "accuracy", of_dev)):
        axis.set_xlabel("step")
        axis.set_title(PANELS[key])
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            curves = [r["curves"][key] for r in rows if r["arm"] == arm and key in r["curves"]]
            if not curves:  # sft has no rollouts
                continue
            of_seeds = list(zip(*(smoothed(c, 1 if key == of_dev else 5) for c in curves)))
            steps, colour = [step for step, _ in curves[0]], f"C{number % 10}"
            style, middle = "-" if number < 10 else "--", [statistics.fmean(at) for at in of_seeds]
            axis.plot(steps, middle, color=colour, linestyle=style, label=arm)
            low, high = [min(at) for at in of_seeds], [max(at) for at in of_seeds]
            axis.fill_between(steps, low, high, color=colour, alpha=0.08)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


# --------------------------------------------------------------------------------- the command line
def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--out", required=True, type=Path, help="folder for the runs; it is gone on with"
    )
    p.add_argument("--task", choices=list(STUDY["tasks"]), default="grade")
    p.add_argument("--seeds", type=int, nargs="+", default=STUDY["seeds"])
    p.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help="all that the task has a use for, unless said"
    )
    p.add_argument(
        "--arm",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FLAGS"),
        help="one more arm, by the flags in which it differs from plain V-RFT",
    )
    p.add_argument("--jobs", type=int, default=2, help="seeds at the same time, a thread each")
    p.add_argument("--add", metavar="F", help="also the arms and seeds of an earlier --json F")
    p.add_argument("--json")
    p.add_argument("--png")
    p.add_argument("--base", nargs=2, help=argparse.SUPPRESS)
    return p


def all_rows(args) -> list[dict]:
    """Of every seed and arm, and those of --add that were not run again."""
    useful = [name for name in ARMS if args.task == "grade" or "fuzzy" not in name]
    arms = {name: ARMS[name] for name in args.arms or useful}
    arms |= {name: [flags] for name, flags in args.arm}
    with ThreadPoolExecutor(args.jobs) as pool:
        of_seeds = pool.map(lambda seed: run_seed(args.out, args.task, arms, seed), args.seeds)
        rows = [row for of_seed in of_seeds for row in of_seed]
    if not args.add:
        return rows
    here = {(row["arm"], row["seed"]) for row in rows}
    earlier = json.loads(Path(args.add).read_text(encoding="utf-8"))["rows"]
    return [row for row in earlier if (row["arm"], row["seed"]) not in here] + rows


def main() -> None:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base:
        seed, knowledge = args.base
        folder = args.out / f"base-{args.task}-{seed}-{knowledge}"
        return make_base(folder, args.task, int(seed), knowledge)
    rows = all_rows(args)
    lines = summarise(rows)
    print(table(lines))
    if args.json:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        facts = {
            "task": args.task,
            "study": STUDY,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit,
            "summary": lines,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
