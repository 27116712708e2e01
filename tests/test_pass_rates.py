"""What a batch would teach, by hand, and the questions that are kept."""

import doctest
import json
from functools import partial

import pytest
from helpers import refused

import data
import eval as evaluation
import train
from data import Item
from policy import Rollout
from rewards import Parsed
from support import pass_rates
from support.config import Config
from support.pass_rates import keep_mixed, look, told


def test_docstring_examples():
    assert doctest.testmod(pass_rates).failed == 0


# ------------------------------------------------------------------------------ can this learn?
def groups(*of_items: str, finished: bool = True) -> list[Rollout]:
    """A group each: + right, - wrong, x malformed, in Med-RLVR's reward of 1, 0 and -1."""
    rewards = {"+": 1.0, "-": 0.0, "x": -1.0}
    rollouts = []
    for group, marks in enumerate(of_items):
        for mark in marks:
            parsed = Parsed("", "x", "A", "", mark != "x")
            rollout = Rollout(Item(str(group), "choice", "Q", (), "A"), group, [], [], [], finished)
            rollout.parsed, rollout.reward, rollout.parts = parsed, rewards[mark], {}
            rollout.correct = mark == "+"
            rollouts.append(rollout)
    return rollouts


def test_a_batch_in_numbers():
    found = look(groups("++++", "+--x", "----", "---x"), Config())
    assert found == {
        "questions": 4,
        "well_formed": 14 / 16,
        "right": 5 / 16,
        "cut": 0,
        "reward": (5 - 2) / 16,
        "all_wrong": 2,
        "mixed": 1,
        "all_right": 1,
        "teaches": 2 / 4,  # rewards differ in "+--x", and in "---x", where form alone is learned
    }


def test_who_compares_decides_what_teaches():
    batch = groups("++++", "----", "---x", "+-+-")
    assert look(batch, Config(dynamic=True))["teaches"] == 1 / 4  # DAPO replaces the others
    assert look(batch, Config(advantage="gae"))["teaches"] == 1
    assert look(groups("xxxx", "xxxx"), Config(advantage="gae"))["teaches"] == 0


def test_what_is_told_and_when_it_is_advised():
    first, second = told(groups("++--", "+--x"), Config())
    assert "2 questions of train, 4 completions each: 88% well formed, 38% right, 0% cut" in first
    assert "mean reward 0.25; 100% of the batch teaches" in first
    assert second == "groups: 0 all wrong, 2 mixed, 0 all right"
    assert len(told(groups("+", "-"), Config(advantage="gae"))) == 1  # PPO: nothing to group
    for batch, advised in (
        (groups("xxxx", "xxxx"), "no completion has the form that the reward asks for"),
        (groups("xxxx", finished=False), "--model; and most completions are cut before they end"),
        (groups("----", finished=False), "raise --max-new"),
        (groups("----", "----"), "never answered right"),
        (groups("++++", "++++"), "take harder ones"),
    ):
        assert advised in told(batch, Config())[2]


def test_a_model_that_never_writes_the_form_is_told_so_by_a_dry_run(model_dir, capsys, tmp_path):
    flags = ["--model", model_dir, "--prompts", "4", "--samples", "4", "--device", "cpu"]
    train.main([*flags, "--dry-run", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert "can this learn? 32 questions of train, 4 completions each" in shown
    assert "of the batch teaches" in shown
    assert "no completion has the form" not in shown  # this one was taught a little
    train.main([*flags, "--dry-run", "--max-new", "2", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert "0% well formed" in shown and "no completion has the form" in shown


# ---------------------------------------------------------------------- the questions in between
@pytest.fixture
def own(tmp_path):
    """A data set of five questions to train on, one of dev and one of test."""
    folder = tmp_path / "own"
    folder.mkdir()
    names = {"train": "abcde", "dev": "v", "test": "t"}
    for split, ids in names.items():
        lines = [
            {"id": i, "question": f"Is {i}?", "options": ["yes", "no"], "answer": "A"} for i in ids
        ]
        lines[0]["rationale"] = "It is – so."
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def answers(own, **right: str) -> list[dict]:
    """Rows of --answers; right: + or - for each sampled completion of an item."""
    asked = {"model": "some-model", "dataset": str(own), "style": "think"}
    rows = [asked | {"id": name, "correct": True, "greedy": True} for name in right]
    for name, marks in right.items():
        rows += [asked | {"id": name, "correct": mark == "+", "greedy": False} for mark in marks]
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_questions_answered_now_right_now_wrong_are_kept(own, tmp_path):
    rows = answers(own, a="++++", b="+---", c="----", d="+++-")  # e was not asked
    out = tmp_path / "mixed"
    said = keep_mixed(written(tmp_path / "rated.jsonl", rows), out)
    assert said.startswith(f"{out}: 2 of 4 questions") and "--dataset" in said
    whole = {split: data.load(str(own), split) for split in data.SPLITS}
    made = {split: data.load(str(out), split) for split in data.SPLITS}
    assert made["train"] == [item for item in whole["train"] if item.id in "bd"]
    assert made["dev"] == whole["dev"] and made["test"] == whole["test"]
    lines = (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["pass_rate"] for line in lines] == [0.25, 0.75]
    assert json.loads((out / "made.json").read_text()) == {
        "model": "some-model",
        "dataset": str(own),
        "style": "think",
        "rated": 4,
        "kept": 2,
    }


def test_what_cannot_be_kept_is_one_line(own, tmp_path):
    path, out = tmp_path / "rated.jsonl", tmp_path / "mixed"
    call = partial(keep_mixed, path, out)
    refused(call, str(path), "not a file of eval.py --answers")
    written(path, answers(own, a=""))
    refused(call, str(path), "0 models, data sets or styles", "--samples 8")
    written(path, answers(own, a="+-") + answers(own.parent, a="+-"))
    refused(call, "2 models, data sets or styles")
    written(path, answers(own, t="+-"))
    refused(call, str(path), "no question of train is in it", "--split train")
    written(path, answers(own, a="++", b="--"))
    refused(call, "each of 2 questions was right always or never")
    written(path, answers("demo-images", a="+-"))
    refused(call, "demo-images: only questions with lettered options")
    assert not out.exists()
    written(path, answers(own, a="+-"))
    refused(lambda: keep_mixed(path, own), f"--out {own}", "name a new folder")


def test_from_answers_to_a_data_set(model_dir, tmp_path, capsys):
    """The two commands of the docstring, on a model whose samples differ."""
    rated = str(tmp_path / "rated.jsonl")
    flags = ["--dataset", "demo", "--split", "train", "--limit", "24", "--samples", "8"]
    evaluation.main([model_dir, *flags, "--answers", rated, "--device", "cpu"])
    pass_rates.main([rated, "--out", str(tmp_path / "mixed")])
    assert "of 24 questions were answered now right, now wrong" in capsys.readouterr().out
    kept = data.load(str(tmp_path / "mixed"), "train")
    assert 0 < len(kept) < 24
    assert data.without(kept, data.load("demo", "train")) == []
