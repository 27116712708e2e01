"""Medical images as `Item`s: MedMNIST, BCCD and your own, in a file of their own because with them data.py could not be read in one sitting.

Read it with MedMNIST v2 (arXiv 2110.14795), whose label names stand in the table below, and with data.py, which calls it and defines `Item`.
A picture is opened in one way only, `open_image`: the RGB pixels that a viewer would show, or one line that names the file and what is wrong with it.
Nothing is unpickled and no XML entity is expanded; from the network come only the files of the table, and only with the right MD5 sum.
"""
import functools
import hashlib
import http.client
import os
import sys
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data import Item, UsageError
from rewards import TAGS, folded, is_answer

MAX_PIXELS = 50_000_000                 # a photograph has 12 million; a whole slide has billions and must be cut into tiles first
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")     # of the forty that Pillow knows, one starts a PostScript interpreter
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class Crop:
    """A part of a picture file."""
    path: str
    box: tuple[int, int, int, int]      # x1, y1, x2, y2, half-open, in pixels of the picture as a viewer shows it


@functools.cache
def say_once(text: str) -> None:
    """On stderr, once in a process: every split of a set would say it again."""
    print(text, file=sys.stderr)


# --------------------------------------------------------------------------------------- the one way in which a picture is opened
def sources(item: Item) -> tuple:
    """The pictures of an item, in order: none, one or several."""
    if item.image is None:
        return ()
    return tuple(item.image) if isinstance(item.image, (tuple, list)) else (item.image,)


@contextmanager
def opened(source, where: str = ""):
    """A Pillow image with its header checked and nothing decoded. Whatever goes wrong here, or in the body of the `with`, becomes one line."""
    path = source.path if isinstance(source, Crop) else source
    name = "a picture in memory" if isinstance(path, (Image.Image, np.ndarray)) else repr(str(path)).strip("'")     # even with a line break: one line
    fault = lambda text: UsageError(f"{where}: {name} {text}" if where else f"{name} {text}")
    too_large = f"has more than {MAX_PIXELS:,} pixels: make it smaller or cut it into tiles"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                   # Pillow's remarks on size, EXIF, palettes: what matters is checked here
            if isinstance(path, np.ndarray):
                if path.dtype != np.uint8 or path.ndim not in (2, 3) or path.shape[2:] not in ((), (3,)):
                    raise fault(f"is an array of {path.dtype} {list(path.shape)}, not of uint8 [H, W] or [H, W, 3]")
                path = Image.fromarray(path)
            with nullcontext(path) if isinstance(path, Image.Image) else Image.open(path, formats=FORMATS) as image:
                if min(image.size) < 1:
                    raise fault("has no pixels: choose another")
                if image.width * image.height > MAX_PIXELS:
                    raise fault(too_large)
                if image.mode not in MODES:
                    raise fault(f"has pixels of the kind {image.mode!r}: save it as 8-bit or 16-bit grey, or as RGB")
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":         # MPO: a phone's JPEG with a preview behind the photograph
                    raise fault(f"holds {image.n_frames} pictures, an animation or pages: save the one that is meant")
                if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0:           # Pillow inverts these at 8 bits, not at 16
                    raise fault("is a 16-bit TIFF in which 0 is white: save it with 0 as black")
                yield image
    except UsageError:
        raise
    except FileNotFoundError:
        raise fault("is not there") from None
    except Image.DecompressionBombError:
        raise fault(too_large) from None
    except UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        raise fault("is an empty file" if empty else f"is no image of the kinds {', '.join(FORMATS)} (DICOM: export it to PNG first)") from None
    except Exception as error:                                                # Pillow lets out SyntaxError, struct.error and a dozen more, by format
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise fault(f"cannot be read: damaged, cut off or of a rare kind ({reason}); save it again, as PNG") from None


def orientation(image: Image.Image) -> int:
    """EXIF's code, 1 for upright, from the header. Pillow's own method also looks behind a PNG's pixels, and decodes them for it."""
    return Image.Image.getexif(image).get(0x0112, 1)


def inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    return 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def size_of(source, where: str = "") -> tuple[int, int]:
    """(width, height) as a viewer shows it; of a file only the header is read."""
    with opened(source, where) as image:
        width, height = image.size
        if orientation(image) in (5, 6, 7, 8) and image.format != "TIFF":     # they lie on their side; Pillow has turned a TIFF's already
            width, height = height, width
    if not isinstance(source, Crop):
        return width, height
    if not inside(source.box, (width, height)):
        raise UsageError(f"{where + ': ' if where else ''}{source.path} has {width} x {height} pixels: the part {source.box} is not inside")
    return source.box[2] - source.box[0], source.box[3] - source.box[1]


def open_image(source, where: str = "") -> Image.Image:
    """The RGB pixels that a viewer would show, of a path, Pillow image, uint8 array or Crop; a complaint begins with `where` (file, line)."""
    if isinstance(source, Crop):
        size_of(source, where)                                                # the box is inside, or this says so
        return open_image(source.path, where).crop(source.box)
    with opened(source, where) as image:
        return rgb(ImageOps.exif_transpose(image) if orientation(image) != 1 else image)


def rgb(image: Image.Image) -> Image.Image:
    """Any of MODES as a new RGB image; what is transparent shows white, as on paper."""
    if image.mode.startswith("I"):                                            # 16-bit grey: Pillow's own conversion clips all above 255 to white
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"grey values from {deep.min()} to {deep.max()}, not within 0 to 65535")
        grey = (deep >> 8).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "P", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_hash(source) -> str:
    """Tells whether two pictures are the same to the eye of a model, whatever their files are called and however they are packed."""
    if isinstance(source, (str, Path, Crop)):
        return _hash_of_file(source if isinstance(source, Crop) else str(source))
    image = open_image(source)
    return hashlib.sha256(f"{image.width} x {image.height} ".encode() + image.tobytes()).hexdigest()


@functools.cache
def _hash_of_file(source: str | Crop) -> str:
    return pixel_hash(open_image(source))


