"""MedMNIST and BCCD: rows of real and made files, and what is refused."""

import hashlib
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from helpers import refused
from PIL import Image

from support import hub, image_sets
from support.image_sets import bccd_rows, medmnist_rows
from support.pictures import open_image

BCCD = SHARED / "BCCD"


# ----------------------------------------------------------------------------- MedMNIST's table
def test_the_table_is_that_of_the_package():
    info = pytest.importorskip("medmnist").INFO
    wanted = {name for name in info if not name.endswith("3d")} - {"chestmnist"}
    assert set(image_sets.MEDMNIST) == wanted and len(wanted) == 11
    suffixes = ["" if size == 28 else f"_{size}" for size in image_sets.SIZES]
    for name, one in image_sets.MEDMNIST.items():
        row = info[name]
        assert dict(zip(map(str, range(99)), one.labels.split("|"))) == row["label"]
        assert (one.task == "grade") == (row["task"] == "ordinal-regression")
        assert one.md5.split() == [row[f"MD5{suffix}"] for suffix in suffixes]
        urls = [f"{image_sets.URL}/{name}{suffix}.npz?download=1" for suffix in suffixes]
        assert urls == [row[f"url{suffix}"] for suffix in suffixes]
        assert one.licence == row["license"]
    assert info["chestmnist"]["task"].startswith("multi-label")


def test_names():
    assert {"retinamnist", "retinamnist-28", "organsmnist-224"} <= set(image_sets.NAMES)
    assert len(image_sets.NAMES) == len(set(image_sets.NAMES)) == 11 * 5


def test_why_not():
    for name in ("chestmnist", "chestmnist-28"):
        assert "multi-label" in image_sets.why_not(name)
    assert "retinamnist-28, retinamnist-64" in image_sets.why_not("retinamnist-99")
    for name in ("mnist", "retinamnist-", "retinamnist_28", "retinamnist-28-28", "mine.jsonl", ""):
        assert image_sets.why_not(name) == ""


# ----------------------------------------------------------------------------- MedMNIST's files
def arrays_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    pictures = np.arange(n * 4 * 5 * 3, dtype=np.uint8).reshape(n, 4, 5, 3)
    return pictures, np.arange(n, dtype=np.uint8)[:, None] % 5


ARRAYS = {}
for part, n in (("train", 6), ("val", 3), ("test", 2)):
    ARRAYS[f"{part}_images"], ARRAYS[f"{part}_labels"] = arrays_of(n)


def write(folder, name="retinamnist", **changes) -> Path:
    path = folder / f"{name}.npz"
    np.savez(path, **{key: x for key, x in (ARRAYS | changes).items() if x is not None})
    return path


def publish(monkeypatch, name: str, size: int, path: Path) -> None:
    """From here on the file is the published one of that set and size."""
    one = image_sets.MEDMNIST[name]
    sums = dict(zip(image_sets.SIZES, one.md5.split()))
    sums[size] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(image_sets.MEDMNIST, name, one._replace(md5=" ".join(sums.values())))


def test_medmnist_rows(tmp_path, capsys):
    path = write(tmp_path)
    for split, part in (("train", "train"), ("dev", "val"), ("test", "test")):
        rows = medmnist_rows("retinamnist", split, str(tmp_path))
        golds, pictures = ARRAYS[f"{part}_labels"][:, 0], ARRAYS[f"{part}_images"]
        assert [row["id"] for row in rows] == [
            f"retinamnist-{split}-{i}" for i in range(len(golds))
        ]
        assert [row["answer"] for row in rows] == [str(gold) for gold in golds]
        for row, picture in zip(rows, pictures):
            assert (row["image"] == picture).all() and row["image"].base is not None  # no copy
            assert (row["task"], row["options"]) == ("grade", ("0", "1", "2", "3", "4"))
            assert row["question"].endswith("from 0 (none) to 4 (proliferative)?")
    found = hashlib.md5(path.read_bytes()).hexdigest()
    warning = f"used, though its MD5 sum {found} is not the published bd4c0672f1bba3e3a89f"
    assert capsys.readouterr().err.count(warning) == 1  # three splits, said once


