"""How often each question is answered right: what a batch would teach, and which questions to keep.

A group that is all right or all wrong has nothing to compare, so a policy learns from the questions
in between. `told` says before a run how many there are. `keep_mixed` writes them down as a data set
of one's own, which a run names by --dataset; its run.json has the set's fingerprint, so that it is
resumed with the same questions or not at all:
    python eval.py MODEL --dataset medqa --split train --samples 8 --answers rated.jsonl
    python -m support.pass_rates rated.jsonl --out mixed
"""

import json
from collections.abc import Hashable, Iterable
from pathlib import Path

import data
from policy import Rollout
from support.alarms import describe
from support.errors import UsageError, run
from support.parser import Parser

FEW = 0.25  # the share of a batch that teaches below which it is said what would help; our choice


def rates_of(completions: Iterable[tuple[Hashable, bool]]) -> dict[Hashable, float]:
    """(an item's id or its group, whether right) of each completion -> {it: the share right}

    >>> rates_of([("a", True), ("b", False), ("a", False)])
    {'a': 0.5, 'b': 0.0}
    """
    of_item: dict[str, list[bool]] = {}
    for name, right in completions:
        of_item.setdefault(name, []).append(right)
    return {name: sum(all_of_it) / len(all_of_it) for name, all_of_it in of_item.items()}


# ------------------------------------------------------------------------------ can this learn?
def look(rollouts: list[Rollout], config) -> dict:
    """Shares of graded completions, numbers of groups, and the share of the batch that teaches."""
    n = len(rollouts)
    rates = list(rates_of((r.group, r.correct) for r in rollouts).values())
    found = describe(rollouts)
    wrong, right = rates.count(0), rates.count(1)
    teaches = 1 - found["groups_equal"]
    if config.advantage == "gae":  # a critic compares with what it expects, not a group with itself
        teaches = float(len({rollout.reward for rollout in rollouts}) > 1)
    elif config.dynamic:  # the others are replaced
        teaches = (len(rates) - wrong - right) / len(rates)
    return {
        "questions": len(rates),
        "well_formed": sum(rollout.parsed.well_formed for rollout in rollouts) / n,
        "right": found["accuracy"],
        "cut": sum(not rollout.finished for rollout in rollouts) / n,
        "reward": found["reward"],
        "all_wrong": wrong,
        "mixed": len(rates) - wrong - right,
        "all_right": right,
        "teaches": teaches,
    }


def told(rollouts: list[Rollout], config) -> list[str]:
    """What `look` finds, in lines for the screen; the last says what to do where little teaches."""
    x = look(rollouts, config)
    each = len(rollouts) // x["questions"]
    lines = [
        f"can this learn? {x['questions']} questions of train, {each} completions each: "
        f"{x['well_formed']:.0%} well formed, {x['right']:.0%} right, {x['cut']:.0%} cut at "
        f"--max-new, mean reward {x['reward']:.2f}; {x['teaches']:.0%} of the batch teaches"
    ]
    if each > 1:
        of_groups = f"{x['all_wrong']} all wrong, {x['mixed']} mixed, {x['all_right']} all right"
        lines.append(f"groups: {of_groups}")
    if x["teaches"] < FEW or not x["well_formed"]:
        lines.append(advice(x))
    return lines


def advice(x: dict) -> str:
    """What would help where little of a batch teaches. x: of `look`."""
    longer = "most completions are cut before they end: raise --max-new"
    if not x["well_formed"]:
        way_on = (
            "no completion has the form that the reward asks for, so there is nothing to learn "
            "from: --algo sft first, which teaches the form, then --init with its run; another "
            "--template or --style; or a larger or instruction-tuned --model"
        )
        return f"{way_on}; and {longer}" if x["cut"] > 0.5 else way_on
    if x["cut"] > 0.5:
        return longer
    if x["all_right"] > x["all_wrong"]:
        return "most questions are answered right every time: take harder ones"
    return (
        "most questions are never answered right: easier ones, more --samples, a larger --model, "
        "--algo sft first, or those that are now and then (python -m support.pass_rates --help)"
    )


# ---------------------------------------------------------------------- the questions in between
def sampled_rates(path: Path) -> tuple[dict, dict[str, float]]:
    """The model and data set of a file that `eval.py --answers` wrote, and the pass rates in it.

    Only sampled completions count: a greedy one is the same each time.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if not row["greedy"]]
        asked = {(row["model"], row["dataset"], row["style"]) for row in rows}
        right = [(row["id"], row["correct"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a file of eval.py --answers ({error})") from None
    if len(asked) != 1:
        what = f"{len(asked)} models, data sets or styles with sampled completions"
        raise UsageError(f"{path}: {what}, and it must be one: eval.py MODEL --samples 8")
    return dict(zip(("model", "dataset", "style"), *asked)), rates_of(right)


def keep_mixed(answers: Path, out: Path, data_dir: str | None = None) -> str:
    """Write the data set `out`: of train the questions answered now right, now wrong.

    dev and test stay whole, so that an accuracy on them can be compared. -> a line for the screen
    """
    made, rates = sampled_rates(answers)
    splits = {split: data.load(made["dataset"], split, data_dir) for split in data.SPLITS}
    items = [item for split in splits.values() for item in split]
    if any(item.task != "choice" or item.image is not None for item in items):
        raise UsageError(f"{made['dataset']}: only questions with lettered options can be written")
    rated = [item for item in splits["train"] if item.id in rates]
    if not rated:
        raise UsageError(f"{answers}: no question of train is in it: eval.py --split train")
    splits["train"] = [item for item in rated if 0 < rates[item.id] < 1]
    if not splits["train"]:
        raise UsageError(f"{answers}: each of {len(rated)} questions was right always or never")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}: name a new folder") from None
    for name, kept in splits.items():
        lines = [json.dumps(as_line(item, rates), ensure_ascii=False) for item in kept]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made |= {"rated": len(rated), "kept": len(splits["train"])}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return (
        f"{out}: {made['kept']} of {made['rated']} questions were answered now right, now wrong; "
        f"train {made['model']} on them with --dataset {out}"
    )


def as_line(item: data.Item, rates: dict[str, float]) -> dict:
    """A line of one's own data (`jsonl.row_of`), with the pass rate where it is known."""
    line = {name: getattr(item, name) for name in ("id", "question", "options", "answer")}
    if item.rationale:
        line["rationale"] = item.rationale
    return line | ({"pass_rate": rates[item.id]} if item.id in rates else {})


def main(argv: list[str] | None = None) -> None:
    p = Parser(
        prog="python -m support.pass_rates",
        description="Keeps the questions of train that a model answers now right, now wrong.",
    )
    p.add_argument(
        "answers", type=Path, help="what eval.py --split train --samples 8 --answers wrote"
    )
    p.add_argument("--out", type=Path, required=True, help="the new folder, for --dataset")
    p.add_argument("--data-dir", help="as in training")
    args = p.parse(argv)
    print(keep_mixed(args.answers, args.out, args.data_dir))


if __name__ == "__main__":
    run(main, "pass_rates.py")
