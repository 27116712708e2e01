"""The demo's vignettes and pictures."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from support import demo_task

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def vignettes():
    return {split: demo_task.demo_rows(split) for split in SPLITS}


def test_no_vignette_occurs_twice(vignettes):
    rows = [row for split in SPLITS for row in vignettes[split]]
    assert [len(vignettes[split]) for split in SPLITS] == [3000, 200, 300]
    assert len({row["id"] for row in rows}) == 3500
    assert len({(row["question"], frozenset(row["options"])) for row in rows}) == 3500


def test_what_is_asked_in_dev_and_test_was_never_seen_in_train(vignettes):
    def findings(row):
        return frozenset(row["question"].split(" has ")[1].split(" . ")[0].split(" and "))

    trained = {findings(row) for row in vignettes["train"]}
    held_out = {findings(row) for row in vignettes["dev"] + vignettes["test"]}
    assert len(held_out) == 20 and {len(found) for found in held_out} == {3}
    assert not trained & held_out and {len(found) for found in trained} == {2, 3}


def test_the_gold_letter_is_that_of_the_condition_with_these_findings(vignettes):
    for row in vignettes["train"]:
        gold = row["options"]["ABCDE".index(row["answer"])]
        asked = row["question"].split(" has ")[1].split(" . ")[0].split(" and ")
        assert set(asked) <= set(demo_task.CONDITIONS[gold].split())
        assert row["rationale"] == f"findings suggest {gold}"
        assert len(set(row["options"])) == 5


def test_every_word_is_in_the_vocabulary(vignettes):
    words = set(demo_task.demo_words())
    for row in vignettes["test"]:
        item = data.Item(**row)
        written = data.messages(item)[1]["content"] + " " + data.completion(item)
        assert set(written.split()) <= words


def test_the_demo_is_the_same_in_every_process():
    """It once came out of the iteration of a set of words, which differs between processes."""
    code = "from support import demo_task; print(demo_task.demo_rows('dev'))"
    outputs = set()
    for seed in "01":
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(data.__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_a_lesion_is_bright_in_its_box_and_nowhere_else():
    for i in range(20):
        picture, shape, grade, (x1, y1, x2, y2) = demo_task.lesion(f"test {i}")
        assert picture.shape == (56, 56) and picture.dtype == np.uint8
        assert x2 - x1 == y2 - y1 == 7 * (int(grade) + 1) and 0 <= x1 < x2 <= 56 and y2 <= 56
        middle = picture[(y1 + y2) // 2, (x1 + x2) // 2]
        assert middle > 160  # 90 + 120, noise of 12
        around = np.ones((56, 56), bool)
        around[y1:y2, x1:x2] = False
        assert picture[around].max() < 160 and shape in demo_task.SHAPES


def test_an_irregular_outline_covers_less():
    round_, irregular = (demo_task.outline(shape, 35) for shape in demo_task.SHAPES)
    assert round_.mean() == pytest.approx(np.pi / 4, abs=0.02)  # a circle in its square
    assert irregular.mean() < 0.75 * round_.mean()


def test_lesions_have_three_tasks():
    for task in ("classify", "grade", "localize"):
        rows = demo_task.lesion_rows("dev", task=task)
        assert len(rows) == 200 and len({row["id"] for row in rows}) == 200
        assert {row["task"] for row in rows} == {task}
    picture, _, _, box = demo_task.lesion("lesion dev 3")
    assert rows[3]["answer"] == (box,) and (rows[3]["image"] == picture).all()
