"""VRFT-Aug's four augmentations on the demo's images: each alone, together, and against the controls that the paper's reviewers missed.

    python benchmarks/ablation.py --out FOLDER [--task grade|classify] [--seeds 0 1 2] [--arms v-rft fuzzy ...] [--arm NAME "FLAGS"] [--json F] [--png F]

All arms of a seed start from one base: a tiny Qwen2.5-VL taught two tasks, grades (or outlines) and boxes (arms with knowledge: a base of their own, taught with
it in the prompt). Each phase of an arm is one `train.py` in a process of its own. The settings and the questions stand in benchmarks/study.json, fixed before the
runs. A killed study goes on where it was: run the same command again. `--arm` adds an arm, for weights: --arm "recite -1" "--knowledge class --recite -1".
"""
import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import demo
import train

STUDY = json.loads((ROOT / "benchmarks" / "study.json").read_text(encoding="utf-8"))
BOXES, KNOWLEDGE = "--task localize", "--knowledge class"
ARMS = {                                # name: phases, each the flags in which it differs from plain V-RFT; a later phase starts from the one before
    "sft": ["--algo sft --prompts {prompts}"],
    "v-rft": [""],
    "v-rft, twice the steps": ["--steps {twice}"],                      # as many samples and updates as "boxes first"
    "boxes first": [BOXES, ""],
    "boxes by sft first": [f"{BOXES} --algo sft --prompts {{prompts}}", ""],          # the baseline that gets the box task too
    "fuzzy": ["--reward fuzzy"],
    "fuzzy, sixteenth": ["--reward fuzzy --fuzzy sixteenth"],
    "fuzzy, asymmetric": ["--reward fuzzy --fuzzy asymmetric"],
    "knowledge": [KNOWLEDGE],
    "knowledge, recite -0.5": [f"{KNOWLEDGE} --recite -0.5"],
    "knowledge, recite +0.5": [f"{KNOWLEDGE} --recite 0.5"],
    "all four": [f"{BOXES} {KNOWLEDGE}", f"{KNOWLEDGE} --recite -0.5 --reward fuzzy"],
}


def make_base(folder: Path, task: str, seed: int, knowledge: str) -> None:
    """A model folder: taught the task and boxes, then spoilt. Written beside and renamed, so that a killed one is made anew."""
    if folder.exists():
        return
    torch.set_num_threads(1)
    config, setting = train.make_config({"dataset": "demo-images", "seed": seed}), STUDY["tasks"][task]
    items = []
    for task, share in setting["items"].items():
        of_task = data.load("demo-images", "train", task=task)[:share]
        items += data.with_knowledge(of_task, "demo-images", knowledge)
    texts = [part for item in items for part in (data.messages(item)[1]["content"], data.completion(item))]
    policy = demo.tiny_vl_policy(train.fold(seed, "model"), texts[:400] + texts[-400:], train_vision=True)
    for _ in demo.warm_start(policy, items, config, setting["clean_steps"], setting["diluted_steps"]):
        pass
    beside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_folder(beside)
    beside.rename(folder)


