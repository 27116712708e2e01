"""MedMNIST v2 (arXiv 2110.14795) and BCCD as plain rows: dictionaries with the keywords of Item.

Nothing is unpickled and no XML entity is expanded. From the network come only the files of the
table below, and only with the right MD5 sum.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from support import hub
from support.errors import UsageError
from support.pictures import Crop, inside, size_of


@functools.cache
def say_once(text: str) -> None:
    """On stderr, once in a process: every split of a set would say it again."""
    print(text, file=sys.stderr)


# ------------------------------------------------------------------------------------- MedMNIST
class MedMnist(NamedTuple):
    """One set of the single-label 2-D sets."""

    picture: str  # what a picture is, for the question
    labels: str  # in the order of their numbers, with "|" between them
    md5: str  # the sums of the files in the order of SIZES
    task: str = "classify"
    licence: str = "CC BY 4.0"


URL = "https://zenodo.org/records/10519652/files"
SIZES = (28, 64, 128, 224)  # pixels a side
PARTS = {"train": "train", "dev": "val", "test": "test"}
ORGANS = (
    "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|"
    "pancreas|spleen"
)
MEDMNIST = {
    "pathmnist": MedMnist(
        "microscope image of stained colorectal tissue",
        "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa|"
        "cancer-associated stroma|colorectal adenocarcinoma epithelium",
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 "
        "ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec",
    ),
    "dermamnist": MedMnist(
        "dermatoscopic image of a skin lesion",
        "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma|"
        "benign keratosis-like lesions|dermatofibroma|melanoma|melanocytic nevi|vascular lesions",
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f "
        "2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d",
        licence="CC BY-NC 4.0",
    ),
    "octmnist": MedMnist(
        "optical coherence tomography image of a retina",
        "choroidal neovascularization|diabetic macular edema|drusen|normal",
        "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf "
        "0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3",
    ),
    "pneumoniamnist": MedMnist(
        "chest X-ray of a child",
        "normal|pneumonia",
        "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 "
        "05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1",
    ),
    "retinamnist": MedMnist(
        "fundus photograph",
        "0|1|2|3|4",
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc "
        "e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348",
        task="grade",
    ),
    "breastmnist": MedMnist(
        "ultrasound image of a breast",
        "malignant|normal, benign",
        "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 "
        "363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b",
    ),
    "bloodmnist": MedMnist(
        "microscope image of a blood cell",
        "basophil|eosinophil|erythroblast|"
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)|lymphocyte|monocyte|"
        "neutrophil|platelet",
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b "
        "adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601",
    ),
    "tissuemnist": MedMnist(
        "microscope image of a cell of the kidney cortex",
        "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|"
        "Glomerular endothelial cells|Interstitial endothelial cells|Leukocytes|Podocytes|"
        "Proximal Tubule Segments|Thick Ascending Limb",
        "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 "
        "61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c",
    ),
    "organamnist": MedMnist(
        "part of an axial CT slice of the trunk",
        ORGANS,
        "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 "
        "eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170",
    ),
    "organcmnist": MedMnist(
        "part of a coronal CT slice of the trunk",
        ORGANS,
        "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 "
        "773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1",
    ),
    "organsmnist": MedMnist(
        "part of a sagittal CT slice of the trunk",
        ORGANS,
        "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 "
        "ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1",
    ),
}
# `retinamnist-28` is that size, `retinamnist` the largest at hand.
NAMES = tuple(f"{base}{size}" for base in MEDMNIST for size in ("", *(f"-{n}" for n in SIZES)))


def why_not(name: str) -> str:
    """Why there is no MedMNIST set of this name; "" where the name has nothing to do with it."""
    base, _, size = name.partition("-")
    if base == "chestmnist":
        return (
            "chestmnist cannot be used: a chest X-ray in it has any number of 14 findings "
            "(multi-label), which one answer cannot hold"
        )
    if base in MEDMNIST and size.isdecimal():
        return f"no {base} of size {size}: there are {', '.join(f'{base}-{n}' for n in SIZES)}"
    return ""


def medmnist_rows(name: str, split: str, data_dir: str | None = None, task: str = "") -> list[dict]:
    """One split of a set of NAMES, from `data_dir`, the cache or the network."""
    base, _, size = name.partition("-")
    one = MEDMNIST[base]
    if one.licence != "CC BY 4.0":
        say_once(f"{base}: licence {one.licence}, not for commercial use")
    path = medmnist_file(base, (int(size),) if size else SIZES[::-1], data_dir)
    labels = tuple(one.labels.split("|"))
    pixels, golds = medmnist_arrays(path, PARTS[split], len(labels))
    question = f"What does this {one.picture} show?"
    if one.task == "grade":
        question = (
            f"Which grade of diabetic retinopathy does this {one.picture} show, "
            "from 0 (none) to 4 (proliferative)?"
        )
    of_all = {"task": one.task, "question": question, "options": labels}
    return [
        {"id": f"{name}-{split}-{i}", "answer": labels[gold], "image": pixels[i], **of_all}
        for i, gold in enumerate(golds)
    ]


def file_name(base: str, size: int) -> str:
    return f"{base}.npz" if size == 28 else f"{base}_{size}.npz"


def medmnist_cached(name: str) -> bool:
    """Whether a set of NAMES need not be downloaded."""
    base, _, size = name.partition("-")
    return (hub.cache_dir() / "medmnist" / file_name(base, int(size or 224))).is_file()


def medmnist_file(base: str, sizes: tuple[int, ...], data_dir: str | None) -> Path:
    """The first of the sizes that lies in `data_dir`.

    Without a `data_dir` the first size of all, from the cache or the network.
    """
    sums = dict(zip(SIZES, MEDMNIST[base].md5.split()))
    if not data_dir:
        name, md5 = file_name(base, sizes[0]), sums[sizes[0]]
        path = hub.cache_dir() / "medmnist" / name
        if not path.is_file() or hub.md5_of(path) != md5:
            hub.download(f"{URL}/{name}?download=1", path, md5)
        return path
    for size in sizes:
        path = Path(data_dir) / file_name(base, size)
        if path.is_file():
            if (found := hub.md5_of(path)) != sums[size]:
                published = f"the published {sums[size]}"
                say_once(f"{path}: used, though its MD5 sum {found} is not {published}")
            return path
    raise UsageError(
        f"{data_dir} does not hold {' or '.join(file_name(base, size) for size in sizes)}: "
        f"get it from {URL}, or leave out --data-dir to have it downloaded"
    )


def medmnist_arrays(path: Path, part: str, classes: int) -> tuple[np.ndarray, list[int]]:
    """Pictures [N, h, w] or [N, h, w, 3], and the numbers of their labels."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            pixels, labels = npz[f"{part}_images"], npz[f"{part}_labels"]
        forms = [f"{array.dtype} {list(array.shape)}" for array in (pixels, labels)]
    except MemoryError:
        smaller = f"{path.stem.split('_')[0]}-28"
        raise UsageError(
            f"{path}: does not fit into memory: take a smaller size, down to {smaller}"
        ) from None
    except Exception as error:
        # Cut off, no zip, a missing name, a pickle: each raises its own kind.
        what = " ".join(str(error).split())
        raise UsageError(f"{path}: not a file of MedMNIST ({what}): download it again") from None
    colours = pixels.ndim == 3 or pixels.ndim == 4 and pixels.shape[3] == 3
    pictures = pixels.dtype == np.uint8 and colours and 0 not in pixels.shape[1:]
    numbers = labels.dtype.kind in "iu" and labels.shape in ((len(pixels),), (len(pixels), 1))
    if not pictures or not numbers:
        raise UsageError(
            f"{path}: {part}_images and {part}_labels are {forms[0]} and {forms[1]}, "
            "not uint8 [N, h, w] or [N, h, w, 3] and whole numbers [N, 1]"
        )
    golds = labels.reshape(-1).tolist()
    for i, gold in enumerate(golds):
        if not 0 <= gold < classes:
            raise UsageError(
                f"{path}: {part}_labels[{i}] is {gold}, and the labels go from 0 to {classes - 1}: "
                "download it again"
            )
    return pixels, golds


