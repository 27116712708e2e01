"""Pictures drawn in code for the augmentations' bench, written as a folder of one's own data.

Nothing here is medicine. Each kind of picture leaves room for one augmentation: `spots` has twelve
grades that are hard to tell exactly, `lesions` a small mark among others that look alike.
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


KINDS: dict[str, Callable] = {"spots": spots}


def write(folder: Path, kind: str) -> None:
    """train.jsonl, dev.jsonl, test.jsonl and their pictures, the same on every machine.

    The lists come last: where they stand, all is there.
    """
    lists = {}
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
