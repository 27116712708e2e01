"""Prior knowledge: the files that are shipped, one's own, and what is wrong with a faulty one."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import refused

import data
from data import Item
from support import image_sets
from support.knowledge import FOLDER

PIXELS = np.zeros((28, 28), np.uint8)
ITEM = Item("i", "classify", "What is it?", ("nevus", "melanoma"), "nevus", image=PIXELS)
GOOD = """<!-- a note -->
# task
A skin lesion.

## nevus
Even and
brown.
## melanoma
Uneven.
"""


def items_of(dataset: str, task: str) -> list[Item]:
    """One item with the options of a data set."""
    if dataset.startswith("bccd"):
        return [replace(ITEM, options=tuple(image_sets.BLOOD_CELLS.values()))]
    if dataset == "demo-images":
        return data.load("demo-images", "dev", limit=1, task=task)
    one = image_sets.MEDMNIST[dataset.partition("-")[0]]
    return [replace(ITEM, task=one.task, options=tuple(one.labels.split("|")))]


DEMO = [f"demo-images {task}" for task in ("classify", "grade", "localize")]
SETS = [*image_sets.MEDMNIST, "retinamnist-28", "bccd", "bccd-rbc", *DEMO]


@pytest.mark.parametrize("name", SETS)
def test_every_class_is_described(name):
    dataset, _, task = name.partition(" ")
    items = items_of(dataset, task)
    (item,) = data.with_knowledge(items, dataset, "class")
    named = {text.partition(": ")[0] for text in item.knowledge[1:]}
    assert named >= set(item.options)
    assert min(len(text.split()) for text in item.knowledge) > 20
    assert len(set(item.knowledge)) == len(item.knowledge)
    (of_task,) = data.with_knowledge(items, dataset, "task")
    assert of_task.knowledge == item.knowledge[:1]
    assert data.with_knowledge(items, dataset, "none") == items


def test_every_file_says_that_no_clinician_has_checked_it():
    files = list(FOLDER.glob("*.md"))
    assert len(files) == 15
    for path in files:
        assert "no clinician has checked" in path.read_text(encoding="utf-8").splitlines()[0]


def test_knowledge_stands_in_the_prompt_at_the_level_asked_for(tmp_path):
    file = tmp_path / "k.md"
    file.write_text(GOOD)

    def prompt(dataset: str, knowledge: str, item: Item = ITEM) -> str:
        (told,) = data.with_knowledge([item], dataset, knowledge)
        return data.messages(told)[1]["content"]

    plain, whole = prompt("mine.jsonl", "none"), prompt("mine.jsonl", str(file))
    assert "A skin lesion." not in plain
    assert "A skin lesion.\nnevus: Even and brown.\nmelanoma: Uneven.\nWhat is it?" in whole
    (lesion,) = data.load("demo-images", "dev", limit=1, task="classify")
    of_task, of_class = (prompt("demo-images", level, lesion) for level in ("task", "class"))
    first = f"{lesion.options[0]}: "
    assert first not in of_task and first in of_class


FAULTS = [
    (GOOD.replace("## melanoma\nUneven.\n", ""), "melanoma"),
    (GOOD + "## naevus\nx\n", "naevus"),
    (GOOD.encode("utf-16"), "UTF-8"),
    (GOOD + "## nevus\nagain\n", "line 10"),
    (GOOD.replace("Uneven.", ""), "melanoma"),
    (GOOD.replace("# task\nA skin lesion.", ""), "task"),
    (None, "cannot be read"),
]


@pytest.mark.parametrize("content, words", FAULTS)
def test_a_faulty_file_is_named_with_the_class(content, words, tmp_path):
    path = tmp_path / "k.md"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: data.with_knowledge([ITEM], "mine.jsonl", str(path)), str(path), words)


def test_no_knowledge_for_ones_own_data_says_what_to_write():
    refused(
        lambda: data.with_knowledge([ITEM], "mine.jsonl", "class"),
        *("mine.jsonl", "## NAME", "--knowledge FILE"),
    )