def run_phase(run: Path, flags: list[str]) -> None:
    """One train.py to its end: begun, or resumed where it was killed."""
    if (run / "eval.json").exists() and "after" in json.loads((run / "eval.json").read_text(encoding="utf-8")):
        return
    if (run / "run.json").exists():
        command = ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)
        command = ["--out", str(run), *flags]
    done = subprocess.run([sys.executable, ROOT / "train.py", *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run}: train.py ended with {done.returncode}:\n{done.stderr[-2000:]}")


def run_arm(out: Path, task: str, name: str, phases: list[str], seed: int) -> dict:
    """An arm of one seed -> what it started from and came to, on the test split, and its curves."""
    knowledge = "class" if KNOWLEDGE in phases[-1] else "none"
    base, before = out / f"base-{task}-{seed}-{knowledge}", None
    for number, phase in enumerate(phases):
        run = out / f"{task}-{name.replace(' ', '_').replace(',', '')}-{seed}-{number}"
        filled = phase.format(prompts=STUDY["prompts"], twice=2 * STUDY["steps"])
        flags = [*shlex.split(f"--dataset demo-images --task {task} --steps {STUDY['steps']} {STUDY['flags']} {STUDY['tasks'][task].get('flags', '')} {filled}"), "--seed", str(seed), "--model", str(base)]
        run_phase(run, flags + (["--init", str(before)] if before else []))
        before = run
    found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    keep = ("accuracy", "sampled_accuracy", "kappa", "mae", "off_by_one", "sampled_length")
    curve = lambda key: [[m["step"], m[key]] for m in metrics if key in m]
    return {"arm": name, "seed": seed, "start": {k: found["before"][k] for k in keep if k in found["before"]}, "after": {k: found["after"][k] for k in keep if k in found["after"]},
            "curves": {key: curve(key) for key in ("reward", "accuracy", "dev_accuracy", "dev_kappa", "part_recite", "think_words") if key.startswith("dev") or "sft" not in phases[-1]}}


def run_seed(out: Path, task: str, arms: dict, seed: int) -> list[dict]:
    for knowledge in sorted({"class" if KNOWLEDGE in phases[-1] else "none" for phases in arms.values()}):
        subprocess.run([sys.executable, __file__, "--out", str(out), "--task", task, "--base", str(seed), knowledge], check=True)
    rows = []
    for name, phases in arms.items():
        rows.append(run_arm(out, task, name, phases, seed))
        start, after = rows[-1]["start"], rows[-1]["after"]
        print(f"seed {seed} {name}: " + ", ".join(f"{key} {start[key]:.3f} -> {after[key]:.3f}" for key in ("sampled_accuracy", "accuracy", "kappa") if key in after), flush=True)
    return rows


def interval(values: list[float]) -> list[float]:
    """Mean and Student's 95% interval over the seeds."""
    from scipy.stats import t
    mean = statistics.fmean(values)
    half = t.ppf(.975, len(values) - 1) * statistics.stdev(values) / len(values) ** .5 if len(values) > 1 else float("nan")
    return [mean, mean - half, mean + half]


def summarise(rows: list[dict]) -> list[dict]:
    """A line an arm: means over seeds with intervals, and the differences from V-RFT, and for boxes from V-RFT of twice the steps, paired by seed."""
    of = {(r["arm"], r["seed"]): r for r in rows}
    value = {"start": lambda r: r["start"]["sampled_accuracy"], "sampled": lambda r: r["after"]["sampled_accuracy"], "greedy": lambda r: r["after"]["accuracy"],
             "accuracy_over_steps": lambda r: statistics.fmean(a for _, a in r["curves"]["dev_accuracy"])}
    if all("kappa" in r["after"] for r in rows):
        value |= {"kappa": lambda r: r["after"]["kappa"], "kappa_over_steps": lambda r: statistics.fmean(k for _, k in r["curves"]["dev_kappa"])}
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        seeds = [r["seed"] for r in rows if r["arm"] == arm]
        line = {"arm": arm, "seeds": len(seeds), **{name: interval([f(of[arm, s]) for s in seeds]) for name, f in value.items()}}
        for control, key in (("v-rft", "against_v-rft"), ("v-rft, twice the steps", "against_twice")):
            if arm != control and all((control, s) in of for s in seeds):
                line[key] = {name: interval([f(of[arm, s]) - f(of[control, s]) for s in seeds]) for name, f in value.items()}
        lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    """Markdown."""
    cell = lambda x, sign="": f"{x[0]:{sign}.3f} [{x[1]:{sign}.3f}, {x[2]:{sign}.3f}]"
    titles = {"start": "start, sampled", "sampled": "sampled", "greedy": "greedy", "kappa": "kappa"}
    differences = {"sampled": "sampled", "accuracy_over_steps": "greedy over the steps", "kappa_over_steps": "kappa over the steps"}
    there = lambda names: [name for name in names if name in lines[0]]
    head = ["arm", "seeds", *(titles[name] for name in there(titles)), *(f"{differences[name]}, minus v-rft" for name in there(differences))]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        against = line.get("against_v-rft")
        rows.append([line["arm"], str(line["seeds"]), *(cell(line[k]) for k in there(titles)), *(cell(against[k], "+") if against else "-" for k in there(differences))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(rows: list[dict], path: str) -> None:
    """Curves of the reward and the sampled accuracy of each step's rollouts (means of five), and of kappa or accuracy on dev; means over seeds and their range."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    for colour, arm in enumerate(dict.fromkeys(r["arm"] for r in rows)):
        for axis, key, smooth in ((axes[0], "reward", 5), (axes[1], "accuracy", 5), (axes[2], "dev_accuracy" if rows[0]["curves"]["dev_kappa"] == [] else "dev_kappa", 1)):
            curves = [r["curves"][key] for r in rows if r["arm"] == arm and key in r["curves"]]
            if not curves:                                                    # sft has no rollouts
                continue
            values = [[statistics.fmean(v for _, v in c[max(0, i - smooth + 1):i + 1]) for i in range(len(c))] for c in curves]
            steps, middle = [s for s, _ in curves[0]], [statistics.fmean(at) for at in zip(*values)]
            axis.plot(steps, middle, color=f"C{colour % 10}", linestyle="-" if colour < 10 else "--", label=arm)
            axis.fill_between(steps, [min(at) for at in zip(*values)], [max(at) for at in zip(*values)], color=f"C{colour % 10}", alpha=.08)
            axis.set_xlabel("step")
            axis.set_title({"reward": "reward of the rollouts (mean of 5 steps)", "accuracy": "sampled accuracy of the rollouts (mean of 5 steps)", "dev_kappa": "quadratic kappa, greedy, dev", "dev_accuracy": "accuracy, greedy, dev"}[key])
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, type=Path, help="folder for the runs; one that holds part of the study is gone on with")
    p.add_argument("--task", choices=list(STUDY["tasks"]), default="grade")
    p.add_argument("--seeds", type=int, nargs="+", default=STUDY["seeds"])
    p.add_argument("--arms", nargs="+", choices=list(ARMS), help="all that the task has a use for, unless said")
    p.add_argument("--arm", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"), help="one more arm, by the flags in which it differs from plain V-RFT")
    p.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time, a thread each")
    p.add_argument("--add", metavar="F", help="also the arms and seeds of an earlier --json F, such as one of more seeds")
    p.add_argument("--json")
    p.add_argument("--png")
    p.add_argument("--base", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base:
        return make_base(args.out / f"base-{args.task}-{args.base[0]}-{args.base[1]}", args.task, int(args.base[0]), args.base[1])
    useful = [name for name in ARMS if args.task == "grade" or "fuzzy" not in name]
    arms = {name: ARMS[name] for name in args.arms or useful} | {name: [flags] for name, flags in args.arm}
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for of_seed in pool.map(lambda seed: run_seed(args.out, args.task, arms, seed), args.seeds) for row in of_seed]
    if args.add:
        here = {(r["arm"], r["seed"]) for r in rows}
        rows = [r for r in json.loads(Path(args.add).read_text(encoding="utf-8"))["rows"] if (r["arm"], r["seed"]) not in here] + rows
    lines = summarise(rows)
    print(table(lines))
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        facts = {"task": args.task, "study": STUDY, "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit, "summary": lines, "rows": rows}
        Path(args.json).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
