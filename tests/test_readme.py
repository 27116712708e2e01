"""README.md, CONTRIBUTING.md and docs/: short enough, true to the code, and its diffs work."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import grpo
import rewards
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DIFFS = dict(re.findall(r"^\*\*An? ([\w ]+)\*\*.*?```diff\n(.*?)```", README, re.S | re.M))
FLAGS = {
    "reward": "--reward no-harm",
    "data set": "--dataset doses",
    "algorithm": "--algo lite_ppo",
    "metric": "",
}


def prose(text: str) -> str:
    """A page without its code, tables, pictures and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->|!\[.*?\]\(.*?\)", "", text, flags=re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    return re.sub(r"\]\([^)]*\)", "]", text)  # of a link, its words


def test_the_readme_is_one_screen_to_decide():
    assert len(prose(README).split()) <= 1200
    assert prose("a ![p](b.png) [c d](e)\n| f |\n<!-- g -->\n```\nh\n```\ni").split() == [
        *("a", "[c", "d]", "i")
    ]


def test_the_update_stands_in_train_py_as_in_the_readme():
    code = re.search(r"<!-- code: train.py -->\n```python\n(.*?)```", README, re.S)[1].splitlines()
    assert 8 <= len(code) <= 14
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    parts = ["\n".join(lines[i : i + len(code)]) for i in range(len(lines))]
    assert [textwrap.dedent(part) for part in parts].count("\n".join(code)) == 1


@pytest.mark.parametrize("module", [grpo, rewards], ids=["grpo.py", "rewards.py"])
def test_the_walkthrough_shows_what_the_module_prints(module):
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    mark = f"<!-- output: {Path(module.__file__).name} -->"
    assert re.search(rf"{mark}\n```\n(.*?)\n```", page, re.S)[1] == module.example()


def test_each_algorithm_has_its_row():
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page, re.M) == list(train.ALGOS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / target).exists(), target
    if page.parent.name == "docs":
        assert f"(docs/{page.name})" in README


# ---------------------------------------------------------------------------------- its commands
def ci_readme():
    spec = importlib.util.spec_from_file_location("ci_readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ci_knows_how_to_try_every_command():
    ci = ci_readme()
    commands = ci.commands()
    assert len(commands) > 30 and len(set(commands)) == len(commands)
    assert [command for command in commands if ci.way(command) is None] == []


# ------------------------------------------------------------------------------------- its diffs
def apply(diff: str, folder: Path) -> None:
    """`--- FILE` names a file, `@@` begins a place in it; whole lines, as `git diff` has them."""
    for part in re.split(r"^--- ", diff, flags=re.M)[1:]:
        name, *places = re.split(r"\n@@\n", part)
        path = folder / name
        for place in places:
            lines = place.splitlines()
            before = "\n".join(line[1:] for line in lines if line[:1] != "+")
            after = "\n".join(line[1:] for line in lines if line[:1] != "-")
            text = path.read_text(encoding="utf-8")
            places_found = f"\n{text}".count(f"\n{before}\n")
            assert places_found == 1, f"{name} has {places_found} places like\n{before}"
            text = f"\n{text}".replace(f"\n{before}\n", f"\n{after}\n")[1:]
            path.write_text(text, encoding="utf-8")


def copy_of_the_code(folder: Path) -> None:
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("support", "knowledge"):
        shutil.copytree(ROOT / name, folder / name)


# Like three commands, one after the other, but torch is imported once.
THREE = """
import runpy, sys
from support.demo_model import demo_policy
demo_policy(0).save_folder("model")
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def run_three(folder: Path, *commands: str) -> str:
    """What they print; one thread, for the models are tiny."""
    done = subprocess.run(
        [sys.executable, "-c", THREE, *commands],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("what", FLAGS)
def test_a_diff_applies(what, tmp_path):
    assert list(DIFFS) == list(FLAGS)
    copy_of_the_code(tmp_path)
    apply(DIFFS[what], tmp_path)
    for path in (*tmp_path.glob("*.py"), *tmp_path.glob("support/*.py")):
        text = path.read_text(encoding="utf-8")
        ast.parse(text)
        assert max(map(len, text.splitlines()), default=0) <= 100, path.name


CHECKS = {  # what the change does, by arithmetic on paper
    "reward": """
import data, rewards
from support.config import Config
item = data.load("demo", "dev")[0]
wrong = "B" if item.answer == "A" else "A"
for answer, total in ((item.answer, 1.0), (wrong, -1.0), ("none", 0.0)):
    text = f"<think> x </think> <answer> {answer} </answer>"
    assert rewards.grade(item, text, Config(reward="no-harm")).total == total
""",
    "algorithm": """
import grpo, torch
rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # all four: mean 3/4, std 1/2
advantages = grpo.group_advantages(rewards, "batch", eps=0)
assert advantages.tolist() == [[1.0, -1.0], [0.0, 0.0]]
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FLAGS)
def test_a_changed_code_trains_is_evaluated_and_keeps_its_examples(what, tmp_path):
    copy_of_the_code(tmp_path)
    apply(DIFFS[what], tmp_path)
    dataset = "doses" if what == "data set" else "demo"
    small = "--model model --template plain --full --steps 2 --prompts 2 --samples 4 --max-new 8"
    printed = run_three(
        tmp_path,
        f"train.py {FLAGS[what]} {small} --eval-limit 2 --eval-every 0 --out run",
        f"eval.py model --dataset {dataset} --limit 2 --max-new 8",
        "rewards.py",
    )
    assert f"| {dataset} test |" in printed and "doctest lines hold" in printed
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["skipped"] for m in metrics] == [0, 0]
    config = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["config"]
    if what == "metric":
        assert all(0 < m["probability"] < 1 for m in metrics)
    else:
        flag, value = FLAGS[what].split()
        assert config[flag.strip("-")] == value
    if what in CHECKS:
        subprocess.run([sys.executable, "-c", CHECKS[what]], cwd=tmp_path, check=True)
