"""The README's diffs: each applies to the code as it is, and trains."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import demo

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Fork it\n")[2].partition("\n## ")[0]
DIFFS = re.findall(r"^\*\*([^*]+)\*\*[^`]*?`(--[^`]+)`.*?```diff\n(.*?)```", SECTION, re.S | re.M)


def apply(diff: str, folder: Path) -> None:
    """`--- FILE` names a file, a lone `---` begins its next place; there, lines with `-` and ` ` are replaced by those with `+` and ` `. A `-` or ` ` line may be the beginning of one."""
    path = None
    for place in re.split(r"^---", diff, flags=re.M)[1:]:
        name, _, lines = place.partition("\n")
        path = folder / name.strip() if name.strip() else path
        before, after = ("\n".join(line[1:] for line in lines.splitlines() if line[:1] in signs) for signs in ("- ", "+ "))
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path.name} has {text.count(before)} places like\n{before}"
        if not any(line.startswith("-") for line in lines.splitlines()):      # only added: after the end of the line that the context begins
            end = text.index("\n", text.index(before) + len(before))
            added = "\n".join(line[1:] for line in lines.splitlines() if line.startswith("+"))
            text = f"{text[:end]}\n{added}{text[end:]}"
        else:
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")


def python(folder: Path, command: str) -> str:
    """What the command prints, run in that folder on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split()], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what, flags, diff", DIFFS, ids=[what for what, _, _ in DIFFS])
def test_a_fork_trains_is_evaluated_and_keeps_its_examples(what, flags, diff, tmp_path):
    assert len(DIFFS) == 3
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    apply(diff, tmp_path)
    demo.demo_policy(0).save_folder(tmp_path / "model")
    flags = flags.replace(" --model DIR", "")
    small = "--template plain --full --steps 2 --prompts 2 --samples 4 --max-new 8 --eval-limit 2"
    python(tmp_path, f"train.py {flags} --model model {small} --eval-every 0 --out run")
    dataset = "doses" if what == "A data set" else "demo"
    assert f"| {dataset} test |" in python(
        tmp_path, f"eval.py model --dataset {dataset} --limit 2 --max-new 8")
    assert "doctest lines hold" in python(tmp_path, "rewards.py")
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["config"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    assert len(metrics) == 2 and all(m["skipped"] == 0 for m in metrics)
    expected = {"--w-suggest": ("w_suggest", .5), "--dataset": ("dataset", "doses"), "--algo": ("ratio", "cispo")}[flags.split()[0]]
    assert run[expected[0]] == expected[1]
    if what == "A reward":
        assert "part_suggest" in metrics[0]
        code = ("import data, rewards, train; item = data.load('demo', 'dev')[0]; config = train.Config(w_suggest=.5); "
                "print(*(rewards.grade(item, f'<think> findings {word} gout </think> <answer> A </answer>', config, True, 9).total for word in ('suggest', 'fit')))")
        paid, unpaid = map(float, subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split())
        assert paid - unpaid == .5
