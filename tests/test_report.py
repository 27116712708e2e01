"""The page of a run: nothing in it runs or loads but our own script, whatever a policy wrote; and in a browser its controls do what they say."""
import base64
import doctest
import hashlib
import html
import io
import json
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
from data import UsageError
from support import report

CONFIG = dict(dataset="demo", data_dir="", task="", target="", knowledge="none", knowledge_file="", style="think", model="", init="", algo="grpo", full=True, lora=16, prompts=4, samples=4, steps=9, lr=1e-3,
              seed=0, reward="med-rlvr", w_format=.5, w_leak=0.0, w_before=0.0, w_short=0.0, w_overlong=0.0, recite=0.0)
HOSTILE = ["</script><script>alert(1)</script>", "</script x='", "</SCRIPT/", "<!--<script ", "<!-- <script>", "<img src=x onerror=alert(1)>", "\u2028\u2029 & &lt; &amp;", "\x00\x07\x1b[31m\x7f\r", "\u202egnorw si txet siht", "مرحبا بالعالم שלום 👩\u200d⚕️ é",
           "half a character: \ud800", "]]>", "javascript:alert(1)", "https://example.com/x.png", "' \" ` ${1} \\u003c \\", "<svg onload=alert(1)>"]


def metric(step: int, **changes) -> dict:
    stages = dict.fromkeys(rewards.STAGES, 0.0) | {rewards.STAGES[0]: 1 / step, rewards.STAGES[5]: 1 - 1 / step}
    return {"step": step, "reward": .1 * step, "accuracy": .5, "length": 20.0 + step, "entropy": 1 / step, "kl": .01 * step, "part_truncated": 0.0, "stages": stages} | changes


def rollout(step: int, row: int = 0, **changes) -> dict:
    text = f"<think> step {step} and row {row} </think> <answer> {'AB'[row % 2]} </answer>"
    pieces = re.findall(r"\s*\S+", text)
    return {"step": step, "group": 0, "id": f"q{step}", "question": "Which of the two?", "options": ["fever", "cough"], "gold": "A", "text": text, "reward": float(row % 2 == 0), "parts": {"accuracy": float(row % 2 == 0), "malformed": 0.0},
            "advantage": 1.0 - 2 * (row % 2), "correct": row % 2 == 0, "finished": row != 3, "tokens": len(pieces), "frame": None, "stage": rewards.STAGES[5 if row % 2 == 0 else 2], "predicted": "AB"[row % 2],
            "pieces": pieces, "entropy": [.1 * i for i in range(len(pieces))], "ratio": [1 + .05 * (-1) ** i * i for i in range(len(pieces))]} | changes


