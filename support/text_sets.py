"""MedQA as plain rows: dictionaries with the keywords of Item."""

import io
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
