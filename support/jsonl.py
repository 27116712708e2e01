"""Your own questions and images: every line of a JSONL file is checked, then a plain row.

A row is a dictionary with the keywords of Item. A line that cannot be used is refused by file and
line. A published set is taken as it is, and its oddities are counted.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from support.errors import UsageError
from support.pictures import inside, size_of
from support.text import ANSWER, LETTERS, TAGS, flat, folded

MAX_LINE = 1_000_000  # characters: a longer line is no exam question
MAX_GOLD = 100  # boxes in a line: the time to match boxes grows with the cube of their number
KEYS = {"classify": "label", "grade": "grade", "localize": "boxes"}  # what says which task it is


def read_file(path: Path, name: str, published: bool = False, task: str = "") -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return read(lines, str(path), name, published, task)


def read(
    lines: Iterable[str], where: str, name: str, published: bool = False, task: str = ""
) -> list[dict]:
    """The rows of all lines that are not empty. An item without an id is called `name`-LINE."""
    rows, alike, seen = [], 0, {}
    for number, line in enumerate(decoded(lines, where), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        row = row_of(line, place, f"{name}-{number}", published, Path(where).parent, task)
        if row["id"] in seen:
            before = f"stands in line {seen[row['id']]} already"
            raise UsageError(f"{place}: the id {row['id']!r} {before}: ids must differ")
        seen[row["id"]] = number
        alike += row["task"] == "choice" and repeats(row["options"])
        rows.append(row)
    if alike:
        print(
            f"{where}: {alike} of {len(rows)} questions have two options with the same text; "
            "either counts as right",
            file=sys.stderr,
        )
    return rows


def decoded(lines: Iterable[str], where: str) -> Iterable[str]:
    """The lines, with a word on where the text stops being UTF-8."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007 (the last number is told below)
            yield line
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}, after line {number}: not UTF-8 ({error.reason}): save the file as UTF-8"
        ) from None


def row_of(
    line: str,
    where: str,
    default_id: str,
    published: bool = False,
    folder: Path = Path(),
    task: str = "",
) -> dict:
    """One line -> its row. `where` begins every complaint; paths of images start in `folder`.

    A question: {"question", "options": [texts] or {letter: text}, "answer": letter}; it may have an
    "image" or "images" beside it. Images without options have a "label" and "labels", a "grade" and
    "grades" (lowest first), or "boxes" [[x1, y1, x2, y2], ...]; `task` says which where a line has
    several. All may have an "id", a "patient" and a "rationale".
    """
    given = json_object(line, where)
    shown = () if given.keys().isdisjoint({"image", "images"}) else images(given, where, folder)
    row = {
        "id": text(given, "id", where) or default_id,
        "image": shown[0] if len(shown) == 1 else shown or None,
        "patient": text(given, "patient", where),
        "rationale": rationale(given, where),
    }
    if shown and "options" not in given:
        return row | labelled(given, where, shown, task)
    return row | choice(given, where, published)


def json_object(line: str, where: str) -> dict:
    if len(line) > MAX_LINE:
        raise UsageError(f"{where}: {len(line):,} characters; the limit is {MAX_LINE:,}")
    try:
        given = json.loads(line)
        # Half a character (a lone surrogate) could not be written again.
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UsageError(f"{where}: a line must be one JSON object")
    return given


def text(given: dict, key: str, where: str) -> str:
    """A text or a whole number as text; "" where there is none."""
    value = given.get(key)
    if value is None:
        return ""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UsageError(f"{where}: {key!r} must be a text, not {str(value)[:40]!r}")
    return str(value).strip()


# ------------------------------------------------------------------------------ lettered options
def rationale(given: dict, where: str) -> str:
    """The text under "rationale", without tags: supervised fine-tuning puts it between its own."""
    found = text(given, "rationale", where)
    if any(tag in found for tag in TAGS):
        raise UsageError(
            f"{where}: 'rationale' holds a tag such as {TAGS[0]}: give only the text "
            "inside <think> and </think>"
        )
    return found


def choice(given: dict, where: str, published: bool) -> dict:
    """MedQA's schema and our own: the gold letter stands in "answer_idx", or else in "answer"."""
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: no text under 'question'")
    options = listed(given.get("options"), where)
    letters = LETTERS[: len(options)]
    answer = given.get("answer_idx", given.get("answer"))
    if answer is None:
        raise UsageError(f"{where}: no 'answer'; there are {', '.join(map(repr, given))}")
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        wanted = f"one of the option letters {', '.join(letters)}"
        raise UsageError(f"{where}: the answer {answer!r} is not {wanted}")
    if not published and repeats(options):
        raise UsageError(f"{where}: two options have the same text")
    return {"task": "choice", "question": question.strip(), "options": options, "answer": answer}


def listed(options, where: str) -> tuple[str, ...]:
    """The options in the order of their letters."""
    if isinstance(options, dict):
        found = sorted(options)
        if found != list(LETTERS[: len(options)]):
            raise UsageError(
                f"{where}: the option letters are {found}, not A, B, C, ... without a gap"
            )
        options = [options[letter] for letter in found]
    sound = isinstance(options, list) and 2 <= len(options) <= 26
    if not sound or not all(isinstance(option, str) and option.strip() for option in options):
        raise UsageError(f"{where}: 'options' must be 2 to 26 texts, as a list or by letter")
    return tuple(option.strip() for option in options)


