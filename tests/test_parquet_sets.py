"""The sets that the hub has as parquet: small files of their real columns, written here."""

import io
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
from helpers import refused
from PIL import Image

import data
from support import hub, parquet_sets, pictures
from support.parquet_sets import HUB, medmcqa_rows, mmlu_pro_rows, pubmedqa_rows, vqa_rad_rows


def write(folder, dataset, split, columns) -> str:
    """A file of a set where its repository has it. columns: {name: values}"""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / HUB[dataset][1][split]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


# ---------------------------------------------------------------------------------- any of them
@pytest.mark.parametrize("rows", [mmlu_pro_rows, medmcqa_rows, pubmedqa_rows, vqa_rad_rows])
def test_a_file_that_is_not_there_or_no_parquet(rows, tmp_path):
    dataset = rows.__name__.removesuffix("_rows").replace("_", "-").replace("pro", "pro-health")
    repo, files = HUB[dataset]
    refused(lambda: rows("test", str(tmp_path)), f"neither {tmp_path}/", repo, files["test"])
    path = tmp_path / files["test"]
    path.parent.mkdir()
    path.write_text("hello")
    refused(lambda: rows("test", str(tmp_path)), str(path), "not a parquet file")


def test_other_columns_are_refused_by_file_and_name(tmp_path):
    path = write(tmp_path, "medmcqa", "test", {"id": ["x"], "question": ["?"], "answer": ["A"]})
    found = "no column 'opa', but id, question, answer"
    refused(lambda: medmcqa_rows("test", str(tmp_path)), path, found)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / HUB["mmlu-pro-health"][1]["test"]
    path.parent.mkdir()
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(lambda: mmlu_pro_rows("test", str(tmp_path)), "pip install pyarrow")


def test_without_a_folder_the_file_comes_from_the_hub(tmp_path, monkeypatch):
    columns = {"id": ["a"], "question": ["Q?"], "cop": [3]}
    columns |= {f"op{letter}": [letter] for letter in "abcd"}
    path = write(tmp_path, "medmcqa", "test", columns)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *names: asked.append(names) or path)
    assert [row["answer"] for row in medmcqa_rows("test")] == ["D"]
    assert asked == [("openlifescienceai/medmcqa", "data/validation-00000-of-00001.parquet")]


def test_a_set_is_at_hand_when_all_its_files_are(monkeypatch):
    here = {HUB["vqa-rad"][1]["test"]}
    monkeypatch.setattr(hub, "cached", lambda repo, name, kind: name in here)
    assert not parquet_sets.cached("vqa-rad")
    here.add(HUB["vqa-rad"][1]["train"])
    assert parquet_sets.cached("vqa-rad")


# ------------------------------------------------------------------------------------- MMLU-Pro
def test_only_the_health_questions_of_mmlu_pro(tmp_path):
    columns = {
        "question_id": [3, 4, 5],
        "question": ["Law?", "Health?", "Too?"],
        "options": [["a", "b"], ["a", "b", "c"], ["a", "b"]],
        "answer": ["A", "C", "B"],
        "category": ["law", "health", "health"],
    }
    write(tmp_path / "MMLU-Pro", "mmlu-pro-health", "test", columns)
    rows = mmlu_pro_rows("test", str(tmp_path))
    found = [(row["id"], row["question"], row["options"], row["answer"]) for row in rows]
    assert found == [
        ("mmlu-pro-4", "Health?", ("a", "b", "c"), "C"),
        ("mmlu-pro-5", "Too?", ("a", "b"), "B"),
    ]
    refused(lambda: data.load("mmlu-pro-health", "train"), "no split 'train'", "only test")


def test_real_mmlu_pro(medqa_dir):
    pytest.importorskip("pyarrow")
    items = data.load("mmlu-pro-health", "test", medqa_dir)
    assert len(items) == 100
    assert all(3 <= len(item.options) <= 10 for item in items)
    assert all(item.answer in "ABCDEFGHIJ"[: len(item.options)] for item in items)


# -------------------------------------------------------------------------------------- MedMCQA
def medmcqa(ids, cop, **other):
    """All columns of the card's schema; `cop` counts from 0, and is -1 where it is withheld."""
    n = len(ids)
    columns = {"id": ids, "question": [f"Which is {i}?" for i in ids]}
    columns |= {f"op{x}": [f"{x} of {i}" for i in ids] for x in "abcd"}
    columns |= {"cop": cop, "choice_type": ["single"] * n, "exp": [None] * n}
    return columns | {"subject_name": ["Anatomy"] * n, "topic_name": [None] * n} | other


def test_medmcqa_counts_the_right_option_from_zero(tmp_path):
    write(tmp_path, "medmcqa", "test", medmcqa(list("wxyz"), [0, 1, 2, 3]))
    items = data.load("medmcqa", "test", str(tmp_path))
    assert [item.answer for item in items] == ["A", "B", "C", "D"]
    first = items[0]
    assert (first.id, first.task, first.question) == ("medmcqa-w", "choice", "Which is w?")
    assert first.options == ("a of w", "b of w", "c of w", "d of w")


def test_rows_of_medmcqa_that_cannot_be_asked_are_counted(tmp_path, capsys):
    columns = medmcqa(list("wxyz"), [0, -1, 2, 3], opb=["b", "b", " ", "b"])
    path = write(tmp_path, "medmcqa", "test", columns)
    found = [row["id"] for row in medmcqa_rows("test", str(tmp_path))]
    assert found == ["medmcqa-w", "medmcqa-z"]
    assert f"{path}: 2 rows without an answer or with an empty text" in capsys.readouterr().err


