"""A run as one page to look at: its curves, its alarms, and every logged completion beside its prompt, its picture and the others of its group.

A file of its own because nothing else draws: train.py calls `write`, and `python report.py RUN` makes the page of any run, done or not, of this version or an older one.
The page is a single HTML file without a network: charts are SVG drawn here, pictures are shrunk and packed in, and style and script stand at the end of this file.
What a policy wrote is hostile until shown otherwise: it goes in as JSON in which no tag can begin, and the script puts it on the page as text, never as HTML.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

import data
import eval as evaluation
import images
import rewards
import runs
from data import Item, UsageError

TEXT_SETS = ("demo", "medqa", "medqa-4", "mmlu-pro-health")     # their lines hold the whole item: nothing is loaded for them
ROLLOUTS = 10_000                       # the newest so many are shown, unless --limit says another number
TOKENS = 1_000_000                      # so many tokens, the newest, keep the numbers that shade them: about 20 MB
PICTURES = 200                          # items whose pictures are packed in, the newest
SIDE = 336                              # pixels of a packed picture's longer side
BOXES = 100                             # drawn of one answer


# --------------------------------------------------------------------------------------------------- what stands in the run folder
def lines_of(path: Path, needs: tuple[str, ...], newest: int | None = None) -> tuple[list[dict], int, int]:
    """The last `newest` rows of a JSONL file, how many lines of them were no such rows, and how many lines there are. A run that is killed or goes on may end in half a line."""
    lines, total = deque(maxlen=newest), 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                lines.append(line)
                total += 1
    rows, damaged = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        sound = isinstance(row, dict) and all(type(row.get(name)) is int and 0 <= row[name] < 10**9 for name in needs)
        rows += [row] if sound else []
        damaged += not sound
    return rows, damaged, total


def number(value) -> float | None:
    """A finite number, or None: JSON as Python writes it also has NaN and whole numbers of any length."""
    return float(value) if type(value) in (int, float) and -1e100 < value < 1e100 else None


def numbers(value, n: int) -> list[float] | None:
    """A list of n finite numbers, or None."""
    found = [number(x) for x in value] if isinstance(value, list) and len(value) == n else [None]
    return None if None in found else found


def boxes_in(value) -> list[list[float]]:
    """The boxes of a list, those that are four numbers."""
    return [box for each in value if (box := numbers(each, 4))][:BOXES] if isinstance(value, list) else []


def items_of(config: dict) -> tuple[dict[str, Item], str]:
    """The items of the run's training split by id, with its knowledge in them; and a word where there are none. Nothing is ever downloaded for a report."""
    dataset = str(config.get("dataset"))
    if dataset in TEXT_SETS:
        return {}, ""
    folder = config.get("data_dir") or (str(images.cache_dir() / "medmnist") if images.is_medmnist(dataset) else None)      # given a folder, it is only read
    try:
        found = data.load(dataset, "train", folder, task=config.get("task", ""), target=config.get("target", ""))
        found = data.with_knowledge(found, dataset, config.get("knowledge", "none"), config.get("knowledge_file", ""))
    except (ValueError, OSError, MemoryError, TypeError, AttributeError) as error:                           # run.json may say anything
        print(f"no pictures and prompts: {' '.join(str(error).split())}", file=sys.stderr)             # the page is passed on: no folders of this machine in it
        return {}, "pictures and prompts, since the data set is not at hand"
    return {item.id: item for item in found}, ""


def item_of(row: dict, items: dict[str, Item], config: dict) -> tuple[Item, bool]:
    """The item of a line, and whether its prompt is known. Options and gold are the line's own, for --shuffle-options moves them."""
    gold, options = row.get("gold"), tuple(map(str, row["options"])) if isinstance(row.get("options"), list) else ()
    task = "localize" if isinstance(gold, list) else "choice" if gold not in options else "grade" if all(map(str.isdecimal, options)) else "classify"
    known, text_set = items.get(str(row.get("id"))), config.get("dataset") in TEXT_SETS
    item = known or Item(str(row.get("id")), task, str(row.get("question")), (), "")
    item = replace(item, options=options, task=task if "localize" in (task, item.task) else item.task, answer=tuple(map(tuple, boxes_in(gold))) if task == "localize" else str(gold),
                   frame=tuple(map(int, frame)) if (frame := numbers(row.get("frame"), 4)) and min(frame) >= 1 else None)
    if text_set and config.get("knowledge", "none") != "none":
        try:
            item = data.with_knowledge([item], config["dataset"], config["knowledge"], config.get("knowledge_file", ""))[0]
        except (ValueError, OSError, TypeError):
            return item, False
    return item, known is not None or text_set