def repeats(options: Iterable[str]) -> bool:
    """Whether two options read the same."""
    texts = [flat(option) for option in options]
    return len(set(texts)) < len(texts)


# ---------------------------------------------------------------------- labels, grades and boxes
def labelled(given: dict, where: str, shown: tuple[str, ...], task: str) -> dict:
    """What is known of images: a label, a grade or boxes."""
    there = [kind for kind, key in KEYS.items() if given.get(key) is not None]
    if not there:
        raise UsageError(
            f"{where}: an image needs 'label' and 'labels', 'grade' and 'grades', 'boxes', "
            "or 'options' and 'answer'"
        )
    if len(there) > 1 and not task:
        raise UsageError(
            f"{where}: {' and '.join(KEYS[kind] for kind in there)} stand side by side: "
            f"say which with --task {' or '.join(there)}"
        )
    kind = task or there[0]
    if kind not in there:
        raise UsageError(
            f"{where}: there is nothing for --task {kind}: here it can be {' or '.join(there)}"
        )
    show = "do these images show" if len(shown) > 1 else "does this image show"
    if kind == "localize":
        options, answer = (), boxes(given, where, shown)
        question = f"Find every {text(given, 'target', where) or 'finding'} in this image."
    else:
        options, answer = names(given, where, KEYS[kind])
        question = f"What {show}?"
    if kind == "grade":
        question = f"Which grade {show}, from {options[0]} (lowest) to {options[-1]} (highest)?"
    question = text(given, "question", where) or question
    return {"task": kind, "question": question, "options": options, "answer": answer}


def images(given: dict, where: str, folder: Path) -> tuple[str, ...]:
    """The paths under "image" or "images". Relative ones start in `folder` and stay in it."""
    paths = given.get("images", [given.get("image")])
    one_key = not {"image", "images"} <= given.keys()
    sound = one_key and isinstance(paths, list) and paths
    if not sound or not all(isinstance(path, str) and path.strip() for path in paths):
        raise UsageError(f"{where}: 'image' must be the path of a file, or 'images' a list of them")
    for path in paths:
        outside = os.path.normpath(path).split(os.sep)[0] == os.pardir
        if outside and not os.path.isabs(path):
            way_on = "put it there or give its absolute path"
            raise UsageError(f"{where}: the image {path!r} leaves the folder {folder}: {way_on}")
        size_of(folder / path, where)  # raises where it cannot be used
    return tuple(str(folder / path) for path in paths)


def names(given: dict, where: str, key: str) -> tuple[tuple[str, ...], str]:
    """The closed set under "labels" or "grades", and the one of them that is right."""
    values, plural = given.get(key + "s"), key + "s"
    if not isinstance(values, list) or not 2 <= len(values) <= 1000:
        raise UsageError(
            f"{where}: {plural!r} must be a list of 2 to 1000, with every {key} there is, "
            "and not only this line's"
        )
    options = tuple(name(value, key) for value in values)
    answer = name(given[key], key)
    if not all(options):
        what = "text or whole number" if key == "grade" else "text"
        raise UsageError(
            f"{where}: {plural!r} holds {values[options.index('')]!r}, which is no {what}"
        )
    # As the grader reads them.
    read = [folded(option) for option in options]
    if key == "grade":
        read = [option.removeprefix("grade ") for option in read]
    if len(set(read)) < len(read):
        raise UsageError(
            f"{where}: two of the {plural!r} read the same to the grader, "
            "which folds case, hyphens and marks"
        )
    if not all(map(ANSWER.search, read)) or any(
        tag in option for tag in TAGS for option in options
    ):
        raise UsageError(
            f"{where}: one of the {plural!r} is nothing but marks, "
            f"or holds a tag such as {TAGS[2]}: no answer could name it"
        )
    if answer not in options:
        raise UsageError(
            f"{where}: the {key} {str(given[key])[:80]!r} is not one of the {plural!r}"
        )
    return options, answer


def name(value, key: str) -> str:
    """A label, or a grade that may be a whole number, as text; "" where it is neither."""
    kinds = (str, int) if key == "grade" else (str,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return ""
    return " ".join(str(value).split())


def boxes(given: dict, where: str, shown: tuple[str, ...]) -> tuple:
    """The boxes as tuples, in the order of their left upper corners."""
    if len(shown) > 1:
        raise UsageError(f"{where}: 'boxes' need one image, and here are {len(shown)}")
    found = given["boxes"]
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_GOLD:
        raise UsageError(
            f"{where}: 'boxes' must be a list of at least one [x1, y1, x2, y2], "
            f"and at most {MAX_GOLD}"
        )
    width, height = size_of(shown[0], where)
    for box in found:
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise UsageError(
                f"{where}: the box {str(box)[:80]} is not [x1, y1, x2, y2] in numbers; "
                "'boxes' is a list of such lists"
            )
        if not inside(box, (width, height)):
            raise UsageError(
                f"{where}: the box {str(box)[:80]} must have x1 < x2 and y1 < y2 "
                f"and lie inside the image of {width} x {height} pixels"
            )
    return tuple(sorted(map(tuple, found)))


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
