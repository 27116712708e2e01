"""Sets that the hub has as parquet, as plain rows: dictionaries with the keywords of Item.

MMLU-Pro's health questions, MedMCQA, PubMedQA and VQA-RAD's closed questions. File names, columns,
counts and licences are those of the cards on huggingface.co/datasets/REPOSITORY.
"""

import hashlib
import json
import math
import random
from pathlib import Path

from support import hub, jsonl
from support.errors import UsageError
from support.image_sets import say_once
from support.pictures import size_of

# The repository of each set and, for our splits, its files.
ONE = "00000-of-00001"
MEDMCQA_TRAIN = f"data/train-{ONE}.parquet"
PUBMEDQA = f"pqa_labeled/train-{ONE}.parquet"
VQA_RAD_TRAIN = f"data/train-{ONE}-eb8844602202be60.parquet"
HUB = {
    "mmlu-pro-health": ("TIGER-Lab/MMLU-Pro", {"test": f"data/test-{ONE}.parquet"}),
    "medmcqa": (
        "openlifescienceai/medmcqa",
        {"train": MEDMCQA_TRAIN, "dev": MEDMCQA_TRAIN, "test": f"data/validation-{ONE}.parquet"},
    ),
    "pubmedqa": ("qiaojin/PubMedQA", {"train": PUBMEDQA, "dev": PUBMEDQA, "test": PUBMEDQA}),
    "vqa-rad": (
        "flaviagiammarino/vqa-rad",
        {
            "train": VQA_RAD_TRAIN,
            "dev": VQA_RAD_TRAIN,
            "test": f"data/test-{ONE}-e5bc3d208bb4deeb.parquet",
        },
    ),
}


def cached(dataset: str) -> bool:
    """Whether all files of a set of HUB are on this machine already."""
    repo, files = HUB[dataset]
    return all(hub.cached(repo, name, "dataset") for name in files.values())


def located(dataset: str, split: str, data_dir: str | None) -> str:
    """The path of a split's file: in `data_dir`, else from the cache or the hub.

    data_dir: holds the files as the hub does, or a folder with the repository's name that does.
    """
    repo, files = HUB[dataset]
    if not data_dir:
        return hub.fetch(repo, files[split])
    places = [Path(data_dir) / repo.split("/")[1] / files[split], Path(data_dir) / files[split]]
    for path in places:
        if path.is_file():
            return str(path)
    raise UsageError(f"neither {places[0]} nor {places[1]} is there: get it from the hub's {repo}")