def completion_of(row: dict, item: Item, shaded: bool) -> dict:
    """What the page shows of one line. What an older log lacks is worked out from the text."""
    text, parts = str(row.get("text", "")), row.get("parts") if isinstance(row.get("parts"), dict) else {}
    shown = {name: number(row.get(name)) for name in ("reward", "advantage", "tokens")}
    shown |= {"text": text, "parts": {name: value for name, x in parts.items() if (value := number(x)) is not None}, "correct": row.get("correct") is True, "cut": row.get("finished") is False}
    parsed = rewards.parse(text)
    shown["stage"] = str(row["stage"]) if "stage" in row else rewards.stage(parsed, item, int(shown["tokens"] or 0))
    if "predicted" in row:
        shown["predicted"] = boxes_in(row["predicted"]) if item.task == "localize" else str(row["predicted"])
    elif item.task != "localize":
        shown["predicted"] = next(iter(rewards.named(item, parsed.answer)), "")
    else:                                                                     # in pixels of the image if they then score what was logged; else in a frame that is not known here
        found, iou = rewards.boxes(parsed.answer, BOXES), shown["parts"].get("iou", 0)
        shown["predicted"] = found if not found or iou > 0 and abs(rewards.box_score(found, item.answer) - iou) < 1e-3 else None
    pieces = row.get("pieces")
    if shaded and isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces):
        lists = {name: row[name] for name in ("entropy", "ratio") if isinstance(row.get(name), list) and len(row[name]) == len(pieces)}
        shown |= {name: [None if (x := number(value)) is None else round(x, 3) for value in values] for name, values in lists.items()}
        shown |= {"pieces": spaced(pieces, text)} if lists else {}
    return shown


def spaced(pieces: list[str], text: str) -> list[str]:
    """Tokens decoded one by one, with the white space that stands before them in the text: many tokenizers leave it out of a lone token.

    >>> spaced(["<think>", "red", " eye", "<eos>"], "<think> red eye")
    ['<think>', ' red', ' eye', '<eos>']
    """
    found, at = [], 0
    for piece in pieces:
        word = at
        while word < min(len(text), at + 64) and text[word].isspace():
            word += 1
        if piece and not text.startswith(piece, at) and text.startswith(piece, word):
            piece = text[at:word] + piece
        at += len(piece) if text.startswith(piece, at) else 0
        found.append(piece)
    return found


def groups_of(rows: list[dict], items: dict[str, Item], config: dict) -> tuple[list[dict], int]:
    """The groups of the log, oldest first: prompt, gold and completions; and how many completions are too old to keep the numbers of their tokens."""
    style = str(config.get("style")) if str(config.get("style")) in data.INSTRUCTIONS else "think"
    groups, asked, left, plain = {}, {}, TOKENS, 0
    for row in reversed(rows):
        key = row["step"], row["group"], str(row.get("id"))
        if key not in groups:
            item, known = item_of(row, items, config)
            asked[key] = item
            prompt = [[message["role"], message["content"]] for message in data.messages(item, style)] if known else [["question", "\n".join([item.question, *item.options])]]
            gold = [*item.answer] if item.task == "localize" else item.answer
            if item.task == "choice" and gold in [*data.LETTERS[:len(item.options)]]:
                gold += f". {item.options[data.LETTERS.index(gold)]}"
            groups[key] = {"step": row["step"], "group": row["group"], "id": item.id, "task": item.task, "prompt": prompt, "gold": gold, "rows": []}
        many = len(row["pieces"]) if isinstance(row.get("pieces"), list) else 0
        left -= many
        plain += many > 0 and left < 0
        groups[key]["rows"].append(completion_of(row, asked[key], left >= 0))
    for group in groups.values():
        group["rows"].reverse()
    return sorted(groups.values(), key=lambda group: (group["step"], group["group"])), plain


def pictures_of(groups: list[dict], items: dict[str, Item]) -> tuple[dict[str, list], list[str]]:
    """{item id: [[width, height, PNG in base64], ...]} of the newest items, each once; and what there is to say about the others."""
    wanted = list(dict.fromkeys(group["id"] for group in reversed(groups) if group["id"] in items and items[group["id"]].image is not None))
    packed, lost = {}, 0
    for name in wanted[:PICTURES]:
        try:
            packed[name] = [packed_png(images.open_image(source)) for source in images.sources(items[name])]
        except UsageError:
            lost += 1
    notes = [f"pictures of the oldest {len(wanted) - PICTURES} of {len(wanted)} items"] if len(wanted) > PICTURES else []
    return packed, notes + ([f"pictures of {lost} items, which cannot be read any more"] if lost else [])


def packed_png(image: Image.Image) -> list:
    size, file = image.size, io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "PNG")
    return [*size, base64.b64encode(file.getvalue()).decode()]


# --------------------------------------------------------------------------------------------------- charts
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 44, 10, 10, 24
COLUMNS = 240                           # of a longer run each column is the mean of several steps
STAGE_COLOURS = ("#8a8f98", "#d9a400", "#4aa3df", "#d55e00", "#b565a7", "#1f9e77")     # told apart by the colour-blind too, on white and on black


