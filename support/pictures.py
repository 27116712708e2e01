"""Pictures opened safely: the RGB pixels that a viewer would show, or one line on what is wrong.

A source is a path, the bytes of a file, a Pillow image, a uint8 array [H, W] or [H, W, 3], or a
`Crop` of a file. Every picture of the project is opened by `open_image`, so training and evaluation
see the same pixels.
"""

import functools
import hashlib
import io
import os
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.errors import UsageError

# A photograph has 12 million pixels; a whole slide has billions and must be cut into tiles first.
MAX_PIXELS = 50_000_000
# Of the forty formats that Pillow knows; one of the others starts a PostScript interpreter.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"),
    *("I", "I;16", "I;16B", "I;16L"),
)
TOO_LARGE = f"has more than {MAX_PIXELS:,} pixels: make it smaller or cut it into tiles"
ORIENTATION, PHOTOMETRIC = 0x0112, 262  # numbers of TIFF tags; EXIF has the first one too


@dataclass(frozen=True)
class Crop:
    """A part of a picture file."""

    path: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2, half-open, in pixels of the picture as shown


class Unusable(Exception):
    """What is wrong with a picture, in words that follow its name."""


def sources(image) -> tuple:
    """The sources under `image`, which is None, one source, or several in a tuple or list."""
    if image is None:
        return ()
    return tuple(image) if isinstance(image, (tuple, list)) else (image,)


# ------------------------------------------------------------------------------- open and check
@contextmanager
def opened(source, where: str = ""):
    """A Pillow image with its header checked and nothing decoded.

    Whatever goes wrong here, or in the body of the `with`, becomes a UsageError of one line that
    begins with `where`, such as a file and its line.
    """
    path = source.path if isinstance(source, Crop) else source
    try:
        with warnings.catch_warnings():
            # Pillow remarks on size, EXIF and palettes. What matters of it is checked here.
            warnings.simplefilter("ignore")
            with as_image(path) as image:
                check_header(image)
                yield image
    except Exception as error:
        name = "a picture in memory"
        if not isinstance(path, (Image.Image, np.ndarray, bytes)):
            name = repr(str(path)).strip("'")  # one line, even with a line break in the name
        raise UsageError(f"{where + ': ' if where else ''}{name} {reason(error, path)}") from None


def as_image(path):
    """A context with the Pillow image of any source but a Crop."""
    if isinstance(path, np.ndarray):
        colours = path.shape[2:] in ((), (3,))
        if path.dtype != np.uint8 or path.ndim not in (2, 3) or not colours:
            found = f"{path.dtype} {list(path.shape)}"
            raise Unusable(f"is an array of {found}, not of uint8 [H, W] or [H, W, 3]")
        path = Image.fromarray(path)
    if isinstance(path, Image.Image):
        return nullcontext(path)  # the caller's own stays open
    file = io.BytesIO(path) if isinstance(path, bytes) else path
    return Image.open(file, formats=FORMATS)


def check_header(image: Image.Image) -> None:
    """Raise Unusable where the pixels are too many, of a rare kind, or not of one picture."""
    if min(image.size) < 1:
        raise Unusable("has no pixels: choose another")
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(TOO_LARGE)
    if image.mode not in MODES:
        kind = f"pixels of the kind {image.mode!r}"
        raise Unusable(f"has {kind}: save it as 8-bit or 16-bit grey, or as RGB")
    frames = getattr(image, "n_frames", 1)
    # MPO is a phone's JPEG with a preview behind the photograph.
    if frames > 1 and image.format != "MPO":
        found = f"holds {frames} pictures, an animation or pages"
        raise Unusable(f"{found}: save the one that is meant")
    # Pillow inverts a TIFF in which 0 is white at 8 bits, but not at 16.
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        raise Unusable("is a 16-bit TIFF in which 0 is white: save it with 0 as black")


def reason(error: Exception, path) -> str:
    """What an exception says about a picture, in words that follow its name."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if isinstance(error, UnidentifiedImageError):
        if (len(path) if isinstance(path, bytes) else os.path.getsize(path)) == 0:
            return "is an empty file"
        return f"is no image of the kinds {', '.join(FORMATS)} (DICOM: export it to PNG first)"
    # Pillow lets out SyntaxError, struct.error and a dozen more, by format.
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    what = f"damaged, cut off or of a rare kind ({text or type(error).__name__})"
    return f"cannot be read: {what}; save it again, as PNG"


# ---------------------------------------------------------------------------------- size and pixels
def orientation(image: Image.Image) -> int:
    """EXIF's code, 1 for upright, from the header.

    A PNG's own method also looks behind the pixels, and decodes them for it.
    """
    return Image.Image.getexif(image).get(ORIENTATION, 1)


def inside(box, size: tuple[int, int]) -> bool:
    """Whether a half-open box is not empty and lies within (width, height). False for NaN."""
    return 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def size_of(source, where: str = "") -> tuple[int, int]:
    """(width, height) as a viewer shows it; of a file only the header is read."""
    with opened(source, where) as image:
        width, height = image.size
        # Codes 5 to 8 lie on their side. Pillow has turned a TIFF already.
        if orientation(image) in (5, 6, 7, 8) and image.format != "TIFF":
            width, height = height, width
    if not isinstance(source, Crop):
        return width, height
    if not inside(source.box, (width, height)):
        raise UsageError(
            f"{where + ': ' if where else ''}{source.path} has {width} x {height} pixels: "
            f"the part {source.box} is not inside"
        )
    x1, y1, x2, y2 = source.box
    return x2 - x1, y2 - y1


def open_image(source, where: str = "") -> Image.Image:
    """The RGB pixels that a viewer would show; a complaint begins with `where`."""
    if isinstance(source, Crop):
        size_of(source, where)  # raises where the box is not inside
        return open_image(source.path, where).crop(source.box)
    with opened(source, where) as image:
        return rgb(ImageOps.exif_transpose(image) if orientation(image) != 1 else image)


def rgb(image: Image.Image) -> Image.Image:
    """Any of MODES as a new RGB image; what is transparent shows white, as on paper."""
    if image.mode.startswith("I"):
        return from_16_bits(image)
    if image.mode in ("LA", "P", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_16_bits(image: Image.Image) -> Image.Image:
    """The upper byte of 16-bit grey; Pillow's own conversion clips all above 255 to white."""
    deep = np.asarray(image)
    if deep.min() < 0 or deep.max() > 65535:
        raise ValueError(f"grey values from {deep.min()} to {deep.max()}, not within 0 to 65535")
    grey = (deep >> 8).astype(np.uint8)
    grey[deep == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def pixel_hash(source) -> str:
    """The same for two pictures that a model cannot tell apart, whatever their files."""
    if isinstance(source, Crop):
        return _hash_of_file(source)
    if isinstance(source, (str, Path, bytes)):
        return _hash_of_file(source if isinstance(source, bytes) else str(source))
    image = open_image(source)
    size = f"{image.width} x {image.height} "
    return hashlib.sha256(size.encode() + image.tobytes()).hexdigest()


@functools.cache
def _hash_of_file(source: str | bytes | Crop) -> str:
    return pixel_hash(open_image(source))
