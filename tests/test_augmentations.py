"""The augmentations' bench: what is drawn, how its runs follow on each other, what decides."""

import json
import math
import random
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

import data
from benchmarks import augmentations, drawn
from benchmarks.student import decided, differences, verdict
from support import cli
from support.bleu import bleu

SETTINGS = augmentations.STUDY["settings"]
ARMS = [(name, arm) for name in SETTINGS for arm in SETTINGS[name]["arms"]]


def test_as_many_spots_as_the_grade_says():
    """One fits into a cell of 7 x 7 pixels, and no noise of 12 reaches 45 above the ground."""
    for seed in range(40):
        picture, row = drawn.spots(random.Random(seed))
        bright = (picture[:, :, 0] > 135).reshape(8, 7, 8, 7).sum((1, 3))  # of each cell
        assert (bright >= 3).sum() == int(row["grade"])


def test_the_class_is_the_texture_of_the_one_reddish_mark():
    # Do the means of its lines vary, and those of its columns? Those of noise do by 12 / sqrt 14.
    varies = {"striate": (True, False), "columnar": (False, True), "tessellate": (False, False)}
    for seed in range(20):
        picture, row = drawn.lesions(random.Random(seed))
        cells = picture.reshape(4, 14, 4, 14, 3).transpose(0, 2, 1, 3, 4)  # [4, 4, 14, 14, 3]
        redness = (cells[..., 0] - cells[..., 1]).mean((2, 3))
        assert (redness > 20).sum() == 1 and (redness < -20).sum() == 3
        mark = cells[np.unravel_index(redness.argmax(), (4, 4))][..., 2]
        assert mark.std() > 18  # 20 of the texture, 12 of the noise
        assert (mark.mean(1).std() > 10, mark.mean(0).std() > 10) == varies[row["label"]]


def test_rationales_of_a_class_recite_more_or_less():
    likeness = []
    for seed in range(40):
        row = drawn.lesions(random.Random(seed))[1]
        likeness.append(bleu(row["rationale"], list(drawn.KNOWLEDGE.values())))
        clauses = [clause for pair in drawn.LOOKS[row["label"]] for clause in pair]
        assert all(clause in clauses for clause in row["rationale"].split(", "))
    assert min(likeness) < 0.3 and max(likeness) == 1


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_a_written_folder_is_a_data_set(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "SIZES", {"train": 5, "dev": 2, "test": 3})
    for name in ("one", "two"):
        drawn.write(tmp_path / name, kind)
    for split, size in drawn.SIZES.items():
        assert len(data.load(str(tmp_path / "one"), split)) == size
    assert (tmp_path / "one/test/0.png").read_bytes() == (tmp_path / "two/test/0.png").read_bytes()
    items = data.load(str(tmp_path / "one"), "train")
    if kind == "lesions":
        told = data.with_knowledge(items, "one", str(tmp_path / "one" / "knowledge.md"))
        assert told[0].knowledge[1:] == tuple(f"{k}: {v}" for k, v in drawn.KNOWLEDGE.items())


@pytest.fixture
def phases(monkeypatch):
    """The flags of every phase, in order; none is run."""
    flags = []

    def run_phase(run, of_phase):
        flags.append(of_phase)
        run.mkdir(parents=True, exist_ok=True)
        found = {"before": {"accuracy": 0.1}, "after": {"accuracy": 0.2}}
        (run / "eval.json").write_text(json.dumps(found))
        (run / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')

    monkeypatch.setattr(augmentations, "run_phase", run_phase)
    monkeypatch.setattr(augmentations, "spoilt_base", lambda *of_base: None)
    monkeypatch.setattr(drawn, "write", lambda folder, kind: None)
    return flags


@pytest.mark.parametrize("name, arm", ARMS)
def test_every_phase_has_flags_that_training_accepts(name, arm, phases, tmp_path):
    row = augmentations.run_arm(tmp_path, name, arm, 3)
    assert row["after"] == {"accuracy": 0.2} and row["curves"]["accuracy"] == [[1, 0.5]]
    for flags in phases:
        given, _ = cli.read_flags(flags)
        if "pictures" in SETTINGS[name]:  # which are not drawn here
            given["dataset"] = str(tmp_path)
        cli.validate(cli.make_config(given))
        assert given["seed"] == 3


def test_a_later_phase_begins_where_the_one_before_ended(phases, tmp_path):
    augmentations.run_arm(tmp_path, "outlines", "boxes first", 0)
    (boxes, _), (outlines, _) = map(cli.read_flags, phases)
    assert boxes["task"] == "localize" and "init" not in boxes
    assert outlines["task"] == "classify" and outlines["init"].endswith("boxes_first-0-0")


def test_a_phase_that_is_done_is_not_run_and_one_begun_is_resumed(tmp_path, monkeypatch):
    commands = []

    def run(command, **kwargs):
        commands.append([str(word) for word in command[2:]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "run"
    augmentations.run_phase(folder, ["--steps", "3"])
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "eval.json").write_text('{"before": {}}')
    augmentations.run_phase(folder, ["--steps", "3"])
    (folder / "eval.json").write_text('{"before": {}, "after": {}}')
    augmentations.run_phase(folder, ["--steps", "3"])
    assert commands == [["--out", str(folder), "--steps", "3"], ["--resume", str(folder)]]


def test_differences_are_paired_by_seed_and_decide():
    curves = {"a": [[1, 0.2], [2, 0.4]], "b": [[1, 0.1], [2, 0.1]]}
    rows = []
    for arm, seed, accuracy in [("a", 0, 0.5), ("b", 0, 0.3), ("a", 1, 0.9), ("b", 1, 0.6)]:
        after = {"accuracy": accuracy}
        rows.append({"arm": arm, "seed": seed, "after": after, "curves": {"kappa": curves[arm]}})
    rows.append({"arm": "a", "seed": 2, "after": {"accuracy": 9}, "curves": {}})  # b has none
    assert differences(rows, "a", "b", "accuracy") == pytest.approx([0.2, 0.3])
    assert differences(rows[:4], "a", "b", "kappa over the steps") == pytest.approx([0.2, 0.2])
    question = {"arm": "a", "control": "b", "figure": "accuracy"}
    answer = decided(rows, question, planned=2)
    # Of two values the half interval is t(1) = 12.706 standard deviations / sqrt 2.
    half = 12.706 * math.sqrt(2 * 0.05**2) / math.sqrt(2)
    assert answer["difference"] == pytest.approx([0.25, 0.25 - half, 0.25 + half], rel=1e-3)
    assert answer["verdict"] == "no effect"
    assert decided(rows, question, planned=5)["verdict"] == "open, 2 of 5 seeds"
    assert (verdict(0.1, 0.2), verdict(-0.2, -0.1)) == ("an effect", "harm")
