"""One's own data: what a line becomes, and what is refused by file and line."""

import json

import pytest
from helpers import refused
from PIL import Image

from support import jsonl

WHERE = "mine.jsonl, line 7"
QUESTION = {"question": "Q?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "B"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "bad.png").write_text("no picture")
    return tmp_path


def own(given, folder, task=""):
    line = given if isinstance(given, str) else json.dumps(given)
    return jsonl.row_of(line, WHERE, "mine-7", folder=folder, task=task)


def but(given, *keys):
    return {key: value for key, value in given.items() if key not in keys}


# ------------------------------------------------------------------------------------ questions
PLAIN = {"id": "mine-7", "image": None, "patient": "", "rationale": "", "task": "choice"}


def test_a_question(tmp_path):
    expected = PLAIN | {"question": "Q?", "options": ("one", "two", "three"), "answer": "B"}
    assert own(QUESTION, tmp_path) == expected
    assert own(QUESTION | {"options": ["one", " two", "three "]}, tmp_path) == expected
    assert own(QUESTION | {"answer": "two", "answer_idx": "B"}, tmp_path) == expected
    more = {"id": 5, "patient": 12, "rationale": " Because. "}
    shown = {"id": "5", "patient": "12", "rationale": "Because."}
    assert own(QUESTION | more, tmp_path) == expected | shown


def test_a_question_about_images(folder):
    row = own(QUESTION | {"image": "a.png"}, folder)
    assert row["task"] == "choice" and row["image"] == str(folder / "a.png")
    row = own(QUESTION | {"images": ["a.png", "sub/b.png"]}, folder)
    assert row["image"] == (str(folder / "a.png"), str(folder / "sub/b.png"))


@pytest.mark.parametrize(
    "given, words",
    [
        ("{bad", "not JSON"),
        ("[1]", "one JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"question": "Q", "n": ' + "1" * 5000 + "}", "not JSON"),
        ('{"question": "\\ud800"}', "not JSON"),
        ('{"question": "' + "x" * jsonl.MAX_LINE + '"}', "limit"),
        (QUESTION | {"question": ""}, "'question'"),
        (QUESTION | {"options": ["a"]}, "'options'"),
        (QUESTION | {"options": [1, 2]}, "'options'"),
        (QUESTION | {"options": ["a", " "]}, "'options'"),
        (QUESTION | {"options": [str(n) for n in range(27)]}, "'options'"),
        (QUESTION | {"options": {"A": "a", "C": "b"}}, "without a gap"),
        (QUESTION | {"options": ["a", "A "], "answer": "A"}, "same text"),
        (QUESTION | {"answer": "D"}, "'D'"),
        (QUESTION | {"answer": "AB"}, "'AB'"),
        (but(QUESTION, "answer"), "no 'answer'"),
        (QUESTION | {"id": ["x"]}, "'id'"),
    ],
)
def test_questions_are_refused_by_file_and_line(tmp_path, given, words):
    assert refused(lambda: own(given, tmp_path), words).startswith(f"{WHERE}: ")


# --------------------------------------------------------------------------------------- images
CLASS = {"image": "a.png", "label": "cat", "labels": ["cat", "dog"]}
GRADE = {"image": "a.png", "grade": 2, "grades": [0, 1, 2]}
BOXES = {"image": "a.png", "boxes": [[20, 1, 40.0, 30], [1.5, 2, 3, 4]]}


def core(row):
    return row["task"], row["question"], row["options"], row["answer"]


def test_a_label_a_grade_and_boxes(folder):
    row = own(CLASS, folder)
    assert core(row) == ("classify", "What does this image show?", ("cat", "dog"), "cat")
    assert (row["id"], row["image"]) == ("mine-7", str(folder / "a.png"))
    question = "Which grade does this image show, from 0 (lowest) to 2 (highest)?"
    assert core(own(GRADE, folder)) == ("grade", question, ("0", "1", "2"), "2")
    assert own(GRADE | {"grade": "II", "grades": ["I", "II"]}, folder)["answer"] == "II"
    boxes = ((1.5, 2, 3, 4), (20, 1, 40.0, 30))
    question = "Find every finding in this image."
    assert core(own(BOXES, folder)) == ("localize", question, (), boxes)
    nodule = own(BOXES | {"target": "nodule"}, folder)
    assert nodule["question"] == "Find every nodule in this image."


def test_what_a_line_may_have_beside_them(folder):
    labels = {"labels": ["cat", "  big   dog "], "label": "big dog"}
    beside = {"question": " Which? ", "id": 0, "patient": 12, "rationale": "Because."}
    row = own(CLASS | labels | beside, folder)
    assert core(row) == ("classify", "Which?", ("cat", "big dog"), "big dog")
    assert (row["id"], row["patient"], row["rationale"]) == ("0", "12", "Because.")


def test_where_images_may_be(folder):
    two = own(but(CLASS, "image") | {"images": ["a.png", "sub/b.png"]}, folder)
    assert two["image"] == (str(folder / "a.png"), str(folder / "sub/b.png"))
    assert two["question"] == "What do these images show?"
    absolute = str(folder / "sub/../a.png")
    assert own(CLASS | {"image": absolute}, folder / "sub")["image"] == absolute
    assert own(CLASS | {"image": "sub/../a.png"}, folder)["answer"] == "cat"


def test_the_task_is_what_the_line_has_or_what_is_asked_for(folder):
    assert own(CLASS | {"boxes": None, "grade": None}, folder)["task"] == "classify"
    for task in ("classify", "grade", "localize"):
        assert own(CLASS | GRADE | BOXES, folder, task)["task"] == task
    words = (WHERE, "--task localize", "classify")
    refused(lambda: own(CLASS, folder, "localize"), *words)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"image": "a.png"}, "'label'"),
        (CLASS | BOXES, "--task classify or localize"),
        (but(CLASS, "image"), "'question'"),
        (CLASS | {"images": ["a.png"]}, "'images'"),
        (CLASS | {"image": ""}, "'image'"),
        (CLASS | {"image": 3}, "'image'"),
        (but(CLASS, "image") | {"images": []}, "'images'"),
        (but(CLASS, "image") | {"images": "a.png"}, "'images'"),
        (CLASS | {"image": "c.png"}, "c.png is not there"),
        (CLASS | {"image": "../a.png"}, "leaves the folder"),
        (CLASS | {"image": "sub/../../a.png"}, "leaves the folder"),
        (CLASS | {"image": "sub"}, "cannot be read"),
        (CLASS | {"image": "bad.png"}, "bad.png is no image"),
        (but(CLASS, "labels"), "'labels'"),
        (CLASS | {"labels": ["cat"]}, "2 to 1000"),
        (CLASS | {"labels": [f"l{i}" for i in range(1001)]}, "2 to 1000"),
        (CLASS | {"labels": "cat dog"}, "'labels'"),
        (CLASS | {"labels": ["cat", "dog", " DOG"]}, "read the same"),
        (CLASS | {"labels": ["cat", 3]}, "holds 3"),
        (CLASS | {"labels": ["cat", " "]}, "holds ' '"),
        (CLASS | {"label": "cow"}, "'cow'"),
        (CLASS | {"label": None}, "needs 'label'"),
        (CLASS | {"label": ["cat"]}, "'labels'"),
        (GRADE | {"grade": 3}, "'3'"),
        (GRADE | {"grade": True, "grades": [1, True]}, "holds True"),
        (GRADE | {"grades": [0, 1, 2, "2"]}, "read the same"),
        (GRADE | {"grades": [0.5, 1, 2]}, "holds 0.5"),
        (GRADE | {"grade": 1, "grades": [1, "grade 1"]}, "read the same"),
        (CLASS | {"question": ["Q"]}, "'question'"),
        (CLASS | {"patient": True}, "'patient'"),
        (BOXES | {"boxes": []}, "at least one"),
        (BOXES | {"boxes": {}}, "at least one"),
        (BOXES | {"boxes": [[0, 0, 1, 1]] * 101}, "at most 100"),
        (BOXES | {"boxes": [1, 2, 3, 4]}, "in numbers"),
        (BOXES | {"boxes": [[1, 2, 3]]}, "in numbers"),
        (BOXES | {"boxes": [[1, 2, 3, "4"]]}, "in numbers"),
        (BOXES | {"boxes": [[False, 2, 3, 4]]}, "in numbers"),
        (BOXES | {"boxes": [[1, 2, 3, 4], [3, 2, 3, 4]]}, "[3, 2, 3, 4]"),
        (BOXES | {"boxes": [[1, 4, 3, 4]]}, "y1 < y2"),
        (BOXES | {"boxes": [[1, 2, 41, 4]]}, "40 x 30"),
        (BOXES | {"boxes": [[1, 2, 4, 31]]}, "40 x 30"),
        (BOXES | {"boxes": [[-1, 2, 4, 5]]}, "40 x 30"),
        (BOXES | {"boxes": [[1, -2, 4, 5]]}, "40 x 30"),
        (BOXES | {"boxes": [[1, 2, float("nan"), 5]]}, "nan"),
        (BOXES | {"boxes": [[1, 2, float("inf"), 5]]}, "inf"),
        (BOXES | {"boxes": [[1, 2, 10**400, 5]]}, "40 x 30"),
        (but(BOXES, "image") | {"images": ["a.png", "sub/b.png"]}, "need one image"),
    ],
)
def test_images_are_refused_by_file_and_line(folder, given, words):
    assert refused(lambda: own(given, folder), words).startswith(f"{WHERE}: ")