def test_dev_of_medmcqa_is_a_hundredth_of_train(tmp_path):
    ids = [f"{i:04}" for i in range(3000)]
    write(tmp_path, "medmcqa", "train", medmcqa(ids, [0] * 3000))
    found = {split: medmcqa_rows(split, str(tmp_path)) for split in ("train", "dev")}
    names = [row["id"] for rows in found.values() for row in rows]
    assert sorted(names) == [f"medmcqa-{i}" for i in ids]
    assert 15 <= len(found["dev"]) <= 45  # a binomial of mean 30 and deviation 5.4


# ------------------------------------------------------------------------------------- PubMedQA
def pubmedqa(decisions, **other):
    n = len(decisions)
    context = {"contexts": ["Some.", "More."], "labels": ["AIM", "RESULTS"], "meshes": ["Heart"]}
    context |= {"reasoning_required_pred": ["y"], "reasoning_free_pred": ["y"]}
    columns = {
        "pubid": list(range(1, n + 1)),
        "question": [f"Does {i}?" for i in range(1, n + 1)],
        "context": [context] * n,
        "long_answer": ["It does."] * n,
        "final_decision": decisions,
    }
    return columns | other


def test_the_test_split_of_pubmedqa_is_the_official_one(tmp_path, capsys):
    """The ids are those that the authors' split_dataset.py gave for these forty decisions."""
    decisions = "yes no yes maybe yes no yes no yes maybe".split() * 4
    path = write(tmp_path, "pubmedqa", "train", pubmedqa(decisions))
    found = {split: pubmedqa_rows(split, str(tmp_path)) for split in data.SPLITS}
    numbers = [int(row["id"].removeprefix("pubmedqa-")) for row in found["test"]]
    official = [3, 6, 9, 11, 13, 14, 15, 16, 17, 18, 20, 24, 25, 26, 27, 31, 36, 38, 39, 40]
    assert numbers == official
    others = [int(row["id"].removeprefix("pubmedqa-")) for row in found["train"] + found["dev"]]
    assert sorted(others + official) == list(range(1, 41))
    # Forty rows are not the published thousand, and that is said.
    assert f"{path}: not the published rows" in capsys.readouterr().err


def test_an_item_of_pubmedqa(tmp_path):
    write(tmp_path / "PubMedQA", "pubmedqa", "train", pubmedqa(["yes", "no", "maybe"] * 4))
    items = data.load("pubmedqa", "test", str(tmp_path))
    assert Counter(item.answer for item in items) == {"yes": 2, "no": 2, "maybe": 2}
    item = items[0]
    assert item.question.startswith("Abstract: Some.\nMore.\nQuestion: Does ")
    assert (item.task, item.options, item.rationale) == (
        "classify",
        ("yes", "no", "maybe"),
        "It does.",
    )
    assert "- maybe" in data.messages(item)[1]["content"]


def test_an_unknown_decision_or_context_of_pubmedqa_is_refused(tmp_path):
    path = write(tmp_path, "pubmedqa", "train", pubmedqa(["yes", "perhaps"]))
    call = partial(pubmedqa_rows, "test", str(tmp_path))
    refused(call, path, "'final_decision' is 'perhaps', not one of yes, no, maybe")
    write(tmp_path, "pubmedqa", "train", pubmedqa(["yes", "yes"], context=["Some.", "More."]))
    refused(call, path, "the column 'context' has no 'contexts', but str")


# -------------------------------------------------------------------------------------- VQA-RAD
def jpeg(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6), grey, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def vqa_rad(images, answers):
    return {
        "image": [{"bytes": image, "path": None} for image in images],
        "question": [f"Is {i} there?" for i in range(len(images))],
        "answer": answers,
    }


def test_closed_questions_of_vqa_rad(tmp_path):
    answers = ["Yes", "left lung", "no ", "yes, both", "NO"]
    write(tmp_path, "vqa-rad", "test", vqa_rad([*map(jpeg, (10, 20, 30, 40, 50))], answers))
    items = data.load("vqa-rad", "test", str(tmp_path))
    found = [(item.id, item.task, item.answer) for item in items]
    assert found == [
        ("vqa-rad-test-0", "classify", "yes"),
        ("vqa-rad-test-2", "classify", "no"),
        ("vqa-rad-test-4", "classify", "no"),
    ]
    assert items[0].question == "Is 0 there?" and items[0].options == ("yes", "no")
    shown = [pictures.open_image(item.image).getpixel((0, 0)) for item in items]
    assert shown == [(10,) * 3, (30,) * 3, (50,) * 3]


def test_no_image_of_vqa_rad_stands_in_train_and_dev(tmp_path):
    images = [jpeg(grey) for grey in range(0, 240, 4)] * 2
    write(tmp_path, "vqa-rad", "train", vqa_rad(images, ["yes"] * len(images)))
    train, dev = (data.load("vqa-rad", split, str(tmp_path)) for split in ("train", "dev"))
    assert len(train) + len(dev) == len(images) and dev
    assert data.without(train, dev) == train


def test_an_image_of_vqa_rad_that_is_damaged_or_missing_is_refused(tmp_path):
    path = write(tmp_path, "vqa-rad", "test", vqa_rad([jpeg(0), b"no image"], ["yes", "no"]))
    call = partial(vqa_rad_rows, "test", str(tmp_path))
    refused(call, f"{path}, row 1: a picture in memory is no image")
    write(tmp_path, "vqa-rad", "test", vqa_rad([b"", jpeg(0)], ["yes", "no"]))
    refused(call, f"{path}, row 0: a picture in memory is an empty file")
    columns = {"image": ["a.png"], "question": ["?"], "answer": ["no"]}
    write(tmp_path, "vqa-rad", "test", columns)
    refused(call, path, "the column 'image' has no 'bytes', but str")
