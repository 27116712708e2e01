"""The page of a run: nothing in it runs or loads but our own script, whatever a policy wrote; and
in a browser its controls do what they say."""

import base64
import doctest
import hashlib
import html
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import data
import rewards
from support import charts, hub, report, statistics
from support.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    **dict(dataset="demo", data_dir="", task="", knowledge="none"),
    **dict(style="think", model="", init="", algo="grpo", full=True, lora=16, prompts=4),
    **dict(samples=4, steps=9, lr=1e-3, seed=0, reward="med-rlvr", w_format=0.5, w_leak=0.0),
    **dict(w_before=0.0, w_short=0.0, w_overlong=0.0, recite=0.0),
}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script x='",
    "</SCRIPT/",
    "<!--<script ",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "\u2028\u2029 & &lt; &amp;",
    "\x00\x07\x1b[31m\x7f\r",
    "\u202egnorw si txet siht",
    "مرحبا بالعالم שלום 👩\u200d⚕️ é",
    "half a character: \ud800",
    "]]>",
    "javascript:alert(1)",
    "https://example.com/x.png",
    "' \" ` ${1} $log \\u003c \\",
    "<svg onload=alert(1)>",
]
RESULT = {
    **{"accuracy": 0.25, "ci95": [0.1, 0.4], "n": 40},
    **{"sampled_accuracy": 0.2, "sampled_ci95": [0.1, 0.3]},
}


def metric(step: int, **changes) -> dict:
    """A line of metrics.jsonl."""
    stages = dict.fromkeys(rewards.STAGES, 0.0)
    stages |= {rewards.STAGES[0]: 1 / step, rewards.STAGES[5]: 1 - 1 / step}
    row = {"step": step, "reward": 0.1 * step, "accuracy": 0.5, "length": 20.0 + step}
    row |= {"entropy": 1 / step, "kl": 0.01 * step, "part_truncated": 0.0, "stages": stages}
    return row | changes


def rollout(step: int, k: int = 0, **changes) -> dict:
    """A line of rollouts.jsonl: the k-th of its group, which is right where k is even."""
    right, letter = k % 2 == 0, "AB"[k % 2]
    text = f"<think> step {step} and row {k} </think> <answer> {letter} </answer>"
    pieces = re.findall(r"\s*\S+", text)
    row = {"step": step, "group": 0, "id": f"q{step}", "question": "Which of the two?"}
    row |= {"options": ["fever", "cough"], "gold": "A", "frame": None, "text": text}
    row |= {"reward": float(right), "parts": {"accuracy": float(right), "malformed": 0.0}}
    row |= {"advantage": 1.0 if right else -1.0, "correct": right, "finished": k != 3}
    row |= {"stage": rewards.STAGES[5 if right else 2], "predicted": letter}
    row |= {"tokens": len(pieces), "pieces": pieces}
    row |= {"logps": [round(-0.1 * i, 3) for i in range(len(pieces))]}
    return row | changes


def not_sampled(step: int, k: int = 0, **changes) -> dict:
    """A demonstration: it has no log-probs."""
    row = rollout(step, k, **changes)
    del row["logps"]
    return row


def from_before(step: int, k: int = 0) -> dict:
    """A line as it was once written: entropy and ratio of each token instead of its log-prob."""
    n = len(rollout(step, k)["pieces"])
    return not_sampled(step, k, entropy=[1.5] * n, ratio=[1.25] * n)


