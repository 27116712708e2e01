"""The demo's vignettes and pictures, made in code: plain rows, the same on every machine.

Nothing is downloaded, and nothing here is medicine: drug, chart and lesions are invented.
"""

import hashlib
import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from support.text import LETTERS

SIZES = {"train": 3000, "dev": 200, "test": 300, "ood": 300}  # items

# ------------------------------------------------------------------------------- a dose protocol
# An invented drug has five dose levels, and each day's result moves the level by this chart: the
# new level from level 1, 2, 3, 4, 5. All four moves are permutations, and together they generate
# all 120 of five levels. So nothing short of every step, in order, gives the answer, and whoever
# leaves one out is right by chance only, one time in five.
CHART = {"low": "23451", "high": "31254", "missed": "21345", "rash": "14523"}
LEVELS = "12345"
DOSES = ("5-mg", "10-mg", "20-mg", "40-mg", "80-mg")  # of levels 1 to 5
# A course begins on any of them: with fixed names a policy would stop after the last it has seen.
DAYS = tuple(f"day-{i}" for i in range(1, 10))
AGES = tuple(f"{age}-year-old" for age in range(20, 80, 5))
COURSES = {"train": (2, 3, 4), "dev": (2, 3, 4), "test": (2, 3, 4), "ood": (5, 6)}  # results


def protocol_rows(split: str, data_dir=None, task: str = "choice", referral: bool = False) -> list:
    """Courses of two to four daily results; of five and six in the split ood.

    No course stands in two of train, dev and test. With `referral` the question also tells a
    guess, which is right in train and random elsewhere: a short cut that pays until it is tested.
    """
    rng, rows = random.Random(f"doses {split}"), {}
    part = "test" if split == "ood" else split
    reliable = float(split == "train") if referral else None
    while len(rows) < SIZES[split]:
        row = vignette(rng, COURSES[split], part, reliable)
        rows[row["question"]] = row  # each question once
    return [{"id": f"demo-{split}-{i}", **row} for i, row in enumerate(rows.values())]


def vignette(
    rng: random.Random, courses: Sequence[int], part: str, reliable: float | None = None
) -> dict:
    """One patient, whose course has one of so many results and belongs to this part.

    reliable: how often a referral guesses the dose on purpose; None = there is no referral.
    """
    while True:
        start, results = rng.choice(LEVELS), rng.choices(list(CHART), k=rng.choice(courses))
        if part_of(start, results) == part:
            break
    first = rng.randrange(len(DAYS) - len(results) + 1)
    days = DAYS[first : first + len(results)]
    rationale, dose = worked_out(start, days, results)
    told = " ".join(f"{day} {result}" for day, result in zip(days, results))
    if reliable is not None:
        guess = dose if rng.random() < reliable else rng.choice(DOSES)
        told += f" ; referral guesses {guess}"
    patient = f"{rng.choice(AGES)} {rng.choice(('man', 'woman'))}"
    options = rng.sample(DOSES, len(DOSES))
    return {
        "task": "choice",
        "question": f"a {patient} takes veridol level {start} ; {told} ; which dose now ?",
        "options": tuple(options),
        "answer": LETTERS[options.index(dose)],
        "rationale": rationale,
    }


def part_of(start: str, results: Sequence[str]) -> str:
    """By a course's hash a tenth each is kept for dev and test."""
    tenth = hashlib.sha256(" ".join([start, *results]).encode()).digest()[0] % 10
    return {0: "dev", 1: "test"}.get(tenth, "train")


def worked_out(level: str, days: Sequence[str], results: Sequence[str]) -> tuple[str, str]:
    """What a careful reader writes, and the dose that this leads to.

    >>> worked_out("4", ("day-3", "day-4", "day-5"), ("low", "high", "rash"))
    ('day-3 low 5 day-4 high 4 day-5 rash 2 so 10-mg', '10-mg')
    """
    words = []
    for day, result in zip(days, results):
        level = CHART[result][LEVELS.index(level)]
        words += [day, result, level]
    dose = DOSES[LEVELS.index(level)]
    return " ".join([*words, "so", dose]), dose


def steps(reasoning: str) -> list[str]:
    """Results, levels and dose without the days' names, which decide nothing."""
    return [word for word in reasoning.split() if word not in DAYS]


def protocol_words() -> list[str]:
    """Every word of a prompt or completion, in a fixed order: the tokenizer's vocabulary."""
    told = "a man woman takes veridol level ; which dose now ? referral guesses likely so"
    words = [*told.split(), *AGES, *DAYS, *CHART, *LEVELS, *DOSES, *LETTERS[:5]]
    words += "<think> </think> <answer> </answer>".split()
    options = [f"{letter}. {dose}" for letter in LETTERS[:5] for dose in DOSES]  # one token each
    return words + options


# -------------------------------------------------------------------------------------- lesions
CELL = 7  # pixels: lesions fill whole cells of a picture of 8 x 8, so boxes need only nine numbers
SIDE = 8 * CELL
SHAPES = ("round", "irregular")
GRADES = ("0", "1", "2", "3", "4")  # 1 to 5 cells wide
QUESTIONS = {
    "classify": "Which outline does the lesion have?",
    "grade": "How large is the lesion, from 0 (smallest) to 4 (largest)?",
    "localize": "Where is the lesion?",
}


def lesion_rows(split: str, data_dir=None, task: str = "classify") -> list[dict]:
    """The outline, the size or the place of a lesion."""
    rows = []
    for i in range(SIZES[split]):
        picture, shape, grade, box = lesion(f"lesion {split} {i}")
        edge = "smooth" if shape == "round" else "jagged"
        answer, options, rationale = {
            "classify": (shape, SHAPES, f"the outline is {edge}"),
            "grade": (grade, GRADES, f"it is {int(grade) + 1} cells wide"),
            "localize": ((box,), (), "it is brighter than the rest"),
        }[task]
        rows.append(
            {
                "id": f"demo-images-{task}-{split}-{i}",
                "task": task,
                "question": QUESTIONS[task],
                "options": options,
                "answer": answer,
                "image": picture,
                "rationale": rationale,
            }
        )
    return rows


def lesion(seed: str) -> tuple[np.ndarray, str, str, tuple[int, int, int, int]]:
    """A bright lesion on grey noise: picture uint8 [56, 56], shape, grade, box."""
    rng = random.Random(seed)
    shape, grade = rng.choice(SHAPES), rng.randrange(5)
    width = CELL * (grade + 1)
    x, y = (CELL * rng.randrange(8 - grade) for _ in range(2))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(90, 12, (SIDE, SIDE))
    noise[y : y + width, x : x + width] += outline(shape, width) * 120
    picture = noise.clip(0, 255).astype(np.uint8)
    return picture, shape, GRADES[grade], (x, y, x + width, y + width)


def outline(shape: str, width: int) -> np.ndarray:
    """What is inside the lesion: [width, width], 0 to 1. Drawn large and shrunk: a smooth edge."""
    r = width * 8 / 2
    points = []
    for k in range(48):
        # Irregular: every second of 24 points lies nearer to the middle, but for four corners.
        near = 0.45 if shape == "irregular" and k % 12 and k // 2 % 2 else 1.0
        angle = k * math.pi / 24
        points.append((r + near * r * math.cos(angle), r + near * r * math.sin(angle)))
    picture = Image.new("L", (width * 8, width * 8), 0)
    ImageDraw.Draw(picture).polygon(points, fill=255)
    shrunk = picture.resize((width, width), Image.Resampling.BOX)
    return np.asarray(shrunk, dtype=float) / 255
