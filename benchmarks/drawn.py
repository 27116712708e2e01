"""Pictures drawn in code for the augmentations' bench, written as a folder of one's own data.

Nothing here is medicine. Each kind of picture leaves room for one augmentation: `spots` has twelve
grades that are hard to tell exactly, `lesions` think texts that recite or do not.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"train": 2000, "dev": 150, "test": 300}
SIDE, CELL = 56, 14  # pixels: a token of the tiny model is one cell of 4 x 4


def noise(rng: random.Random) -> np.ndarray:
    """Grey background, [56, 56, 3]."""
    grey = np.random.default_rng(rng.getrandbits(32)).normal(90, 12, (SIDE, SIDE, 1))
    return grey.repeat(3, 2)


# ------------------------------------------------------------------------------------------ spots
GRADES = tuple(map(str, range(12)))


def spots(rng: random.Random) -> tuple[np.ndarray, dict]:
    """As many bright spots as the grade says.

    Sizes and brightness vary, so that what a short look gives, the light in all, is near the grade
    and seldom exact.
    """
    picture, grade = noise(rng), rng.randrange(len(GRADES))
    for place in rng.sample(range(64), grade):
        y, x = (7 * at + rng.randrange(3) for at in divmod(place, 8))
        width = rng.choice((2, 3, 4))
        picture[y : y + width, x : x + width] += rng.uniform(60, 140)
    return picture, {
        "question": "How many spots are there?",
        "grade": GRADES[grade],
        "grades": GRADES,
        "rationale": "the spots are counted",
    }


# ---------------------------------------------------------------------------------------- lesions
# What a class is told to look like, and the same in other words: each clause of a rationale is one
# or the other, so that samples of one question recite more or less.
LOOKS = {
    "striate": (
        ("bright lines run from side to side", "it is ruled like the page of a book"),
        ("the reddish field between them stays dark", "its ground is dim"),
        ("each line is as wide as its gap", "bars and gaps alternate"),
    ),
    "columnar": (
        ("bright lines run from top to bottom", "it stands like a fence of posts"),
        ("the reddish ground behind them stays dark", "what lies behind is dim"),
        ("no line touches the line beside it", "all posts are apart"),
    ),
    "tessellate": (
        ("bright and dark squares take turns", "it looks like a board for chess"),
        ("the reddish squares meet at their corners", "its fields touch at points"),
        ("no line runs through the whole field", "nothing is ruled across it"),
    ),
}
KNOWLEDGE = {name: ", ".join(told for told, _ in looks) for name, looks in LOOKS.items()}


def texture(name: str) -> np.ndarray:
    """[CELL, CELL], 0 and 1 in lines or squares of two pixels."""
    y, x = np.indices((CELL, CELL)) // 2
    return {"striate": y, "columnar": x, "tessellate": x + y}[name] % 2


def lesions(rng: random.Random) -> tuple[np.ndarray, dict]:
    """A reddish mark among three greenish ones; each has a texture, the reddish one's is the class.

    About half of the rationale is recited.
    """
    picture, name = noise(rng), rng.choice(list(LOOKS))
    for i, place in enumerate(rng.sample(range((SIDE // CELL) ** 2), 4)):
        y, x = (CELL * at for at in divmod(place, SIDE // CELL))
        shown = texture(rng.choice(list(LOOKS)) if i else name) * 40
        picture[y : y + CELL, x : x + CELL] += shown[..., None]
        picture[y : y + CELL, x : x + CELL, min(i, 1)] += 25  # red, or green
    return picture, {
        "question": "What is the reddish mark?",
        "label": name,
        "labels": list(LOOKS),
        "rationale": ", ".join(rng.choice(clause) for clause in LOOKS[name]),
    }


KINDS: dict[str, Callable] = {"spots": spots, "lesions": lesions}


def write(folder: Path, kind: str) -> None:
    """train.jsonl, dev.jsonl, test.jsonl and their pictures, the same on every machine.

    Beside them knowledge.md, for --knowledge. The lists come last: where they stand, all is there.
    """
    lists = {}
    folder.mkdir(parents=True, exist_ok=True)
    sections = {"task": "a photograph with a reddish mark"} | KNOWLEDGE
    told = "\n".join(f"# {name}\n{text}" for name, text in sections.items())
    (folder / "knowledge.md").write_text(told + "\n", encoding="utf-8")
    for split, size in SIZES.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        lists[split] = []
        for i in range(size):
            picture, row = KINDS[kind](random.Random(f"{kind} {split} {i}"))
            path = f"{split}/{i}.png"
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / path)
            lists[split].append(json.dumps({"image": path, **row}))
    for split, lines in lists.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
