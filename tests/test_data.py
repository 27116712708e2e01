"""Data: what is read, what is refused and where, and the order of items."""
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import data
import demo as demos
from data import Item, UsageError, batch_for_step

ROW = {"question": "Q?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "two", "answer_idx": "B"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_medqa_both_layouts(tmp_path):
    us = tmp_path / "data_clean/questions/US"
    write(us / "test.jsonl", ROW, ROW | {"answer_idx": "C"})
    write(us / "4_options/phrases_no_exclude_test.jsonl", ROW | {"question": "Four?"})
    items = data.load("medqa", "test", str(tmp_path))
    assert [(i.answer, i.options, i.task) for i in items] == [("B", ("one", "two", "three"), "choice"), ("C", ("one", "two", "three"), "choice")]
    assert data.load("medqa-4", "test", str(tmp_path))[0].question == "Four?"
    assert len(data.load("medqa", "test", str(tmp_path), limit=1)) == 1


def test_medqa_from_the_hub_archive_without_unpacking(tmp_path, monkeypatch):
    archive = tmp_path / "data_clean.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("data_clean/questions/US/dev.jsonl", json.dumps(ROW) + "\n")
        z.writestr("../escape.txt", "never written")
    monkeypatch.setattr(data, "fetch", lambda repo, name: str(archive))
    assert data.load("medqa", "dev")[0].answer == "B"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data_clean.zip"]


def test_real_medqa(medqa_dir):
    splits = {name: data.load("medqa", name, medqa_dir) for name in data.SPLITS}
    assert {name: len(items) for name, items in splits.items()} == {"train": 700, "dev": 100, "test": 100}
    assert all(len(i.options) == 5 and i.answer in "ABCDE" for items in splits.values() for i in items)
    assert data.without(splits["train"], splits["test"] + splits["dev"]) == splits["train"]


@pytest.mark.parametrize("row, words", [
    ("{bad", "not JSON"), ("[1]", "one JSON object"), ({"question": "", "options": ["a", "b"], "answer": "A"}, "'question'"),
    ({"question": "Q", "options": ["a"], "answer": "A"}, "'options'"), ({"question": "Q", "options": ["a", "b"], "answer": "C"}, "'C'"),
    ({"question": "Q", "options": ["a", "b"]}, "no 'answer'"), ({"question": "Q", "options": ["a", "A "], "answer": "A"}, "same text"),
    ({"question": "Q", "options": {"A": "a", "C": "b"}, "answer": "A"}, "without a gap"), ('{"question": "' + "x" * data.MAX_LINE + '"}', "limit"),
    ({"question": "Q", "options": [1, 2], "answer": "A"}, "'options'"), ("[" * 100_000, "not JSON"), ('{"question": "Q", "n": ' + "1" * 5000 + "}", "not JSON"), ('{"question": "\\ud800"}', "not JSON"), ({"question": "Q", "options": ["a", "b"], "answer": "AB"}, "'AB'")])
def test_own_jsonl_refuses_by_file_and_line(tmp_path, row, words):
    path = write(tmp_path / "mine.jsonl", ROW | {"answer": "A"}, row)
    with pytest.raises(UsageError) as error:
        data.load(str(path), "train")
    assert f"{path}, line 2" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_own_jsonl_that_is_not_utf8(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + b'{"question": "caf\xe9"}\n')
    with pytest.raises(UsageError, match="UTF-8"):
        data.load(str(path), "train")


def test_duplicate_options_of_a_published_set_are_kept_and_counted(tmp_path, capsys):
    write(tmp_path / "data_clean/questions/US/test.jsonl", ROW, ROW | {"options": {"A": "same", "B": "same"}})
    assert len(data.load("medqa", "test", str(tmp_path))) == 2
    assert "1 of 2 questions" in capsys.readouterr().err


def test_own_file_is_split_by_content(tmp_path):
    rows = [{"question": f"Q{i}?", "options": ["a", "b"], "answer": "A", "id": f"i{i}"} for i in range(300)]
    path = write(tmp_path / "mine.jsonl", *rows)
    parts = {name: {i.id for i in data.load(str(path), name)} for name in data.SPLITS}
    assert sum(map(len, parts.values())) == 300 and len(set.union(*parts.values())) == 300 and len(parts["test"]) > 10
    write(tmp_path / "mine.jsonl", *reversed(rows))                           # the order of lines does not move an item to another split
    assert {name: {i.id for i in data.load(str(path), name)} for name in data.SPLITS} == parts


@pytest.mark.parametrize("call, words", [(("nothing", "train"), "demo, demo-images, medqa"), (("demo", "valid"), "train, dev, test"), (("medqa", "test", "/nowhere"), "data_clean")])
def test_names_that_do_not_exist(call, words):
    with pytest.raises(UsageError, match=words):
        data.load(*call)


def test_only_names_are_known_and_no_sentence_of_help():
    assert all(data.is_known(name) for name in (*data.DATASETS, "retinamnist", "retinamnist-28"))
    told = "the MedMNIST sets (retinamnist, retinamnist-28, ...)"
    assert not data.is_known(told) and not data.is_known("") and not data.is_known("demo, medqa")
    with pytest.raises(UsageError, match="the MedMNIST sets"):
        data.load("nothing", "train")


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
def test_a_rationale_with_a_tag_is_refused(tmp_path, tag):
    """SFT would teach a second block, which is malformed."""
    path = write(tmp_path / "m.jsonl", ROW | {"answer": "A", "rationale": f"one {tag} two"})
    with pytest.raises(UsageError, match="line 1: 'rationale' holds a tag"):
        data.load(str(path), "train")


def test_double_ids_are_refused(tmp_path):
    with pytest.raises(UsageError, match="line 2: the id 'x' stands in line 1"):
        data.load(str(write(tmp_path / "m.jsonl", ROW | {"id": "x", "answer": "A"}, ROW | {"id": "x", "answer": "A"})), "train")


def test_overlap_is_found_by_question_and_options():
    item = Item("1", "choice", "Which is true?", ("a", "b"), "A")
    same, other = Item("2", "choice", " which  is TRUE?", ("b", "a"), "B"), Item("3", "choice", "Which is true?", ("c", "d"), "A")
    assert data.without([same, other], [item]) == [other]


def test_demo_splits_share_nothing_and_fit_the_tokenizer():
    splits = {name: data.load("demo", name) for name in data.SPLITS}
    prints = [data.fingerprint(i) for items in splits.values() for i in items]
    assert len(prints) == len(set(prints)) == 3500
    findings = lambda item: frozenset(item.question.split(" has ")[1].split(" . ")[0].split(" and "))
    trained = {findings(i) for i in splits["train"]}
    assert not trained & {findings(i) for i in splits["test"] + splits["dev"]}
    words = set(demos.demo_words())
    for item in splits["test"]:
        assert set((data.messages(item)[1]["content"] + " " + data.completion(item)).split()) <= words
    assert all(i.options["ABCDE".index(i.answer)] == i.rationale.split()[-1] for items in splits.values() for i in items)


def test_the_demo_is_the_same_in_every_process():
    """It once came out of the iteration of a set of words, which differs from process to process."""
    code = "import data; print([data.set_fingerprint(data.load('demo', s)) for s in data.SPLITS], [i.id for i in data.batch_for_step(data.load('demo', 'dev'), 3, 5, (1, 2))])"
    outputs = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=Path(data.__file__).parent, capture_output=True, text=True,
                              check=True).stdout for seed in "01"}
    assert len(outputs) == 1