@pytest.mark.parametrize(
    "labels",
    [["CIN-1", "CIN 1"], ["a.", "a"], ["*a*", "a"], ["**", "b"], ["</answer>", "b"], ["?", "b"]],
)
def test_labels_that_the_grader_cannot_tell_apart_are_refused(folder, labels):
    given = CLASS | {"label": labels[0], "labels": labels}
    refused(lambda: own(given, folder), WHERE, "'labels'")


# ---------------------------------------------------------------------------------- whole files
def lines(*rows):
    return [json.dumps(row) + "\n" for row in rows]


def test_ids_tell_the_line_and_empty_lines_are_counted_but_not_read():
    given = lines(QUESTION) + [" \n"] + lines(QUESTION | {"id": "x"}, QUESTION)
    rows = jsonl.read(given, "f.jsonl", "set")
    assert [row["id"] for row in rows] == ["set-1", "x", "set-4"]


def test_double_ids_are_refused():
    twice = lines(QUESTION | {"id": "x"}, QUESTION | {"id": "x"})
    words = "f.jsonl, line 2: the id 'x' stands in line 1"
    refused(lambda: jsonl.read(twice, "f.jsonl", "set"), words)


def test_like_options_of_a_published_set_are_kept_and_counted(capsys):
    given = lines(QUESTION, QUESTION | {"options": {"A": "same", "B": " SAME"}})
    assert len(jsonl.read(given, "f.jsonl", "set", published=True)) == 2
    assert "1 of 2 questions" in capsys.readouterr().err


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(QUESTION).encode() + b"\n" + b'{"question": "caf\xe9"}\n')
    refused(lambda: jsonl.read_file(path, "set"), str(path), "UTF-8")


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
def test_a_rationale_with_a_tag_is_refused(tmp_path, tag):
    """SFT would teach a second block, which is malformed."""
    given = QUESTION | {"rationale": f"one {tag} two"}
    refused(lambda: own(given, tmp_path), WHERE, "'rationale' holds a tag")
