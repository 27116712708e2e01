"""Images: what is shown of each kind of file, what is refused and with which words, and the three sources of items."""
import hashlib
import http.server
import json
import re
import threading
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import images
from conftest import SHARED
from data import Item, UsageError
from images import Crop, open_image, own_image_item, pixel_hash, size_of

BCCD = SHARED / "BCCD"
GREY = np.array([[0, 255, 256], [4096, 32768, 65535]], np.uint16)             # 16 bits; what a viewer shows is the upper byte
SHOWN = [[0, 0, 1], [16, 128, 255]]


def pixels(source):
    image = open_image(source)
    assert image.mode == "RGB" and image.size == size_of(source)
    return np.asarray(image).astype(int)


def refused(call, *words):
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- opening a picture
def on_white(colour, alpha):
    return [round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour]


def paletted():
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


@pytest.mark.parametrize("image, suffix, options, expected", [
    (Image.new("RGB", (1, 1), (1, 2, 3)), "png", {}, [[[1, 2, 3]]]),
    (Image.new("L", (1, 1), 77), "png", {}, [[[77] * 3]]),
    (Image.new("1", (1, 1), 1), "png", {}, [[[255] * 3]]),
    (Image.new("1", (1, 1), 0), "tif", {}, [[[0] * 3]]),
    (paletted(), "png", {}, [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]),
    (paletted(), "gif", {}, [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]),
    (paletted(), "png", {"transparency": 1}, [[[10, 20, 30], [255] * 3, [70, 80, 90]]]),
    (paletted(), "png", {"transparency": bytes([255, 128, 0])}, [[[10, 20, 30], on_white([40, 50, 60], 128), [255] * 3]]),
    (Image.new("RGBA", (1, 1), (200, 0, 100, 0)), "png", {}, [[[255] * 3]]),
    (Image.new("RGBA", (1, 1), (200, 0, 100, 64)), "png", {}, [[on_white([200, 0, 100], 64)]]),
    (Image.new("LA", (1, 1), (100, 51)), "png", {}, [[on_white([100] * 3, 51)]]),
    (Image.new("PA", (1, 1), (0, 0)), "tif", {}, [[[255] * 3]]),
    (Image.new("RGB", (1, 1), (9, 9, 9)), "png", {"transparency": (9, 9, 9)}, [[[255] * 3]]),
    (Image.new("L", (1, 1), 9), "png", {"transparency": 9}, [[[255] * 3]]),
    (Image.new("1", (1, 1), 0), "png", {"transparency": 0}, [[[255] * 3]]),
    (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "tif", {}, [[[0, 255, 255]]]),
    (Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "tif", {}, [[[0, 0, 0]]]),
    (Image.new("YCbCr", (1, 1), (76, 85, 255)), "tif", {}, [[[254, 0, 0]]]),      # JFIF: R = 76 + 1.402 * 127, G = 76 - .344 * -43 - .714 * 127
    (Image.fromarray(GREY), "png", {}, np.repeat(np.array(SHOWN)[..., None], 3, 2)),
    (Image.fromarray(GREY), "tif", {}, np.repeat(np.array(SHOWN)[..., None], 3, 2)),
    (Image.frombytes("I;16B", (3, 2), GREY.astype(">u2").tobytes()), "tif", {}, np.repeat(np.array(SHOWN)[..., None], 3, 2)),
    (Image.fromarray(GREY.astype(np.int32)), "tif", {}, np.repeat(np.array(SHOWN)[..., None], 3, 2)),
    (Image.fromarray(GREY), "pgm", {}, np.repeat(np.array(SHOWN)[..., None], 3, 2)),
    (Image.fromarray(GREY), "png", {"transparency": 4096}, np.repeat(np.array([[0, 0, 1], [255, 128, 255]])[..., None], 3, 2))])
def test_pixels_are_what_a_viewer_shows(tmp_path, image, suffix, options, expected):
    path = tmp_path / f"x.{suffix}"
    image.save(path, **options)
    with Image.open(path) as stored:
        assert suffix == "pgm" or stored.mode == image.mode                   # the file really is of this kind
    assert np.abs(pixels(path) - expected).max() <= 1                         # blending and YCbCr may round either way
    if not options:
        assert np.abs(pixels(image) - expected).max() <= 1


