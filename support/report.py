"""A run as one HTML page: its curves, its alarms, and every logged completion beside its prompt,
its picture and the others of its group. train.py calls `write`; `python support/report.py RUN`
writes the page of any run again, finished or not.

The page needs no network: charts are SVG, pictures are shrunk and packed in, and report.html, .css
and .js are put together here. What a policy wrote may be hostile: it goes in as JSON in which no
tag can begin, and the script puts it on the page as text, never as HTML.
"""

import base64
import hashlib
import io
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from html import escape
from itertools import accumulate, groupby, product
from pathlib import Path
from string import Template

if __name__ == "__main__":  # started by its path, Python looks for modules beside this file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import data
import rewards
from data import Item
from support import charts, hub, image_sets, pictures, runs, statistics
from support.errors import UsageError
from support.errors import run as run_program
from support.parser import Parser

# The log holds the whole of their items, which are questions without images: nothing is loaded.
TEXT_SETS = [name for name, source in data.LOADERS.items() if source.tasks == ("choice",)]
SIZE = 20_000_000  # characters of a log that are shown, the newest
PICTURES = 200  # items whose pictures are packed in, the newest
SIDE = 336  # pixels of the longer side of a picture

# What a card shows of a row of rollouts.jsonl, and without what a row is damaged. Demonstrations
# have no log-probs, since nobody sampled them.
SHOWN = ("text", "reward", "parts", "advantage", "correct", "finished", "tokens", "stage")
SHOWN += ("predicted", "pieces", "logps")
NEEDED = {"step", "group", "id", "question", "options", "gold", "frame", *SHOWN} - {"logps"}


# ------------------------------------------------------------------------------ the run folder
def read_rows(path: Path, needed: set[str]) -> tuple[list[dict], list[str]]:
    """The newest rows of a log, oldest first, and notes on the lines that are left out.

    A run that was killed may leave half a line. NaN and infinity become None.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold U+2028
    older = sum(size > SIZE for size in accumulate(len(line) for line in reversed(lines)))
    rows = []
    for line in lines[older:]:
        with suppress(ValueError, RecursionError):
            row = json.loads(line, parse_constant=lambda name: None)
            if isinstance(row, dict) and row.keys() >= needed and type(row["step"]) is int:
                rows.append(row)
    counts = {"older": older, "damaged": len(lines) - older - len(rows)}
    return rows, [f"{n:,} {what} lines of {path.name}" for what, n in counts.items() if n]


def local_items(config: dict) -> list[Item]:
    """The run's training items, [] if they are not on this machine: nothing is downloaded."""
    dataset, folder = config["dataset"], config["data_dir"]
    if dataset in TEXT_SETS:
        return []
    if not folder and dataset in image_sets.NAMES:
        folder = str(hub.cache_dir() / "medmnist")  # a folder that is named is only read
    try:
        items = data.load(dataset, "train", folder, task=config["task"])
        return data.with_knowledge(items, dataset, config["knowledge"])
    except (UsageError, OSError) as error:
        # Not on the page, which is passed on: the message names folders of this machine.
        print(f"no pictures and prompts: {error}", file=sys.stderr)
        return []


def group_of(rows: list[dict], items: dict[str, Item], config: dict) -> dict:
    """What the page shows of one group; items: {id: item}, those that are at hand.

    Options, gold and frame are the log's own, since --shuffle-options moves the first two and the
    policy makes the third.
    """
    first, in_log = rows[0], config["dataset"] in TEXT_SETS
    known, gold = items.get(first["id"]), first["gold"]
    task = "localize" if isinstance(gold, list) else "choice" if in_log else "classify"
    item = known or Item(first["id"], task, first["question"], (), "")
    item = replace(item, options=tuple(first["options"]), frame=first["frame"])

    if known or (in_log and config["knowledge"] == "none"):
        messages = data.messages(item, config["style"])
        prompt = [[message["role"], message["content"]] for message in messages]
    else:  # the rest of the prompt is in the data set
        prompt = [["question", "\n".join([item.question, *item.options])]]
    if item.task == "choice":
        gold += f". {item.options[data.LETTERS.index(gold)]}"
    group = {"step": first["step"], "group": first["group"], "id": item.id, "task": item.task}
    shown = [{name: row[name] for name in SHOWN if name in row} for row in rows]
    return group | {"prompt": prompt, "gold": gold, "rows": shown}


def packed_png(image) -> list:
    """[width, height, the shrunk picture as PNG in base64]"""
    size, file = image.size, io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "PNG")
    return [*size, base64.b64encode(file.getvalue()).decode()]


