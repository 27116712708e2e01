"""What eval.py is told and what it shows: flags, the settings and items they mean, one table.

A model is asked and graded by the same `Config` as in training. What no flag says is taken from the
run, and for a model alone from training's own defaults.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import data
from data import Item
from policy import Policy, Rollout
from support import distributed, hub, loading, runs
from support.config import Config
from support.errors import UsageError
from support.parser import Parser

# A model alone is evaluated with training's defaults, but for these two: the paper's test set, and
# a prompt that fits a model is not dropped.
ALONE = Config(dataset="medqa", max_prompt=2048)
# Flags that mean what they mean in training. --samples, --limit and --seed say other things here.
AS_IN_TRAINING = (
    *("data_dir", "task", "knowledge", "max_pixels", "max_new"),
    *("max_prompt", "template", "stop_answer"),
)
OF_A_DATASET = ("task", "knowledge")


# ------------------------------------------------------------------------------------- the flags
# What an old command line may still say, and what to do instead.
GONE = {
    "--target": "is part of the name now: --dataset bccd-rbc or bccd-platelets",
    "--knowledge-file": "is gone: --knowledge takes the file itself",
}


def parser() -> Parser:
    p = Parser(
        prog="eval.py",
        description="Accuracy of models and runs, side by side; or an answer to one question.",
    )
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL_OR_RUN",
        help="a run folder of train.py, a Hugging Face folder, or a hub name; each is compared "
        "with the first. A model beside a run is evaluated with the first run's settings; flags "
        "beat them",
    )
    p.add_argument(
        "--dataset",
        nargs="+",
        help=f"{data.OFFERED}, or a JSONL path (default: the run's, else medqa)",
    )
    p.add_argument("--split", default="test", choices=data.SPLITS, help="default test")
    p.add_argument("--limit", type=int, help="the first N items only")
    p.add_argument(
        "--style",
        nargs="+",
        choices=list(data.INSTRUCTIONS),
        help="prompts: think (as trained), direct, cot (chain of thought): the paper's baselines",
    )
    for f in fields(Config):
        if f.name in AS_IN_TRAINING:
            default = getattr(ALONE, f.name) or "none"
            p.add_argument(
                "--" + f.name.replace("_", "-"),
                type=type(f.default),
                choices=tuple(filter(None, f.metadata["choices"] or ())) or None,
                help=f"{f.metadata['help']} (default: the run's, else {default})",
            )
    add_what_is_measured(p)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, help="of the sampled completions (default: the run's)")
    p.add_argument(
        "--json",
        metavar="F",
        help="write the result to F: one object for one model, data set and style, else {results, "
        "comparisons}",
    )
    p.add_argument("--answers", metavar="F", help="write one line of JSON a completion to F")
    p.add_argument(
        "--ask", metavar="QUESTION", help="answer this instead, options included in its text"
    )
    return p


def add_what_is_measured(p: Parser) -> None:
    """The flags of all that costs more than one greedy answer an item."""
    p.add_argument(
        "--samples",
        type=int,
        default=0,
        help="completions an item at temperature 1: sampled mean, maj@k, pass@k (default none)",
    )
    p.add_argument(
        "--likelihood",
        action="store_true",
        help="also the accuracy of the likeliest letter or class name, as harnesses report it, "
        "and for classes the AUC",
    )
    p.add_argument(
        "--rotate",
        action="store_true",
        help="also the agreement of a model with itself when the options are rotated",
    )
    p.add_argument(
        "--blind",
        action="store_true",
        help="also with blank and with swapped images: does the model look at all?",
    )
    p.add_argument(
        "--save-images",
        metavar="DIR",
        help="write a contact sheet as PNG: right and given boxes or labels, worst first",
    )


def check(args: argparse.Namespace) -> None:
    """UsageError for what cannot work: before an hour of sampling, not after."""
    for path in filter(None, (args.json, args.answers)):
        if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
            raise UsageError(
                f"{path} cannot be written: it is a folder, or its folder does not exist"
            )
    if args.save_images:
        try:
            Path(args.save_images).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--save-images {args.save_images}: {error.strerror}") from None
    at_least = {"limit": 1, "max_new": 1, "max_prompt": 1, "max_pixels": 1, "samples": 0}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in args.models:
        check_model(name)


def check_model(name: str) -> None:
    """A folder must hold a run or a model; another name must be one that the hub can have."""
    folder = Path(name)
    if not folder.is_dir():
        if hub.is_path(name):
            raise UsageError(f"{name}: no such folder")
        if not hub.cached(name, "config.json", "model") and not hub.online():
            raise UsageError(f"{name}: no such folder, and the hub cannot be reached")
    elif not runs.read_run(name) and not (folder / "config.json").is_file():
        raise UsageError(
            f"{name}: neither a run folder (no run.json) nor a Hugging Face folder (no config.json)"
        )


def check_data(args: argparse.Namespace) -> None:
    """Load all items once, for the UsageError of a data set that is not there."""
    for name in args.models:
        for dataset in args.dataset or [None]:
            config = settings(args, trained_as(name, args.models), dataset)
            load_items(config, args.split, args.limit)


# ------------------------------------------------------------------------------ what they mean
def trained_as(name: str, models: list[str]) -> dict:
    """The settings a run was trained with; for a model those of the first run beside it, else {}.

    A base model and what was made of it are compared only where both get the same prompt, stop and
    limit, and are graded alike.
    """
    return runs.read_run(name) or next(filter(None, map(runs.read_run, models)), {})


def settings(
    args: argparse.Namespace, run: dict, dataset: str | None = None, style: str | None = None
) -> Config:
    """What prompts, sampling and grading need: the flags, then the run's settings, then ALONE.

    Another data set than the run's does not inherit its task and knowledge. The seed stays the
    run's: options stand as in training, whatever --seed is.
    """
    if dataset and dataset != run.get("dataset"):
        run = {name: value for name, value in run.items() if name not in OF_A_DATASET}
    chosen = {name: getattr(args, name, None) for name in AS_IN_TRAINING}
    chosen |= {"dataset": dataset, "style": style}
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(of_run(run), **given)


def of_run(run: dict) -> Config:
    """A run's own settings; what its run.json does not say is as in ALONE."""
    return replace(ALONE, **{f.name: run[f.name] for f in fields(Config) if f.name in run})