def said(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from one to the other.

    >>> ticks(0, 1), ticks(3, 61)
    ([0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], [20.0, 40.0, 60.0])
    """
    size = 10.0 ** math.floor(math.log10((high - low) / 5.01))
    size *= next(times for times in (1, 2, 5, 10) if times * size >= (high - low) / 5.01)
    return [i * size for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def columns_of(metrics: list[dict]) -> list[dict]:
    """One row a column of a chart: the means over its steps of whatever number a step has; `from` and `to` are its first and last step, `n` its steps with an accuracy."""
    size, columns = math.ceil(len(metrics) / COLUMNS), []
    for start in range(0, len(metrics), size or 1):
        part = metrics[start:start + size]
        names = {name: None for row in part for name in row if name != "step"}
        flat = {name: [x for row in part if (x := number(row.get(name))) is not None] for name in names}
        column = {name: sum(values) / len(values) for name, values in flat.items() if values}
        stages = [row["stages"] for row in part if isinstance(row.get("stages"), dict)]
        column["stages"] = {name: sum(number(of_step.get(name)) or 0 for of_step in stages) / len(stages) for name in rewards.STAGES} if stages else {}
        columns.append(column | {"from": part[0]["step"], "to": part[-1]["step"], "n": len(flat.get("accuracy", []))})
    return columns


def figure(title: str, note: str, columns: list[dict], heights: tuple[float, float], draw, tip, label: str, alarms: list, above=None) -> str:
    """Axes, ticks, alarms and a strip for each column that says its values; `draw(x, y)` fills the frame, `above(x, y)` what can be pointed at itself."""
    (low, high), (first, last) = heights, (columns[0]["from"] - .5, columns[-1]["to"] + .5)
    x = lambda step: LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
    y = lambda value: HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/><text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{said(v)}</text>' for v in ticks(low, high)]
    parts += [f'<text x="{x(v):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{v:.0f}</text>' for v in ticks(first, last) if v == int(v)]
    parts.append(draw(x, y))
    parts += [f'<rect class="hit" x="{x(c["from"] - .5):.1f}" y="{TOP}" width="{x(c["to"] + .5) - x(c["from"] - .5):.1f}" height="{HEIGHT - TOP - BOTTOM}"><title>{escape(where(c) + text)}</title></rect>'
              for c in columns if (text := tip(c))]
    parts += [f'<g class="alarm"><line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><path d="M{x(step):.1f} {TOP + 8} l-5 -9 h10 z"/><title>{escape(f"step {step}: {text}")}</title></g>'
              for step, text in alarms]
    return (f'<figure><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}{above(x, y) if above else ""}</svg></figure>')


def where(column: dict) -> str:
    return f"step {column['from']}" if column["from"] == column["to"] else f"steps {column['from']} to {column['to']}, mean"


def curve(name: str, title: str, note: str, columns: list[dict], alarms: list, least: float | None = None, most: float | None = None, band=None, dev=()) -> str:
    """One metric by step. `band(column)` is an interval around it; `dev` are points (step, value, low, high) of another kind beside it. Steps without the metric leave a gap."""
    there = [c for c in columns if name in c]
    if not there and not dev:
        return ""
    bands = {id(c): band(c) for c in there} if band else {}
    values = [*(c[name] for c in there), *(v for pair in bands.values() for v in pair), *(v for point in dev for v in point[1:])]
    low, high = min([*values, *([] if least is None else [least])]), max([*values, *([] if most is None else [most])])
    pad = (high - low) * .06 or max(abs(high), 1) * .05
    low, high = low if low == least else low - pad, high if high == most else high + pad
    middle = lambda c: (c["from"] + c["to"]) / 2

    def draw(x, y):
        drawn = []
        for stretch in [list(part) for present, part in groupby(columns, lambda c: name in c) if present]:
            if bands:
                edge = [f"{x(middle(c)):.1f},{y(bands[id(c)][1]):.1f}" for c in stretch] + [f"{x(middle(c)):.1f},{y(bands[id(c)][0]):.1f}" for c in reversed(stretch)]
                drawn.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
            drawn.append(f'<path class="curve" d="M{" L".join(f"{x(middle(c)):.1f} {y(c[name]):.1f}" for c in stretch)} h.1"/>')              # h.1: one point alone shows as a dot
        return "".join(drawn)

    def points(x, y):
        return "".join(f'<g class="dev"><line x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{y(a):.1f}" y2="{y(b):.1f}"/><circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5"/>'
                       f'<title>step {s}, dev accuracy {said(v)} [{said(a)}, {said(b)}]</title></g>' for s, v, a, b in dev)

    tip = lambda c: f": {title.lower()} {said(c[name])}" + (" [{}, {}]".format(*map(said, bands[id(c)])) if bands else "") if name in c else ""
    label = [f"{said(there[0][name])} at step {there[0]['from']}, {said(there[-1][name])} at step {there[-1]['to']}"] if there else []
    label += [f"on dev {said(dev[0][1])} at step {dev[0][0]}, {said(dev[-1][1])} at step {dev[-1][0]}"] if dev else []
    return figure(title, note, columns, (low, high), draw, tip, f"{title}: {'; '.join(label)}", alarms, points)


def stage_chart(columns: list[dict], alarms: list) -> str:
    """The share of each of the six stages, one on the other, the first at the bottom."""
    if not any(c["stages"] for c in columns):
        return ""

    def draw(x, y):
        drawn = []
        for c in columns:
            bottom, left, width = 0.0, x(c["from"] - .5), x(c["to"] + .5) - x(c["from"] - .5)
            for name, colour in zip(rewards.STAGES, STAGE_COLOURS):
                if share := c["stages"].get(name):
                    drawn.append(f'<rect x="{left:.2f}" y="{y(bottom + share):.1f}" width="{width + .5:.2f}" height="{y(bottom) - y(bottom + share):.1f}" fill="{colour}"/>')
                    bottom += share
        return "".join(drawn)

    tip = lambda c: "".join(f"\n{name} {share:.0%}" for name, share in c["stages"].items() if share)
    last = next(c["stages"] for c in reversed(columns) if c["stages"])
    legend = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in zip(rewards.STAGES, STAGE_COLOURS))
    label = "Stages at the last step: " + ", ".join(f"{name} {share:.0%}" for name, share in last.items() if share)
    return figure("Stages", "share of completions", columns, (0, 1), draw, tip, label, alarms).replace("</figure>", f'<ul class="legend">{legend}</ul></figure>')


def charts(metrics: list[dict], config: dict) -> str:
    if not metrics:
        return "<p>No step is logged yet.</p>"
    columns, sft = columns_of(metrics), config.get("algo") == "sft"
    alarms = [(row["step"], str(text)) for row in metrics if isinstance(row.get("alarms"), list) for text in row["alarms"]]
    dev = []
    for row in metrics:
        value = number(row.get("dev_accuracy"))
        dev += [(row["step"], value, *(numbers(row.get("dev_ci95"), 2) or (value, value)))] if value is not None else []
    prompts, samples = number(config.get("prompts")) or 0, number(config.get("samples")) or 0
    n = lambda c: max(1, round((prompts - c.get("groups_unfilled", 0)) * samples * c["n"]))
    band = (lambda c: evaluation.wilson(min(max(c["accuracy"], 0), 1) * n(c), n(c))) if prompts and samples else None
    by_dev = "dots: greedy on dev" if dev else ""
    note = "; ".join(filter(None, [f"95% Wilson band, n = {prompts * samples:.0f}" if band else "", by_dev]))
    found = [] if sft else [curve("reward", "Reward", "mean of the step's completions", columns, alarms), curve("accuracy", "Accuracy", note, columns, alarms, 0, 1, band, dev), stage_chart(columns, alarms)]
    found += [curve("loss", "Loss", "cross-entropy of the demonstrations", columns, alarms), curve("none", "Accuracy", by_dev, columns, alarms, 0, 1, None, dev)] if sft else []
    found += [curve("length", "Length", "tokens of a demonstration" if sft else "tokens of a completion", columns, alarms, 0), curve("entropy", "Entropy", "nats a token", columns, alarms, 0),
              curve("kl", "KL", "to the reference, nats a token", columns, alarms, 0), "" if sft else curve("part_truncated", "Cut at the limit", "share of completions", columns, alarms, 0, .05)]
    listed = "".join(f"<li><b>step {step}</b> {escape(text)}</li>" for step, text in alarms)
    return (f'<section class="alarms"><h2>Alarms</h2><ul>{listed}</ul></section>' if alarms else "") + f'<section class="charts" aria-label="Charts by step">{"".join(found)}</section>'


# --------------------------------------------------------------------------------------------------- the page
def header(run: Path, config: dict, facts: dict, results: dict, metrics: list[dict]) -> str:
    """Name, accuracy before and after as intervals on one axis, and the facts that a reader asks for first."""
    short = lambda name: Path(str(name)).name if data.is_path(str(name)) else str(name)
    versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    rows = []
    for name in ("clean", "before", "after"):
        for kind, value, interval in (("greedy", "accuracy", "ci95"), ("sampled", "sampled_accuracy", "sampled_ci95")):
            if (share := number(results.get(name, {}).get(value))) is not None:
                low, high = numbers(results[name].get(interval), 2) or (share, share)
                axis = "".join(f'<line class="grid" x1="{v}%" x2="{v}%" y1="0" y2="100%"/>' for v in range(0, 101, 25))
                mark = f'<line class="bar" x1="{low:.2%}" x2="{high:.2%}" y1="50%" y2="50%"/><circle cx="{share:.2%}" cy="50%" r="5"/>'
                text = f"{share:.3f} [{low:.3f}, {high:.3f}]"
                rows.append(f'<li class="{name}"><span>{name}, {kind}</span> <svg role="img" aria-label="{name}, {kind}, on an axis from 0 to 1">{axis}{mark}</svg> <span>{text}</span></li>')
    greedy = [f"{share:.3f}" for name in ("before", "after") if (share := number(results.get(name, {}).get("accuracy"))) is not None]
    n = next((f", {n:.0f} items" for name in ("after", "before") if (n := number(results.get(name, {}).get("n")))), "")
    table = f'<div><p class="big">{" → ".join(greedy)}</p><p class="soft">accuracy on test{n}; below with 95% intervals from 0 to 1</p><ul class="results">{"".join(rows)}</ul></div>' if rows else "<p>Not evaluated yet.</p>"
    batch = f"{config.get('prompts')} prompts x {config.get('samples')} completions" if config.get("algo") != "sft" else f"{config.get('prompts')} demonstrations"
    listed = {"algorithm": config.get("algo"), "data set": " ".join(filter(None, [short(config.get("dataset")), str(config.get("task") or ""), str(config.get("target") or "")])),
              "model": short(config.get("model")) if config.get("model") not in runs.MADE_HERE else "tiny, made in code", "begun from": Path(str(config.get("init") or "")).name, "weights": "all" if config.get("full") else f"adapters of rank {config.get('lora')}",
              "reward": config.get("reward"), "step": f"{metrics[-1]['step'] if metrics else 0} of {config.get('steps')}", "batch": batch, "learning rate": config.get("lr"), "seed": config.get("seed"),
              "versions": ", ".join(f"{name} {version}" for name, version in versions.items()), "written": time.strftime("%Y-%m-%d %H:%M")}
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in listed.items() if value not in (None, ""))
    return f"<header><h1>{escape(run.resolve().name)}</h1>{table}<dl>{facts}</dl></header>"


def weights_of(config: dict, groups: list[dict]) -> dict[str, float]:
    """Which parts the reward is the weighted sum of; {} for a config of another version."""
    try:
        return {name: weight for name, weight in rewards.weights(SimpleNamespace(**config), groups[0]["task"]).items() if number(weight) is not None}
    except (AttributeError, ValueError, TypeError, IndexError):
        return {}


def script_json(name: str, content) -> str:
    """JSON inside HTML: all ASCII, and without the three signs with which a tag, a comment or an entity begins or ends."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def page(run: Path, limit: int = ROLLOUTS, items=None) -> tuple[str, list[str]]:
    """The HTML of a run folder, and notes on what is left out of it."""
    if not (run / "run.json").is_file():
        raise UsageError(f"{run} is no run folder: there is no run.json in it")
    config, facts, notes = runs.read_run(str(run)), runs.read_json(run / "run.json", "start a new run"), []
    try:
        results = runs.read_json(run / "eval.json", "") if (run / "eval.json").exists() else {}
    except UsageError:
        results, notes = {}, ["accuracies before and after, since eval.json is damaged"]
    results = {name: result for name, result in results.items() if isinstance(result, dict)}
    metrics, damaged, _ = lines_of(run / "metrics.jsonl", ("step",))
    metrics = [row for _, row in sorted({row["step"]: row for row in metrics}.items())]
    rows, lost, total = lines_of(run / "rollouts.jsonl", ("step", "group"), limit)
    notes += [f"{count} damaged lines of {name}" for name, count in (("metrics.jsonl", damaged), ("rollouts.jsonl", lost)) if count]
    notes += [f"the oldest {total - limit:,} of {total:,} completions" if total > limit else ""]
    found, missing = ({item.id: item for item in items}, "") if items is not None else items_of(config) if rows else ({}, "")
    groups, plain = groups_of(rows, found, config)
    pictures, unseen = pictures_of(groups, found)
    notes = list(filter(None, [*notes, missing, *unseen, f"the token numbers of the oldest {plain:,} completions" if plain else ""]))
    index = {"stages": rewards.STAGES, "colours": STAGE_COLOURS, "weights": weights_of(config, groups), "clip": [clip if (clip := number(config.get(name)) or 0) >= .05 else .2 for name in ("clip_low", "clip_high")],
             "shades": [name for name in ("entropy", "ratio") if any(name in row for group in groups for row in group["rows"])],
             "groups": [[group["step"], [[row["reward"], row["correct"], row["stage"]] for row in group["rows"]]] for group in groups]}
    embedded = script_json("index", index) + script_json("pictures", pictures) + "".join(script_json(f"group-{i}", group) for i, group in enumerate(groups))
    said_out = f'<p class="notes">Left out: {escape("; ".join(notes))}.</p>' if notes else ""
    hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark"><title>{escape(run.resolve().name)}: report</title>'
            f"<style>{STYLE}</style></head>\n<body><main>{header(run, config, facts, results, metrics)}{said_out}{charts(metrics, config)}"
            f'{CONTROLS if groups else "<section><h2>Completions</h2><p>None is logged.</p></section>"}</main>\n{embedded}<script>{SCRIPT}</script></body></html>\n'), notes