def pictures_of(groups: list[dict], items: dict[str, Item]) -> tuple[dict[str, list], list[str]]:
    """{item id: its pictures, packed} of the newest items, and a note on what is left out."""
    ids = dict.fromkeys(group["id"] for group in reversed(groups))  # each once
    found = [items[name] for name in ids if name in items and items[name].image is not None]
    packed = {}
    for item in found[:PICTURES]:
        with suppress(UsageError):  # moved or damaged since: counted below
            sources = pictures.sources(item.image)
            packed[item.id] = [packed_png(pictures.open_image(source)) for source in sources]
    missing = len(found) - len(packed)
    return packed, [f"the pictures of {missing} items"] if missing else []


# ------------------------------------------------------------------------------ charts
# Told apart by the colour-blind too.
COLOURS = ("#8a8f98", "#d9a400", "#4aa3df", "#d55e00", "#b565a7", "#1f9e77")
STAGE_COLOURS = dict(zip(rewards.STAGES, COLOURS, strict=True))

LINES = {  # metric: title, note, values that are always in sight
    "reward": ("Reward", "mean of the step's completions", ()),
    "loss": ("Loss", "cross-entropy of the demonstrations", ()),
    "length": ("Length", "tokens", (0,)),
    "entropy": ("Entropy", "nats a token", (0,)),
    "kl": ("KL", "to the reference, nats a token", (0,)),
    "part_truncated": ("Cut at the limit", "share of completions", (0, 0.05)),
}
# A policy gradient's loss says nothing of the policy, nor does what demonstrations earn.
HIDDEN, HIDDEN_SFT = {"loss"}, {"reward", "accuracy", "stages", "part_truncated"}


def column(metrics: list[dict], name: str) -> dict:
    """{step: value} of a metric, where it is logged."""
    return {row["step"]: row[name] for row in metrics if row.get(name) is not None}


def curves(metrics: list[dict], config: dict) -> str:
    """The alarms, and a chart of whatever is logged."""
    if not metrics:
        return "<p>No step is logged yet.</p>"
    hidden = HIDDEN_SFT if config["algo"] == "sft" else HIDDEN
    metrics = [{name: row[name] for name in row.keys() - hidden} for row in metrics]
    steps = [row["step"] for row in metrics]
    alarms = [(step, text) for step, texts in column(metrics, "alarms").items() for text in texts]

    unfilled, shares = column(metrics, "groups_unfilled"), {}
    for step, share in column(metrics, "accuracy").items():
        n = (config["prompts"] - unfilled.get(step, 0)) * config["samples"]
        shares[step] = (share, *statistics.wilson(share * n, n))
    ends, dev = column(metrics, "dev_ci95"), column(metrics, "dev_accuracy")
    dots = {step: (share, *ends.get(step, (share, share))) for step, share in dev.items()}
    note = "95% Wilson band of the step's completions; dots: greedy on dev"
    drawn = charts.curve("Accuracy", note, steps, alarms, shares, (0, 1), dots)
    drawn += charts.stack("Stages", steps, alarms, column(metrics, "stages"), STAGE_COLOURS)
    for name, (title, note, bounds) in LINES.items():
        points = {step: (value,) * 3 for step, value in column(metrics, name).items()}
        drawn += charts.curve(title, note, steps, alarms, points, bounds)

    listed = "".join(f"<li><b>step {step}</b> {escape(text)}</li>" for step, text in alarms)
    section = f'<section class="alarms"><h2>Alarms</h2><ul>{listed}</ul></section>'
    return f'{section if alarms else ""}<div class="charts">{drawn}</div>'


# ------------------------------------------------------------------------------ the page
def accuracies(results: dict) -> str:
    """Before and after: the two numbers, and each with its interval on an axis from 0 to 1."""
    rows = ""
    for name, prefix in product(("before", "after"), ("", "sampled_")):
        result = results.get(name, {})
        if f"{prefix}accuracy" not in result:
            continue
        share, (low, high) = result[f"{prefix}accuracy"], result[f"{prefix}ci95"]
        rows += (
            f'<div class="results {name}"><span>{name}, {"sampled" if prefix else "greedy"}</span> '
            f'<svg aria-hidden="true"><line x1="{low:.2%}" x2="{high:.2%}" y1="50%" y2="50%"/>'
            f'<circle cx="{share:.2%}" cy="50%" r="4"/></svg> '
            f"<span>{share:.3f} [{low:.3f}, {high:.3f}]</span></div>"
        )
    note = "Not evaluated yet."
    if rows:
        n = next(iter(results.values()))["n"]
        note = f"accuracy on {n} test items; below with 95% intervals from 0 to 1"
    both = [f"{results[name]['accuracy']:.3f}" for name in ("before", "after") if name in results]
    return f'<div><p class="big">{" → ".join(both)}</p><p class="soft">{note}</p>{rows}</div>'


