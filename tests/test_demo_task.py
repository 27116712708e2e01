"""The demo's dose protocol and pictures."""

import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

import data
from support import demo_task
from support.demo_model import demo_policy

SPLITS = ("train", "dev", "test", "ood")
# The chart once more, as one would tell it: from which level to which.
MOVES = {
    "low": {1: 2, 2: 3, 3: 4, 4: 5, 5: 1},
    "high": {1: 3, 2: 1, 3: 2, 4: 5, 5: 4},
    "missed": {1: 2, 2: 1, 3: 3, 4: 4, 5: 5},
    "rash": {1: 1, 2: 4, 3: 5, 4: 2, 5: 3},
}
MG = {1: "5-mg", 2: "10-mg", 3: "20-mg", 4: "40-mg", 5: "80-mg"}


@pytest.fixture(scope="module")
def vignettes():
    return {split: demo_task.protocol_rows(split) for split in SPLITS}


def course(row: dict) -> tuple[int, list[str], list[str]]:
    """What a question tells: the level, the days, the results."""
    level, told = row["question"].split(" level ")[1].split(" ; ")[:2]
    return int(level), told.split()[::2], told.split()[1::2]


def test_the_moves_generate_every_permutation_of_the_levels():
    found = frontier = {(1, 2, 3, 4, 5)}
    while frontier:
        reached = {
            tuple(move[level] for level in order) for order in frontier for move in MOVES.values()
        }
        frontier = reached - found
        found = found | reached
    assert found == set(permutations(range(1, 6)))


def test_no_result_can_be_left_out():
    """Without any one of its results a course leads elsewhere for some start: of all up to four."""
    for n in (2, 3, 4):
        for results in product(MOVES, repeat=n):
            for left_out in range(n):
                rest = results[:left_out] + results[left_out + 1 :]
                ends = [(followed(level, results), followed(level, rest)) for level in MG]
                assert any(one != other for one, other in ends)


def followed(level: int, results) -> int:
    for result in results:
        level = MOVES[result][level]
    return level


def test_answer_and_rationale_are_those_of_the_chart(vignettes):
    for split in SPLITS:
        for row in vignettes[split][:200]:
            level, days, results = course(row)
            steps = []
            for day, result in zip(days, results):
                level = MOVES[result][level]
                steps += [day, result, str(level)]
            assert row["rationale"].split() == [*steps, "so", MG[level]]
            assert row["options"]["ABCDE".index(row["answer"])] == MG[level]
            assert sorted(row["options"]) == sorted(MG.values())


def test_a_rationale_by_hand():
    """4, one up: 5; 5 goes to 4 when high; 4 goes to 2 by a rash; level 2 is 10 mg."""
    found = demo_task.worked_out("4", ("day-3", "day-4", "day-5"), ("low", "high", "rash"))
    assert found == ("day-3 low 5 day-4 high 4 day-5 rash 2 so 10-mg", "10-mg")
    assert demo_task.steps(found[0]) == "low 5 high 4 rash 2 so 10-mg".split()


def test_no_vignette_occurs_twice_and_no_course_in_two_splits(vignettes):
    rows = [row for split in SPLITS for row in vignettes[split]]
    assert [len(vignettes[split]) for split in SPLITS] == [3000, 200, 300, 300]
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == 3800
    told = {}
    for split in SPLITS:
        courses = [course(row) for row in vignettes[split]]
        told[split] = {(level, *results) for level, _, results in courses}
        lengths = {"ood": {5, 6}}.get(split, {2, 3, 4})
        assert {len(results) for _, _, results in courses} == lengths
    assert not told["train"] & told["dev"] and not told["train"] & told["test"]
    assert not told["dev"] & told["test"]
    # The warm start sees courses of train of every length.
    warm = {demo_task.part_of(level, results) for level, *results in product("3", *[MOVES] * 6)}
    assert warm == {"train", "dev", "test"}
    for level, *results in (*told["test"], *told["ood"]):
        assert demo_task.part_of(str(level), results) == "test"


def test_a_referral_is_right_in_train_and_at_chance_elsewhere():
    for split, low, high in (("train", 1.0, 1.0), ("test", 0.1, 0.3), ("ood", 0.1, 0.3)):
        rows = demo_task.protocol_rows(split, referral=True)
        right = [
            row["question"].split(" guesses ")[1].split()[0]
            == row["options"]["ABCDE".index(row["answer"])]
            for row in rows
        ]
        assert low <= sum(right) / len(right) <= high


def test_every_word_and_every_option_is_one_token(vignettes):
    tokenizer = demo_policy(0).tokenizer
    for row in [*vignettes["ood"], *demo_task.protocol_rows("test", referral=True)]:
        item = data.Item(**row)
        asked = data.messages(item)[1]["content"]
        written = tokenizer(f"{asked} {data.completion(item)} likely").input_ids
        assert tokenizer.unk_token_id not in written
        assert len(tokenizer(asked).input_ids) == len(row["question"].split()) + 5


def test_the_demo_is_the_same_in_every_process():
    """It once came out of the iteration of a set of words, which differs between processes."""
    code = "from support import demo_task; print(demo_task.protocol_rows('dev'))"
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
