"""A run as one page to look at: its curves, its alarms, and every logged completion beside its prompt, its picture and the others of its group.

A file of its own because nothing else draws: train.py calls `write`, and `python report.py RUN` makes the page of any run again, done or not.
The page is one HTML file without a network: charts are SVG drawn here, pictures are shrunk and packed in, and style and script stand at the end of this file.
What a policy wrote is hostile until shown otherwise: it goes in as JSON in which no tag can begin, and the script puts it on the page as text, never as HTML.
"""
import base64
import hashlib
import io
import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from html import escape
from itertools import accumulate, groupby, product
from pathlib import Path
from types import SimpleNamespace

import data
import eval as evaluation
import images
import rewards
import runs
from data import Item, UsageError

TEXT_SETS = ("demo", "medqa", "medqa-4", "mmlu-pro-health")     # the log holds the whole of their items: nothing is loaded for them
SIZE = 20_000_000                       # characters of a log that are shown, the newest
PICTURES, SIDE = 200, 336               # items whose pictures are packed in, the newest; pixels of their longer side
SHOWN = ("text", "reward", "parts", "advantage", "correct", "finished", "tokens", "stage", "predicted", "pieces", "entropy", "ratio")
NEEDED = {"step", "group", "id", "question", "options", "gold", "frame", *SHOWN} - {"ratio"}      # which demonstrations lack


# --------------------------------------------------------------------------------------------------- what stands in the run folder
def rows_of(path: Path, needed: set[str]) -> tuple[list[dict], list[str]]:
    """The newest rows of a JSONL file, oldest first, and what is left out: a kill may leave half a line. NaN and infinity become None."""
    lines = list(filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n"))) if path.exists() else []
    newest, rows = sum(size <= SIZE for size in accumulate(map(len, reversed(lines)))), []
    for line in lines[len(lines) - newest:]:
        with suppress(ValueError, RecursionError):
            row = json.loads(line, parse_constant=lambda name: None)
            rows += [row] if isinstance(row, dict) and row.keys() >= needed and type(row["step"]) is int else []
    return rows, [f"{n:,} {what} lines of {path.name}" for what, n in (("older", len(lines) - newest), ("damaged", newest - len(rows))) if n]


def local_items(config: dict) -> list[Item]:
    """The run's training items with its knowledge in them, [] where they are not on this machine: nothing is downloaded for a report."""
    dataset = config["dataset"]
    folder = config["data_dir"] or (str(images.cache_dir() / "medmnist") if images.is_medmnist(dataset) else None)      # given a folder, it is only read
    try:
        items = [] if dataset in TEXT_SETS else data.load(dataset, "train", folder, task=config["task"], target=config["target"])
        return data.with_knowledge(items, dataset, config["knowledge"], config["knowledge_file"]) if items else []
    except (UsageError, OSError) as error:
        print(f"no pictures and prompts: {error}", file=sys.stderr)           # it names folders of this machine: nothing for a page that is passed on
        return []


def group_of(rows: list[dict], items: dict[str, Item], config: dict) -> dict:
    """What the page shows of one group. Options, gold and frame are the log's own: --shuffle-options moves the first two, the policy makes the third."""
    row, known, text_set = rows[0], items.get(rows[0]["id"]), config["dataset"] in TEXT_SETS
    task = "localize" if isinstance(row["gold"], list) else "choice" if text_set else "classify"
    item = replace(known or Item(row["id"], task, row["question"], (), ""), options=tuple(row["options"]), frame=row["frame"])
    prompt, gold = [["question", "\n".join([item.question, *item.options])]], row["gold"]
    if known or text_set and config["knowledge"] == "none":                   # else the rest of the prompt stands in the data set
        prompt = [[message["role"], message["content"]] for message in data.messages(item, config["style"])]
    if item.task == "choice":
        gold += f". {item.options[data.LETTERS.index(gold)]}"
    shown = [{name: row[name] for name in SHOWN if name in row} for row in rows]
    return {"step": row["step"], "group": row["group"], "id": item.id, "task": item.task, "prompt": prompt, "gold": gold, "rows": shown}


def pictures_of(groups: list[dict], items: dict[str, Item]) -> tuple[dict[str, list], list[str]]:
    """{item id: [[width, height, PNG in base64], ...]} of the newest items, each once; and what is left out."""
    names, packed = dict.fromkeys(group["id"] for group in reversed(groups)), {}
    wanted = {name: images.sources(items[name]) for name in names if name in items and items[name].image is not None}
    for name in list(wanted)[:PICTURES]:
        with suppress(UsageError):                                            # moved or damaged since
            packed[name] = [packed_png(images.open_image(source)) for source in wanted[name]]
    return packed, [f"the pictures of {len(wanted) - len(packed)} items"] if len(packed) < len(wanted) else []


def packed_png(image) -> list:
    size, file = image.size, io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "PNG")
    return [*size, base64.b64encode(file.getvalue()).decode()]