def test_grey_pictures_and_a_published_sum(tmp_path, capsys, monkeypatch):
    """Labels [N] of another integer kind; a file with the right sum is used without a word."""
    grey = {key: array[..., 0] for key, array in ARRAYS.items() if "images" in key}
    flat = {key: array[:, 0].astype(np.int64) % 2 for key, array in ARRAYS.items()}
    path = write(tmp_path, "pneumoniamnist_64", **(flat | grey))
    publish(monkeypatch, "pneumoniamnist", 64, path)
    rows = medmnist_rows("pneumoniamnist-64", "train", str(tmp_path))
    answers = [row["answer"] for row in rows]
    assert answers == ["normal", "pneumonia", "normal", "pneumonia", "normal", "normal"]
    assert rows[0]["image"].shape == (4, 5) and rows[0]["options"] == ("normal", "pneumonia")
    assert rows[0]["question"] == "What does this chest X-ray of a child show?"
    assert rows[0]["task"] == "classify" and capsys.readouterr().err == ""


def test_the_largest_size_present_is_taken(tmp_path):
    for size, name in ((28, "retinamnist"), (64, "retinamnist_64"), (128, "retinamnist_128")):
        write(tmp_path, name, train_images=np.zeros((6, size, size, 3), np.uint8))

    def side(name):
        return medmnist_rows(name, "train", str(tmp_path))[0]["image"].shape[0]

    assert side("retinamnist") == side("retinamnist-128") == 128
    assert side("retinamnist-28") == 28 and side("retinamnist-64") == 64
    refused(lambda: side("retinamnist-224"), "retinamnist_224.npz", str(tmp_path), "zenodo.org")
    names = "octmnist_224.npz or octmnist_128.npz or octmnist_64.npz or octmnist.npz"
    refused(lambda: side("octmnist"), names, "--data-dir")


def test_dermamnist_says_its_licence_once(tmp_path, capsys):
    image_sets.say_once.cache_clear()
    write(tmp_path, "dermamnist")
    for split in ("train", "test"):
        medmnist_rows("dermamnist", split, str(tmp_path))
    assert capsys.readouterr().err.count("CC BY-NC 4.0") == 1


@pytest.mark.parametrize(
    "array, change, words",
    [
        ("labels", np.array([["0"]] * 6), "<U1"),
        ("labels", np.array([[0], [1], [5], [0], [7], [0]]), "train_labels[2] is 5"),
        ("labels", np.array([[0], [1], [-1], [0], [0], [0]]), "train_labels[2] is -1"),
        ("labels", np.zeros((6, 14), np.uint8), "[6, 14]"),
        ("labels", np.zeros((5, 1), np.uint8), "[5, 1]"),
        ("labels", np.zeros((6, 1)), "float64"),
        ("labels", np.array([{}] * 6, object), "allow_pickle"),
        ("images", np.zeros((6, 4, 5, 4), np.uint8), "[6, 4, 5, 4]"),
        ("images", np.zeros((6, 4, 5, 3)), "float64"),
        ("images", np.zeros((6, 0, 5), np.uint8), "[6, 0, 5]"),
        ("images", np.array([{}] * 6, object), "allow_pickle"),
        ("images", None, "train_images"),
    ],
)
def test_npz_with_the_wrong_contents(tmp_path, array, change, words):
    path = write(tmp_path, **{f"train_{array}": change})
    refused(lambda: medmnist_rows("retinamnist", "train", str(tmp_path)), str(path), words)


