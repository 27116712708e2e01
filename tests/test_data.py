"""Data: which sets there are, what is refused, and the order of items."""

import doctest
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from PIL import Image

import data
import rewards
from benchmarks import prompts
from data import Item, batch_for_step
from support import image_sets
from support.config import Config

ROW = {"question": "Q?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "A"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_doctests():
    failed, tried = doctest.testmod(data)
    assert tried >= 2 and failed == 0


def test_importing_data_does_not_import_torch():
    code = "import sys, data; print('torch' in sys.modules, 'transformers' in sys.modules)"
    root = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# --------------------------------------------------------------------------------- the data sets
def test_every_row_of_the_table_is_whole():
    import train  # noqa: PLC0415 (all of Config and torch: for this test alone)

    known = {field.name for field in fields(train.Config)}
    for name, source in data.LOADERS.items():
        assert set(source.defaults) <= known, name
        assert source.tasks and set(source.tasks) <= set(data.WANTED), name
        assert source.splits and set(source.splits) <= {*data.SPLITS, data.OOD}, name
        assert source.about and "\n" not in source.about, name
        assert source.licence.strip(), name
    assert {"bccd", "bccd-rbc", "bccd-platelets", *image_sets.NAMES} <= set(data.LOADERS)


def test_a_new_data_set_is_a_row(monkeypatch):
    def rows(split, data_dir, task):
        return [{"id": split, "task": task, "question": "?", "options": ("a", "b"), "answer": "A"}]

    source = data.Source(rows, "CC0-1.0", splits=("train", "test"), instruction="Reply.")
    monkeypatch.setitem(data.LOADERS, "new", source)
    [item] = data.load("new", "train")
    assert (item.id, item.task) == ("train", "choice")
    assert data.messages(item, "direct")[0]["content"].startswith("Reply. Give only the letter")
    refused(lambda: data.load("new", "dev"), "new", "only train, test")
    with pytest.raises(TypeError, match="licence"):
        data.Source(rows)


def test_the_table_can_be_read_by_a_user():
    path = Path(data.__file__)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(data.DATASETS) + 11
    assert any(line.startswith("dermamnist ") and "CC BY-NC 4.0" in line for line in lines)


@pytest.mark.parametrize(
    "call, words",
    [
        (("nothing", "train"), ("demo-images, medqa", "the MedMNIST sets", "JSONL")),
        (("the MedMNIST sets (retinamnist, retinamnist-28, ...)", "train"), ("no data set",)),
        (("demo", "valid"), ("train, dev, test",)),
        (("demo", "train", None, 0), ("the limit 0",)),
        (("chestmnist", "train"), ("multi-label",)),
        (("chestmnist-28", "train"), ("multi-label",)),
        (("retinamnist-99", "train"), ("retinamnist-28", "retinamnist-224")),
        (("bccd", "train"), ("git clone https://github.com/Shenggan/BCCD_Dataset", "--data-dir")),
        (("bccd", "train", "D", None, "grade"), ("'grade'", "localize and classify")),
        (("bccd-rbc", "train", "D", None, "classify"), ("'classify'", "localize")),
        (("medqa", "train", None, None, "localize"), ("medqa", "'localize'", "choice")),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_read(call, words):
    refused(lambda: data.load(*call), *words)


def test_the_names_of_bccd_are_the_kinds_of_cells(medqa_dir):
    kinds = {"bccd": "white blood cell", "bccd-rbc": "red blood cell", "bccd-platelets": "platelet"}
    for name, kind in kinds.items():
        items = data.load(name, "dev", medqa_dir, limit=2)
        assert all(item.task == "localize" and f"every {kind} " in item.question for item in items)
    assert data.load("bccd", "dev", medqa_dir, task="classify")[0].task == "classify"


# ------------------------------------------------------------------------------------- your own
def test_own_file_is_split_by_content(tmp_path):
    rows = [{**ROW, "question": f"Q{i}?", "id": f"i{i}"} for i in range(300)]
    path = write(tmp_path / "mine.jsonl", *rows)

    def parts():
        return {name: {item.id for item in data.load(path, name)} for name in data.SPLITS}

    first = parts()
    assert sum(map(len, first.values())) == 300 and len(set.union(*first.values())) == 300
    assert min(map(len, first.values())) > 10
    write(tmp_path / "mine.jsonl", *reversed(rows))
    assert parts() == first  # the order of lines does not move an item to another split


def test_a_patient_is_not_cut_in_two(tmp_path):
    for i in range(60):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    labels = {"label": "cat", "labels": ["cat", "dog"]}
    rows = [{"image": f"{i}.png", "patient": f"p{i % 20}", **labels} for i in range(60)]
    path = write(tmp_path / "mine.jsonl", *rows)
    patients = [{item.patient for item in data.load(path, name)} for name in data.SPLITS]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20


def test_own_folder_has_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", ROW)
    [item] = data.load(str(tmp_path), "train", limit=5)
    assert item.id == "train-train-1"
    refused(lambda: data.load(str(tmp_path), "dev"), str(tmp_path / "dev.jsonl"), "is not there")
    refused(lambda: data.load(str(tmp_path), "train", task="grade"), "--task grade", "choice")


def test_only_names_are_known_and_no_sentence_of_help():
    known = ("demo", "medqa", "retinamnist", "retinamnist-28")
    assert all(name in data.LOADERS for name in known)
    told = "the MedMNIST sets (retinamnist, retinamnist-28, ...)"
    assert not {told, "", "demo, medqa"} & set(data.LOADERS)
    refused(lambda: data.load("nothing", "train"), "the MedMNIST sets")


def test_a_line_is_refused_by_file_and_line(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROW, ROW | {"answer": "D"})
    refused(lambda: data.load(path, "train"), f"{path}, line 2: ", "'D'")


# ------------------------------------------------------------------------------ splits and order
def test_overlap_is_found_by_question_and_options():
    item = Item("1", "choice", "Which is true?", ("a", "b"), "A")
    same = Item("2", "choice", " which  is TRUE?", ("b", "a"), "B")
    other = Item("3", "choice", "Which is true?", ("c", "d"), "A")
    assert data.without([same, other], [item]) == [other]


def test_the_fingerprint_of_a_set_is_the_same_in_every_process():
    code = (
        "import data; items = data.load('demo', 'dev'); print(data.set_fingerprint(items), "
        "[item.id for item in data.batch_for_step(items, 3, 5, (1, 2))])"
    )
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


def test_batches_are_pages_of_seeded_epochs():
    items = [Item(str(i), "choice", f"Q{i}", ("a", "b"), "A") for i in range(10)]
    seen = [item.id for step in range(5) for item in batch_for_step(items, step, 4, seed=1)]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(str(i) for i in range(10))
    assert seen[:10] != seen[10:]
    assert [item.id for item in batch_for_step(items, 3, 4, 1)] == seen[12:16]  # no cursor
    seeds = (2, 1, (1, 1))
    first, second, third = (batch_for_step(items, 0, 4, seed) for seed in seeds)
    assert first != second and second != third
    refused(lambda: batch_for_step([], 0, 4, 1), "no items")


def test_shuffled_options_keep_the_gold_text():
    items = data.load("demo", "test")[:50]
    shuffled = [data.shuffle_options(item, 3) for item in items]
    for before, after in zip(items, shuffled):
        gold = before.options["ABCDE".index(before.answer)]
        assert gold == after.options["ABCDE".index(after.answer)]
    assert shuffled != items
    # A function of (seed, id), not of the position.
    assert shuffled[7] == data.shuffle_options(items[7], 3)


def test_names_are_shuffled_and_grades_are_not():
    names = Item("i", "classify", "?", ("a", "b", "c", "d"), "c")
    orders = {data.shuffle_options(names, seed).options for seed in range(20)}
    assert len(orders) > 5 and {tuple(sorted(order)) for order in orders} == {names.options}
    assert data.shuffle_options(names, 1).answer == "c"
    grades = Item("i", "grade", "?", ("0", "1", "2"), "1")
    assert data.shuffle_options(grades, 1) == grades


def test_rotated_options_keep_the_gold_text():
    item = Item("i", "choice", "?", ("a", "b", "c"), "A")
    assert data.rotate_options(item, 1).options == ("b", "c", "a")
    assert [data.rotate_options(item, by).answer for by in (1, 2, 3, 4)] == ["C", "B", "A", "C"]


# --------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("style", ["think", "direct", "cot"])
def test_prompts_hold_every_option_and_end_open(style):
    item = data.load("demo", "test")[0]
    text = data.plain_text(data.messages(item, style))
    for letter, option in zip("ABCDE", item.options):
        assert f"{letter}. {option}" in text
    assert text.startswith("Answer the medical question. ") and text.endswith("Assistant:")
    assert ("<think>" in data.messages(item, style)[0]["content"]) == (style == "think")


@pytest.mark.parametrize("style", ["think", "direct", "cot"])
def test_the_prompt_is_the_wording_that_was_measured_and_its_form_earns_nothing(style):
    item = data.load("demo", "test")[0]
    assert data.messages(item, style) == prompts.messages(prompts.CHOSEN, item, style)
    system = data.messages(item, style)[0]["content"]
    form = system[system.index("The form: ") + len("The form: ") :]
    graded = rewards.grade(item, form, Config(style=style))
    assert not graded.correct and not graded.predicted
    assert graded.parts["format"] == (style != "think")  # X is a word, "..." is none


def test_a_patient_of_the_test_set_is_not_trained_on():
    one = Item("a", "choice", "Q1?", ("x", "y"), "A", patient="p")
    other = Item("b", "choice", "Q2?", ("x", "y"), "A", patient="p")
    assert data.without([one], [other]) == []
    unknown = replace(one, patient="")
    assert data.without([unknown], [other]) == [unknown]


def test_a_few_shots_are_of_every_class_and_boxes_are_one_class():
    boxes, shapes = (data.load("demo-images", "dev", task=task) for task in ("localize", "grade"))
    assert len(data.few_shot(boxes, 2, 0)) == 2
    few = data.few_shot(shapes, 8, 0)
    assert len(few) == 40
    assert len({item.answer for item in few[:20]}) > 3  # so a limit cuts off no class
    assert few == data.few_shot(shapes, 8, 0) != data.few_shot(shapes, 8, 1)


def test_a_box_never_rounds_to_nothing():
    assert data.to_frame((100, 100, 103, 102), (56, 56, 1000, 1000)) == (6, 6, 7, 7)