# --------------------------------------------------------------------------------------------------- charts
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 44, 390, 10, 166          # of a chart, and the sides of the frame in it
STAGE_COLOURS = dict(zip(rewards.STAGES, ("#8a8f98", "#d9a400", "#4aa3df", "#d55e00", "#b565a7", "#1f9e77")))     # told apart by the colour-blind too


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from one to the other.
    >>> ticks(0, 1), ticks(3, 61)
    ([0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], [20.0, 40.0, 60.0])
    """
    size = 10.0 ** math.floor(math.log10((high - low) / 5.01))
    size *= next(times for times in (1, 2, 5, 10) if times * size >= (high - low) / 5.01)
    return [i * size for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def figure(title: str, note: str, steps: list[int], low: float, high: float, draw, tips: dict[int, str], alarms: list) -> str:
    """Axes, what `draw(x, y)` yields, and over it a strip for each step that says its values, and the alarms."""
    first, last = steps[0] - .5, steps[-1] + .5
    x = lambda step: LEFT + (step - first) / (last - first) * (RIGHT - LEFT)
    y = lambda value: BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)
    parts = [f'<path class="grid" d="M{LEFT} {y(v):.1f}H{RIGHT}"/><text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>' for v in ticks(low, high)]
    parts += [f'<text x="{x(v):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{v:.0f}</text>' for v in ticks(first, last) if v == int(v)]
    parts += draw(x, y)
    parts += [f'<path class="hit" d="M{x(step - .5):.1f} {TOP}V{BOTTOM}H{x(step + .5):.1f}V{TOP}"><title>step {step}: {tip}</title></path>' for step, tip in tips.items()]
    parts += [f'<path class="alarm" d="M{x(step):.1f} {TOP + 8}l-5 -9h10l-5 9V{BOTTOM}"><title>step {step}: {escape(text)}</title></path>' for step, text in alarms]
    label = f"{title}: {tips[min(tips)]} at step {min(tips)}; {tips[max(tips)]} at step {max(tips)}"
    return (f'<figure><figcaption><b>{title}</b> <span class="soft">{note}</span></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>')


def curve(title: str, note: str, steps: list[int], alarms: list, points: dict, bounds: tuple = (), dots: dict = {}) -> str:
    """One metric by step, a line of points and single dots: {step: (value, low, high)} with the ends of an interval. What `bounds` names is always in sight."""
    if not points and not dots:
        return ""
    values = [*bounds, *(v for found in (points, dots) for ends in found.values() for v in ends)]
    low, high = min(values), max(values)
    pad = (high - low) * .06 or max(abs(high), 1) * .05
    low, high = low - pad * (low not in bounds), high + pad * (high not in bounds or high == low)

    def draw(x, y):
        for there, stretch in groupby(steps, points.__contains__):            # a step without a value leaves a gap
            line = [(x(step), *map(y, points[step])) for step in stretch if there]
            edge = [f"{at:.1f} {top:.1f}" for at, _, _, top in line] + [f"{at:.1f} {bottom:.1f}" for at, _, bottom, _ in reversed(line)]
            if there:                                                         # h.1: one point alone shows as a dot
                yield f'<path class="band" d="M{" L".join(edge)}"/><path class="curve" d="M{" L".join(f"{at:.1f} {v:.1f}" for at, v, *_ in line)}h.1"/>'
        for step, ends in dots.items():
            v, bottom, top = map(y, ends)
            yield f'<path class="dev" d="M{x(step):.1f} {bottom:.1f}V{top:.1f}"/><circle class="dev" cx="{x(step):.1f}" cy="{v:.1f}" r="3.5"/>'

    told = lambda v, low, high: f"{v:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low < high else "")
    tips = {step: ", ".join(kind + told(*found[step]) for kind, found in (("", points), ("on dev ", dots)) if step in found) for step in sorted({*points, *dots})}
    return figure(title, note, steps, low, high, draw, tips, alarms)


def stage_chart(steps: list[int], alarms: list, stages: dict[int, dict]) -> str:
    """The share of each of the six stages, one on the other, the first at the bottom."""
    def draw(x, y):
        bottoms = dict.fromkeys(stages, 0.0)
        for name, colour in STAGE_COLOURS.items():
            tops = {step: bottoms[step] + shares.get(name, 0) for step, shares in stages.items()}
            bars = [f"M{x(step - .5):.1f} {y(bottoms[step]):.1f}V{y(top):.1f}H{x(step + .5):.1f}V{y(bottoms[step]):.1f}" for step, top in tops.items()]
            yield f'<path fill="{colour}" shape-rendering="crispEdges" d="{"".join(bars)}"/>'
            bottoms = tops

    legend = "".join(f'<span><i style="background:{colour}"></i>{name}</span> ' for name, colour in STAGE_COLOURS.items())
    tips = {step: ", ".join(f"{name} {shares[name]:.0%}" for name in STAGE_COLOURS if shares.get(name)) for step, shares in stages.items()}
    return figure("Stages", legend, steps, 0, 1, draw, tips, alarms)


def charts(metrics: list[dict], config: dict) -> str:
    """Alarms, and a chart of whatever is logged: but no loss of a policy gradient, and nothing that demonstrations earn, for these say nothing of the policy."""
    hidden = {"reward", "accuracy", "stages", "part_truncated"} if config["algo"] == "sft" else {"loss"}
    of = lambda name: {row["step"]: row[name] for row in metrics if row.get(name) is not None and name not in hidden}
    steps, alarms = [row["step"] for row in metrics], [(step, text) for step, texts in of("alarms").items() for text in texts]
    unfilled, stages, dev_ends = of("groups_unfilled"), of("stages"), of("dev_ci95")
    n = {step: (config["prompts"] - unfilled.get(step, 0)) * config["samples"] for step in steps}
    shares = {step: (share, *evaluation.wilson(share * n[step], n[step])) for step, share in of("accuracy").items()}
    dev = {step: (share, *dev_ends.get(step, (share, share))) for step, share in of("dev_accuracy").items()}
    line = lambda name, title, note, *bounds: curve(title, note, steps, alarms, {step: (v, v, v) for step, v in of(name).items()}, bounds)
    found = [line("reward", "Reward", "mean of the step's completions"), line("loss", "Loss", "cross-entropy of the demonstrations"),
             curve("Accuracy", "95% Wilson band of the step's completions; dots: greedy on dev", steps, alarms, shares, (0, 1), dev),
             stage_chart(steps, alarms, stages) if stages else "", line("length", "Length", "tokens", 0), line("entropy", "Entropy", "nats a token", 0),
             line("kl", "KL", "to the reference, nats a token", 0), line("part_truncated", "Cut at the limit", "share of completions", 0, .05)]
    listed = "".join(f"<li><b>step {step}</b> {escape(text)}</li>" for step, text in alarms)
    alarmed = f'<section class="alarms"><h2>Alarms</h2><ul>{listed}</ul></section>' if alarms else ""
    return f'{alarmed}<div class="charts">{"".join(found)}</div>'


# --------------------------------------------------------------------------------------------------- the page
def accuracies(results: dict) -> str:
    """Before and after: the two numbers, and each with its interval on one axis."""
    rows, grid = [], "".join(f'<line class="grid" x1="{v}%" x2="{v}%" y1="0" y2="100%"/>' for v in range(0, 101, 25))
    for name, kind in product(("clean", "before", "after"), ("", "sampled_")):
        if f"{kind}accuracy" in results.get(name, {}):
            share, (low, high) = results[name][f"{kind}accuracy"], results[name][f"{kind}ci95"]
            bar = f'<line class="bar" x1="{low:.2%}" x2="{high:.2%}" y1="50%" y2="50%"/><circle class="bar" cx="{share:.2%}" cy="50%" r="4"/>'
            what = f"<span>{name}, {'sampled' if kind else 'greedy'}</span>"
            rows.append(f'<div class="results {name}">{what} <svg aria-hidden="true">{grid}{bar}</svg> <span>{share:.3f} [{low:.3f}, {high:.3f}]</span></div>')
    big = " → ".join(f"{results[name]['accuracy']:.3f}" for name in ("before", "after") if name in results)
    note = f"accuracy on {next(iter(results.values()))['n']} test items; below with 95% intervals from 0 to 1" if rows else "Not evaluated yet."
    return f'<div><p class="big">{big}</p><p class="soft">{note}</p>{"".join(rows)}</div>'


def header(run: Path, config: dict, versions: dict, results: dict, step: int) -> str:
    """Name, accuracies, and the facts that a reader asks for first."""
    short = lambda name: Path(name).name if data.is_path(name) else name       # the page is passed on: no folders of this machine in it
    batch = f"{config['prompts']} " + ("demonstrations" if config["algo"] == "sft" else f"prompts x {config['samples']} completions")
    facts = {"algorithm": config["algo"], "data set": " ".join([short(config["dataset"]), config["task"], config["target"]]), "reward": config["reward"],
             "model": "tiny, made in code" if config["model"] in runs.MADE_HERE else short(config["model"]), "begun from": Path(config["init"]).name,
             "weights": "all" if config["full"] else f"adapters of rank {config['lora']}", "step": f"{step} of {config['steps']}", "batch": batch,
             "learning rate": config["lr"], "seed": config["seed"], "versions": ", ".join(f"{name} {version}" for name, version in versions.items())}
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value != "")
    return f"<header><h1>{escape(run.resolve().name)}</h1>{accuracies(results)}<dl>{listed}</dl></header>"


def page(run: Path, items=None) -> str:
    """The HTML of a run folder."""
    config = runs.read_run(str(run))
    if not config:
        raise UsageError(f"{run} is no run folder: there is no run.json in it")
    versions = runs.read_json(run / "run.json", "start a new run").get("versions", {})
    results = runs.read_json(run / "eval.json", "delete it, and evaluate again") if (run / "eval.json").exists() else {}
    (metrics, notes), (rows, lost) = rows_of(run / "metrics.jsonl", {"step"}), rows_of(run / "rollouts.jsonl", NEEDED)
    items = {item.id: item for item in (local_items(config) if items is None else items)}
    groups = [group_of(list(group), items, config) for _, group in groupby(rows, lambda row: (row["step"], row["group"]))]
    pictures, unseen = pictures_of(groups, items)
    missing = ["pictures and prompts, since the data set is not at hand"] if groups and not items and config["dataset"] not in TEXT_SETS else []
    left_out = "; ".join(notes + lost + unseen + missing)
    weights = rewards.weights(SimpleNamespace(**config), groups[0]["task"]) if groups else {}
    log = json.dumps({"groups": groups, "pictures": pictures, "colours": STAGE_COLOURS, "weights": weights}, separators=(",", ":"))       # all ASCII
    for sign in "<>&":                                                        # without them no tag, comment or entity can begin or end
        log = log.replace(sign, f"\\u{ord(sign):04x}")
    hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f"<title>{escape(run.resolve().name)}: report</title><style>{STYLE}</style></head>\n<body><main>"
            f"{header(run, config, versions, results, metrics[-1]['step'] if metrics else 0)}<p class=\"soft\">{left_out and f'Left out: {left_out}.'}</p>"
            f"{charts(metrics, config) if metrics else '<p>No step is logged yet.</p>'}<h2>Completions</h2>{CONTROLS}</main>\n"
            f'<script type="application/json" id="log">{log}</script>\n<script>{SCRIPT}</script></body></html>\n')


def write(run: Path, out: Path | None = None, items=None) -> Path:
    """Write the page of a run folder, by default to RUN/report.html: beside it first, then renamed. items: the run's training items, where they are at hand."""
    out = Path(out) if out else run / "report.html"
    beside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    with runs.writing(out.parent, out.name):
        try:
            beside.write_bytes(page(run, items).encode("utf-8", errors="replace"))           # a name may hold half a character
            beside.replace(out)
        except (KeyError, AttributeError) as error:
            raise UsageError(f"{run}: its run.json was written by another version of this code ({error})") from None
        finally:
            beside.unlink(missing_ok=True)
    return out