def test_batches_are_pages_of_seeded_epochs():
    items = [Item(str(i), "choice", f"Q{i}", ("a", "b"), "A") for i in range(10)]
    seen = [item.id for step in range(5) for item in batch_for_step(items, step, 4, seed=1)]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(str(i) for i in range(10)) and seen[:10] != seen[10:]
    assert [i.id for i in batch_for_step(items, 3, 4, 1)] == seen[12:16]                          # no cursor
    assert batch_for_step(items, 0, 4, 2) != batch_for_step(items, 0, 4, 1) != batch_for_step(items, 0, 4, (1, 1))


def test_shuffled_options_keep_the_gold_text():
    items = data.load("demo", "test")[:50]
    shuffled = [data.shuffle_options(i, 3) for i in items]
    assert all(i.options["ABCDE".index(i.answer)] == s.options["ABCDE".index(s.answer)] for i, s in zip(items, shuffled))
    assert shuffled == [data.shuffle_options(i, 3) for i in items] and shuffled != items
    assert shuffled[7] == data.shuffle_options(items[7], 3)                   # a function of (seed, id), not of the position


def test_prompts_hold_every_option_and_end_open():
    item = data.load("demo", "test")[0]
    for style in ("think", "direct", "cot"):
        text = data.plain_text(data.messages(item, style))
        assert all(f"{letter}. {option}" in text for letter, option in zip("ABCDE", item.options)) and text.endswith("Assistant:")
    assert "<think>" not in data.messages(item, "direct")[0]["content"]