def test_files_that_are_no_npz(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"NUMPY") + 200] ^= 255  # in the pixels: the zip's own check sum finds it
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as z:
        z.writestr("train_images", "hello")
        z.writestr("train_labels", "hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    contents = [b"", b"hello", whole[: len(whole) // 2], whole[:40], bytes(flipped)]
    contents += [b"\x80\x04]\x94.", (tmp_path / "text.zip").read_bytes()]
    for content in (*contents, (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        words = (str(path), "not a file of MedMNIST")
        refused(lambda: medmnist_rows("retinamnist", "train", str(tmp_path)), *words)


def test_a_file_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise MemoryError

    write(tmp_path, "retinamnist_64")
    monkeypatch.setattr(np, "load", load)
    words = ("retinamnist_64.npz", "memory", "retinamnist-28")
    refused(lambda: medmnist_rows("retinamnist", "train", str(tmp_path)), *words)


def test_download_once_and_again_when_the_file_has_gone_bad(tmp_path, monkeypatch):
    published, asked = write(tmp_path, "published"), []

    def download(url, path, md5):
        asked.append((url, md5))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published, path)

    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "download", download)
    publish(monkeypatch, "retinamnist", 224, published)
    assert not image_sets.medmnist_cached("retinamnist")
    for split in ("train", "dev", "test"):
        assert medmnist_rows("retinamnist", split)
    md5 = hashlib.md5(published.read_bytes()).hexdigest()
    assert asked == [(f"{image_sets.URL}/retinamnist_224.npz?download=1", md5)]
    assert image_sets.medmnist_cached("retinamnist")
    assert image_sets.medmnist_cached("retinamnist-224")
    assert not image_sets.medmnist_cached("retinamnist-28")
    (tmp_path / "cache/medmnist/retinamnist_224.npz").write_bytes(b"rotten")
    assert len(medmnist_rows("retinamnist-224", "train")) == 6 and len(asked) == 2
    medmnist_rows("retinamnist-28", "train")
    assert asked[2][0] == f"{image_sets.URL}/retinamnist.npz?download=1"


# ----------------------------------------------------------------------------------------- BCCD
NAMES = {"WBC": "white blood cell", "RBC": "red blood cell", "Platelets": "platelet"}
EDGES = ("xmin", "ymin", "xmax", "ymax")


@pytest.fixture(scope="session")
def bccd():
    """Every annotation, read with regular expressions: {stem: [(name, (x1, y1, x2, y2)), ...]}."""
    if not BCCD.is_dir():
        pytest.skip("the sample of real data is not here")
    numbers = ".*?".join(rf"<{edge}>(\d+)</{edge}>" for edge in EDGES)
    cell = re.compile(r"<name>(\w+)</name>.*?" + numbers, re.S)
    found = {}
    for path in (BCCD / "Annotations").glob("*.xml"):
        cells = cell.findall(path.read_text())
        found[path.stem] = [(name, tuple(map(int, box))) for name, *box in cells]
    return found


def listed(split):
    name = "train" if split == "train" else "val"
    stems = (BCCD / f"ImageSets/Main/{name}.txt").read_text().split()
    return {"train": stems, "dev": stems[0::2], "test": stems[1::2]}[split]


def side(box):
    return min(box[2] - box[0], box[3] - box[1])


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_bccd_localize(bccd, split, target):
    expected = {}
    for stem in listed(split):
        boxes = sorted(box for name, box in bccd[stem] if name == target and box[0] < box[2])
        if boxes:
            expected[f"bccd-{split}-{stem}"] = boxes
    rows = bccd_rows(target, split, str(SHARED), "localize")
    assert {row["id"]: list(row["answer"]) for row in rows} == expected
    for row in rows:
        assert row["task"] == "localize" and row["options"] == ()
        assert NAMES[target] in row["question"]
        assert Path(row["image"]).stem == row["id"].split("-")[2]


def test_bccd_says_once_what_it_did(bccd, capsys):
    image_sets.say_once.cache_clear()
    for split in ("train", "dev", "test"):
        for target in NAMES:
            bccd_rows(target, split, str(SHARED), "localize")
    said = capsys.readouterr().err
    assert said.count("no test.txt") == 1
    assert said.count("BloodImage_00338") == said.count("BloodImage_00343") == 1  # empty boxes


def test_bccd_is_the_folder_itself_or_in_the_one_given(bccd):
    inside, itself = (bccd_rows("WBC", "dev", str(path), "localize") for path in (SHARED, BCCD))
    assert inside == itself


@pytest.mark.parametrize("split", ["train", "dev"])
def test_bccd_classify(bccd, split):
    expected = [
        ((stem, box), NAMES[name])
        for stem in listed(split)
        for name, box in bccd[stem]
        if side(box) >= 8
    ]
    rows = bccd_rows("WBC", split, str(SHARED), "classify")
    images = [row["image"] for row in rows]
    found = {(Path(crop.path).stem, crop.box): row["answer"] for crop, row in zip(images, rows)}
    assert found == dict(expected)
    assert len({row["id"] for row in rows}) == len(rows) == len(expected)
    assert {row["options"] for row in rows} == {("platelet", "red blood cell", "white blood cell")}
    x1, y1, x2, y2 = images[0].box
    with Image.open(images[0].path) as whole:
        assert (np.asarray(open_image(images[0])) == np.asarray(whole)[y1:y2, x1:x2]).all()


XML = "<annotation><size><width>40</width><height>30</height></size>{}</annotation>"
OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def small_bccd(root, xml, **lists):
    """A set of one photograph of 40 x 30 pixels, called a."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "BCCD" / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "BCCD/JPEGImages/a.jpg")
    content = xml if isinstance(xml, bytes) else xml.encode()
    (root / "BCCD/Annotations/a.xml").write_bytes(content)
    for name, stems in ({"train": "a\n"} | lists).items():
        (root / f"BCCD/ImageSets/Main/{name}.txt").write_text(stems)
    return str(root)


def test_bccd_with_a_test_list_and_strange_boxes(tmp_path, capsys):
    sound = [(20, 1, 40, 30), (1, 1, 8, 30), (1, 2, 9, 10)]
    strange = [(5, 5, 4, 9), (1, 1, 41, 9), (3, 3, 3, 9)]
    cells = "".join(OBJECT.format("WBC", *box) for box in sound + strange)
    folder = small_bccd(tmp_path, XML.format(cells), val="", test="a\n")
    [row] = bccd_rows("WBC", "test", folder, "localize")
    assert row["answer"] == ((1, 1, 8, 30), (1, 2, 9, 10), (20, 1, 40, 30))
    assert bccd_rows("WBC", "dev", folder, "localize") == []
    assert bccd_rows("RBC", "test", folder, "localize") == []
    said = capsys.readouterr().err
    assert "3 boxes" in said and "(a, a, a)" in said and "test.txt" not in said
    rows = bccd_rows("WBC", "test", folder, "classify")
    # 7 pixels are too few, 8 are not.
    expected = [("bccd-test-a-0", sound[0]), ("bccd-test-a-2", sound[2])]
    assert [(row["id"], row["image"].box) for row in rows] == expected


EMPTY = XML.format("")
UTF_16 = ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a>' + EMPTY).encode("utf-16")


@pytest.mark.parametrize(
    "xml, words",
    [
        ("<annotation>", "Pascal VOC"),
        ("<annotation/>", "Pascal VOC"),
        (EMPTY.replace("40", "41"), "(40, 30)"),
        (XML.format(OBJECT.format("WBC", 1, 2, "x", 4)), "Pascal VOC"),
        (XML.format("<object><name>WBC</name></object>"), "Pascal VOC"),
        (XML.format(OBJECT.format("Parasite", 1, 2, 3, 4)), "'Parasite'"),
        (f'<!DOCTYPE a [<!ENTITY b "c">]>{EMPTY}', "DOCTYPE"),
        (f'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">{EMPTY}', "DOCTYPE"),
        (UTF_16, "Pascal VOC"),
        (XML.format(" " * 1_000_000), "1 MB"),
    ],
)
def test_bad_annotations_are_refused_by_name(tmp_path, xml, words):
    folder = small_bccd(tmp_path, xml)
    place = str(tmp_path / "BCCD")
    refused(lambda: bccd_rows("WBC", "train", folder, "localize"), place, "a.", words)


def test_bccd_that_is_not_there(tmp_path):
    def read():
        return bccd_rows("WBC", "train", str(tmp_path), "localize")

    refused(read, str(tmp_path), "train.txt", "--data-dir")
    small_bccd(tmp_path, EMPTY)
    (tmp_path / "BCCD/JPEGImages/a.jpg").unlink()
    refused(read, "a.jpg is not there")
    (tmp_path / "BCCD/Annotations/a.xml").unlink()
    refused(read, "a.xml")
