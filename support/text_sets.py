"""MedQA and MMLU-Pro's health questions as plain rows: dictionaries with the keywords of Item."""

import io
import json
import zipfile
from pathlib import Path

from support import hub, jsonl
from support.errors import UsageError


def medqa_rows(dataset: str, split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """MedQA-USMLE (arXiv 2009.13081) in the layout of its archive: data_clean/questions/US/..."""
    name = f"data_clean/questions/US/{split}.jsonl"
    if dataset == "medqa-4":
        name = f"data_clean/questions/US/4_options/phrases_no_exclude_{split}.jsonl"
    item_name = f"{dataset}-{split}"
    if data_dir:
        path = Path(data_dir) / name
        if not path.is_file():
            raise UsageError(
                f"{path} is not there: "
                "--data-dir must hold the folder data_clean of the MedQA archive"
            )
        return jsonl.read_file(path, item_name, published=True)
    archive = hub.fetch("bigbio/med_qa", "data_clean.zip")
    # Read in place: no member of the archive is written anywhere.
    with zipfile.ZipFile(archive) as z, z.open(name) as member:
        lines = io.TextIOWrapper(member, encoding="utf-8")
        return jsonl.read(lines, f"{archive}:{name}", item_name, published=True)


def mmlu_pro_rows(split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """The 818 health questions of MMLU-Pro (arXiv 2406.01574), with 3 to 10 options.

    They are Med-RLVR's test out of distribution.
    """
    name = "data/test-00000-of-00001.parquet"
    try:
        import pyarrow.parquet  # noqa: PLC0415 (an optional package)
    except ImportError:
        raise UsageError("reading parquet needs pyarrow: pip install pyarrow") from None
    if data_dir:
        places = [Path(data_dir) / "MMLU-Pro" / name, Path(data_dir) / name]
        found = [str(path) for path in places if path.is_file()]
        if not found:
            raise UsageError(f"neither {places[0]} nor {places[1]} is there")
        path = found[0]
    else:
        path = hub.fetch("TIGER-Lab/MMLU-Pro", name)
    columns = ["question_id", "question", "options", "answer", "category"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        what = f"not the parquet file of MMLU-Pro ({str(error).splitlines()[0]})"
        raise UsageError(f"{path}: {what}") from None
    lines = [
        json.dumps(row | {"id": f"mmlu-pro-{row['question_id']}"})
        for row in rows
        if row["category"] == "health"
    ]
    return jsonl.read(lines, path, f"mmlu-pro-health-{split}", published=True)