def make_run(folder: Path, rollouts=(), metrics=(), results=None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": CONFIG | config, "versions": {"torch": "2"}}
    (folder / "run.json").write_text(json.dumps(content))
    for name, rows in (("rollouts", rollouts), ("metrics", metrics)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    if results:
        (folder / "eval.json").write_text(json.dumps(results))
    return folder


class Page(HTMLParser):
    """A report as a browser reads it: every tag and script with its attributes, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.scripts, self.text, self.inside = [], [], "", None
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.log = json.loads(self.scripts[0][1])
        self.groups, self.pictures = self.log["groups"], self.log["pictures"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + text)
        elif self.inside != "style":
            self.text += text + " "

    def charts(self) -> list[str]:
        return [found["aria-label"] for tag, found in self.tags if "aria-label" in found]

    def paths(self, kind: str) -> list[str]:
        return [found["d"] for tag, found in self.tags if tag == "path" and found["class"] == kind]


@pytest.fixture
def read(tmp_path):
    def read(rollouts=(), metrics=(), results=None, **config) -> Page:
        return Page(report.write(make_run(tmp_path / "run", rollouts, metrics, results, **config)))

    return read


def test_doctests():
    failed, tried = doctest.testmod(charts)
    assert tried and not failed


# ------------------------------------------------------------------------------ what it shows
def test_the_numbers_of_a_run(read, tmp_path):
    metrics = [
        metric(1),
        metric(2, dev_accuracy=0.75, dev_ci95=[0.6, 0.9]),
        metric(3, alarms=["reward rose <b>while</b>"]),
    ]
    after = RESULT | {"accuracy": 0.875, "ci95": [0.7, 0.95]}
    page = read((), metrics, {"before": RESULT, "after": after})
    for text in (
        *("0.250 → 0.875", "0.250 [0.100, 0.400]", "0.875 [0.700, 0.950]", "0.200 [0.100, 0.300]"),
        *("40 test items", "grpo", "3 of 9", "torch 2", "Alarms", "reward rose <b>while</b>"),
        *rewards.STAGES,
    ):
        assert text in page.text, text
    # 4 prompts x 4 completions, half of them right.
    half = "0.5 [{:.4g}, {:.4g}]".format(*statistics.wilson(8, 16))
    assert f"step 2: {half}, on dev 0.75 [0.6, 0.9]" in page.text and "Loss" not in page.text
    labels = " ".join(page.charts())
    for text in (
        *("Reward: 0.1 at step 1; 0.3 at step 3", f"Accuracy: {half} at step 1;"),
        *("Length", "Entropy", "KL", "Cut at the limit", f"{rewards.STAGES[5]} 67% at step 3"),
    ):
        assert text in labels, text
    assert "Left out" not in page.text and not list((tmp_path / "run").glob(".*"))


def test_the_completions_of_a_run(read):
    page = read([rollout(s, k) for s in (1, 2) for k in range(4)], [metric(1), metric(2)])
    first = page.groups[0]
    item = data.Item("q1", "choice", "Which of the two?", ("fever", "cough"), "A")
    assert first["prompt"] == [[m["role"], m["content"]] for m in data.messages(item)]
    assert first["gold"] == "A. fever"
    assert [row["finished"] for row in first["rows"]] == [True, True, True, False]
    assert [row["predicted"] for row in first["rows"]] == list("ABAB")
    for name in ("pieces", "logps", "stage", "text"):
        assert first["rows"][1][name] == rollout(1, 1)[name]
    assert page.log["reward"] == "med-rlvr" and not any(page.log["terms"].values())


def test_what_a_policy_wrote_stays_text(read):
    texts = [*HOSTILE, "".join(HOSTILE) * 20, "x" * 1_000_000]
    rows = []
    for step, text in enumerate(texts):
        asked = {"id": text, "question": text, "options": [text, "b"]}
        said = {"text": text, "pieces": [text], "stage": text, "predicted": text}
        rows.append(rollout(step, **asked, **said, logps=[-1.0], parts={text: 1.0}))
    page = read(rows, [metric(1, alarms=texts)], lr=texts, algo=texts[-2])

    types = [attributes.get("type") for attributes, _ in page.scripts]
    assert types == ["application/json", None] and page.scripts[1][1] == report.own_file("js")
    loading = {"img", "image", "iframe", "link", "object", "embed", "base", "a"}
    assert not {tag for tag, _ in page.tags} & loading
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "xlink:href", "action", "srcset"}
    assert not [name for name in names if name.startswith("on")]
    log = page.scripts[0][1]
    assert log.isascii() and not set(log) & set("<>&\x00")
    for group, text in zip(page.groups, texts, strict=True):
        row = group["rows"][0]
        assert row["text"] == row["stage"] == row["predicted"] == group["id"] == text
        assert row["pieces"] == [text] and row["parts"] == {text: 1.0}
        assert text in group["prompt"][1][1]


def test_the_policy_lets_only_our_script_run(read):
    page = read([rollout(1)], [metric(1)])
    policy = next(found["content"] for _, found in page.tags if "http-equiv" in found)
    digest = hashlib.sha256(page.scripts[-1][1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "http" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    assert not re.search(r"https?://|innerHTML|@import|url\(", page.source)


def test_no_number_breaks_the_page(read):
    strange = [float("nan"), float("inf"), -float("inf"), None]
    rows, metrics = [], []
    for step, value in enumerate(strange, start=1):
        parts, logps = {"accuracy": value}, [value] * 7
        rows.append(rollout(step, reward=value, advantage=value, parts=parts, logps=logps))
        names = ("reward", "accuracy", "dev_accuracy", "stages", "length", "alarms")
        metrics.append(metric(step, **dict.fromkeys(names, value)))
    page = read(rows, metrics)
    assert [group["rows"][0]["reward"] for group in page.groups] == [None] * 4
    assert not re.search(r"NaN|Infinity\b|nan\b", page.source.replace(report.own_file("js"), ""))
    titles = [chart.partition(":")[0] for chart in page.charts()]
    assert titles == ["Entropy", "KL", "Cut at the limit"]


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-12, 1e6, 12345.678])
@pytest.mark.parametrize("bounds", [(), (0,)])
def test_a_flat_curve_of_one_step_or_many(value, bounds):
    """A KL of 0 at the first step, say, would leave an axis without a length."""
    for last in (1, 2, 700):
        steps = range(1, last + 1)
        points = dict.fromkeys(steps, (value,) * 3)
        drawn = charts.curve("KL", "", list(steps), [], points, bounds)
        assert f"KL: {value:.4g} at step 1; {value:.4g} at step {last}" in drawn


# ------------------------------------------------------------------------------ what may be missing
def test_steps_without_rollouts_leave_a_gap(read):
    page = read((), [metric(1), {"step": 2, "lr": 1e-3}, metric(3, groups_unfilled=4), metric(4)])
    curves = page.paths("curve")
    assert len(page.charts()) == 7 and len(curves) == 6
    for curve in curves:  # step 1 alone, a gap, then 3 to 4
        assert re.sub(r"[^ML]", "", curve) == "MML"


def test_supervised_runs_show_their_loss(read):
    metrics = [metric(1, loss=2.0, dev_accuracy=0.5), metric(2, loss=1.0)]
    page = read([not_sampled(1)], metrics, algo="sft")
    labels = " ".join(page.charts())
    assert "Loss: 2 at step 1; 1 at step 2" in labels
    assert "Accuracy: on dev 0.5 at step 1" in labels
    assert "Reward" not in labels and "Stages" not in labels
    assert "4 demonstrations" in page.text and "logps" not in page.groups[0]["rows"][0]


def test_logs_of_before_are_shown_without_their_ratios(read):
    row = read([from_before(1)], [metric(1)]).groups[0]["rows"][0]
    assert row["text"] == rollout(1)["text"]
    assert not row.keys() & {"entropy", "ratio", "logps"}


def test_an_empty_run(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "rollouts.jsonl").unlink()
    page = Page(report.write(run, tmp_path / "x.html"))
    assert "No step is logged" in page.text and "Not evaluated yet" in page.text
    assert not page.groups


def test_damaged_lines_are_counted(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1), metric(2)])
    damaged = b'{"step": 2, "gro\n\xff\xfe\n[1]\n"x"\n{"step": 2, "group": 0}\n' + b"[" * 100_000
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write(damaged + b"\n\n" + json.dumps(rollout(3)).encode() + b'\n{"step": 4')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    page = Page(report.write(run))
    assert [group["step"] for group in page.groups] == [1, 3]
    note = "1 damaged lines of metrics.jsonl; 7 damaged lines of rollouts.jsonl."
    assert f"Left out: {note}" in page.text


# ------------------------------------------------------------------------------ pictures
def seen(items, **changes) -> list[dict]:
    """A line for each item, answered with its gold."""
    rows = []
    for step, item in enumerate(items, start=1):
        row = rollout(step, parts={"iou": 1.0, "malformed": 0.0}, id=item.id)
        row |= {"question": item.question, "options": list(item.options), "gold": item.answer}
        row |= {"text": data.completion(item), "predicted": item.answer}
        rows.append(row | changes)
    return rows


@pytest.fixture(scope="module")
def lesions():
    return data.load("demo-images", "train", task="localize")[:3]


def test_an_item_to_localize_gets_its_picture(read, lesions):
    rows = seen(lesions) + seen(lesions[:1], step=4, frame=[100, 50, 56, 56])
    page = read(rows, [metric(1)], dataset="demo-images", task="localize")
    first, framed = page.groups[0], page.groups[3]
    assert first["gold"] == first["rows"][0]["predicted"] == [list(lesions[0].answer[0])]
    assert "Where is the lesion?" in first["prompt"][1][1]
    assert "100 x 50 image" in framed["prompt"][0][1]
    assert set(page.pictures) == {item.id for item in lesions}
    ([width, height, png],) = page.pictures[lesions[1].id]
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    assert image.size == (width, height) == (56, 56)
    assert image.convert("L").tobytes() == lesions[1].image.tobytes()


@pytest.fixture
def picture_run(tmp_path) -> Path:
    """A run on a data set of 40 items, in tmp_path / "set", that share one picture of 1000 x 500"""
    picture, folder = tmp_path / "a.png", tmp_path / "set"
    Image.new("RGB", (1000, 500), "red").save(picture)
    folder.mkdir()
    item = {"image": str(picture), "label": "x", "labels": ["x", "y"]}
    lines = "".join(json.dumps({"id": f"i{k}"} | item) + "\n" for k in range(40))
    for split in data.SPLITS:
        (folder / f"{split}.jsonl").write_text(lines)
    rows = seen(data.load(str(folder), "train"))
    return make_run(tmp_path / "run", rows, [metric(1)], dataset=str(folder))


def test_pictures_are_shrunk_and_the_newest_kept(picture_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURES", 10)
    page = Page(report.write(picture_run))
    assert set(page.pictures) == {f"i{k}" for k in range(30, 40)}
    assert "Left out: the pictures of 30 items." in page.text and str(tmp_path) not in page.text
    ([width, height, png],) = page.pictures["i39"]
    assert (width, height) == (1000, 500)
    assert Image.open(io.BytesIO(base64.b64decode(png))).size == (336, 168)


def test_items_that_a_caller_has_are_not_read_again(picture_run, tmp_path):
    items = data.load(str(tmp_path / "set"), "train")
    assert set(Page(report.write(picture_run, items=items[39:])).pictures) == {"i39"}
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert "the pictures of 40 items" in Page(report.write(picture_run, items=items)).text


def test_a_data_set_that_is_gone_is_named_without_its_folder(picture_run, tmp_path):
    (tmp_path / "set").rename(tmp_path / "gone")
    page = Page(report.write(picture_run))
    note = "Left out: pictures and prompts, since the data set is not at hand."
    assert note in page.text and str(tmp_path) not in page.text
    assert not page.pictures and page.groups[0]["prompt"][0][0] == "question"


DATASETS = ["medqa", "mmlu-pro-health", "retinamnist", "pathmnist-28", "bccd", "no-such-set"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_nothing_is_downloaded(read, monkeypatch, tmp_path, dataset):
    def asked(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "fetch", asked)
    monkeypatch.setattr(hub, "download", asked)
    monkeypatch.setattr("urllib.request.urlopen", asked)
    page = read([rollout(1)], [metric(1)], dataset=dataset)
    in_log = dataset in report.TEXT_SETS
    assert page.groups[0]["prompt"][0][0] == ("system" if in_log else "question")
    assert ("not at hand" in page.text) == (not in_log)


def test_knowledge_stands_in_the_prompt_where_it_is_known(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)], knowledge="task")
    item = data.Item("q1", "choice", "?", (), "A", knowledge=("What everybody knows.",))
    known = Page(report.write(run, items=[item])).groups[0]["prompt"]
    assert "What everybody knows." in known[1][1]
    unknown = Page(report.write(run)).groups[0]["prompt"]
    assert unknown == [["question", "Which of the two?\nfever\ncough"]]


# ------------------------------------------------------------------------------ size
@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, float]:
    """The page of 10,000 completions, and the seconds it took to write."""
    rows = [rollout(s, k) for s in range(1, 1251) for k in range(8)]
    metrics = [metric(s) for s in range(1, 1251)]
    run = make_run(tmp_path_factory.mktemp("large"), rows, metrics)
    started = time.perf_counter()
    return report.write(run), time.perf_counter() - started


def test_ten_thousand_completions_in_seconds(large):
    path, seconds = large
    assert seconds < 15 and path.stat().st_size < 20e6
    assert sum(len(group["rows"]) for group in Page(path).groups) == 10_000


def test_the_newest_of_a_long_log_are_shown(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [rollout(s) for s in range(1, 6)], [metric(1)])
    monkeypatch.setattr(report, "SIZE", 2.5 * len(json.dumps(rollout(1))))
    page = Page(report.write(run))
    assert [group["step"] for group in page.groups] == [4, 5]
    assert "Left out: 3 older lines of rollouts.jsonl." in page.text


# ------------------------------------------------------------------------------ command line
def test_the_script_starts_from_anywhere(tmp_path):
    make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    argv = [sys.executable, ROOT / "support" / "report.py", "run", "--out", "a.html"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "a.html: 0.0 MB\n"), done.stderr
    assert Page(tmp_path / "a.html").groups


def test_a_mistake_ends_the_command_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(report.__file__, run_name="__main__")
    line = f"report.py: {tmp_path} is no run folder: there is no run.json in it\n"
    assert left.value.code == 2 and capsys.readouterr().err == line


def test_mistakes_are_one_line(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    outs = [tmp_path / "no" / "a.html", run / "run.json" / "a.html", run, ".", "/"]
    for argv in (
        *([], [str(run), "--nonsense"], [str(tmp_path)]),
        *([str(run), "--out", str(out)] for out in outs),
    ):
        with pytest.raises(UsageError) as error:
            report.main(argv)
        assert "\n" not in str(error.value)
    left = sorted(path.name for path in run.iterdir())
    assert left == ["metrics.jsonl", "rollouts.jsonl", "run.json"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("eval.json", "{", "eval.json is damaged"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", '{"config": {"algo": "grpo"}}', "another version"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, message):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    (run / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        report.write(run)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    before = report.write(run).read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left"):
        report.write(run)
    assert (run / "report.html").read_bytes() == before and not list(run.glob(".*"))


# ------------------------------------------------------------------------------ in a browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROME = next(filter(None, map(shutil.which, NAMES)), None)
browser = pytest.mark.skipif(not CHROME and not os.environ.get("CI"), reason="no Chromium here")


def browse(path: Path) -> str:
    """The DOM after a while, as Chromium has it; any error on its console is a failure."""
    assert CHROME, "CI needs Chromium: apt-get install chromium"
    argv = [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    argv += [f"--user-data-dir={path.parent / 'chrome'}", "--enable-logging=stderr", "--v=0"]
    argv += ["--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    done = subprocess.run(argv, capture_output=True, timeout=120)
    console = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in console if "CONSOLE" in line or "Uncaught" in line]
    if errors:
        pytest.fail("\n".join(errors))
    return done.stdout.decode("utf-8", errors="replace")


TOOLS = """
const at = id => document.getElementById(id);
const all = name => [...document.querySelectorAll(name)];
const texts = name => all(name).map(node => node.textContent);
const cards = () => all(".card").length;
const set = (id, value) => {
  at(id).value = value;
  at(id).dispatchEvent(new Event("input", {bubbles: true}));
};
"""


def ask(path: Path, script: str, width: int = 1280):
    """What `script`, the body of an async function that runs on a copy of the page, returns.

    The copy is shown in a frame, which may be narrower than Chromium's least window.
    """
    probe = (
        f"<script>(async () => {{ {TOOLS} {script} }})()"
        ".then(found => parent.postMessage(JSON.stringify(found), '*'))</script></body>"
    )
    page = path.read_text(encoding="utf-8").replace("</body>", probe)
    page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page, count=1)
    path.with_name("probe.html").write_text(page, encoding="utf-8")
    frame = path.with_name("frame.html")
    frame.write_text(
        "<body><script>onmessage = event => { document.body.dataset.result = event.data; }</script>"
        f"<iframe src=probe.html width={width} height=900 style='border:0'></iframe>"
    )
    return json.loads(html.unescape(re.search(r'data-result="([^"]*)"', browse(frame))[1]))


@browser
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    rows = [rollout(s, k) for s in range(1, 4) for k in range(4)]
    run = make_run(tmp_path / "run", rows, [metric(s) for s in range(1, 4)])
    dom = browse(report.write(run))
    assert dom.count('class="card ') == 12 and "✓ right" in dom
    assert "3 of 3 groups shown, with 12 completions that match" in dom
    assert "0 of 0 groups shown" in browse(report.write(make_run(tmp_path / "empty")))


@browser
def test_a_card_says_how_its_reward_comes_about(tmp_path):
    """Paid 1 by the paper; half of a leak that costs 1/2, and a quarter of what recitation adds."""
    parts = {"accuracy": 1.0, "format": 1.0, "malformed": 0.0, "leak": 0.5, "recite": 0.25}
    rows = [rollout(1, reward=1.0, parts=parts), rollout(1, 1)]
    run = make_run(tmp_path / "run", rows, [metric(1)], w_leak=0.5, recite=1.0)
    lines = ask(report.write(run), "return texts('.card .soft');")
    assert "med-rlvr 1 + leak 0.5 × -0.5 + recite 0.25 × 1, accuracy 1, format 1" in lines
    assert "med-rlvr 0" in lines


@browser
def test_the_page_stops_a_script_that_is_not_ours(tmp_path):
    page = report.write(make_run(tmp_path / "run"))
    alien = "<script>document.title = 'run'</script></body>"
    page.write_text(page.read_text().replace("</body>", alien))
    with pytest.raises(pytest.fail.Exception, match="Content Security Policy"):
        browse(page)


@browser
def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    rows = []
    for k, text in enumerate(HOSTILE):
        said = {"text": text, "pieces": [text], "stage": text, "predicted": text}
        rows.append(rollout(1, k, id="<b>", question=text, logps=[-1.0], parts={text: 1}, **said))
    run = make_run(tmp_path / "run", rows, [metric(1, alarms=HOSTILE)], lr=HOSTILE[0])
    result = ask(
        report.write(run),
        """
        const found = {tagged: texts(".card .text")};
        set("shade", "probability");
        found.shaded = texts(".card .text");
        found.alien = ["img", "script", "a", "b", "svg"].map(tag => all("#groups " + tag).length);
        found.title = document.title;
        return found;""",
    )
    expected = [text.replace("\ud800", "\ufffd") for text in HOSTILE]
    for way in ("tagged", "shaded"):
        assert [text.replace("\ud800", "\ufffd") for text in result[way]] == expected
    assert result["alien"] == [0] * 5 and result["title"] == "run: report"


@browser
def test_filters_and_more(tmp_path):
    rows = [rollout(s, k) for s in range(1, 51) for k in range(4)]
    rows[-4]["text"] = "long " * 2000  # the first card of the newest group
    run = make_run(tmp_path / "run", rows, [metric(s) for s in range(1, 51)])
    result = ask(
        report.write(run),
        """
        const found = {}, state = () => at("state").textContent;
        const first = () => texts(".card .text")[0].length;
        found.start = [cards(), texts("h3")[0], first()];
        all(".card button")[0].click(); found.whole = first();
        at("more").click(); found.more = [cards(), state()];
        set("shade", "probability"); found.kept = [cards(), all(".token").length > 0];
        set("shade", ""); at("more").click(); found.all = [cards(), at("more").hidden];
        set("first", 10); set("last", 12); found.steps = [cards(), texts("h3")];
        set("answer", "right"); found.right = [cards(), all(".card.wrong").length, state()];
        set("answer", ""); set("stage", "concise structurer");
        found.stage = [cards(), all(".card.right").length];
        set("stage", ""); set("least", "0.5"); found.least = cards();
        set("least", ""); set("most", "0"); found.most = cards();
        set("most", "-1"); found.none = [cards(), state()];
        set("shade", "probability"); set("answer", "wrong");
        document.querySelector("button[type=reset]").click();
        await new Promise(wait => setTimeout(wait, 100));
        found.cleared = [cards(), all(".token").length];
        return found;""",
    )
    assert result == {
        "start": [80, "step 50, group 0", 4000],
        "whole": 10_000,
        "more": [160, "40 of 50 groups shown, with 200 completions that match"],
        "kept": [160, True],
        "all": [200, True],
        "steps": [12, ["step 12, group 0", "step 11, group 0", "step 10, group 0"]],
        "right": [6, 0, "3 of 3 groups shown, with 6 completions that match"],
        "stage": [6, 0],
        "least": 6,
        "most": 6,
        "none": [0, "0 of 0 groups shown, with 0 completions that match"],
        "cleared": [80, 0],
    }


@browser
def test_tokens_are_shaded_by_their_probability(tmp_path):
    rows = [rollout(1), not_sampled(1, 1), from_before(1, 2)]
    rows.append(rollout(1, 3, logps=[None, 0.0, *rollout(1)["logps"][2:]]))
    result = ask(
        report.write(make_run(tmp_path / "run", rows, [metric(1)])),
        """
        const shown = node => [node.title, node.style.backgroundColor];
        const found = {before: all(".token").length};
        set("shade", "probability");
        found.each = all(".card").map(card => [...card.querySelectorAll(".token")].map(shown));
        found.texts = texts(".card .text");
        return found;""",
    )
    assert result["before"] == 0
    sampled, demonstrated, old, strange = result["each"]
    assert demonstrated == old == []  # their texts are shown without shades
    assert result["texts"][1] == rows[1]["text"] and result["texts"][2] == rows[2]["text"]
    assert len(sampled) == len(rows[0]["pieces"])
    for i, (title, colour) in enumerate(sampled):
        probability = math.exp(-0.1 * i)
        assert float(title.removeprefix("probability ")) == pytest.approx(probability, abs=6e-4)
        *violet, opacity = re.findall(r"[\d.]+", colour)
        assert violet == ["150", "90", "220"]
        assert float(opacity) == pytest.approx(0.7 * (1 - probability), abs=0.005)
    nothing = "rgba(150, 90, 220, 0)"
    assert strange[:2] == [["probability none", nothing], ["probability 1", nothing]]


@browser
@pytest.mark.parametrize("width", [375, 1280])
def test_a_phone_never_scrolls_sideways(tmp_path, width, lesions):
    boxes = [[-20, -20, 90, 90], [0, 0, 1e9, 1e9]]
    wide = {"text": "W" * 500 + " " + "i" * 9000, "predicted": boxes, "stage": "x" * 300}
    rows = 3 * seen(lesions[:1], step=1, **wide) + 3 * seen(lesions[1:2], step=2, **wide)
    rows += seen(lesions[1:2], step=2, predicted=[])
    metrics = [metric(s, alarms=["a" * 400]) for s in range(1, 9)]
    config = {"dataset": "demo-images", "task": "localize", "lr": "r" * 200}
    both = {"before": RESULT, "after": RESULT}
    run = make_run(tmp_path / "run", rows, metrics, both, **config)
    page = report.write(run, items=lesions)
    result = ask(
        page,
        """
        all("details").forEach(node => { node.open = true; });
        all(".card button").forEach(node => node.click());
        return {
          inner: innerWidth,
          wide: document.documentElement.scrollWidth,
          pictures: all(".picture img").map(node => node.naturalWidth),
          boxes: all(".box").length,
        };""",
        width,
    )
    assert result["wide"] <= result["inner"] == width
    # Two groups and seven cards have a picture, with a gold box in each and two in six answers.
    assert result["pictures"] == [56] * 9 and result["boxes"] == 9 + 6 * 2


@browser
def test_every_control_has_a_label_and_shows_its_focus(tmp_path):
    rows = [rollout(s, k, text="x" * 5000) for s in range(1, 30) for k in range(2)]
    result = ask(
        report.write(make_run(tmp_path / "run", rows, [metric(1)])),
        """
        return all("input, select, button, summary").slice(0, 40).map(node => {
          node.focus();
          const own = node.matches("button, summary");
          const style = getComputedStyle(node);
          return {
            focused: document.activeElement === node && node.tabIndex === 0,
            labelled: own ? node.textContent.length > 2 : node.labels.length === 1,
            outline: style.outlineStyle + style.outlineWidth,
          };
        });""",
    )
    assert len(result) > 20
    for control in result:
        assert control == {"focused": True, "labelled": True, "outline": "solid3px"}


@browser
def test_the_script_opens_ten_thousand_completions_fast(large):
    path, _ = large
    shown, milliseconds = ask(
        path,
        """
        const start = performance.now();
        set("first", 3);
        return [cards(), performance.now() - start];""",
    )
    assert shown == 160 and milliseconds < 2000
