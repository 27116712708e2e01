"""Prior knowledge about a data set's images and classes, as Markdown files.

A file has a section `# task` (what kind of image it is) and a section `## NAME` for each class.
"""

from pathlib import Path

from support.errors import UsageError

FOLDER = Path(__file__).resolve().parent.parent / "knowledge"


def texts(wanted: str, stems: list[str], names: set[str], what: str) -> tuple[str, ...]:
    """The text about the task, then one about each class unless `wanted` is "task".

    wanted: "task" or "class", from the first file of FOLDER that has one of the stems; or the path
    of a file of one's own. names: the classes that there must be, none for boxes, where all
    sections are told. what: the data set, for messages.
    """
    path = Path(wanted)
    if wanted in ("task", "class"):
        files = [found for stem in stems if (found := FOLDER / f"{stem}.md").is_file()]
        if not files:
            raise UsageError(
                f"--knowledge {wanted}: there is none for {what}; write a file with a '# task' and "
                "a '## NAME' section for each class, and give it by --knowledge FILE"
            )
        path = files[0]
    sections = read(path)
    classes = set(sections) - {"task"}
    listed = ", ".join(sorted(names))
    if names and (missing := sorted(names - classes)):
        raise UsageError(f"{path}: no section '## {missing[0]}'; every class needs one: {listed}")
    if names and (unknown := sorted(classes - names)):
        raise UsageError(
            f"{path}: the section '## {unknown[0]}' names no class of {what}; there are {listed}"
        )
    told = [sections.pop("task")]
    if wanted != "task":
        told += [f"{name}: {text}" for name, text in sections.items()]
    return tuple(told)


def read(path: Path) -> dict[str, str]:
    """{"task": text, class name: text, ...}; comments and line breaks in a section do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from None
    except OSError as error:
        raise UsageError(
            f"--knowledge {path}: none, task, class, or a file, which cannot be read: "
            f"{error.strerror}"
        ) from None
    sections: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            name = line.lstrip("#").strip()
            if name in sections:
                raise UsageError(f"{path}, line {number}: a second section {name!r}")
            sections[name] = []
        elif sections and not line.startswith("<!--"):
            sections[list(sections)[-1]].append(line.strip())
    found = {name: " ".join(filter(None, parts)) for name, parts in sections.items()}
    for name in ("task", *found):
        if not found.get(name):
            raise UsageError(f"{path}: the section {name!r} is missing or empty")
    return found
