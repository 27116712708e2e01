"""MedQA: its layouts, in a folder and on the hub."""

import json
import zipfile

from helpers import refused

import data
from support import hub
from support.text_sets import medqa_rows

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


def test_a_file_that_is_not_there(tmp_path):
    refused(lambda: medqa_rows("medqa", "test", "/nowhere"), "/nowhere/data_clean", "--data-dir")


def test_real_medqa(medqa_dir):
    splits = {name: data.load("medqa", name, medqa_dir) for name in data.SPLITS}
    sizes = {name: len(items) for name, items in splits.items()}
    assert sizes == {"train": 700, "dev": 100, "test": 100}
    for items in splits.values():
        assert all(len(item.options) == 5 and item.answer in "ABCDE" for item in items)
    held_out = splits["test"] + splits["dev"]
    assert data.without(splits["train"], held_out) == splits["train"]