def short(name: str) -> str:
    """A data set or model without the folders of this machine: the page is passed on."""
    return Path(name).name if hub.is_path(name) else name


def facts(config: dict, versions: dict, step: int) -> str:
    """What a reader asks for first."""
    made_here = config["model"] in runs.MADE_HERE
    batch = f"{config['prompts']} prompts x {config['samples']} completions"
    if config["algo"] == "sft":
        batch = f"{config['prompts']} demonstrations"
    told = {
        "algorithm": config["algo"],
        "data set": " ".join([short(config["dataset"]), config["task"]]),
        "reward": config["reward"],
        "model": "tiny, made in code" if made_here else short(config["model"]),
        "begun from": Path(config["init"]).name,
        "weights": "all" if config["full"] else f"adapters of rank {config['lora']}",
        "step": f"{step} of {config['steps']}",
        "batch": batch,
        "learning rate": config["lr"],
        "seed": config["seed"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    listed = {name: escape(str(value)) for name, value in told.items() if value != ""}
    divs = [f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in listed.items()]
    return f"<dl>{''.join(divs)}</dl>"


def inert(content: dict) -> str:
    """JSON in ASCII without <, > and &: no tag, comment or entity can begin or end in it."""
    text = json.dumps(content, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def own_file(kind: str) -> str:
    """report.html, report.css or report.js"""
    return Path(__file__).with_suffix(f".{kind}").read_text(encoding="utf-8")


def page(run: Path, items: list[Item] | None = None) -> str:
    """The HTML of a run folder."""
    config = runs.read_run(str(run))
    if not config:
        raise UsageError(f"{run} is no run folder: there is no run.json in it")
    versions = runs.read_json(run / "run.json", "start a new run").get("versions", {})
    results = {}
    if (run / "eval.json").exists():
        results = runs.read_json(run / "eval.json", "delete it, and evaluate again")
    metrics, left_out = read_rows(run / "metrics.jsonl", {"step"})
    rows, lost = read_rows(run / "rollouts.jsonl", NEEDED)
    by_id = {item.id: item for item in (local_items(config) if items is None else items)}
    by_group = groupby(rows, lambda row: (row["step"], row["group"]))
    groups = [group_of(list(group), by_id, config) for _, group in by_group]
    shown, unseen = pictures_of(groups, by_id)
    left_out += lost + unseen
    if groups and not by_id and config["dataset"] not in TEXT_SETS:
        left_out.append("pictures and prompts, since the data set is not at hand")

    log = {"groups": groups, "pictures": shown, "colours": STAGE_COLOURS}
    guards = {name: -config[f"w_{name}"] for name in rewards.GUARDS}
    log |= {"reward": config["reward"], "terms": guards | {"recite": config["recite"]}}
    script = own_file("js")
    script_hash = hashlib.sha256(script.encode()).digest()
    return Template(own_file("html")).substitute(
        name=escape(run.resolve().name),
        results=accuracies(results),
        facts=facts(config, versions, metrics[-1]["step"] if metrics else 0),
        left_out=f"Left out: {'; '.join(left_out)}." if left_out else "",
        charts=curves(metrics, config),
        log=inert(log),
        style=own_file("css"),
        script=script,
        script_hash=base64.b64encode(script_hash).decode(),
    )


def write(run: Path, out: Path | None = None, items: list[Item] | None = None) -> Path:
    """Write the page of a run folder, by default to RUN/report.html; returns where it is.

    items: the run's training items, if they are at hand. Written beside its place, then renamed.
    """
    out = Path(out) if out else run / "report.html"
    beside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    with runs.writing(out.parent, out.name):
        try:
            # A name may hold half a character.
            beside.write_bytes(page(run, items).encode("utf-8", errors="replace"))
            beside.replace(out)
        except (KeyError, AttributeError) as error:
            why = f"its run.json was written by another version of this code ({error})"
            raise UsageError(f"{run}: {why}") from None
        finally:
            beside.unlink(missing_ok=True)
    return out


# ------------------------------------------------------------------------------ command line
def main(argv: list[str] | None = None) -> None:
    about = (
        "One HTML page of a run: curves, alarms, and every logged completion, without a network."
    )
    p = Parser(prog="report.py", description=about)
    p.add_argument("run", metavar="RUN", help="a run folder of train.py, finished or not")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    args = p.parse_args(argv)
    out = write(runs.run_of(args.run)[0], args.out)
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_program(main, "report.py")