def write(run: Path, out: Path | None = None, limit: int = ROLLOUTS, items=None, notes: list | None = None) -> Path:
    """Write the page of a run folder, RUN/report.html unless `out` says another place: beside it first, then renamed.

    items: the training items where the caller has them already, so that no data set is read again. What is left out of the page is added to `notes`.
    """
    run = Path(run)
    out = Path(out) if out else run / "report.html"
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        text, left_out = page(run, limit, items)
        beside.write_bytes(text.encode("utf-8", errors="replace"))            # a name may hold half a character
        beside.replace(out)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise UsageError(f"the report {out} could not be made: {error}") from None
    if notes is not None:
        notes += left_out
    return out


# --------------------------------------------------------------------------------------------------- what the page is made of
STYLE = """
:root { --back: #fff; --front: #1b1f24; --soft: #596270; --line: #d9dee5; --card: #f6f8fa; --main: #0b62c4; --dev: #b84a00; --good: #0b7a4b; --bad: #c02626; --gold: #12a150; --said: #e8590c }
@media (prefers-color-scheme: dark) { :root { --back: #0f1216; --front: #e6e9ee; --soft: #9aa5b4; --line: #2c333d; --card: #181d24; --main: #6cb0ff; --dev: #ffa057; --good: #4fd19a; --bad: #ff7b7b; --gold: #40e08a; --said: #ff9a4d } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--front); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
main { max-width: 1500px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.7rem; margin: 0 0 12px } h2 { font-size: 1.25rem; margin: 28px 0 8px } h3 { font-size: 1rem; margin: 0 }
header { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 12px 40px } h1 { grid-column: 1 / -1 }
.big { font-size: 2.4rem; font-weight: 600; line-height: 1.1; margin: 0; font-variant-numeric: tabular-nums } .big + p { margin: 0 0 8px } .soft, .notes, figcaption span { color: var(--soft); font-size: .85rem }
.results { list-style: none; margin: 0; padding: 0 } .results li { display: grid; grid-template-columns: 8.5em 1fr 13em; gap: 0 14px; align-items: center; font-variant-numeric: tabular-nums }
.results svg { width: 100%; height: 20px; overflow: visible } .results circle { fill: var(--soft) } .bar { stroke: var(--soft); stroke-width: 3 } .after { font-weight: 600 } .after circle { fill: var(--main) } .after .bar { stroke: var(--main) }
@media (max-width: 520px) { .results li { grid-template-columns: 1fr auto } .results svg { grid-row: 2; grid-column: 1 / -1 } }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 6px 16px; margin: 0; align-self: start } dt { color: var(--soft); font-size: .8rem } dd { margin: 0 }
.alarms { border-left: 4px solid var(--bad); padding-left: 14px } .alarms h2 { color: var(--bad) } .alarms ul { margin: 0; padding-left: 18px; max-height: 12em; overflow: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px 20px; margin-top: 20px }
figure { margin: 0; min-width: 0 } figure svg { width: 100%; display: block } svg text { fill: var(--soft); font-size: 11px } .grid { stroke: var(--line) }
.curve { fill: none; stroke: var(--main); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round } .band { fill: var(--main); opacity: .18 } .dev { fill: var(--dev); stroke: var(--dev); stroke-width: 1.5 }
.hit { fill: transparent } .hit:hover { fill: var(--front); fill-opacity: .1 } .alarm { stroke: var(--bad); fill: var(--bad) } .alarm line { stroke-dasharray: 4 3 }
.legend { list-style: none; margin: 0; padding: 0 0 0 10px; display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .8rem } i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: 5px }
form { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: end; padding: 10px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card) }
@media (min-width: 900px) { form { position: sticky; top: 0; z-index: 1 } html { scroll-padding-top: 130px } }
form label { display: grid; font-size: .8rem; color: var(--soft); gap: 2px } form label.inline { display: inline-flex; gap: 4px; align-items: center; color: var(--front); font-size: .9rem; margin-right: 8px }
fieldset { border: 0; padding: 0; margin: 0 } legend { font-size: .8rem; color: var(--soft); padding: 0 }
input, select, button { font: inherit; color: inherit; background: var(--back); border: 1px solid var(--soft); border-radius: 6px; padding: 4px 8px; min-height: 34px; max-width: 14em } input[type=number] { width: 6.2em } input[type=radio] { min-height: 0 }
button { cursor: pointer } :focus-visible { outline: 3px solid var(--main); outline-offset: 2px } #state, #scale { color: var(--soft); font-size: .9rem; margin: 8px 0 }
.group { border-top: 1px solid var(--line); padding: 16px 0 } .group > .top { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline } .top > *, .head > * { unicode-bidi: isolate }
.asked { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0 } .asked > .words { flex: 1 1 300px; min-width: 0 } summary { color: var(--soft); font-size: .85rem; cursor: pointer }
.gold { font-weight: 600 } .text { white-space: pre-wrap; unicode-bidi: plaintext; overflow-wrap: anywhere } .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 10px }
.card { border: 1px solid var(--line); border-top: 4px solid var(--bad); border-radius: 8px; background: var(--card); padding: 8px 10px; min-width: 0 } .card.right { border-top-color: var(--good) }
.head { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline } .head strong { font-size: 1.3rem; font-variant-numeric: tabular-nums } .right .mark, .up { color: var(--good) } .wrong .mark, .down, .cut { color: var(--bad) }
.card .text { font: 13px/1.5 ui-monospace, monospace; margin-top: 6px } .tag { color: var(--main); font-weight: 600 } .card .soft { margin-top: 2px }
.picture { position: relative; overflow: hidden; width: 224px; max-width: 100%; align-self: start; line-height: 0 } .picture img { width: 100%; height: auto } .card .picture { width: 150px; margin-top: 6px }
.box { position: absolute; border: 2px solid var(--gold) } .box.said { border: 2px dashed var(--said) }
"""