# ----------------------------------------------------------------------------------------- BCCD
BLOOD_CELLS = {"Platelets": "platelet", "RBC": "red blood cell", "WBC": "white blood cell"}
MIN_CELL = 8  # pixels a side: on a smaller cut-out there is nothing to see


class Cell(NamedTuple):
    name: str  # a key of BLOOD_CELLS
    box: tuple[int, int, int, int]  # x1, y1, x2, y2, half-open


def bccd_rows(target: str, split: str, data_dir: str, task: str) -> list[dict]:
    """Blood smears of github.com/Shenggan/BCCD_Dataset.

    task localize: a row is a photograph, and all its cells of the kind `target` are to be found.
    task classify: a row is one cell, cut out.
    """
    folder = Path(data_dir)
    root = folder if (folder / "Annotations").is_dir() else folder / "BCCD"
    rows, dropped = [], []
    for stem in bccd_stems(root, split):
        photo = str(root / "JPEGImages" / f"{stem}.jpg")
        cells, size = bccd_cells(root / "Annotations" / f"{stem}.xml")
        if (found := size_of(photo)) != size:
            raise UsageError(
                f"{photo}: {found} pixels, and its annotation says {size}: get the set again"
            )
        sound = {i: cell for i, cell in enumerate(cells) if inside(cell.box, size)}
        dropped += [stem] * (len(cells) - len(sound))
        if task == "localize":
            rows += where_are(target, sound, photo, f"bccd-{split}-{stem}")
        else:
            rows += what_are(sound, photo, f"bccd-{split}-{stem}")
    if dropped:
        count = f"{len(dropped)} boxes that are empty or not inside the picture"
        say_once(f"{root}, {split}: {count} are left out ({', '.join(dropped)})")
    return rows