def test_the_two_byte_orders_in_memory():
    for mode, order in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")):
        assert pixels(Image.frombytes(mode, (3, 2), GREY.astype(order).tobytes()))[..., 0].tolist() == SHOWN


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("code", range(1, 9))
def test_exif_orientation(tmp_path, suffix, code):
    """Expected: the eight codes written out as NumPy operations; Pillow's own transposition must agree, and the header must tell the turned size."""
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8], corner[:8, 8:16] = 255, 128
    turned = {1: corner, 2: corner[:, ::-1], 3: corner[::-1, ::-1], 4: corner[::-1], 5: corner.transpose(1, 0, 2),
              6: np.rot90(corner, -1), 7: corner[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(corner)}[code]
    exif = Image.Exif()
    exif[0x0112] = code
    Image.fromarray(corner).save(tmp_path / f"x.{suffix}", exif=exif, **({"quality": 100} if suffix in ("jpg", "webp") else {}))
    found = pixels(tmp_path / f"x.{suffix}")
    assert found.shape == turned.shape and np.abs(found - turned).max() <= 24                      # lossy
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert (np.asarray(ImageOps.exif_transpose(image)) == found).all()
        assert (pixels(image) == found).all()
    assert open_image(Crop(str(tmp_path / f"x.{suffix}"), (1, 0, 4, 9))).size == (3, 9) == size_of(Crop(str(tmp_path / f"x.{suffix}"), (1, 0, 4, 9)))


def test_arrays_and_crops(tmp_path):
    colour = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert (pixels(colour) == colour).all() and (pixels(colour[..., 0]) == colour[..., :1]).all() and (pixels(colour[::2, ::-1]) == colour[::2, ::-1]).all()
    Image.fromarray(colour).save(tmp_path / "x.png")
    assert (pixels(Crop(str(tmp_path / "x.png"), (2, 1, 6, 5))) == colour[1:5, 2:6]).all()
    for box in ((0, 0, 8, 5), (-1, 0, 2, 2), (3, 3, 3, 4), (4, 3, 3, 4)):
        for call in (open_image, size_of):
            refused(lambda: call(Crop(str(tmp_path / "x.png"), box), "list, line 3"), "list, line 3: ", "x.png", "not inside")
    for bad in (colour.astype(float), colour[..., :2], colour.reshape(-1), np.zeros((0, 4), np.uint8), np.zeros((3, 4, 1), np.uint8)):
        refused(lambda: open_image(bad, "here"), "here: a picture in memory")


def write_broken(folder):
    """Files that cannot be shown, each with the words to expect."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture, second = Image.fromarray(noise), Image.fromarray(255 - noise)
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "gif"):
        picture.save(folder / f"cut.{suffix}")
        (folder / f"cut.{suffix}").write_bytes((folder / f"cut.{suffix}").read_bytes()[:1500])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    (folder / "code.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (folder / "folder.png").mkdir()
    for suffix in ("gif", "png", "webp", "tif"):
        picture.save(folder / f"moves.{suffix}", save_all=True, append_images=[second])
    Image.new("F", (2, 2)).save(folder / "float.tif")
    Image.new("LAB", (2, 2)).save(folder / "lab.tif")
    Image.fromarray(np.array([[-5, 3]], np.int32)).save(folder / "hounsfield.tif")
    Image.fromarray(GREY).save(folder / "inverted.tif", tiffinfo={262: 0})
    Image.new("1", (7072, 7071)).save(folder / "large.png")                   # just above 50 million
    Image.new("1", (10_000, 10_000)).save(folder / "bomb_warning.png")        # Pillow warns above 89 million ...
    Image.new("1", (20_000, 10_000)).save(folder / "bomb_error.png")          # ... and refuses above 179 million
    return [*[(f"cut.{s}", "cannot be read") for s in ("png", "jpg", "bmp", "webp", "gif", "tif")], ("empty.png", "empty file"), ("text.png", "no image"),
            ("scan.dcm", "DICOM"), ("code.eps", "no image"), ("folder.png", "cannot be read"), ("missing.png", "is not there"), ("nul\0.png", "cannot be read"),
            *[(f"moves.{s}", "holds 2 pictures") for s in ("gif", "png", "webp", "tif")], ("float.tif", "'F'"), ("lab.tif", "'LAB'"),
            ("hounsfield.tif", "-5 to 3"), ("inverted.tif", "0 is white"), *[(f"{n}.png", "50,000,000 pixels") for n in ("large", "bomb_warning", "bomb_error")]]


def test_broken_pictures_are_refused_by_name(tmp_path):
    decoded_only = ("cut.png", "cut.jpg", "cut.bmp", "hounsfield.tif", "cut.gif", "cut.tif", "cut.webp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, words in write_broken(tmp_path):
            shown = repr(str(tmp_path / name)).strip("'")
            assert refused(lambda: open_image(tmp_path / name, "mine.jsonl, line 4"), words).startswith(f"mine.jsonl, line 4: {shown} ")
            assert refused(lambda: open_image(str(tmp_path / name))).startswith(f"{shown} ")
            if name not in decoded_only:
                assert refused(lambda: size_of(tmp_path / name, "mine.jsonl, line 4"), words).startswith(f"mine.jsonl, line 4: {shown} ")
    Image.new("1", (7071, 7071)).save(tmp_path / "fits.png")                  # 49,999,041
    assert size_of(tmp_path / "fits.png") == (7071, 7071)


def test_a_phones_jpeg_with_a_preview_behind_it_is_one_picture(tmp_path):
    Image.new("RGB", (32, 16), "white").save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert pixels(tmp_path / "x.jpg").min() == 255 and pixels(tmp_path / "x.jpg").shape == (16, 32, 3)


def test_a_line_break_in_a_name_stays_in_one_line(tmp_path):
    refused(lambda: open_image(tmp_path / "a\nb.png"), "a\\nb.png is not there")


def test_the_size_is_read_from_the_header_alone(tmp_path, monkeypatch):
    for suffix in ("png", "jpg"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"x.{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert size_of(tmp_path / "x.png") == size_of(tmp_path / "x.jpg") == (30, 20)


def test_files_are_closed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        open_image(tmp_path / "x.png")
        size_of(tmp_path / "x.png")
    refused(lambda: open_image(Crop(str(tmp_path / "x.png"), (0, 0, 9, 9))))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    memory = Image.new("RGB", (4, 4), "red")
    assert open_image(memory) is not memory and (pixels(memory) == [255, 0, 0]).all()              # still open, still the caller's own


def test_pixel_hash(tmp_path):
    colour = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for name in ("a.png", "b.bmp"):
        Image.fromarray(colour).save(tmp_path / name)
    hashes = {pixel_hash(s) for s in (tmp_path / "a.png", str(tmp_path / "b.bmp"), colour, Image.fromarray(colour), Crop(str(tmp_path / "a.png"), (0, 0, 3, 2)))}
    assert len(hashes) == 1 and len(hashes.pop()) == 64
    others = [colour, 255 - colour, colour.reshape(3, 2, 3), colour[:1], colour[:, :2]]
    assert len({pixel_hash(other) for other in others}) == len(others)        # 2 x 3 is not 3 x 2 of the same bytes
    (tmp_path / "a.png").unlink()
    assert pixel_hash(str(tmp_path / "a.png")) == pixel_hash(colour)          # remembered


def test_sources():
    item = lambda image: Item("1", "classify", "Q", ("a", "b"), "a", image=image)
    assert images.sources(item(None)) == () and images.sources(item("a.png")) == ("a.png",)
    assert images.sources(item(("a", "b"))) == images.sources(item(["a", "b"])) == ("a", "b")
    array = np.zeros((3, 2), np.uint8)
    assert images.sources(item(array))[0] is array


# ------------------------------------------------------------------------------------------------------------------------- MedMNIST
def test_the_table_is_that_of_the_package():
    info = {name: row for name, row in pytest.importorskip("medmnist").INFO.items() if not name.endswith("3d")}
    assert images.NAMES == tuple(images.MEDMNIST) == tuple(info) and len(info) == 12
    for name, row in info.items():
        task, labels, _, sums = images.MEDMNIST[name]
        assert task == row["task"] and dict(zip(map(str, range(99)), labels)) == row["label"]
        suffixes = ["" if size == 28 else f"_{size}" for size in images.MEDMNIST_SIZES]
        assert list(sums) == [row[f"MD5{suffix}"] for suffix in suffixes]
        assert [f"{images.MEDMNIST_URL}/{name}{suffix}.npz?download=1" for suffix in suffixes] == [row[f"url{suffix}"] for suffix in suffixes]
        assert images.MEDMNIST_LICENCES.get(name, "CC BY 4.0") == row["license"]


def test_names():
    assert all(map(images.is_medmnist, ("retinamnist", "retinamnist-28", "organsmnist-224", "chestmnist")))
    assert not any(map(images.is_medmnist, ("mnist", "retinamnist-", "retinamnist_28", "retinamnist-big", "retina", "retinamnist-28-28")))


ARRAYS = {f"{part}_{kind}": value for n, part in ((6, "train"), (3, "val"), (2, "test")) for kind, value in
          (("images", np.arange(n * 4 * 5 * 3, dtype=np.uint8).reshape(n, 4, 5, 3)), ("labels", np.arange(n, dtype=np.uint8)[:, None] % 5))}


def test_medmnist_items(tmp_path, capsys):
    np.savez(tmp_path / "retinamnist.npz", **ARRAYS)
    for split, part in (("train", "train"), ("dev", "val"), ("test", "test")):
        items = images.medmnist_items("retinamnist", split, str(tmp_path))
        assert [i.id for i in items] == [f"retinamnist-{split}-{n}" for n in range(len(ARRAYS[f"{part}_labels"]))]
        assert [i.answer for i in items] == [str(n) for n in ARRAYS[f"{part}_labels"][:, 0]]
        assert all((i.image == picture).all() and i.image.base is not None for i, picture in zip(items, ARRAYS[f"{part}_images"]))
        assert {(i.task, i.options) for i in items} == {("grade", ("0", "1", "2", "3", "4"))} and "from 0 (none) to 4 (proliferative)?" in items[0].question
    warning = f"used, though its MD5 sum {hashlib.md5((tmp_path / 'retinamnist.npz').read_bytes()).hexdigest()} is not the published bd4c0672f1bba3e3a89f"
    assert capsys.readouterr().err.count(warning) == 1                        # three splits, said once


def test_medmnist_classes_and_a_published_sum(tmp_path, capsys, monkeypatch):
    """Grey pictures, labels [N] of another integer kind; and a file with the right sum is used without a word."""
    arrays = {key: value[..., 0] if "images" in key else value[:, 0].astype(np.int64) % 2 for key, value in ARRAYS.items()}
    np.savez_compressed(tmp_path / "pneumoniamnist_64.npz", **arrays)
    task, labels, picture, sums = images.MEDMNIST["pneumoniamnist"]
    right = hashlib.md5((tmp_path / "pneumoniamnist_64.npz").read_bytes()).hexdigest()
    monkeypatch.setitem(images.MEDMNIST, "pneumoniamnist", (task, labels, picture, (sums[0], right, *sums[2:])))
    items = images.medmnist_items("pneumoniamnist-64", "train", str(tmp_path))
    assert [i.answer for i in items] == ["normal", "pneumonia", "normal", "pneumonia", "normal", "normal"] and items[1].image.shape == (4, 5)
    assert items[0].question == "What does this chest X-ray of a child show?" and items[0].task == "classify" and items[0].options == labels
    assert "normal" not in items[0].question and capsys.readouterr().err == ""


def test_the_md5_sum_is_computed_once(tmp_path, monkeypatch):
    np.savez(tmp_path / "retinamnist.npz", **ARRAYS)
    calls, real = [], hashlib.md5
    monkeypatch.setattr(hashlib, "md5", lambda *args: calls.append(1) or real(*args))
    for split in ("train", "dev", "test"):
        images.medmnist_items("retinamnist", split, str(tmp_path))
    assert len(calls) == 1


def test_the_largest_size_present_is_taken(tmp_path):
    for size, name in ((28, "retinamnist"), (64, "retinamnist_64"), (128, "retinamnist_128")):
        np.savez(tmp_path / f"{name}.npz", train_images=np.zeros((2, size, size, 3), np.uint8), train_labels=np.zeros((2, 1), np.uint8))
    side = lambda name: images.medmnist_items(name, "train", str(tmp_path))[0].image.shape[0]
    assert (side("retinamnist"), side("retinamnist-28"), side("retinamnist-64"), side("retinamnist-128")) == (128, 28, 64, 128)
    refused(lambda: side("retinamnist-224"), "retinamnist_224.npz", str(tmp_path), "zenodo.org")
    refused(lambda: side("retinamnist-32"), "retinamnist-28, retinamnist-64")
    refused(lambda: side("octmnist"), "octmnist_224.npz or octmnist_128.npz or octmnist_64.npz or octmnist.npz", "--data-dir")


def test_chestmnist_is_refused_and_dermamnist_says_its_licence(tmp_path, capsys):
    refused(lambda: images.medmnist_items("chestmnist-28", "train", str(tmp_path)), "chestmnist", "multi-label")
    images.say_once.cache_clear()
    np.savez(tmp_path / "dermamnist.npz", **ARRAYS)
    for split in ("train", "test"):
        images.medmnist_items("dermamnist", split, str(tmp_path))
    assert capsys.readouterr().err.count("CC BY-NC 4.0") == 1


@pytest.mark.parametrize("change, words", [
    ({"train_labels": np.array([["0"]] * 6)}, "<U1"), ({"train_labels": np.array([[0], [1], [5], [0], [7], [0]])}, "train_labels[2] is 5"),
    ({"train_labels": np.array([[0], [1], [-1], [0], [0], [0]])}, "train_labels[2] is -1"), ({"train_labels": np.zeros((6, 14), np.uint8)}, "[6, 14]"),
    ({"train_labels": np.zeros((5, 1), np.uint8)}, "[5, 1]"), ({"train_labels": np.zeros((6, 1))}, "float64"), ({"train_images": np.zeros((6, 4, 5, 4), np.uint8)}, "[6, 4, 5, 4]"),
    ({"train_images": np.zeros((6, 4, 5, 3))}, "float64"), ({"train_images": np.zeros((6, 0, 5), np.uint8)}, "[6, 0, 5]"), ({"train_images": None}, "train_images"),
    ({"train_images": np.array([{}] * 6, object)}, "allow_pickle"), ({"train_labels": np.array([{}] * 6, object)}, "allow_pickle")])
def test_npz_with_the_wrong_contents(tmp_path, change, words):
    np.savez(tmp_path / "retinamnist.npz", **{key: value for key, value in (ARRAYS | change).items() if value is not None})
    refused(lambda: images.medmnist_items("retinamnist", "train", str(tmp_path)), str(tmp_path / "retinamnist.npz"), words)


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "retinamnist.npz"
    np.savez(path, **ARRAYS)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"NUMPY") + 200] ^= 255                               # in the pixels: the zip's own check sum finds it
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as z:
        z.writestr("train_images", "hello")
        z.writestr("train_labels", "hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for content in (b"", b"hello", whole[:len(whole) // 2], whole[:40], bytes(flipped), b"\x80\x04]\x94.", (tmp_path / "text.zip").read_bytes(),
                    (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        refused(lambda: images.medmnist_items("retinamnist", "train", str(tmp_path)), str(path), "not a file of MedMNIST")


def test_a_file_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise MemoryError
    np.savez(tmp_path / "retinamnist_64.npz", **ARRAYS)
    monkeypatch.setattr(np, "load", load)
    refused(lambda: images.medmnist_items("retinamnist", "train", str(tmp_path)), "retinamnist_64.npz", "memory", "retinamnist-28")


# ------------------------------------------------------------------------------------------------------------------------- download
@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server in Zenodo's place. Its `files` maps a name to (bytes, how many of them to send before it hangs up)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.split("?")[0].lstrip("/")
            if name not in files:
                return self.send_error(404)
            content, sent = files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        def log_message(self, *args):
            pass

    files, asked = {}, []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(images, "MEDMNIST_URL", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "published.npz", **ARRAYS)
    content = (tmp_path / "published.npz").read_bytes()
    task, labels, picture, sums = images.MEDMNIST["retinamnist"]
    monkeypatch.setitem(images.MEDMNIST, "retinamnist", (task, labels, picture, (*sums[:3], hashlib.md5(content).hexdigest())))
    files["retinamnist_224.npz"] = (content, None)
    yield files, asked, tmp_path / "cache" / "medmnist"
    httpd.shutdown()
    httpd.server_close()


def test_download_once_and_again_when_the_file_has_gone_bad(server, capsys):
    files, asked, cache = server
    for split in ("train", "dev", "test"):
        assert images.medmnist_items("retinamnist", split, None)
    assert asked == ["/retinamnist_224.npz?download=1"] and images.MEDMNIST_URL in capsys.readouterr().err
    assert [p.name for p in cache.iterdir()] == ["retinamnist_224.npz"] and (cache / "retinamnist_224.npz").read_bytes() == files["retinamnist_224.npz"][0]
    (cache / "retinamnist_224.npz").write_bytes(b"rotten")
    assert len(images.medmnist_items("retinamnist-224", "train", None)) == 6 and len(asked) == 2


def test_download_with_the_wrong_sum_or_cut_off_leaves_nothing(server):
    files, asked, cache = server
    content = files["retinamnist_224.npz"][0]
    for served, *words in (((content + b"!", None), hashlib.md5(content + b"!").hexdigest(), hashlib.md5(content).hexdigest()),
                           ((content, 500), f"500 of {len(content):,} bytes", "--data-dir"), ((content, 0), "0 of", "--data-dir")):
        files["retinamnist_224.npz"] = served
        refused(lambda: images.medmnist_items("retinamnist", "train", None), images.MEDMNIST_URL, *words)
        assert list(cache.iterdir()) == []
    del files["retinamnist_224.npz"]
    refused(lambda: images.medmnist_items("retinamnist", "train", None), "404", "--data-dir")
    refused(lambda: images.medmnist_items("retinamnist-28", "train", None), "/retinamnist.npz?download=1", "404")
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_and_the_old_file_alone(server, monkeypatch):
    files, asked, cache = server
    class Answer:
        headers = {}
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def read(self, size):
            assert [p.suffix for p in cache.iterdir() if "224" in p.name] == [".part"]             # it is being written, beside its place
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer())
        images.medmnist_items("retinamnist", "train", None)
    assert list(cache.iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MEDMNIST_URL", "http://127.0.0.1:9")         # nobody listens
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path))
    refused(lambda: images.medmnist_items("octmnist", "train", None), "http://127.0.0.1:9/octmnist_224.npz", "refused", "--data-dir")
    (tmp_path / "medmnist").rmdir()
    (tmp_path / "medmnist").write_text("a file where the folder should be")
    refused(lambda: images.medmnist_items("octmnist", "train", None), "medmnist", "--data-dir")
    monkeypatch.delenv("MEDRL_CACHE")
    assert images.cache_dir() == Path.home() / ".cache" / "medrl"


# ----------------------------------------------------------------------------------------------------------------------------- BCCD
NAMES = {"WBC": "white blood cell", "RBC": "red blood cell", "Platelets": "platelet"}


@pytest.fixture(scope="session")
def bccd():
    """Every annotation, read with regular expressions: {stem: [(name, (x1, y1, x2, y2)), ...]}."""
    if not BCCD.is_dir():
        pytest.skip("the sample of real data is not here")
    edges = re.compile(r"<name>(\w+)</name>.*?" + ".*?".join(rf"<{e}>(\d+)</{e}>" for e in ("xmin", "ymin", "xmax", "ymax")), re.S)
    return {path.stem: [(m[0], tuple(map(int, m[1:]))) for m in edges.findall(path.read_text())] for path in (BCCD / "Annotations").glob("*.xml")}


def listed(split):
    stems = (BCCD / f"ImageSets/Main/{'train' if split == 'train' else 'val'}.txt").read_text().split()
    return {"train": stems, "dev": stems[0::2], "test": stems[1::2]}[split]


def test_bccd_localize(bccd, capsys):
    images.say_once.cache_clear()
    for split in ("train", "dev", "test"):
        for target in NAMES:
            items = images.bccd_items(split, str(SHARED), target=target)
            expected = {s: sorted(b for n, b in bccd[s] if n == target and b[0] < b[2]) for s in listed(split)}
            assert {i.id: list(i.answer) for i in items} == {f"bccd-{split}-{s}": boxes for s, boxes in expected.items() if boxes}
            assert all(i.task == "localize" and i.options == () and NAMES[target] in i.question and Path(i.image).stem == i.id.split("-")[2] for i in items)
    said = capsys.readouterr().err.splitlines()
    assert sum("no test.txt" in line for line in said) == 1
    assert sorted(stem for stem in ("BloodImage_00338", "BloodImage_00343") for line in said if stem in line) == ["BloodImage_00338", "BloodImage_00343"]
    assert images.bccd_items("dev", str(BCCD)) == images.bccd_items("dev", str(SHARED))            # the folder itself or the one that holds it


def test_bccd_classify(bccd):
    for split in ("train", "dev"):
        items = images.bccd_items(split, str(SHARED), task="classify")
        expected = {(s, b): NAMES[n] for s in listed(split) for n, b in bccd[s] if min(b[2] - b[0], b[3] - b[1]) >= 8}
        assert {(Path(i.image.path).stem, i.image.box): i.answer for i in items} == expected
        assert len({i.id for i in items}) == len(items) == sum(min(b[2] - b[0], b[3] - b[1]) >= 8 for s in listed(split) for n, b in bccd[s])
        assert {i.options for i in items} == {("platelet", "red blood cell", "white blood cell")} and items[0].task == "classify"
    x1, y1, x2, y2 = items[0].image.box
    with Image.open(items[0].image.path) as whole:
        assert (pixels(items[0].image) == np.asarray(whole)[y1:y2, x1:x2]).all()


XML = """<annotation><size><width>40</width><height>30</height></size>{}</annotation>"""
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def small_bccd(root, xml, **lists):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "BCCD" / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "BCCD/JPEGImages/a.jpg")
    (root / "BCCD/Annotations/a.xml").write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    for name, stems in ({"train": "a\n"} | lists).items():
        (root / f"BCCD/ImageSets/Main/{name}.txt").write_text(stems)
    return str(root)


def test_bccd_with_a_test_list_and_strange_boxes(tmp_path, capsys):
    boxes = [(20, 1, 40, 30), (5, 5, 4, 9), (1, 1, 41, 9), (1, 1, 8, 30), (1, 2, 9, 10), (3, 3, 3, 9)]
    folder = small_bccd(tmp_path, XML.format("".join(OBJECT.format("WBC", *b) for b in boxes)), val="", test="a\n")
    [item] = images.bccd_items("test", folder)
    assert item.answer == ((1, 1, 8, 30), (1, 2, 9, 10), (20, 1, 40, 30)) and images.bccd_items("dev", folder) == []
    assert "3 boxes" in (said := capsys.readouterr().err) and "(a, a, a)" in said and "test.txt" not in said
    cells = images.bccd_items("test", folder, task="classify")
    assert [(c.id, c.image.box) for c in cells] == [("bccd-test-a-0", boxes[0]), ("bccd-test-a-4", boxes[4])]      # 7 pixels are too few, 8 are not


@pytest.mark.parametrize("xml, words", [
    ("<annotation>", "Pascal VOC"), (XML.replace("40", "41").format(""), "(40, 30)"), ("<annotation/>", "Pascal VOC"), (XML.format(OBJECT.format("WBC", 1, 2, "x", 4)), "Pascal VOC"),
    (XML.format(OBJECT.format("Parasite", 1, 2, 3, 4)), "'Parasite'"), (XML.format("<object><name>WBC</name></object>"), "Pascal VOC"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>' + XML.format(""), "DOCTYPE"), ('<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">' + XML.format(""), "DOCTYPE"), (('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a>' + XML.format("")).encode("utf-16"), "Pascal VOC"),
    (XML.format(" " * 1_000_000), "1 MB")])
def test_bad_annotations_are_refused_by_name(tmp_path, xml, words):
    folder = small_bccd(tmp_path, xml)
    refused(lambda: images.bccd_items("train", folder), str(tmp_path / "BCCD"), "a.", words)


def test_bccd_that_is_not_there(tmp_path):
    refused(lambda: images.bccd_items("train", None), "https://github.com/Shenggan/BCCD_Dataset", "--data-dir")
    refused(lambda: images.bccd_items("train", str(tmp_path)), str(tmp_path), "train.txt", "--data-dir")
    refused(lambda: images.bccd_items("train", str(tmp_path), target="Parasite"), "'Parasite'", "WBC")
    refused(lambda: images.bccd_items("train", str(tmp_path), task="grade"), "'grade'", "localize")
    folder = small_bccd(tmp_path, XML.format(""))
    (tmp_path / "BCCD/JPEGImages/a.jpg").unlink()
    refused(lambda: images.bccd_items("train", folder), "a.jpg is not there")
    (tmp_path / "BCCD/Annotations/a.xml").unlink()
    refused(lambda: images.bccd_items("train", folder), "a.xml")


# ------------------------------------------------------------------------------------------------------------------------- your own
@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return tmp_path


CLASS = {"image": "a.png", "label": "cat", "labels": ["cat", "dog"]}
GRADE = {"image": "a.png", "grade": 2, "grades": [0, 1, 2]}
BOXES = {"image": "a.png", "boxes": [[20, 1, 40.0, 30], [1.5, 2, 3, 4]]}


def own(row, folder, task=""):
    return own_image_item(json.loads(json.dumps(row)), "mine.jsonl, line 7", "mine-7", folder, task)


def test_own_rows(folder):
    a = str(folder / "a.png")
    assert own(CLASS, folder) == Item("mine-7", "classify", "What does this image show?", ("cat", "dog"), "cat", image=a)
    assert own(GRADE, folder) == Item("mine-7", "grade", "Which grade does this image show, from 0 (lowest) to 2 (highest)?", ("0", "1", "2"), "2", image=a)
    assert own(GRADE | {"grade": "II", "grades": ["I", "II"]}, folder).answer == "II"
    assert own(BOXES, folder) == Item("mine-7", "localize", "Find every finding in this image.", (), ((1.5, 2, 3, 4), (20, 1, 40.0, 30)), image=a)
    assert own(BOXES | {"target": "nodule"}, folder).question == "Find every nodule in this image."
    more = own(CLASS | {"question": " Which? ", "id": 0, "patient": 12, "rationale": "Because.", "labels": ["cat", "  big   dog "], "label": "big dog"}, folder)
    assert (more.question, more.id, more.patient, more.rationale, more.answer, more.options) == ("Which?", "0", "12", "Because.", "big dog", ("cat", "big dog"))
    two = own({"images": ["a.png", "sub/b.png"], "label": "cat", "labels": ["cat", "dog"]}, folder)
    assert images.sources(two) == (a, str(folder / "sub/b.png")) and two.question == "What do these images show?"
    assert own({**CLASS, "image": str(folder / "sub/../a.png")}, folder / "sub") and own(CLASS | {"image": "sub/../a.png"}, folder)
    assert own(CLASS | {"boxes": None, "grade": None}, folder).task == "classify"
    assert {task: own(CLASS | GRADE | BOXES, folder, task).task for task in ("classify", "grade", "localize")} == {t: t for t in ("classify", "grade", "localize")}


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize("row, words", [
    ({"image": "a.png"}, "'label'"), (CLASS | BOXES, "--task classify or localize"), (without(CLASS, "image"), "'image'"), (CLASS | {"images": ["a.png"]}, "'images'"),
    (CLASS | {"image": ""}, "'image'"), (CLASS | {"image": 3}, "'image'"), (without(CLASS, "image") | {"images": []}, "'images'"),
    (without(CLASS, "image") | {"images": "a.png"}, "'images'"), (CLASS | {"image": "c.png"}, "c.png is not there"), (CLASS | {"image": "../a.png"}, "leaves the folder"),
    (CLASS | {"image": "sub/../../a.png"}, "leaves the folder"), (CLASS | {"image": "sub"}, "cannot be read"), (CLASS | {"image": "bad.png"}, "bad.png is no image"),
    (without(CLASS, "labels"), "'labels'"), (CLASS | {"labels": ["cat"]}, "2 to 1000"), (CLASS | {"labels": [f"l{i}" for i in range(1001)]}, "2 to 1000"),
    (CLASS | {"labels": "cat dog"}, "'labels'"), (CLASS | {"labels": ["cat", "dog", " DOG"]}, "read the same"), (CLASS | {"labels": ["cat", 3]}, "holds 3"),
    (CLASS | {"labels": ["cat", " "]}, "holds ' '"), (CLASS | {"label": "cow"}, "'cow'"), (CLASS | {"label": None}, "needs 'label'"), (CLASS | {"label": ["cat"]}, "'labels'"),
    (GRADE | {"grade": 3}, "'3'"), (GRADE | {"grade": True, "grades": [1, True]}, "holds True"), (GRADE | {"grades": [0, 1, 2, "2"]}, "read the same"),
    (GRADE | {"grades": [0.5, 1, 2]}, "holds 0.5"), (CLASS | {"question": ["Q"]}, "'question'"), (CLASS | {"patient": True}, "'patient'"),
    (BOXES | {"boxes": []}, "at least one"), (BOXES | {"boxes": {}}, "at least one"), (BOXES | {"boxes": [1, 2, 3, 4]}, "in numbers"), (BOXES | {"boxes": [[1, 2, 3]]}, "in numbers"),
    (BOXES | {"boxes": [[1, 2, 3, "4"]]}, "in numbers"), (BOXES | {"boxes": [[False, 2, 3, 4]]}, "in numbers"), (BOXES | {"boxes": [[1, 2, 3, 4], [3, 2, 3, 4]]}, "[3, 2, 3, 4]"),
    (BOXES | {"boxes": [[1, 4, 3, 4]]}, "y1 < y2"), (BOXES | {"boxes": [[1, 2, 41, 4]]}, "40 x 30"), (BOXES | {"boxes": [[1, 2, 4, 31]]}, "40 x 30"),
    (BOXES | {"boxes": [[-1, 2, 4, 5]]}, "40 x 30"), (BOXES | {"boxes": [[1, -2, 4, 5]]}, "40 x 30"), (BOXES | {"boxes": [[1, 2, float("nan"), 5]]}, "nan"),
    (BOXES | {"boxes": [[1, 2, float("inf"), 5]]}, "inf"), (BOXES | {"boxes": [[1, 2, 10 ** 400, 5]]}, "40 x 30"),
    (without(BOXES, "image") | {"images": ["a.png", "sub/b.png"]}, "need one image")])
def test_own_rows_are_refused_by_file_and_line(folder, row, words):
    (folder / "bad.png").write_text("no picture")
    assert refused(lambda: own(row, folder), words).startswith("mine.jsonl, line 7: ")


def test_a_task_that_the_row_does_not_have(folder):
    refused(lambda: own(CLASS, folder, "localize"), "mine.jsonl, line 7", "--task localize", "classify")


@pytest.mark.parametrize("labels", [["CIN-1", "CIN 1"], ["a.", "a"], ["*a*", "a"], ["**", "b"], ["</answer>", "b"],
                                    ["?", "b"]])
def test_labels_that_the_grader_cannot_tell_apart_are_refused(labels):
    refused(lambda: images.own_name({"label": labels[0], "labels": labels}, "f, line 1", "label"), "f, line 1", "labels")


def test_grades_that_the_grader_cannot_tell_apart_are_refused():
    refused(lambda: images.own_name({"grade": 1, "grades": [1, "grade 1"]}, "f, line 1", "grade"), "f, line 1", "grades")


@pytest.mark.parametrize("arguments, words", [(("chestmnist", None), "multi-label"), (("retinamnist-99", None), "retinamnist-224"), (("bccd", None), "git clone"),
                                              (("bccd", "D", "grade"), "localize"), (("bccd", "D", "", "Foo"), "Platelets"), (("demo", None, "", "WBC"), "bccd")])
def test_names_are_checked_before_anything_is_loaded(arguments, words):
    refused(lambda: images.check(*arguments), words)