# --------------------------------------------------------------------------------------------------- what the page is made of
STYLE = """
:root { --back: #fff; --front: #1b1f24; --soft: #596270; --line: #d9dee5; --card: #f6f8fa; --main: #0b62c4; --dev: #b84a00; --good: #0b7a4b; --bad: #c02626 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f1216; --front: #e6e9ee; --soft: #9aa5b4; --line: #2c333d; --card: #181d24; --main: #6cb0ff; --dev: #ffa057; --good: #4fd19a; --bad: #ff7b7b } }
* { box-sizing: border-box } main { max-width: 1500px; margin: 0 auto; padding: 16px } p { margin: 0 0 8px } .big { font-size: 2.4em; font-weight: 600; line-height: 1.1 }
body { margin: 0; background: var(--back); color: var(--front); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
h1 { font-size: 1.7rem; margin: 0; grid-column: 1 / -1 } h2 { font-size: 1.25rem; margin: 28px 0 8px } h3 { font-size: 1rem; margin: 0 }
.soft, summary, dt, label { color: var(--soft); font-size: .85rem } i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: 5px }
header { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 12px 40px }
.results { display: flex; flex-wrap: wrap; gap: 0 14px } .results span { flex: 0 0 9em } .results svg { flex: 1 1 150px; min-width: 0; height: 20px; color: var(--soft) }
.results svg + span { flex-basis: 13em } .after { font-weight: 600 } .after svg { color: var(--main) } .bar { fill: currentColor; stroke: currentColor; stroke-width: 3 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 6px 16px; margin: 0; align-self: start } dd { margin: 0 }
.alarms { border-left: 4px solid var(--bad); padding-left: 14px } .alarms h2 { color: var(--bad) } ul { margin: 0; padding-left: 18px; max-height: 12em; overflow: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px 20px; margin-top: 20px }
figure { margin: 0; display: grid; align-content: space-between } svg { width: 100%; display: block; overflow: visible } text { fill: var(--soft); font-size: 11px }
.grid { stroke: var(--line) } .band { fill: var(--main); opacity: .18 } .curve { fill: none; stroke: var(--main); stroke-width: 2; stroke-linejoin: round }
.dev { fill: var(--dev); stroke: var(--dev); stroke-width: 1.5 } .alarm { stroke: var(--bad); fill: var(--bad) } .hit { opacity: 0 } .hit:hover { opacity: .1 }
form, .top, .asked, .head { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline } .top > *, .head > * { unicode-bidi: isolate } label { display: grid }
form { gap: 8px 16px; align-items: end; padding: 8px; margin-bottom: 8px; border: 1px solid var(--line); background: var(--card) }
@media (min-width: 900px) { form { position: sticky; top: 0; z-index: 1 } html { scroll-padding-top: 90px } }
input, select, button { font: inherit; color: var(--front); background: var(--back); border: 1px solid var(--soft); border-radius: 6px; padding: 4px 8px }
input { width: 6.2em } select { max-width: 14em } button, summary { cursor: pointer } :focus-visible { outline: 3px solid var(--main); outline-offset: 2px }
.group { border-top: 1px solid var(--line); padding: 16px 0 } .asked { margin: 8px 0; align-items: start } .words { flex: 1 1 300px } .gold { font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 10px } .text { white-space: pre-wrap; unicode-bidi: plaintext }
.card { border: 1px solid var(--line); border-top: 4px solid var(--bad); border-radius: 8px; background: var(--card); padding: 8px 10px; min-width: 0 }
.card.right { border-top-color: var(--good) } .card .text { font: 13px/1.5 ui-monospace, monospace; margin-top: 6px } .tag { color: var(--main); font-weight: 600 }
.head strong { font-size: 1.3rem } .right .mark, .up { color: var(--good) } .wrong .mark, .down, .cut { color: var(--bad) } .token { margin-right: .3em }
.picture { position: relative; overflow: hidden; width: 224px; line-height: 0 } .card .picture { width: 150px; margin-top: 6px } img { width: 100% }
.small { image-rendering: pixelated } .box { position: absolute; border: 2px solid #12a150 } .box.said { border: 2px dashed #e8590c }
"""