# ------------------------------------------------------------------------------------------------------------------------- MedMNIST
ORGANS = "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen"
MEDMNIST_URL = "https://zenodo.org/records/10519652/files"
MEDMNIST_SIZES = (28, 64, 128, 224)
MEDMNIST_LICENCES = {"dermamnist": "CC BY-NC 4.0"}                            # the others: CC BY 4.0
_TABLE = {                              # name: task, labels in the order of their numbers, what a picture is, MD5 sums in the order of MEDMNIST_SIZES
    "pathmnist": ("multi-class",
        "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa|cancer-associated stroma|"
        "colorectal adenocarcinoma epithelium", "microscope image of stained colorectal tissue",
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec"),
    "chestmnist": ("multi-label, binary-class",
        "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|consolidation|edema|emphysema|fibrosis|pleural|hernia",
        "chest X-ray",
        "02c8a6516a18b556561a56cbdd36c4a8 9de6cd0b934ebb5b7426cfba5efbae16 db107e5590b27930b62dbaf558aebee3 45bd33e6f06c3e8cdb481c74a89152aa"),
    "dermamnist": ("multi-class",
        "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma|benign keratosis-like lesions|dermatofibroma|melanoma|"
        "melanocytic nevi|vascular lesions", "dermatoscopic image of a skin lesion",
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f 2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d"),
    "octmnist": ("multi-class", "choroidal neovascularization|diabetic macular edema|drusen|normal", "optical coherence tomography image of a retina",
        "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf 0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3"),
    "pneumoniamnist": ("binary-class", "normal|pneumonia", "chest X-ray of a child",
        "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1"),
    "retinamnist": ("ordinal-regression", "0|1|2|3|4", "fundus photograph",
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348"),
    "breastmnist": ("binary-class", "malignant|normal, benign", "ultrasound image of a breast",
        "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b"),
    "bloodmnist": ("multi-class",
        "basophil|eosinophil|erythroblast|immature granulocytes(myelocytes, metamyelocytes and promyelocytes)|lymphocyte|monocyte|neutrophil|"
        "platelet", "microscope image of a blood cell",
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601"),
    "tissuemnist": ("multi-class",
        "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|Glomerular endothelial cells|Interstitial endothelial cells|Leukocytes|"
        "Podocytes|Proximal Tubule Segments|Thick Ascending Limb", "microscope image of a cell of the kidney cortex",
        "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c"),
    "organamnist": ("multi-class", ORGANS, "part of an axial CT slice of the trunk",
        "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170"),
    "organcmnist": ("multi-class", ORGANS, "part of a coronal CT slice of the trunk",
        "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1"),
    "organsmnist": ("multi-class", ORGANS, "part of a sagittal CT slice of the trunk",
        "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1"),
}
MEDMNIST = {name: (task, tuple(labels.split("|")), picture, tuple(sums.split())) for name, (task, labels, picture, sums) in _TABLE.items()}
NAMES = tuple(MEDMNIST)


def is_medmnist(name: str) -> bool:
    """`retinamnist`, or with a size `retinamnist-28`."""
    base, dash, size = name.partition("-")
    return base in MEDMNIST and (not dash or size.isdecimal())


def check(dataset: str, data_dir: str | None, task: str = "", target: str = "") -> None:
    """Before anything is loaded: UsageError where MedMNIST or BCCD have no such thing."""
    base, _, size = dataset.partition("-")
    if is_medmnist(dataset):
        if base == "chestmnist":
            raise UsageError("chestmnist cannot be used: a chest X-ray in it has any number of 14 findings (multi-label), which one answer cannot hold")
        if size and int(size) not in MEDMNIST_SIZES:
            raise UsageError(f"no {base} of size {size}: there are {', '.join(f'{base}-{s}' for s in MEDMNIST_SIZES)}")
    elif dataset == "bccd":
        if task not in ("", "localize", "classify"):
            raise UsageError(f"bccd cannot be used for the task {task!r}: there are localize and classify")
        if target and target not in BLOOD_CELLS:
            raise UsageError(f"bccd has no boxes of {target!r}: there are {', '.join(BLOOD_CELLS)}")
        if not data_dir:
            raise UsageError("bccd is not downloaded by itself: git clone https://github.com/Shenggan/BCCD_Dataset, then give --data-dir BCCD_Dataset")
    if target and dataset != "bccd":
        raise UsageError(f"--target {target}: only bccd has several kinds to find")


def medmnist_items(name: str, split: str, data_dir: str | None) -> list[Item]:
    """One split. `retinamnist-64` is that size; `retinamnist` the largest in `data_dir`, or 224 from the network."""
    check(name, data_dir)
    base, _, size = name.partition("-")
    if base in MEDMNIST_LICENCES:
        say_once(f"{base}: licence {MEDMNIST_LICENCES[base]}, not for commercial use")
    task, options, picture, _ = MEDMNIST[base]
    path = medmnist_file(base, (int(size),) if size else MEDMNIST_SIZES[::-1], data_dir)
    pixels, golds = medmnist_arrays(path, {"train": "train", "dev": "val", "test": "test"}[split], len(options))
    kind, question = "classify", f"What does this {picture} show?"
    if task == "ordinal-regression":
        kind, question = "grade", f"Which grade of diabetic retinopathy does this {picture} show, from 0 (none) to 4 (proliferative)?"
    return [Item(f"{name}-{split}-{i}", kind, question, options, options[gold], image=pixels[i]) for i, gold in enumerate(golds)]


def medmnist_cached(name: str) -> bool:
    """Whether it need not be downloaded."""
    base, _, size = name.partition("-")
    return (cache_dir() / "medmnist" / (f"{base}.npz" if size == "28" else f"{base}_{size or 224}.npz")).is_file()


def medmnist_file(base: str, sizes: tuple[int, ...], data_dir: str | None) -> Path:
    """The first of the sizes that lies in `data_dir`; without one the first size of all, from the cache or the network."""
    names = [f"{base}.npz" if size == 28 else f"{base}_{size}.npz" for size in sizes]
    sums = dict(zip(MEDMNIST_SIZES, MEDMNIST[base][3]))
    if not data_dir:
        path, url, md5 = cache_dir() / "medmnist" / names[0], f"{MEDMNIST_URL}/{names[0]}?download=1", sums[sizes[0]]
        if not path.is_file() or md5_of(path, path.stat().st_mtime_ns) != md5:
            download(url, path, md5)
        return path
    for size, path in zip(sizes, (Path(data_dir) / name for name in names)):
        if path.is_file():
            found = md5_of(path, path.stat().st_mtime_ns)
            if found != sums[size]:
                say_once(f"{path}: used, though its MD5 sum {found} is not the published {sums[size]}")
            return path
    raise UsageError(f"{data_dir} does not hold {' or '.join(names)}: get it from {MEDMNIST_URL}, or leave out --data-dir to have it downloaded")


@functools.cache
def md5_of(path: Path, changed: int) -> str:
    """Of a file as it was when it was last changed: three splits of a set ask for it, and a file may be replaced."""
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def medmnist_arrays(path: Path, part: str, classes: int) -> tuple[np.ndarray, list[int]]:
    """Pictures [N, h, w] or [N, h, w, 3] and the numbers of their labels."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            pixels, labels = npz[f"{part}_images"], npz[f"{part}_labels"]
        forms = f"{pixels.dtype} {list(pixels.shape)} and {labels.dtype} {list(labels.shape)}"
    except MemoryError:
        raise UsageError(f"{path}: does not fit into memory: take a smaller size, down to {path.stem.split('_')[0]}-28") from None
    except Exception as error:                                                # cut off, no zip, a missing name, a pickle: each raises its own kind
        raise UsageError(f"{path}: not a file of MedMNIST ({' '.join(str(error).split())}): download it again") from None
    pictures = pixels.dtype == np.uint8 and (pixels.ndim == 3 or pixels.ndim == 4 and pixels.shape[3] == 3) and 0 not in pixels.shape[1:]
    if not pictures or labels.dtype.kind not in "iu" or labels.shape not in ((len(pixels),), (len(pixels), 1)):
        raise UsageError(f"{path}: {part}_images and {part}_labels are {forms}, not uint8 [N, h, w] or [N, h, w, 3] and whole numbers [N, 1]")
    golds = labels.reshape(-1).tolist()
    if strange := [(i, gold) for i, gold in enumerate(golds) if not 0 <= gold < classes]:
        raise UsageError(f"{path}: {part}_labels[{strange[0][0]}] is {strange[0][1]}, and the labels go from 0 to {classes - 1}: download it again")
    return pixels, golds


def cache_dir() -> Path:
    """Where downloads stay; the environment variable MEDRL_CACHE moves it."""
    return Path(os.environ.get("MEDRL_CACHE") or Path.home() / ".cache" / "medrl")


def download(url: str, path: Path, md5: str) -> None:
    """Written beside its place and moved there only when it is whole and its sum is right: a broken download leaves nothing behind."""
    print(f"downloading {url} to {path}", file=sys.stderr)
    part, digest = path.with_name(f"{path.name}.{os.getpid()}.part"), hashlib.md5()          # two runs may fetch the same file at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=10) as answer, part.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if file.tell() < size:
                raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")
        if digest.hexdigest() != md5:
            raise UsageError(f"{url}: the MD5 sum is {digest.hexdigest()} and should be {md5}: nothing was kept; try again later")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"cannot download {url} to {path} ({error}): try again, or give --data-dir DIR with {path.name} in it") from None
    finally:
        if part.is_file():                                                    # Ctrl-C comes through here too
            part.unlink()


# ----------------------------------------------------------------------------------------------------------------------------- BCCD
BLOOD_CELLS = {"Platelets": "platelet", "RBC": "red blood cell", "WBC": "white blood cell"}
MAX_GOLD = 100                          # boxes in one line of your own: matching takes time that grows with their cube
MIN_CELL = 8                            # pixels a side: on a smaller cut-out there is nothing to see


def bccd_items(split: str, data_dir: str | None, task: str = "localize", target: str = "WBC") -> list[Item]:
    """Blood smears (github.com/Shenggan/BCCD_Dataset). localize: all cells of one kind in a photograph; classify: one cell, cut out."""
    check("bccd", data_dir, task, target)
    root = Path(data_dir) if (Path(data_dir) / "Annotations").is_dir() else Path(data_dir) / "BCCD"
    items, dropped = [], []
    for stem in bccd_stems(root, split):
        photo, cells, size = str(root / "JPEGImages" / f"{stem}.jpg"), *bccd_cells(root / "Annotations" / f"{stem}.xml")
        if size_of(photo) != size:
            raise UsageError(f"{photo}: {size_of(photo)} pixels, and its annotation says {size}: get the set again")
        dropped += [stem for _, box in cells if not inside(box, size)]
        cells = [(i, name, box) for i, (name, box) in enumerate(cells) if inside(box, size)]
        if task == "localize":
            boxes = tuple(sorted(box for _, name, box in cells if name == target))
            question = f"Find every {BLOOD_CELLS[target]} in this photograph of a blood smear."
            items += [Item(f"bccd-{split}-{stem}", task, question, (), boxes, image=photo)] if boxes else []
        else:
            question, kinds = "Which kind of blood cell does this cut-out of a blood smear show?", tuple(BLOOD_CELLS.values())
            items += [Item(f"bccd-{split}-{stem}-{i}", task, question, kinds, BLOOD_CELLS[name], image=Crop(photo, box))
                      for i, name, box in cells if min(box[2] - box[0], box[3] - box[1]) >= MIN_CELL]
    if dropped:
        say_once(f"{root}, {split}: {len(dropped)} boxes that are empty or not inside the picture are left out ({', '.join(dropped)})")
    return items


def bccd_stems(root: Path, split: str) -> list[str]:
    """The names of a split's photographs. A copy without test.txt has its val.txt halved."""
    lists = root / "ImageSets" / "Main"
    halved = split != "train" and not (lists / "test.txt").is_file()
    path = lists / ("val.txt" if halved else {"train": "train.txt", "dev": "val.txt", "test": "test.txt"}[split])
    try:
        stems = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): --data-dir must hold BCCD/ with Annotations, JPEGImages and ImageSets/Main") from None
    if halved:
        say_once(f"{lists}: there is no test.txt; of val.txt's {len(stems)} photographs the first, third, ... are dev and the others test")
    return stems[split == "test"::2] if halved else stems


def bccd_cells(path: Path) -> tuple[list[tuple[str, tuple[int, int, int, int]]], tuple[int, int]]:
    """The boxes of an annotation with their names, and the picture's size. labelImg writes half-open edges, lifted to 1 at the border."""
    try:
        if path.stat().st_size > 1_000_000:
            raise UsageError(f"{path}: over 1 MB, which no annotation is")
        text = path.read_text(encoding="utf-8")                               # as text, so that no other encoding can hide the next two words
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise UsageError(f"{path}: declares a DOCTYPE or an ENTITY, which no annotation needs and which can be made to fill the memory")
        tree = ElementTree.fromstring(text)
        number = lambda node, name: int(node.findtext(name))
        cells = [(node.findtext("name"), tuple(number(node.find("bndbox"), edge) for edge in ("xmin", "ymin", "xmax", "ymax")))
                 for node in tree.iter("object")]
        size = number(tree.find("size"), "width"), number(tree.find("size"), "height")
    except UsageError:
        raise
    except (OSError, UnicodeDecodeError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not an annotation in Pascal VOC's form ({' '.join(str(error).split())}): get the set again") from None
    if strange := {name for name, _ in cells} - set(BLOOD_CELLS):
        raise UsageError(f"{path}: an object is called {strange.pop()!r}, not {', '.join(BLOOD_CELLS)}: get the set again")
    return cells, size


# ------------------------------------------------------------------------------------------------------------------------- your own
def own_image_item(row: dict, where: str, default_id: str, folder: Path, task: str = "") -> Item:
    """One line of your own JSONL with an image: "label" and "labels", "grade" and "grades" (lowest first), or "boxes" [[x1, y1, x2, y2], ...].

    Also "question", "patient", "id", "rationale", and for boxes "target" (what to find); `task` says which is meant where a line has several.
    """
    keys = {"classify": "label", "grade": "grade", "localize": "boxes"}
    given = [kind for kind, key in keys.items() if row.get(key) is not None]
    if not given:
        raise UsageError(f"{where}: an image needs 'label' and 'labels', 'grade' and 'grades', 'boxes', or 'options' and 'answer'")
    if len(given) > 1 and not task:
        raise UsageError(f"{where}: {' and '.join(keys[k] for k in given)} stand side by side: say which with --task {' or '.join(given)}")
    kind = task or given[0]
    if kind not in given:
        raise UsageError(f"{where}: there is nothing for --task {kind}: here it can be {' or '.join(given)}")
    image = own_images(row, where, folder)
    show = "do these images" if len(image) > 1 else "does this image"
    if kind == "localize":
        options, answer, question = (), own_boxes(row, where, image), f"Find every {own_text(row, 'target', where) or 'finding'} in this image."
    else:
        options, answer = own_name(row, where, keys[kind])
        question = f"What {show} show?" if kind == "classify" else f"Which grade {show} show, from {options[0]} (lowest) to {options[-1]} (highest)?"
    return Item(own_text(row, "id", where) or default_id, kind, own_text(row, "question", where) or question, options, answer,
                image=image if len(image) > 1 else image[0],
                patient=own_text(row, "patient", where), rationale=own_rationale(row, where))


def own_text(row: dict, key: str, where: str) -> str:
    """A text or a whole number as text; "" where there is none."""
    value = row.get(key)
    if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool)):
        raise UsageError(f"{where}: {key!r} must be a text, not {str(value)[:40]!r}")
    return "" if value is None else str(value).strip()


def own_rationale(row: dict, where: str) -> str:
    """The text under "rationale", without tags: supervised fine-tuning puts it between its own."""
    rationale = own_text(row, "rationale", where)
    if any(tag in rationale for tag in TAGS):
        raise UsageError(f"{where}: 'rationale' holds a tag such as {TAGS[0]}: give only the text "
                         "inside <think> and </think>")
    return rationale


def own_images(row: dict, where: str, folder: Path) -> tuple[str, ...]:
    """The paths under "image" or "images": relative ones start in `folder`, the JSONL's, and stay in it."""
    names = row.get("images", [row.get("image")])
    if {"image", "images"} <= set(row) or not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise UsageError(f"{where}: 'image' must be the path of a file, or 'images' a list of them")
    for name in names:
        if not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise UsageError(f"{where}: the image {name!r} leaves the folder {folder}: put it there or give its absolute path")
        size_of(folder / name, where)
    return tuple(str(folder / name) for name in names)


def own_name(row: dict, where: str, key: str) -> tuple[tuple[str, ...], str]:
    """The closed set under "labels" or "grades", and the one of them that is right."""
    names, plural = row.get(key + "s"), key + "s"
    if not isinstance(names, list) or not 2 <= len(names) <= 1000:
        raise UsageError(f"{where}: {plural!r} must be a list of 2 to 1000, with every {key} there is, and not only this line's")
    kinds = (str, int) if key == "grade" else (str,)
    flat = lambda value: " ".join(str(value).split()) if isinstance(value, kinds) and not isinstance(value, bool) else ""
    options, answer = tuple(map(flat, names)), flat(row[key])
    if not all(options):
        raise UsageError(f"{where}: {plural!r} holds {names[options.index('')]!r}, which is no text{' or whole number' if key == 'grade' else ''}")
    read = [folded(option).removeprefix("grade ") if key == "grade" else folded(option) for option in options]       # as the grader reads them
    if len(set(read)) < len(options):
        raise UsageError(f"{where}: two of the {plural!r} read the same to the grader, which folds case, hyphens and marks")
    if not all(map(is_answer, read)) or any(tag in option for tag in TAGS for option in options):
        raise UsageError(f"{where}: one of the {plural!r} is nothing but marks, or holds a tag such as {TAGS[2]}: no answer could name it")
    if answer not in options:
        raise UsageError(f"{where}: the {key} {str(row[key])[:80]!r} is not one of the {plural!r}")
    return options, answer


def own_boxes(row: dict, where: str, image: tuple[str, ...]) -> tuple:
    """The boxes as tuples, in the order of their left upper corners."""
    boxes = row["boxes"]
    if len(image) > 1:
        raise UsageError(f"{where}: 'boxes' need one image, and here are {len(image)}")
    if not isinstance(boxes, list) or not 1 <= len(boxes) <= MAX_GOLD:
        raise UsageError(f"{where}: 'boxes' must be a list of at least one [x1, y1, x2, y2], and at most {MAX_GOLD}")
    width, height = size_of(image[0], where)
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in box):
            raise UsageError(f"{where}: the box {str(box)[:80]} is not [x1, y1, x2, y2] in numbers; 'boxes' is a list of such lists")
        if not inside(box, (width, height)):                                  # false also for NaN
            raise UsageError(f"{where}: the box {str(box)[:80]} must have x1 < x2 and y1 < y2 and lie inside the image of {width} x {height} pixels")
    return tuple(sorted(map(tuple, boxes)))
