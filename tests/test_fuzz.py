"""Generated input for all that is read from files or written by a model.

One clear refusal or a sound result, never another exception.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rewards
from data import Item
from support import checkpoints, jsonl, runs, text
from support.config import Config
from support.errors import UsageError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


def nested(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)


JSON = st.recursive(LEAVES, nested, max_leaves=8)
KEYS = st.sampled_from(
    "question options answer answer_idx id rationale patient image images label labels grade "
    "grades boxes target".split()
)
VALUES = JSON | st.sampled_from(["A", ["x", "y"], {"A": "x", "B": "y"}, [[0, 0, 1, 1]], "a.png"])
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6)

ITEM = Item("i", "choice", "Which?", ("red", "blue", "AA", "Aa"), "B")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = st.sampled_from(
    [
        *TAGS,
        *("<ANSWER>", "< answer>", "A", "B", "b", "(B)", "B.", "B A", "AA", "Aa", "aa"),
        *("blue", "red", "Blue", "\\boxed{B}", "**", "answer is", "or"),
        *(" ", "\n", "\x00", "\u2028", "\u202e"),
    ]
)
HOSTILE = st.lists(PIECES | st.text(max_size=3), max_size=20).map("".join)
EVERYTHING = list(HealthCheck)


# ---------------------------------------------------------------------------------- completions
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=EVERYTHING)
@given(HOSTILE | HOSTILE.map(lambda words: f"<think> x </think> <answer>{words}</answer>"))
@example("<think>B</think><answer></answer>")
@example("<answer>B</answer>")
@example("<think>x</think><answer>A</answer><answer>B</answer>")
def test_nothing_is_earned_without_the_right_answer_in_its_place(completion):
    result = rewards.grade(ITEM, completion, Config())
    assert result.total in (-1.0, 0.0, 1.0)
    if result.total > 0:
        assert [completion.count(tag) for tag in TAGS] == [1, 1, 1, 1]
        inside = completion[completion.rfind("<answer>") + 8 : completion.rfind("</answer>")]
        left = text.normal(inside).casefold().strip("()[].:, ")
        assert left in ("b", "blue") or left.startswith("b") and left.endswith("blue"), inside


# -------------------------------------------------------------------------------- lines of data
@settings(max_examples=600, deadline=None, suppress_health_check=EVERYTHING)
@given(OBJECTS.map(json.dumps) | st.text(max_size=60) | JSON.map(json.dumps))
@example('{"question": "Q", "options": ["x", "y"], "answer": "A", "id": 5}')
@example('{"image": "a.png", "boxes": [[NaN, 0, 1, 1]]}')
@example('{"image": "\\u0000", "label": "x", "labels": ["x", "y"]}')
@example("[" * 100_000)
def test_a_line_is_a_row_or_refused_by_its_place(line):
    where = "f.jsonl, line 7"
    try:
        item = Item(**jsonl.row_of(line, where, "d", folder=Path("/nowhere")))
    except UsageError as error:
        assert str(error).startswith(where) and "\n" not in str(error)
    else:
        assert item.answer in text.LETTERS[: len(item.options)] and isinstance(item.id, str)
        assert all(option.strip() for option in item.options)


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


# ---------------------------------------------------------------------------------- checkpoints
FILES = ["policy.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints with files that are small, so that flips hit all parts of them."""
    run = tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.trainable = lambda part="": dict(model.named_parameters())
    for step in (1, 2):
        checkpoints.save_checkpoint(run, model, optimizer, step)
    return run


@settings(max_examples=300, deadline=None, suppress_health_check=EVERYTHING)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(two, name, place, byte, cut):
    victim = two / "checkpoints" / "000002" / name
    whole = victim.read_bytes()
    place %= len(whole)
    rest = b"" if cut else bytes([byte]) + whole[place + 1 :]
    victim.write_bytes(whole[:place] + rest)
    try:
        found = checkpoints.newest_checkpoint(two)
        if found.name != "000002":
            assert found.name == "000001"
        # Only where nothing was changed, or white space of state.json.
        elif name == "state.json":
            assert json.loads(victim.read_text()) == json.loads(whole)
        else:
            assert victim.read_bytes() == whole
    finally:
        victim.write_bytes(whole)