CONTROLS = """<noscript><p>The charts need no script; the completions do.</p></noscript>
<form id="controls"><label>step from <input type="number" id="from"></label><label>to <input type="number" id="to"></label>
<label>reward from <input type="number" id="least" step="any"></label><label>to <input type="number" id="most" step="any"></label>
<label>answer <select id="answer"><option value="">right and wrong</option><option>right</option><option>wrong</option></select></label>
<label>stage <select id="stage"><option value="">all</option></select></label>
<label>shade tokens by <select id="shade"><option value="">nothing</option><option value="entropy">entropy: violet unsure, most at 2 nats</option>
<option value="ratio">ratio: blue likelier after the update, most at 1.25; orange less, most at 0.8</option></select></label><button type="reset">clear</button></form>
<p id="state" class="soft" role="status"></p><div id="groups"></div><button id="more">show more groups</button>"""

SCRIPT = r"""
"use strict";
const at = id => document.getElementById(id), value = id => at(id).value, log = JSON.parse(at("log").textContent), PAGE = 20, LONG = 4000;
const show = x => x == null ? "none" : String(+x.toFixed(3));
let chosen = [], done = 0;

function make(tag, name, ...content) {                              // the only way onto the page: what a model wrote is appended as text, never as HTML
  const node = Object.assign(document.createElement(tag), {className: name});
  node.append(...content);
  return node;
}
function long(text, parts) {                                        // parts(size): at first the beginning of a long text, all of it when asked for
  const node = make("div", "text", ...parts(LONG)), button = make("button", "", "show all of " + text.length.toLocaleString("en") + " characters");
  node.dir = "auto";
  button.onclick = () => { button.remove(); node.replaceChildren(...parts(Infinity)); };
  return make("div", "", node, text.length > LONG ? button : "");
}
function tagged(text) {
  return text.split(/(<\/?(?:think|answer)>)/).map((part, i) => i % 2 ? make("span", "tag", part) : part);
}
function tokens({pieces, entropy, ratio}, shade, size) {            // with gaps: decoded one by one, they often lack the spaces of the text
  const violet = x => "rgb(150 90 220 / " + Math.min(x / 2, 1) * .7 + ")", far = x => Math.min(Math.abs(Math.log(x ?? 1) / Math.log(1.25)), 1) * .7;
  const colour = shade === "entropy" ? i => violet(entropy[i]) : i => (ratio[i] > 1 ? "rgb(20 120 230 / " : "rgb(240 120 0 / ") + far(ratio[i]) + ")";
  const attributes = i => ({style: "background: " + colour(i), title: "entropy " + entropy[i] + (ratio ? ", ratio " + ratio[i] : "")});
  return pieces.slice(0, size).flatMap((piece, i) => [Object.assign(make("span", "token", piece), attributes(i)), make("wbr", "")]);
}
function picture([width, height, png], gold, said) {
  const frame = make("div", "picture", Object.assign(make("img", width < 200 ? "small" : ""), {src: "data:image/png;base64," + png, alt: "picture of the question"}));
  for (const [name, boxes] of [["box", gold], ["box said", said]])
    for (const [x1, y1, x2, y2] of boxes)
      frame.appendChild(make("div", name)).style.inset = [y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width].map(x => 100 * x + "%").join(" ");
  return frame;
}
function card(row, {gold}, seen) {
  const boxes = Array.isArray(gold), tone = row.advantage > 0 ? "up" : row.advantage < 0 ? "down" : "soft", shade = value("shade");
  const paid = Object.keys(log.weights).map(name => name + " " + show(row.parts[name]) + " × " + show(log.weights[name]));
  const unpaid = Object.keys(row.parts).filter(name => row.parts[name] && !(name in log.weights)).map(name => ", " + name + " " + show(row.parts[name]));
  return make("article", row.correct ? "card right" : "card wrong",
    make("div", "head", make("strong", "", show(row.reward)), make("span", "mark", row.correct ? "✓ right" : "✗ wrong"),
      make("span", tone, "advantage " + show(row.advantage)), make("span", "cut", row.finished ? "" : "cut at the limit")),
    make("div", "soft", Object.assign(make("i", ""), {style: "background: " + log.colours[row.stage]}), row.stage + ", " + row.tokens + " tokens"),
    make("div", "soft", paid.join(" + "), ...unpaid),
    make("div", "", boxes ? "boxes in the answer: " + row.predicted.length : "answer: " + (row.predicted || "none that can be read")),
    boxes && seen ? picture(seen[0], gold, row.predicted.slice(0, 100)) : "",
    long(row.text, size => row[shade] ? tokens(row, shade, size) : tagged(row.text.slice(0, size))));
}
function article(group, rows) {
  const {step, id, gold, prompt} = group, seen = log.pictures[id], boxes = Array.isArray(gold), right = group.rows.filter(row => row.correct).length;
  const parts = prompt.map(([role, text]) => make("details", "", make("summary", "", role), long(text, size => [text.slice(0, size)])));
  parts[parts.length - 1].open = true;
  return make("article", "group",
    make("div", "top", make("h3", "", "step " + step + ", group " + group.group), right + " of " + group.rows.length + " right", make("span", "soft", id)),
    make("div", "asked", ...(seen ?? []).map(each => picture(each, boxes ? gold : [], [])), make("div", "words", ...parts,
      make("div", "gold", "gold: " + (boxes ? JSON.stringify(gold) : gold)), make("div", "soft", boxes && seen ? "solid green: gold; dashed orange: answer" : ""))),
    make("div", "cards", ...rows.map(row => card(row, group, seen))));
}
function more(count) {
  at("groups").append(...chosen.slice(done, done + count).map(([group, rows]) => article(group, rows)));
  done = Math.min(done + count, chosen.length);
  const matching = chosen.reduce((sum, [group, rows]) => sum + rows.length, 0).toLocaleString("en");
  at("state").textContent = done + " of " + chosen.length + " groups shown, with " + matching + " completions that match";
  at("more").hidden = done === chosen.length;
}
function again(count) {                                             // filter, newest first, and show the first so many groups
  const within = (x, low, high) => (!low || x !== null && x >= +low) && (!high || x !== null && x <= +high), is = (id, x) => ["", x].includes(value(id));
  const fits = row => within(row.reward, value("least"), value("most")) && is("answer", row.correct ? "right" : "wrong") && is("stage", row.stage);
  const inside = log.groups.filter(group => within(group.step, value("from"), value("to"))).reverse();
  chosen = inside.map(group => [group, group.rows.filter(fits)]).filter(([group, rows]) => rows.length);
  at("groups").replaceChildren();
  done = 0;
  more(count);
}
at("stage").append(...Object.keys(log.colours).map(name => new Option(name)));
at("controls").oninput = event => again(event.target.id === "shade" ? done : PAGE);
at("controls").onreset = () => setTimeout(again, 0, PAGE);          // the fields are cleared after this event
at("more").onclick = () => more(PAGE);
again(PAGE);
"""


# --------------------------------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    p = evaluation.Parser(prog="report.py", description="One HTML page of a run: curves, alarms, and every logged completion. No network is needed to make or to see it.")
    p.add_argument("run", metavar="RUN", help="a run folder of train.py, finished or not")
    p.add_argument("--out", metavar="FILE.html", help="default RUN/report.html")
    args = p.parse_args(argv)
    out = write(runs.run_of(args.run)[0], args.out)
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
