"""MedQA and MMLU-Pro: their layouts, in a folder and on the hub."""

import json
import sys
import zipfile

import pytest
from helpers import refused

import data
from support import hub
from support.text_sets import medqa_rows, mmlu_pro_rows

OPTIONS = {"A": "one", "B": "two", "C": "three"}
ROW = {"question": "Q?", "options": OPTIONS, "answer": "two", "answer_idx": "B"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_medqa_in_both_layouts(tmp_path):
    us = tmp_path / "data_clean/questions/US"
    write(us / "test.jsonl", ROW, ROW | {"answer_idx": "C"})
    four = us / "4_options/phrases_no_exclude_test.jsonl"
    write(four, ROW | {"question": "Four?"})
    rows = medqa_rows("medqa", "test", str(tmp_path))
    assert [row["answer"] for row in rows] == ["B", "C"]
    assert [row["id"] for row in rows] == ["medqa-test-1", "medqa-test-2"]
    assert rows[0]["options"] == ("one", "two", "three") and rows[0]["task"] == "choice"
    [row] = medqa_rows("medqa-4", "test", str(tmp_path))
    assert row["question"] == "Four?" and row["id"] == "medqa-4-test-1"


def test_medqa_from_the_hub_archive_without_unpacking(tmp_path, monkeypatch):
    archive = tmp_path / "data_clean.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("data_clean/questions/US/dev.jsonl", json.dumps(ROW) + "\n")
        z.writestr("../escape.txt", "never written")
    monkeypatch.setattr(hub, "fetch", lambda repo, name: str(archive))
    assert medqa_rows("medqa", "dev")[0]["answer"] == "B"
    assert [path.name for path in tmp_path.iterdir()] == ["data_clean.zip"]


def test_files_that_are_not_there(tmp_path):
    refused(lambda: medqa_rows("medqa", "test", "/nowhere"), "/nowhere/data_clean", "--data-dir")
    refused(lambda: mmlu_pro_rows("test", str(tmp_path)), f"neither {tmp_path}/MMLU-Pro/data")


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "data/test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("hello")
    refused(lambda: mmlu_pro_rows("test", str(tmp_path)), str(path), "not the parquet file")


def test_only_the_health_questions_of_mmlu_pro(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "question_id": [3, 4, 5],
        "question": ["Law?", "Health?", "Too?"],
        "options": [["a", "b"], ["a", "b", "c"], ["a", "b"]],
        "answer": ["A", "C", "B"],
        "category": ["law", "health", "health"],
    }
    folder = tmp_path / "MMLU-Pro/data"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.table(columns), folder / "test-00000-of-00001.parquet")
    rows = mmlu_pro_rows("test", str(tmp_path))
    found = [(row["id"], row["question"], row["options"], row["answer"]) for row in rows]
    assert found == [
        ("mmlu-pro-4", "Health?", ("a", "b", "c"), "C"),
        ("mmlu-pro-5", "Too?", ("a", "b"), "B"),
    ]
    refused(lambda: data.load("mmlu-pro-health", "train"), "evaluation only", "its split is test")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "data/test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(lambda: mmlu_pro_rows("test", str(tmp_path)), "pip install pyarrow")


def test_real_mmlu_pro(medqa_dir):
    pytest.importorskip("pyarrow")
    items = data.load("mmlu-pro-health", "test", medqa_dir)
    assert len(items) == 100
    assert all(3 <= len(item.options) <= 10 for item in items)
    assert all(item.answer in "ABCDEFGHIJ"[: len(item.options)] for item in items)


def test_real_medqa(medqa_dir):
    splits = {name: data.load("medqa", name, medqa_dir) for name in data.SPLITS}
    sizes = {name: len(items) for name, items in splits.items()}
    assert sizes == {"train": 700, "dev": 100, "test": 100}
    for items in splits.values():
        assert all(len(item.options) == 5 and item.answer in "ABCDE" for item in items)
    held_out = splits["test"] + splits["dev"]
    assert data.without(splits["train"], held_out) == splits["train"]