def where_are(target: str, cells: dict[int, Cell], photo: str, name: str) -> list[dict]:
    """One row with the boxes of one kind of cell; none where the photograph has no such cell."""
    boxes = tuple(sorted(cell.box for cell in cells.values() if cell.name == target))
    question = f"Find every {BLOOD_CELLS[target]} in this photograph of a blood smear."
    row = {"task": "localize", "question": question, "options": (), "image": photo}
    return [{"id": name, "answer": boxes, **row}] if boxes else []


def what_are(cells: dict[int, Cell], photo: str, name: str) -> list[dict]:
    """One row for each cell that is large enough to be seen."""
    question = "Which kind of blood cell does this cut-out of a blood smear show?"
    of_all = {"task": "classify", "question": question, "options": tuple(BLOOD_CELLS.values())}
    rows = []
    for i, cell in cells.items():
        x1, y1, x2, y2 = cell.box
        if min(x2 - x1, y2 - y1) >= MIN_CELL:
            gold, image = BLOOD_CELLS[cell.name], Crop(photo, cell.box)
            rows.append({"id": f"{name}-{i}", "answer": gold, "image": image, **of_all})
    return rows


def bccd_stems(root: Path, split: str) -> list[str]:
    """The names of a split's photographs. A copy without test.txt has its val.txt halved."""
    lists = root / "ImageSets" / "Main"
    halved = split != "train" and not (lists / "test.txt").is_file()
    path = lists / ("val.txt" if halved else f"{PARTS[split]}.txt")
    try:
        stems = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): "
            "--data-dir must hold BCCD/ with Annotations, JPEGImages and ImageSets/Main"
        ) from None
    if not halved:
        return stems
    say_once(
        f"{lists}: there is no test.txt; of val.txt's {len(stems)} photographs "
        "the first, third, ... are dev and the others test"
    )
    return stems[1::2] if split == "test" else stems[0::2]


def bccd_cells(path: Path) -> tuple[list[Cell], tuple[int, int]]:
    """The cells of an annotation, and the (width, height) of its picture.

    labelImg writes half-open edges, lifted to 1 at the border.
    """
    try:
        if path.stat().st_size > 1_000_000:
            raise UsageError(f"{path}: over 1 MB, which no annotation is")
        # Read as text, so that no other encoding can hide the next two words.
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise UsageError(
                f"{path}: declares a DOCTYPE or an ENTITY, which no annotation needs "
                "and which can be made to fill the memory"
            )
        tree = ElementTree.fromstring(text)
        cells = [
            Cell(node.findtext("name"), whole_numbers(node.find("bndbox"), "xmin ymin xmax ymax"))
            for node in tree.iter("object")
        ]
        size = whole_numbers(tree.find("size"), "width height")
    except UsageError:
        raise
    # A missing element is None, which raises AttributeError or TypeError.
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        what = f"not an annotation in Pascal VOC's form ({' '.join(str(error).split())})"
        raise UsageError(f"{path}: {what}: get the set again") from None
    for cell in cells:
        if cell.name not in BLOOD_CELLS:
            kinds = ", ".join(BLOOD_CELLS)
            raise UsageError(
                f"{path}: an object is called {cell.name!r}, not {kinds}: get the set again"
            )
    return cells, size


def whole_numbers(node, names: str) -> tuple[int, ...]:
    return tuple(int(node.findtext(name)) for name in names.split())