def opened(name: str, args: argparse.Namespace, trained: dict) -> tuple[Policy, dict]:
    """The policy, with the template, the stop, the image size and the head of `settings`."""
    config = settings(args, trained)
    names = ("template", "stop_answer", "max_pixels", "fp32_head")
    how = {name: getattr(config, name) for name in names}
    return runs.open_policy(name, loading.pick_device(args.device), **how)


def load(config: Config, split: str, limit: int | None = None) -> list[Item]:
    folder = config.data_dir or None
    return data.load(config.dataset, split, folder, limit, config.task)


def load_items(config: Config, split: str, limit: int | None) -> list[Item]:
    """The items as the prompt shows them: with knowledge, their options in the run's order."""
    items = load(config, split, limit)
    items = data.with_knowledge(items, config.dataset, config.knowledge)
    if config.shuffle_options:
        items = [data.shuffle_options(item, config.seed) for item in items]
    return items


def seen_in_training(items: list[Item], run: dict) -> int | None:
    """How many of the items stand in a run's training data; None where that is not at hand."""
    config = of_run(run)
    try:
        train, dev, test = (load(config, split) for split in data.SPLITS)
    except UsageError as error:
        distributed.say(f"test items in the training data: not checked ({error})")
        return None
    trained_on = data.without(train, dev + test)[: config.limit or None]
    return len(items) - len(data.without(items, trained_on))


