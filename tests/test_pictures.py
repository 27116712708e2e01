"""Pictures: what is shown of each kind of file, what is refused and with which words."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from PIL import Image, ImageOps

from support.pictures import Crop, open_image, pixel_hash, size_of, sources

# 16 bits; what a viewer shows is the upper byte.
GREY = np.array([[0, 255, 256], [4096, 32768, 65535]], np.uint16)
SHOWN = [[0, 0, 1], [16, 128, 255]]
WHITE = [255] * 3


def pixels(source):
    image = open_image(source)
    assert image.mode == "RGB" and image.size == size_of(source)
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------------- pixels
def on_white(colour, alpha):
    return [round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour]


def one_pixel(mode, colour):
    return Image.new(mode, (1, 1), colour)


def paletted():
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


def grey(rows):
    """[h, w] -> [h, w, 3]"""
    return np.repeat(np.array(rows)[..., None], 3, 2)


FIRST, SECOND, THIRD = [10, 20, 30], [40, 50, 60], [70, 80, 90]
BIG_ENDIAN = Image.frombytes("I;16B", (3, 2), GREY.astype(">u2").tobytes())
WIDE = Image.fromarray(GREY.astype(np.int32))
HALF_CLEAR = [FIRST, on_white(SECOND, 128), WHITE]


@pytest.mark.parametrize(
    "image, suffix, options, expected",
    [
        (one_pixel("RGB", (1, 2, 3)), "png", {}, [[[1, 2, 3]]]),
        (one_pixel("L", 77), "png", {}, [[[77] * 3]]),
        (one_pixel("1", 1), "png", {}, [[WHITE]]),
        (one_pixel("1", 0), "tif", {}, [[[0] * 3]]),
        (paletted(), "png", {}, [[FIRST, SECOND, THIRD]]),
        (paletted(), "gif", {}, [[FIRST, SECOND, THIRD]]),
        (paletted(), "png", {"transparency": 1}, [[FIRST, WHITE, THIRD]]),
        (paletted(), "png", {"transparency": bytes([255, 128, 0])}, [HALF_CLEAR]),
        (one_pixel("RGBA", (200, 0, 100, 0)), "png", {}, [[WHITE]]),
        (one_pixel("RGBA", (200, 0, 100, 64)), "png", {}, [[on_white([200, 0, 100], 64)]]),
        (one_pixel("LA", (100, 51)), "png", {}, [[on_white([100] * 3, 51)]]),
        (one_pixel("PA", (0, 0)), "tif", {}, [[WHITE]]),
        (one_pixel("RGB", (9, 9, 9)), "png", {"transparency": (9, 9, 9)}, [[WHITE]]),
        (one_pixel("L", 9), "png", {"transparency": 9}, [[WHITE]]),
        (one_pixel("1", 0), "png", {"transparency": 0}, [[WHITE]]),
        (one_pixel("CMYK", (255, 0, 0, 0)), "tif", {}, [[[0, 255, 255]]]),
        (one_pixel("CMYK", (0, 0, 0, 255)), "tif", {}, [[[0, 0, 0]]]),
        # JFIF: R = 76 + 1.402 * 127, G = 76 - .344 * -43 - .714 * 127
        (one_pixel("YCbCr", (76, 85, 255)), "tif", {}, [[[254, 0, 0]]]),
        (Image.fromarray(GREY), "png", {}, grey(SHOWN)),
        (Image.fromarray(GREY), "tif", {}, grey(SHOWN)),
        (BIG_ENDIAN, "tif", {}, grey(SHOWN)),
        (WIDE, "tif", {}, grey(SHOWN)),
        (Image.fromarray(GREY), "pgm", {}, grey(SHOWN)),
        (Image.fromarray(GREY), "png", {"transparency": 4096}, grey([SHOWN[0], [255, 128, 255]])),
    ],
)
def test_pixels_are_what_a_viewer_shows(tmp_path, image, suffix, options, expected):
    path = tmp_path / f"x.{suffix}"
    image.save(path, **options)
    with Image.open(path) as stored:
        assert suffix == "pgm" or stored.mode == image.mode  # the file really is of this kind
    assert np.abs(pixels(path) - expected).max() <= 1  # blending and YCbCr may round either way
    if not options:
        assert np.abs(pixels(image) - expected).max() <= 1


def test_the_two_byte_orders_in_memory():
    for mode, order in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (3, 2), GREY.astype(order).tobytes())
        assert pixels(image)[..., 0].tolist() == SHOWN


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("code", range(1, 9))
def test_exif_orientation(tmp_path, suffix, code):
    """Expected: the eight codes written out as NumPy operations.

    Pillow's own transposition must agree, and the header must tell the turned size.
    """
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8], corner[:8, 8:16] = 255, 128
    turned = {
        1: corner,
        2: corner[:, ::-1],
        3: corner[::-1, ::-1],
        4: corner[::-1],
        5: corner.transpose(1, 0, 2),
        6: np.rot90(corner, -1),
        7: corner[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corner),
    }[code]
    exif = Image.Exif()
    exif[0x0112] = code
    path = tmp_path / f"x.{suffix}"
    lossy = {"quality": 100} if suffix in ("jpg", "webp") else {}
    Image.fromarray(corner).save(path, exif=exif, **lossy)
    found = pixels(path)
    assert found.shape == turned.shape and np.abs(found - turned).max() <= 24  # lossy
    with Image.open(path) as image:
        assert (np.asarray(ImageOps.exif_transpose(image)) == found).all()
        assert (pixels(image) == found).all()
    part = Crop(str(path), (1, 0, 4, 9))
    assert open_image(part).size == size_of(part) == (3, 9)


def test_arrays_and_crops(tmp_path):
    colour = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    path = str(tmp_path / "x.png")
    assert (pixels(colour) == colour).all()
    assert (pixels(colour[..., 0]) == colour[..., :1]).all()
    assert (pixels(colour[::2, ::-1]) == colour[::2, ::-1]).all()
    Image.fromarray(colour).save(path)
    assert (pixels(Crop(path, (2, 1, 6, 5))) == colour[1:5, 2:6]).all()


@pytest.mark.parametrize("call", [open_image, size_of])
@pytest.mark.parametrize("box", [(0, 0, 8, 5), (-1, 0, 2, 2), (3, 3, 3, 4), (4, 3, 3, 4)])
def test_a_part_that_is_not_inside_is_refused(tmp_path, call, box):
    Image.new("RGB", (7, 5)).save(tmp_path / "x.png")
    part = Crop(str(tmp_path / "x.png"), box)
    refused(lambda: call(part, "list, line 3"), "list, line 3: ", "x.png", "7 x 5", "not inside")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 3)),
        np.zeros((3, 4, 2), np.uint8),
        np.zeros(12, np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((3, 4, 1), np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    refused(lambda: open_image(array, "here"), "here: a picture in memory")


# -------------------------------------------------------------------------------- broken pictures
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
HEADER_IS_FINE = {*(f"cut.{s}" for s in ("png", "jpg", "bmp", "gif", "tif", "webp")), "deep.tif"}


def write_broken(folder):
    """Files that cannot be shown, each with the words to expect."""
    picture, second = Image.fromarray(NOISE), Image.fromarray(255 - NOISE)
    for suffix in ("png", "jpg", "bmp", "webp", "gif", "tif"):
        picture.save(folder / f"cut.{suffix}")
        whole = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[:1500])
        yield f"cut.{suffix}", "cannot be read"
    for suffix in ("gif", "png", "webp", "tif"):
        picture.save(folder / f"moves.{suffix}", save_all=True, append_images=[second])
        yield f"moves.{suffix}", "holds 2 pictures"
    contents = {
        "empty.png": (b"", "empty file"),
        "text.png": (b"hello", "no image"),
        "scan.dcm": (b"\0" * 128 + b"DICM" + b"\0" * 64, "DICOM"),
        "code.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),
    }
    for name, (content, words) in contents.items():
        (folder / name).write_bytes(content)
        yield name, words
    (folder / "folder.png").mkdir()
    yield from (("folder.png", "cannot be read"), ("missing.png", "is not there"))
    yield "nul\0.png", "cannot be read"
    Image.new("F", (2, 2)).save(folder / "float.tif")
    Image.new("LAB", (2, 2)).save(folder / "lab.tif")
    Image.fromarray(np.array([[-5, 3]], np.int32)).save(folder / "deep.tif")  # as CT has them
    Image.fromarray(GREY).save(folder / "inverted.tif", tiffinfo={262: 0})
    yield from (("float.tif", "'F'"), ("lab.tif", "'LAB'"))
    yield from (("deep.tif", "-5 to 3"), ("inverted.tif", "0 is white"))
    # Just above 50 million pixels; Pillow warns above 89 million, and refuses above 179 million.
    sizes = {"large": (7072, 7071), "warned": (10_000, 10_000), "bomb": (20_000, 10_000)}
    for name, size in sizes.items():
        Image.new("1", size).save(folder / f"{name}.png")
        yield f"{name}.png", "50,000,000 pixels"


def test_broken_pictures_are_refused_by_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = list(write_broken(tmp_path))
        assert len(broken) == 24
        for name, words in broken:
            path = tmp_path / name
            shown = repr(str(path)).strip("'")
            said = refused(lambda path=path: open_image(path, "m.jsonl, line 4"), words)
            assert said.startswith(f"m.jsonl, line 4: {shown} ")
            said = refused(lambda path=path: open_image(str(path)))
            assert said.startswith(f"{shown} ")
            if name not in HEADER_IS_FINE:
                said = refused(lambda path=path: size_of(path, "m.jsonl, line 4"), words)
                assert said.startswith(f"m.jsonl, line 4: {shown} ")


def test_just_below_the_limit_is_fine(tmp_path):
    Image.new("1", (7071, 7071)).save(tmp_path / "fits.png")  # 49,999,041
    assert size_of(tmp_path / "fits.png") == (7071, 7071)


def test_a_phones_jpeg_with_a_preview_behind_it_is_one_picture(tmp_path):
    photograph, preview = Image.new("RGB", (32, 16), "white"), Image.new("RGB", (8, 8))
    path = tmp_path / "x.jpg"
    photograph.save(path, "MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert pixels(path).min() == 255 and pixels(path).shape == (16, 32, 3)


def test_a_line_break_in_a_name_stays_in_one_line(tmp_path):
    refused(lambda: open_image(tmp_path / "a\nb.png"), "a\\nb.png is not there")


# ------------------------------------------------------------------------------ files and hashes
def test_the_size_is_read_from_the_header_alone(tmp_path, monkeypatch):
    for suffix in ("png", "jpg"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"x.{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert size_of(tmp_path / "x.png") == size_of(tmp_path / "x.jpg") == (30, 20)


def test_files_are_closed(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        open_image(path)
        size_of(path)
    refused(lambda: open_image(Crop(str(path), (0, 0, 9, 9))))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_picture_in_memory_stays_open_and_the_callers_own():
    memory = Image.new("RGB", (4, 4), "red")
    assert open_image(memory) is not memory and (pixels(memory) == [255, 0, 0]).all()


def test_pixel_hash(tmp_path):
    colour = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    png, bmp = tmp_path / "a.png", tmp_path / "b.bmp"
    Image.fromarray(colour).save(png)
    Image.fromarray(colour).save(bmp)
    same = [png, str(bmp), colour, Image.fromarray(colour), Crop(str(png), (0, 0, 3, 2))]
    hashes = {pixel_hash(source) for source in same}
    assert len(hashes) == 1 and len(hashes.pop()) == 64
    # 2 x 3 is not 3 x 2 of the same bytes.
    others = [colour, 255 - colour, colour.reshape(3, 2, 3), colour[:1], colour[:, :2]]
    assert len({pixel_hash(other) for other in others}) == len(others)
    png.unlink()
    assert pixel_hash(str(png)) == pixel_hash(colour)  # remembered


def test_sources():
    array = np.zeros((3, 2), np.uint8)
    assert sources(None) == () and sources("a.png") == ("a.png",) and sources(array)[0] is array
    assert sources(("a", "b")) == sources(["a", "b"]) == ("a", "b")
