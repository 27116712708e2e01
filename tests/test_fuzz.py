"""Generated input for everything that is read from files or written by a model: one clear refusal or a sound result, never another exception."""
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import data
import rewards
import runs
import train
from data import Item, UsageError

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)
KEYS = st.sampled_from(["question", "options", "answer", "answer_idx", "id", "rationale", "patient", "image", "images", "label", "labels", "grade", "grades", "boxes", "target"])
ITEM = Item("i", "choice", "Which?", ("red", "blue", "AA", "Aa"), "B")
PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "A", "B", "b", "(B)", "B.", "blue", "red", "Blue", "\\boxed{B}", "**", "answer is", " ", "\n", "\x00", "\u2028", "\u202e", "<ANSWER>", "< answer>", "AA", "Aa", "aa", "B A", "or"])
HOSTILE = st.lists(PIECES | st.text(max_size=3), max_size=20).map("".join)


# ------------------------------------------------------------------------------------------- completions
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(HOSTILE | HOSTILE.map(lambda text: f"<think> x </think> <answer>{text}</answer>"))
@example("<think>B</think><answer></answer>")
@example("<answer>B</answer>")
@example("<think>x</think><answer>A</answer><answer>B</answer>")
def test_ten_thousand_completions_earn_nothing_without_the_right_answer_in_its_place(text):
    result = rewards.grade(ITEM, text, train.Config())
    assert result.total in (-1.0, 0.0, 1.0)
    if result.total > 0:
        inside = text[text.rfind("<answer>") + 8:text.rfind("</answer>")]
        assert text.count("<answer>") == text.count("</answer>") == text.count("<think>") == text.count("</think>") == 1
        left = rewards.normal(inside).casefold().strip("()[].:, ")
        assert left in ("b", "blue") or left.startswith("b") and left.endswith("blue"), inside


# ------------------------------------------------------------------------------------------- lines of data
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, JSON | st.sampled_from(["A", ["x", "y"], {"A": "x", "B": "y"}, [[0, 0, 1, 1]], "a.png"]), max_size=6).map(lambda row: json.dumps(row)) | st.text(max_size=60) | JSON.map(json.dumps))
@example('{"question": "Q", "options": ["x", "y"], "answer": "A", "id": 5}')
@example('{"image": "a.png", "boxes": [[NaN, 0, 1, 1]]}')
@example('{"image": "\\u0000", "label": "x", "labels": ["x", "y"]}')
@example("[" * 100_000)
def test_a_line_is_an_item_or_refused_by_its_place(line):
    try:
        item, _ = data.read_item(line, "f.jsonl, line 7", "d", False, Path("/nowhere"))
    except UsageError as error:
        assert "f.jsonl, line 7" in str(error) and "\n" not in str(error)
    else:
        assert item.answer in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(item.options)] and all(option.strip() for option in item.options)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps({"config": value}).encode()))
def test_a_run_json_of_any_bytes_is_read_or_refused(tmp_path_factory, content):
    run = tmp_path_factory.mktemp("run")
    (run / "run.json").write_bytes(content)
    try:
        assert isinstance(runs.read_run(str(run)), dict)
    except UsageError as error:
        assert "run.json" in str(error)
    shutil.rmtree(run)


# ------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints with files that are small, so that flips hit all parts of them."""
    import torch
    run = tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.trainable = lambda part="": dict(model.named_parameters())
    for step in (1, 2):
        runs.save_checkpoint(run, model, optimizer, step, 2, {})
    return run


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["policy.safetensors", "optimizer.safetensors", "state.json"]), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(checkpoints, name, place, byte, cut):
    victim = checkpoints / "checkpoints" / "000002" / name
    whole = victim.read_bytes()
    place %= len(whole)
    victim.write_bytes(whole[:place] if cut else whole[:place] + bytes([byte]) + whole[place + 1:])
    try:
        found = runs.newest_checkpoint(checkpoints)
        if found.name == "000002":                                            # only where nothing was changed, or white space of state.json
            assert victim.read_bytes() == whole or name == "state.json" and json.loads(victim.read_text()) == json.loads(whole)
        else:
            assert found.name == "000001"
    finally:
        victim.write_bytes(whole)