# ------------------------------------------------------------------------------- what it shows
def write(
    args: argparse.Namespace,
    evaluated: list[tuple[dict, list[Rollout]]],
    comparisons: list[dict],
) -> None:
    """The table and the comparisons on the screen, the files that --json and --answers name."""
    results = [result for result, _ in evaluated]
    print(table(results))
    for found in comparisons:
        print(compared(found))
    if args.json:
        content = {"results": results, "comparisons": comparisons}
        text = json.dumps(results[0] if len(results) == 1 else content, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.answers:
        with Path(args.answers).open("w", encoding="utf-8") as file:
            for result, rollouts in evaluated:
                for i, rollout in enumerate(rollouts):
                    row = as_row(result, rollout) | {"greedy": i < result["n"]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def as_row(result: dict, rollout: Rollout) -> dict:
    """A completion in the file of --answers."""
    asked = {name: result[name] for name in ("model", "dataset", "style")}
    asked |= {"id": rollout.item.id, "gold": rollout.item.answer}
    said = ("predicted", "correct", "finished", "text")
    return asked | {name: getattr(rollout, name) for name in said}


METRICS = {
    "lenient_accuracy": "with lone letters",
    "likelihood_accuracy": "likeliest answer",
    "auc": "AUC",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro F1",
    "kappa": "kappa",
    "mae": "MAE",
    "off_by_one": "off by one",
    "mean_iou": "mean IoU",
    "accuracy_80": "IoU over .8",
    "accuracy_50_95": "IoU .5 to .95",
    "blank_image_accuracy": "blank image",
    "swapped_image_accuracy": "swapped image",
    "rotated_agreement": "same when rotated",
}


def table(results: list[dict]) -> str:
    """Markdown, a row a model, data set and style; a metric's column where any result has it."""
    shown = [name for name in METRICS if any(name in result for result in results)]
    cells = [row(result, shown) for result in results]
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(of_row.values() for of_row in cells)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def row(result: dict, metrics: list[str]) -> dict:
    """{column: cell} of one result."""
    cells = {
        "model": Path(result["model"]).name,
        "data": f"{result['dataset']} {result['split']}",
        "prompt": result["style"],
        "template, stop, limit": asked_how(result),
        "n": result["n"],
        "greedy": with_interval(result, "accuracy", "ci95"),
    }
    if "samples" in result:
        k = result["samples"]
        cells["sampled"] = with_interval(result, "sampled_accuracy", "sampled_ci95")
        cells[f"maj@{k}"] = figure(result, "maj_at_k")
        cells[f"pass@{k}"] = figure(result["pass_at_k"], k)
    return cells | {
        **{METRICS[name]: figure(result, name) for name in metrics},
        "read": f"{result['parsed']:.0%}",
        "cut": f"{result['truncated']:.0%}",
        "main stage": max(result["stages"], key=result["stages"].get),
        "seen in training": result.get("seen_in_training", "-"),
    }


def asked_how(result: dict) -> str:
    """Template, stop rule and limit of new tokens, as in force: "plain, at </answer>, 512"."""
    stop = "at </answer>" if result["stop_answer"] else "at the end token"
    return f"{result['template']}, {stop}, {result['max_new']}"


def figure(numbers: dict, name) -> str:
    return f"{numbers[name]:.3f}" if name in numbers else "-"


def with_interval(result: dict, name: str, interval: str) -> str:
    """0.910 [0.872, 0.937]"""
    low, high = result[interval]
    return f"{result[name]:.3f} [{low:.3f}, {high:.3f}]"


def compared(found: dict) -> str:
    """The line of two models on one data set."""
    a, b = Path(found["a"]).name, Path(found["b"]).name
    if not found["n"]:
        return f"{found['dataset']}: {a} and {b} share no item, so they are not compared"
    low, high = found["difference_ci95"]
    return (
        f"{found['dataset']}: {b} ({found['style_b']}) - {a} ({found['style_a']}) = "
        f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}] on {found['n']} shared items; right "
        f"alone {found['only_b']} : {found['only_a']}, McNemar p {found['mcnemar_p']:.2g}"
    )