def make_run(folder: Path, rollouts=(), metrics=(), results=None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"config": CONFIG | config, "versions": {"torch": "2"}}))
    for name, rows in (("rollouts", rollouts), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results:
        (folder / "eval.json").write_text(json.dumps(results))
    return folder


class Page(HTMLParser):
    """A report as a browser reads it: scripts by id, every tag with its attributes, and the text that is shown."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.scripts, self.text, self.inside, self.source = [], [], "", None, path.read_bytes().decode("utf-8")
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
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + text)
        elif self.inside != "style":
            self.text += text + " "

    def charts(self) -> list[str]:
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg" and "aria-label" in attributes]


@pytest.fixture
def read(tmp_path):
    def read(rollouts=(), metrics=(), results=None, **config) -> Page:
        return Page(report.write(make_run(tmp_path / "run", rollouts, metrics, results, **config)))
    return read


def test_doctests():
    failed, tried = doctest.testmod(report)
    assert tried and not failed


# ------------------------------------------------------------------------------------------------- what is on the page
def test_the_page_of_a_run(read, tmp_path):
    accuracy = {"accuracy": .25, "ci95": [.1, .4], "n": 40, "sampled_accuracy": .2, "sampled_ci95": [.1, .3]}
    page = read([rollout(s, k) for s in (1, 2) for k in range(4)], [metric(1), metric(2, dev_accuracy=.75, dev_ci95=[.6, .9]), metric(3, alarms=["reward rose <b>while</b>"])],
                {"before": accuracy, "after": accuracy | {"accuracy": .875, "ci95": [.7, .95]}})
    for text in ("0.250 → 0.875", "0.250 [0.100, 0.400]", "0.875 [0.700, 0.950]", "0.200 [0.100, 0.300]", "40 test items", "grpo", "3 of 9", "torch 2", "Alarms", "reward rose <b>while</b>"):
        assert text in page.text, text
    low, high = report.evaluation.wilson(8, 16)                                                   # 4 prompts x 4 completions, half of them right
    labels = " ".join(page.charts())
    for text in ("Reward: 0.1 at step 1; 0.3 at step 3", f"Accuracy: 0.5 [{low:.4g}, {high:.4g}] at step 1;", "Length", "Entropy", "KL", "Cut at the limit", f"{rewards.STAGES[5]} 67% at step 3"):
        assert text in labels, text
    assert f"step 2: 0.5 [{low:.4g}, {high:.4g}], on dev 0.75 [0.6, 0.9]" in page.text and all(name in page.text for name in rewards.STAGES) and "Loss" not in page.text
    first = page.groups[0]
    assert first["prompt"] == [[m["role"], m["content"]] for m in data.messages(data.Item("q1", "choice", "Which of the two?", ("fever", "cough"), "A"))] and first["gold"] == "A. fever"
    assert [row["finished"] for row in first["rows"]] == [True, True, True, False] and [row["predicted"] for row in first["rows"]] == list("ABAB")
    assert first["rows"][1]["pieces"] == rollout(1, 1)["pieces"] and first["rows"][1]["ratio"][3] == .85 and page.log["weights"] == {"accuracy": 1.0, "malformed": -1.0}
    assert "Left out" not in page.text and not list((tmp_path / "run").glob(".*"))                # nothing is left beside it


@pytest.mark.parametrize("text", [*HOSTILE, "".join(HOSTILE) * 20, "x" * 1_000_000])
def test_what_a_policy_wrote_stays_text(read, text):
    page = read([rollout(1, text=text, pieces=[text], entropy=[1.0], ratio=[1.0], id=text, question=text, options=[text, "b"], stage=text, predicted=text, parts={text: 1.0})],
                [metric(1, alarms=[text])], lr=text, algo=text)
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None] and page.scripts[1][1] == report.SCRIPT
    assert not {tag for tag, _ in page.tags} & {"img", "image", "iframe", "link", "object", "embed", "base", "a"}
    assert not [(tag, name) for tag, attributes in page.tags for name in attributes if name.startswith("on") or name in ("src", "href", "xlink:href", "action", "srcset")]
    assert not set(page.scripts[0][1]) & set("<>&\u2028\u2029\x00") and page.scripts[0][1].isascii()
    row = page.groups[0]["rows"][0]
    assert row["text"] == text and row["pieces"] == [text] and row["stage"] == row["predicted"] == text and row["parts"] == {text: 1.0} and page.groups[0]["id"] == text
    assert text in page.groups[0]["prompt"][1][1]


def test_the_policy_lets_only_our_script_run(read):
    page = read([rollout(1)], [metric(1)])
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1] and "http" not in policy
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(page.scripts[-1][1].encode()).digest()).decode()}'" in policy
    assert not re.search(r"https?://", page.source) and "innerHTML" not in page.source and "@import" not in page.source and "url(" not in page.source


def test_no_number_breaks_the_page(read):
    strange = [float("nan"), float("inf"), -float("inf"), None]
    page = read([rollout(i, reward=value, advantage=value, parts={"accuracy": value}, entropy=[value] * 7, ratio=[value] * 7) for i, value in enumerate(strange)],
                [metric(i + 1, reward=value, accuracy=value, dev_accuracy=value, stages=value, length=value, alarms=value) for i, value in enumerate(strange)])
    assert all(row["reward"] is None for group in page.groups for row in group["rows"]) and not re.search(r"NaN|Infinity\b|nan\b", page.source.replace(report.SCRIPT, ""))
    assert [chart.partition(":")[0] for chart in page.charts()] == ["Entropy", "KL", "Cut at the limit"]


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-12, 1e6, 12345.678])
def test_a_flat_curve_of_one_step_or_many(read, value):
    for steps in (1, 2, 700):
        assert f"Reward: {value:.4g} at step 1; {value:.4g} at step {steps}" in read((), [metric(s, reward=value) for s in range(1, steps + 1)]).charts()


# ------------------------------------------------------------------------------------------------- what may be missing
def test_steps_without_rollouts_leave_a_gap(read):
    page = read((), [metric(1), {"step": 2, "groups_dropped": 4, "lr": 1e-3}, metric(3, groups_unfilled=4), metric(4)])
    curves = [attributes["d"] for tag, attributes in page.tags if attributes.get("class") == "curve"]
    assert len(page.charts()) == 7 and [curve.count("L") for curve in curves] == [0, 1] * 6        # each: step 1 alone, a gap, then 3 to 4


def test_supervised_runs_show_their_loss(read):
    line = rollout(1)
    del line["ratio"]                                                                             # nobody sampled it
    page = read([line], [metric(1, loss=2.0, dev_accuracy=.5), metric(2, loss=1.0)], algo="sft")
    labels = " ".join(page.charts())
    assert "Loss: 2 at step 1; 1 at step 2" in labels and "Accuracy: on dev 0.5 at step 1" in labels and "Reward" not in labels and "Stages" not in labels
    assert "4 demonstrations" in page.text and "ratio" not in page.groups[0]["rows"][0]


def test_an_empty_run(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "rollouts.jsonl").unlink()
    page = Page(report.write(run, tmp_path / "x.html"))
    assert "No step is logged" in page.text and "Not evaluated yet" in page.text and not page.groups


def test_damaged_lines_are_counted(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1), metric(2)])
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "gro\n\xff\xfe\n[1]\n"x"\n{"step": 2, "group": 0}\n' + b"[" * 100_000 + b"\n\n" + json.dumps(rollout(3)).encode() + b'\n{"step": 4')
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 3, "rew')
    page = Page(report.write(run))
    assert [group["step"] for group in page.groups] == [1, 3] and "Left out: 1 damaged lines of metrics.jsonl; 7 damaged lines of rollouts.jsonl." in page.text


# ------------------------------------------------------------------------------------------------- pictures
def seen(items, **changes) -> list[dict]:
    """A line for each item, answered with its gold."""
    return [rollout(i + 1) | {"id": item.id, "question": item.question, "options": list(item.options), "gold": item.answer, "text": data.completion(item), "predicted": item.answer,
                              "parts": {"box": 1.0, "malformed": 0.0}} | changes for i, item in enumerate(items)]


@pytest.fixture(scope="module")
def lesions():
    return data.load("demo-images", "train", task="localize")[:3]


def test_an_item_to_localize_gets_its_picture(read, lesions):
    page = read(seen(lesions) + seen(lesions[:1], step=4, frame=[100, 50, 56, 56]), [metric(1)], dataset="demo-images", task="localize")
    assert set(page.pictures) == {item.id for item in lesions} and page.groups[0]["gold"] == page.groups[0]["rows"][0]["predicted"] == [list(lesions[0].answer[0])]
    [width, height, png], = page.pictures[lesions[1].id]
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    assert image.size == (width, height) == (56, 56) and image.convert("L").tobytes() == lesions[1].image.tobytes()
    assert "Where is the lesion?" in page.groups[0]["prompt"][1][1] and "100 x 50 image" in page.groups[3]["prompt"][0][1] and "box" in page.log["weights"]


def test_pictures_are_shrunk_and_the_newest_kept(tmp_path, monkeypatch):
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "a.png")
    lines = [{"id": f"i{k}", "image": "a.png", "label": "x", "labels": ["x", "y"]} for k in range(40)]
    (tmp_path / "set").mkdir()
    for split in data.SPLITS:
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(json.dumps(line | {"image": str(tmp_path / "a.png")}) + "\n" for line in lines))
    monkeypatch.setattr(report, "PICTURES", 10)
    run = make_run(tmp_path / "run", seen(data.load(str(tmp_path / "set"), "train")), [metric(1)], dataset=str(tmp_path / "set"))
    page = Page(report.write(run))
    assert set(page.pictures) == {f"i{k}" for k in range(30, 40)} and page.pictures["i39"][0][:2] == [1000, 500] and "Left out: the pictures of 30 items." in page.text
    assert Image.open(io.BytesIO(base64.b64decode(page.pictures["i39"][0][2]))).size == (336, 168) and str(tmp_path) not in page.text
    assert set(Page(report.write(run, items=data.load(str(tmp_path / "set"), "train")[39:])).pictures) == {"i39"}      # items that a caller has are not read again
    (tmp_path / "set").rename(tmp_path / "gone")
    page = Page(report.write(run))
    assert not page.pictures and "Left out: pictures and prompts, since the data set is not at hand." in page.text and str(tmp_path) not in page.text and page.groups[0]["prompt"][0][0] == "question"
    (tmp_path / "gone").rename(tmp_path / "set")
    items = data.load(str(tmp_path / "set"), "train")
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert "the pictures of 40 items" in Page(report.write(run, items=items)).text


@pytest.mark.parametrize("dataset", ["medqa", "mmlu-pro-health", "retinamnist", "pathmnist-28", "bccd", "no-such-set"])
def test_nothing_is_downloaded(read, monkeypatch, tmp_path, dataset):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    for place, name in ((data, "fetch"), (report.images, "download"), (data.urllib.request, "urlopen")):
        monkeypatch.setattr(place, name, lambda *a, **k: pytest.fail("the network was asked"))
    page = read([rollout(1)], [metric(1)], dataset=dataset)
    assert (page.groups[0]["prompt"][0][0] == "system") == (dataset in report.TEXT_SETS) and ("not at hand" in page.text) == (dataset not in report.TEXT_SETS)


def test_knowledge_stands_in_the_prompt_where_it_is_known(tmp_path):
    run, item = make_run(tmp_path / "run", [rollout(1)], [metric(1)], knowledge="task"), data.Item("q1", "choice", "?", (), "A", knowledge="What everybody knows.")
    assert "What everybody knows." in Page(report.write(run, items=[item])).groups[0]["prompt"][1][1]
    assert Page(report.write(run)).groups[0]["prompt"] == [["question", "Which of the two?\nfever\ncough"]]


# ------------------------------------------------------------------------------------------------- size
def test_ten_thousand_completions_in_seconds(tmp_path):
    run, started = make_run(tmp_path / "run", [rollout(s, k) for s in range(1, 1251) for k in range(8)], [metric(s) for s in range(1, 1251)]), time.perf_counter()
    page = report.write(run)
    assert time.perf_counter() - started < 15 and page.stat().st_size < 20e6
    assert sum(len(group["rows"]) for group in Page(page).groups) == 10_000


def test_the_newest_of_a_long_log_are_shown(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [rollout(s) for s in range(1, 6)], [metric(1)])
    monkeypatch.setattr(report, "SIZE", 2.5 * len(json.dumps(rollout(1))))
    page = Page(report.write(run))
    assert [group["step"] for group in page.groups] == [4, 5] and "Left out: 3 older lines of rollouts.jsonl." in page.text


# ------------------------------------------------------------------------------------------------- command line
def test_the_command_line(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    report.main([str(run), "--out", str(tmp_path / "a.html")])
    assert (tmp_path / "a.html").is_file() and capsys.readouterr() == (f"{tmp_path / 'a.html'}: 0.0 MB\n", "")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(report.__file__, run_name="__main__")
    assert left.value.code == 2 and capsys.readouterr().err == f"report.py: {tmp_path / 'none'} is no run folder: there is no run.json in it\n"


def test_mistakes_are_one_line(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1)], [metric(1)])
    for argv in ([], [str(run), "--nonsense"], [str(tmp_path)], [str(run), "--out", str(tmp_path / "no" / "a.html")], [str(run), "--out", str(run / "run.json" / "a.html")],
                 [str(run), "--out", str(run)], [str(run), "--out", "."], [str(run), "--out", "/"]):
        with pytest.raises(UsageError) as error:
            report.main(argv)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".*")) and sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "rollouts.jsonl", "run.json"]
    for name, text, word in (("eval.json", "{", "eval.json is damaged"), ("run.json", '{"config": {"algo": "grpo"}}', "another version"), ("run.json", "{", "run.json is damaged")):
        (run / "eval.json").unlink(missing_ok=True)
        (run / name).write_text(text)
        with pytest.raises(UsageError, match=word):
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


# ------------------------------------------------------------------------------------------------- in a browser
CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(not CHROME and not os.environ.get("CI"), reason="no Chromium here")


def browse(path: Path) -> str:
    """The DOM after a while, as Chromium has it; any error on its console is a failure."""
    assert CHROME, "CI needs Chromium: apt-get install chromium"
    done = subprocess.run([CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={path.parent / 'chrome'}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000",
                           "--dump-dom", path.as_uri()], capture_output=True, timeout=120)
    errors = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line or "Uncaught" in line]
    if errors:
        pytest.fail("\n".join(errors))
    return done.stdout.decode("utf-8", errors="replace")


def ask(path: Path, script: str, width: int = 1280):
    """What `script`, the body of a function that runs on a copy of the page, returns. In a frame, which may be narrower than Chromium's least window."""
    probe = f"<script>parent.postMessage(JSON.stringify((() => {{ {script} }})()), '*')</script></body>"
    text = re.sub(rb"script-src '[^']*'", b"script-src 'unsafe-inline'", path.read_bytes(), count=1)
    path.with_name("probe.html").write_bytes(text.replace(b"</body>", probe.encode()))
    frame = path.with_name("frame.html")
    frame.write_text(f"<body><script>onmessage = event => {{ document.body.dataset.result = event.data; }}</script><iframe src=probe.html width={width} height=900 style='border:0'></iframe>")
    return json.loads(html.unescape(re.search(r'data-result="([^"]*)"', browse(frame))[1]))


TOOLS = """const at = id => document.getElementById(id), all = name => [...document.querySelectorAll(name)], cards = () => all(".card").length;
const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input", {bubbles: true})); };
"""


@browser
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    run = make_run(tmp_path / "run", [rollout(s, k) for s in range(1, 4) for k in range(4)], [metric(s) for s in range(1, 4)])
    dom = browse(report.write(run))
    assert dom.count('class="card ') == 12 and "3 of 3 groups shown, with 12 completions that match" in dom and "✓ right" in dom
    assert "0 of 0 groups shown" in browse(report.write(make_run(tmp_path / "empty")))
    with pytest.raises(pytest.fail.Exception, match="Content Security Policy"):                          # the page's own rule stops what is not ours: and this test would see it
        page = run / "report.html"
        page.write_text(page.read_text().replace("</body>", "<script>document.title = 'run'</script></body>"))
        browse(page)


@browser
def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    rows = [rollout(1, k, text=text, pieces=[text], entropy=[1.0], ratio=[2.0], id="<b>", question=text, stage=text, predicted=text, parts={text: 1.0}) for k, text in enumerate(HOSTILE)]
    result = ask(report.write(make_run(tmp_path / "run", rows, [metric(1, alarms=HOSTILE)], lr=HOSTILE[0])), TOOLS + """
        const shown = () => all(".card .text").map(node => node.textContent), off = shown();
        set("shade", "ratio");
        return {off, ratio: shown(), alien: all("#groups img, #groups script, #groups a, #groups b, #groups svg").length, title: document.title};""")
    known = lambda texts: [text.replace("\ud800", "\ufffd") for text in texts]
    assert known(result["off"]) == known(result["ratio"]) == known(HOSTILE) and result["alien"] == 0 and result["title"] == "run: report"


@browser
def test_filters_shades_and_more(tmp_path):
    rows = [rollout(s, k, text=("long " * 2000 if (s, k) == (50, 0) else rollout(s, k)["text"])) for s in range(1, 51) for k in range(4)]
    result = ask(report.write(make_run(tmp_path / "run", rows, [metric(s) for s in range(1, 51)])), TOOLS + """
        const found = {start: cards(), newest: all("h3")[0].textContent, cut: all(".card .text")[0].textContent.length, plain: all(".token").length};
        all(".card button")[0].click();
        found.whole = all(".card .text")[0].textContent.length;
        at("more").click(); found.more = [cards(), at("state").textContent];
        set("shade", "entropy"); found.kept = [cards(), all(".token").length > 0]; set("shade", "");
        at("more").click(); found.all = [cards(), at("more").hidden];
        set("from", 10); set("to", 12); found.steps = [cards(), all("h3").map(node => node.textContent)];
        set("answer", "right"); found.right = [cards(), all(".card.wrong").length, at("state").textContent];
        set("answer", ""); set("stage", "concise structurer"); found.stage = [cards(), all(".card.right").length];
        set("stage", ""); set("least", "0.5"); found.least = cards();
        set("least", ""); set("most", "0"); found.most = cards(); set("most", "-1"); found.none = [cards(), at("state").textContent];
        set("most", "");
        set("shade", "entropy"); found.entropy = [all(".token").length, all(".token")[3].style.backgroundColor, all(".token")[3].title];
        set("shade", "ratio"); found.ratio = [all(".token")[2], all(".token")[3]].map(node => node.style.backgroundColor);
        set("shade", ""); found.off = all(".token").length;
        return found;""")
    assert result["start"] == 80 and result["newest"] == "step 50, group 0" and (result["cut"], result["whole"], result["plain"]) == (4000, 10_000, 0)
    assert result["more"] == [160, "40 of 50 groups shown, with 200 completions that match"] and result["kept"] == [160, True] and result["all"] == [200, True]
    assert result["steps"] == [12, ["step 12, group 0", "step 11, group 0", "step 10, group 0"]]
    assert result["right"] == [6, 0, "3 of 3 groups shown, with 6 completions that match"]
    assert result["stage"] == [6, 0] and result["least"] == result["most"] == 6 and result["none"] == [0, "0 of 0 groups shown, with 0 completions that match"]
    assert result["entropy"][0] == 12 * len(rollout(10)["pieces"]) and result["entropy"][1].startswith("rgba(150, 90, 220, 0.10") and re.fullmatch(r"entropy 0\.3\d*, ratio 0\.85", result["entropy"][2])
    blue, orange = (re.fullmatch(r"rgba\((.*), (.*?)\)", colour) for colour in result["ratio"])
    assert (blue[1], orange[1], result["off"]) == ("20, 120, 230", "240, 120, 0", 0) and [float(blue[2]), float(orange[2])] == pytest.approx([.299, .510], abs=.01)      # .7 log 1.1 / log 1.25, .7 log .85 / log .8


@browser
def test_clear_brings_everything_back(tmp_path):
    run = make_run(tmp_path / "run", [rollout(1, k) for k in range(4)], [metric(1)])
    path = report.write(run)
    path.write_text(path.read_text().replace("</body>", "<script>{" + TOOLS + """set("answer", "wrong"); set("shade", "ratio"); document.body.dataset.before = cards();
        document.querySelector("button[type=reset]").click(); setTimeout(() => { document.body.dataset.after = cards() + " " + all(".token").length; }, 100)}</script></body>"""))
    path.write_text(re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", path.read_text(), count=1))
    dom = browse(path)
    assert 'data-before="2"' in dom and 'data-after="4 0"' in dom


@browser
@pytest.mark.parametrize("width", [375, 1280])
def test_a_phone_never_scrolls_sideways(tmp_path, width, lesions):
    rows = [row for i in (0, 1) for row in 3 * seen(lesions[i:i + 1], step=i + 1, text="W" * 500 + " " + "i" * 9000, predicted=[[-20, -20, 90, 90], [0, 0, 1e9, 1e9]], stage="x" * 300)]
    rows += seen(lesions[1:2], step=2, predicted=[])
    accuracy = {"accuracy": .25, "ci95": [.1, .4], "n": 40, "sampled_accuracy": .2, "sampled_ci95": [.1, .3]}
    run = make_run(tmp_path / "run", rows, [metric(s, alarms=["a" * 400]) for s in range(1, 9)], {"before": accuracy, "after": accuracy}, dataset="demo-images", task="localize", lr="r" * 200)
    result = ask(report.write(run, items=lesions), TOOLS + """all("details").forEach(node => { node.open = true; }); all(".card button").forEach(node => node.click());
        return {inner: innerWidth, wide: document.documentElement.scrollWidth, pictures: all(".picture img").map(node => node.naturalWidth), boxes: all(".box").length};""", width)
    assert result["wide"] <= result["inner"] == width and result["pictures"] == [56] * 9 and result["boxes"] == 2 + 6 * 3 + 1


@browser
def test_every_control_has_a_label_and_shows_its_focus(tmp_path):
    run = make_run(tmp_path / "run", [rollout(s, k, text="x" * 5000) for s in range(1, 30) for k in range(2)], [metric(1)])
    result = ask(report.write(run), TOOLS + """return all("input, select, button, summary").slice(0, 40).map(node => { node.focus();
        return [node.tagName, document.activeElement === node && node.tabIndex === 0, node.tagName === "BUTTON" || node.tagName === "SUMMARY" ? node.textContent.length > 2 : node.labels.length === 1, getComputedStyle(node).outlineStyle + getComputedStyle(node).outlineWidth]; });""")
    assert len(result) > 20 and {tuple(row[1:]) for row in result} == {(True, True, "solid3px")}, result


@browser
def test_the_script_opens_ten_thousand_completions_fast(tmp_path):
    run = make_run(tmp_path / "run", [rollout(s, k) for s in range(1, 1251) for k in range(8)], [metric(s) for s in range(1, 1251)])
    result = ask(report.write(run), TOOLS + """const t = performance.now(); set("from", 3); return [cards(), performance.now() - t];""")
    assert result[0] == 160 and result[1] < 2000


def test_a_metric_that_is_always_zero_has_a_chart():
    """A KL of 0 at the first step left an axis without a length."""
    assert "step 1: 0" in report.curve("KL", "", [1], [], {1: (0.0, 0.0, 0.0)}, (0,))