def table(path: str, columns: list[str]) -> list[dict]:
    """The rows of a parquet file. UsageError where it is none, or a column is missing."""
    try:
        import pyarrow.parquet  # noqa: PLC0415 (an optional package)
    except ImportError:
        raise UsageError("reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        there = pyarrow.parquet.read_schema(path).names
        if missing := [name for name in columns if name not in there]:
            found = ", ".join(there)
            raise UsageError(f"{path}: no column {missing[0]!r}, but {found}: get the set again")
        return pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        what = f"not a parquet file ({str(error).splitlines()[0]})"
        raise UsageError(f"{path}: {what}: get the set again") from None


def drawn(key: str, one_in: int) -> bool:
    """A fixed share of all keys, by hash: the same ones wherever in a file they stand."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % one_in == 0


# ------------------------------------------------------------------------------ lettered options
def mmlu_pro_rows(split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """The 818 health questions of MMLU-Pro (arXiv 2406.01574), with 3 to 10 options.

    They are Med-RLVR's test out of distribution.
    """
    path = located("mmlu-pro-health", split, data_dir)
    columns = ["question_id", "question", "options", "answer", "category"]
    lines = [
        json.dumps(row | {"id": f"mmlu-pro-{row['question_id']}"})
        for row in table(path, columns)
        if row["category"] == "health"
    ]
    return jsonl.read(lines, path, f"mmlu-pro-health-{split}", published=True)


def medmcqa_rows(split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """MedMCQA (arXiv 2203.14371): questions of Indian entrance exams, with four options.

    Its own test split has no answers. Therefore the 4,183 questions of validation are test here, as
    in lm-evaluation-harness, and dev is a hundredth of train's 182,822.
    """
    path = located("medmcqa", split, data_dir)
    lines, left_out = [], 0
    for row in table(path, ["id", "question", "opa", "opb", "opc", "opd", "cop"]):
        if split != "test" and drawn(row["id"], 100) != (split == "dev"):
            continue
        texts = [row[name] for name in ("question", "opa", "opb", "opc", "opd")]
        # The card's text counts `cop` from 1, but its schema and the harness count from 0.
        if not all(text and text.strip() for text in texts) or row["cop"] not in range(4):
            left_out += 1
            continue
        answer, question, *options = "ABCD"[row["cop"]], *texts
        line = {"id": f"medmcqa-{row['id']}", "question": question, "options": options}
        lines.append(json.dumps(line | {"answer": answer}))
    if left_out:
        say_once(f"{path}: {left_out} rows without an answer or with an empty text are left out")
    return jsonl.read(lines, path, f"medmcqa-{split}", published=True)


# ------------------------------------------------------------------------- yes, no and maybe
DECISIONS = ("yes", "no", "maybe")
# SHA-256 of the 500 sorted ids of test_ground_truth.json in github.com/pubmedqa/pubmedqa.
OFFICIAL_TEST = "8cf42aa2181eb26c"


def pubmedqa_rows(split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """PubMedQA's 1,000 questions answered by experts (arXiv 1909.06146), with their abstracts.

    The file has no splits. `official_test` makes the official 500 questions of test; dev is a tenth
    of the others, by hash.
    """
    path = located("pubmedqa", split, data_dir)
    columns = ["pubid", "question", "context", "long_answer", "final_decision"]
    published = {str(row["pubid"]): row for row in table(path, columns)}
    test = official_test({name: row["final_decision"] for name, row in published.items()}, path)
    rows = []
    for name, row in published.items():
        belongs = "test" if name in test else "dev" if drawn(name, 10) else "train"
        if belongs != split:
            continue
        abstract = "\n".join(inner(row, "context", "contexts", path))
        row = {
            "id": f"pubmedqa-{name}",
            "task": "classify",
            "question": f"Abstract: {abstract}\nQuestion: {row['question']}",
            "options": DECISIONS,
            "answer": row["final_decision"],
            "rationale": row["long_answer"],  # the abstract's conclusion
        }
        rows.append(row)
    return rows


def official_test(decisions: dict[str, str], path: str) -> set[str]:
    """The ids of PubMedQA's test split, from {id: decision} in the file's order.

    As its split_dataset.py does: the ids of each decision are shuffled, and the second half is
    test. It is said where they are not the official ones.
    """
    test, shuffled = set(), random.Random(0)
    for decision in DECISIONS:
        ids = [name for name, found in decisions.items() if found == decision]
        shuffled.shuffle(ids)
        test.update(ids[math.ceil(len(ids) / 2) :])
    if other := set(decisions.values()) - set(DECISIONS):
        wanted = ", ".join(DECISIONS)
        raise UsageError(f"{path}: 'final_decision' is {other.pop()!r}, not one of {wanted}")
    found = hashlib.sha256(" ".join(sorted(test)).encode()).hexdigest()
    if not found.startswith(OFFICIAL_TEST):
        say_once(f"{path}: not the published rows in their order, so test is not the official one")
    return test


def vqa_rad_rows(split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """VQA-RAD's closed questions (doi 10.1038/sdata.2018.251): those answered by yes or no.

    There are 1,793 + 451 questions about 314 radiological images, the open ones among them. Many
    images stand in both published splits. dev has all questions of a tenth of train's images.
    """
    path = located("vqa-rad", split, data_dir)
    rows = []
    for number, row in enumerate(table(path, ["image", "question", "answer"])):
        answer = str(row["answer"]).strip().lower()
        if answer not in ("yes", "no"):
            continue
        picture = inner(row, "image", "bytes", path)
        if split != "test" and drawn(picture.hex(), 10) != (split == "dev"):
            continue
        size_of(picture, f"{path}, row {number}")  # raises where it cannot be opened
        row = {
            "id": f"vqa-rad-{Path(path).name.split('-')[0]}-{number}",
            "task": "classify",
            "question": str(row["question"]).strip(),
            "options": ("yes", "no"),
            "answer": answer,
            "image": picture,
        }
        rows.append(row)
    return rows


def inner(row: dict, column: str, field: str, path: str):
    """What stands under `field` in a column of structures. UsageError where nothing does."""
    structure = row[column]
    if not isinstance(structure, dict) or structure.get(field) is None:
        found = ", ".join(structure) if isinstance(structure, dict) else type(structure).__name__
        raise UsageError(f"{path}: the column {column!r} has no {field!r}, but {found}")
    return structure[field]
