"""The demo's vignettes and pictures, made in code: plain rows, the same on every machine.

Nothing is downloaded. The vignettes are so simple that a model of 0.09 million weights can learn
them on a CPU, and the pictures that one of 0.4 million can.
"""

import math
import random
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from support.text import LETTERS

SIZES = {"train": 3000, "dev": 200, "test": 300}  # items

# ------------------------------------------------------------------------------------ vignettes
# Twenty conditions, each with four findings that a textbook would name first. One word each, since
# the demo's tokenizer knows words.
CONDITIONS = {
    "pneumonia": "productive-cough pleuritic-pain crackles rusty-sputum",
    "asthma": "wheeze night-cough pollen-trigger variable-peak-flow",
    "appendicitis": "right-iliac-pain rebound-tenderness anorexia migrating-pain",
    "migraine": "throbbing-headache photophobia visual-aura phonophobia",
    "gout": "big-toe-pain tophi high-urate negatively-birefringent-crystals",
    "hypothyroidism": "cold-intolerance weight-gain slow-reflexes dry-skin",
    "hyperthyroidism": "heat-intolerance tremor lid-lag weight-loss",
    "cystitis": "dysuria urinary-frequency suprapubic-pain cloudy-urine",
    "meningitis": "neck-stiffness petechial-rash kernig-sign bulging-fontanelle",
    "angina": "exertional-chest-pain relief-by-nitrate jaw-radiation st-depression",
    "pancreatitis": "epigastric-pain-to-back high-lipase grey-turner-sign alcohol-excess",
    "psoriasis": "silvery-plaques nail-pitting auspitz-sign extensor-rash",
    "cholera": "rice-water-stool severe-dehydration sunken-eyes contaminated-water",
    "measles": "koplik-spots coryza conjunctivitis maculopapular-rash",
    "parkinsonism": "rest-tremor bradykinesia shuffling-gait cogwheel-rigidity",
    "glaucoma": "halos-around-lights raised-eye-pressure cupped-disc tunnel-vision",
    "pulmonary-embolism": "sudden-dyspnoea haemoptysis leg-swelling recent-flight",
    "iron-deficiency": "pallor spoon-nails low-ferritin pica",
    "diabetes-insipidus": "polyuria dilute-urine hypernatraemia constant-thirst",
    "scabies": "burrows night-itch itchy-web-spaces affected-household",
}
AGES = tuple(f"{age}-year-old" for age in range(20, 80, 5))


def demo_rows(split: str, data_dir=None, task: str = "choice") -> list[dict]:
    """Vignettes of two or three findings with five options.

    One combination of three findings of each condition never occurs in train; dev and test are
    different vignettes of just those. So the test asks for a combination that was never seen.
    Shared findings or more held-out combinations would need a larger model.
    """
    rng, seen = random.Random("demo"), set()
    held_out = {name: rng.sample(findings.split(), 3) for name, findings in CONDITIONS.items()}
    names = list(CONDITIONS)
    rows = {part: [] for part in SIZES}
    for part, size in SIZES.items():
        while len(rows[part]) < size:
            name = names[len(rows[part]) % len(names)]
            findings = held_out[name]
            if part == "train":
                findings = rng.choice(combinations_but(findings, CONDITIONS[name].split()))
            row = vignette(name, findings, rng)
            same = row["question"], *sorted(row["options"])
            if same not in seen:
                seen.add(same)
                rows[part].append({"id": f"demo-{part}-{len(rows[part])}", **row})
    return rows[split]


def combinations_but(held_out: list[str], findings: list[str]) -> list[tuple[str, ...]]:
    """All pairs and triples of findings, without the triple that is held out."""
    every = [found for k in (2, 3) for found in combinations(findings, k)]
    return [found for found in every if set(found) != set(held_out)]


def vignette(name: str, findings, rng: random.Random) -> dict:
    findings = rng.sample(findings, len(findings))
    options = rng.sample([other for other in CONDITIONS if other != name], 4) + [name]
    rng.shuffle(options)
    patient = f"{rng.choice(AGES)} {rng.choice(('man', 'woman'))}"
    return {
        "task": "choice",
        "question": f"a {patient} has {' and '.join(findings)} . which diagnosis ?",
        "options": tuple(options),
        "answer": LETTERS[options.index(name)],
        "rationale": f"findings suggest {name}",
    }


def demo_words() -> list[str]:
    """Every word of a demo prompt or completion, in a fixed order: the tokenizer's vocabulary."""
    texts = [
        "a man woman has and . which diagnosis ? findings suggest",
        "<think> </think> <answer> </answer>",
        *AGES,
        *CONDITIONS,
        *CONDITIONS.values(),
        *(f"{letter} {letter}." for letter in LETTERS[:5]),
    ]
    return list(dict.fromkeys(" ".join(texts).split()))


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