CONTROLS = """<section><h2>Completions</h2><noscript><p>The charts need no script; the completions do.</p></noscript>
<form id="controls"><label>step from <input type="number" id="from" min="0"></label><label>to <input type="number" id="to" min="0"></label>
<label>reward from <input type="number" id="least" step="any"></label><label>to <input type="number" id="most" step="any"></label>
<label>answer <select id="answer"><option value="">right and wrong</option><option value="right">right</option><option value="wrong">wrong</option></select></label>
<label>stage <select id="stage"><option value="">all</option></select></label><label>order <select id="order"><option value="new">newest first</option><option value="old">oldest first</option></select></label>
<fieldset><legend>shade tokens by</legend><label class="inline"><input type="radio" name="shade" value="off" checked> nothing</label><label class="inline"><input type="radio" name="shade" value="entropy"> entropy</label>
<label class="inline"><input type="radio" name="shade" value="ratio"> ratio</label></fieldset><button type="reset">clear</button></form>
<p id="scale"></p><p id="state" role="status"></p><div id="groups"></div><p><button id="more" type="button">more</button></p></section>"""

SCRIPT = r"""
"use strict";
(() => {
const at = id => document.getElementById(id), read = id => JSON.parse(at(id).textContent);
if (!at("controls")) return;
const PAGE = 20, LONG = 4000, index = read("index"), show = (x, sign) => x === null ? "none" : (sign && x > 0 ? "+" : "") + +x.toFixed(3);
let pictures = null, chosen = [], done = 0, paint = [];

function make(tag, name, text) {                                    // the only way in which anything of a model reaches the page: as text
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = visible(text);
  return node;
}
function visible(text) {                                            // control characters by their pictures; tab and line break stay
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, c => String.fromCharCode(c === "\u007f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
}
function long(fill, size, what) {                                   // fill(node, whole): a text that is cut at LONG characters until it is asked for
  const box = make("div"), node = box.appendChild(make("div", "text")), button = make("button", "", "show all of " + size.toLocaleString("en") + " characters" + what);
  let whole = size <= LONG;
  const again = () => { node.replaceChildren(); fill(node, whole); };
  node.dir = "auto";
  button.type = "button";
  button.addEventListener("click", () => { whole = true; button.remove(); again(); });
  again();
  if (!whole) box.append(button);
  return [box, again];
}
const plain = text => long((node, whole) => node.append(visible(whole ? text : text.slice(0, LONG))), text.length, "")[0];

function colour(kind, value) {
  if (value === null) return "";
  if (kind === "entropy") return "rgb(150 90 220 / " + Math.min(value / 2, 1) * .7 + ")";
  const far = value > 1 ? Math.log(value) / Math.log(1 + index.clip[1]) : Math.log(Math.max(value, 1e-9)) / Math.log(Math.max(1 - index.clip[0], .01));
  return (value > 1 ? "rgb(20 120 230 / " : "rgb(240 120 0 / ") + Math.min(far, 1) * .7 + ")";
}
function written(row) {
  const [box, again] = long((node, whole) => {
    const kind = document.querySelector("input[name=shade]:checked").value, text = whole ? row.text : row.text.slice(0, LONG);
    let size = 0;
    if (kind === "off" || !row[kind])
      for (const part of text.split(/(<\/?(?:think|answer)>)/)) node.append(/^<\/?(think|answer)>$/.test(part) ? make("span", "tag", part) : visible(part));
    else for (let i = 0; i < row.pieces.length && (whole || size < LONG); size += row.pieces[i++].length) {
      const token = node.appendChild(make("span", "token", row.pieces[i]));
      token.style.backgroundColor = colour(kind, row[kind][i]);
      token.title = ["entropy", "ratio"].filter(name => row[name]).map(name => name + " " + row[name][i]).join(", ");
    }
  }, row.text.length, "");
  paint.push(again);
  return box;
}
function picture([width, height, png], gold, said, words) {
  const frame = make("div", "picture"), image = frame.appendChild(make("img"));
  image.src = "data:image/png;base64," + png;
  image.alt = words;
  image.style.imageRendering = width < 200 ? "pixelated" : "auto";
  for (const [name, boxes] of [["box", gold], ["box said", said]])
    for (const [x1, y1, x2, y2] of boxes) {
      const box = frame.appendChild(make("div", name));
      [box.style.left, box.style.top, box.style.width, box.style.height] = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height].map(x => 100 * Math.max(-2, Math.min(x, 3)) + "%");
    }
  return frame;
}
function card(row, group, seen) {
  const box = make("article", "card " + (row.correct ? "right" : "wrong")), head = box.appendChild(make("div", "head")), boxes = Array.isArray(group.gold);
  head.append(make("strong", "", show(row.reward)), make("span", "mark", row.correct ? "\u2713 right" : "\u2717 wrong"));
  if (row.advantage !== null) head.append(make("span", row.advantage > 0 ? "up" : row.advantage < 0 ? "down" : "soft", "advantage " + show(row.advantage, true)));
  if (row.cut) head.append(make("span", "cut", "cut at the limit"));
  const stage = make("div", "soft"), dot = stage.appendChild(make("i"));
  dot.style.backgroundColor = index.colours[index.stages.indexOf(row.stage)] || "transparent";
  stage.append(visible(row.stage) + (row.tokens === null ? "" : ", " + row.tokens + " tokens"));
  const paid = Object.keys(index.weights).filter(name => name in row.parts), other = Object.keys(row.parts).filter(name => !paid.includes(name) && row.parts[name]);
  box.append(stage, make("div", "soft", [paid.map(name => name + " " + show(row.parts[name]) + " \u00d7 " + show(index.weights[name])).join(" + "), other.map(name => name + " " + show(row.parts[name])).join(", ")].filter(Boolean).join("; ")));
  const said = row.predicted === null ? "in its text" : boxes ? row.predicted.length + (row.predicted.length === 1 ? " box" : " boxes") : row.predicted || "none that can be read";
  box.append(make("div", "", "answer: " + said));
  if (boxes && seen) box.append(picture(seen[0], group.gold, row.predicted || [], "the picture with the boxes of gold and of this answer"));
  box.append(written(row));
  return box;
}
function matching(row) {
  const [reward, correct, stage] = row, least = at("least").value, most = at("most").value, answer = at("answer").value, wanted = at("stage").value;
  return (!least || reward !== null && reward >= +least) && (!most || reward !== null && reward <= +most) && (!answer || correct === (answer === "right")) && (!wanted || stage === wanted);
}
function one([number, rows]) {
  const group = read("group-" + number), box = make("article", "group"), top = box.appendChild(make("div", "top")), asked = box.appendChild(make("div", "asked"));
  const seen = (pictures = pictures || read("pictures"))[group.id], right = group.rows.filter(row => row.correct).length, boxes = Array.isArray(group.gold);
  top.append(make("h3", "", "step " + group.step + ", group " + group.group), make("span", "", right + " of " + group.rows.length + " right"), make("span", "soft", group.id));
  for (const each of seen || []) asked.append(picture(each, boxes ? group.gold : [], [], "picture of the question" + (boxes ? ", with the gold boxes" : "")));
  const words = asked.appendChild(make("div", "words"));
  for (const [role, text] of group.prompt) {
    const part = words.appendChild(make("details"));
    part.open = role !== "system";
    part.append(make("summary", "", role === "question" ? role : "prompt, " + role), plain(text));
  }
  words.append(make("div", "gold", "gold: " + (boxes ? group.gold.map(each => "[" + each.join(", ") + "]").join(" ") : group.gold)));
  if (boxes && seen) words.append(make("div", "soft", "solid green: gold; dashed orange: answer"));
  const cards = box.appendChild(make("div", "cards")), rest = group.rows.filter((row, i) => !rows.includes(i));
  rows.forEach(i => cards.append(card(group.rows[i], group, seen)));
  if (rest.length) {
    const button = box.appendChild(make("button", "", "show the other " + rest.length + " of this group"));
    button.type = "button";
    button.addEventListener("click", () => { button.remove(); rest.forEach(row => cards.append(card(row, group, seen))); });
  }
  return box;
}
function more() {
  chosen.slice(done, done + PAGE).forEach(group => at("groups").append(one(group)));
  done = Math.min(done + PAGE, chosen.length);
  const count = chosen.reduce((sum, group) => sum + group[1].length, 0);
  at("state").textContent = done + " of " + chosen.length + (chosen.length === 1 ? " group" : " groups") + " shown, with " + count.toLocaleString("en") + " completions that match";
  at("more").hidden = done === chosen.length;
  at("more").textContent = "show " + Math.min(PAGE, chosen.length - done) + " more groups of " + (chosen.length - done);
}
function filter() {
  const from = at("from").value, to = at("to").value;
  chosen = index.groups.map(([step, rows], i) => [i, rows.map((row, k) => matching(row) ? k : -1).filter(k => k >= 0), step]).filter(([i, rows, step]) => rows.length && (!from || step >= +from) && (!to || step <= +to));
  if (at("order").value === "new") chosen.reverse();
  done = 0;
  paint = [];
  at("groups").replaceChildren();
  more();
}
function shade() {
  const kind = document.querySelector("input[name=shade]:checked").value, [low, high] = [1 - index.clip[0], 1 + index.clip[1]].map(x => show(x));
  at("scale").textContent = kind === "entropy" ? "violet: the policy was unsure here, full colour at 2 nats and above" : kind === "ratio" ?
    "probability after the update over that when it was sampled: blue is likelier (full colour at " + high + "), orange less likely (at " + low + ")" : "";
  paint.forEach(again => again());
}
const names = [...new Set(index.groups.flatMap(([step, rows]) => rows.map(row => row[2])))].sort((a, b) => index.stages.indexOf(a) - index.stages.indexOf(b));
for (const name of names) at("stage").append(Object.assign(make("option", "", name), {value: name}));
for (const name of ["entropy", "ratio"]) {
  const button = document.querySelector("input[value=" + name + "]");
  button.disabled = !index.shades.includes(name);
  if (button.disabled) button.parentNode.append(" (not in this log)");
}
at("from").placeholder = index.groups[0][0];
at("to").placeholder = index.groups[index.groups.length - 1][0];
at("controls").addEventListener("input", event => event.target.name === "shade" ? shade() : filter());
at("controls").addEventListener("submit", event => event.preventDefault());
at("controls").addEventListener("reset", () => setTimeout(() => { filter(); shade(); }));
at("more").addEventListener("click", more);
filter();
})();
"""


# --------------------------------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    p = evaluation.Parser(prog="report.py", description="One HTML page of a run: curves, alarms, and every logged completion. No network is needed to make or to see it.")
    p.add_argument("run", metavar="RUN", help="a run folder of train.py, finished or not")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    p.add_argument("--limit", type=int, default=ROLLOUTS, metavar="N", help=f"the newest N completions (default {ROLLOUTS:,})")
    args, notes = p.parse_args(argv), []
    if args.limit < 1:
        raise UsageError("--limit must be at least 1")
    out = write(runs.run_of(args.run)[0], args.out, args.limit, notes=notes)
    for note in notes:
        print(f"left out: {note}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
