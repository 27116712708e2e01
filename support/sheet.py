"""A contact sheet of an evaluation: one PNG, the worst answers first, with what is right.

Blue and orange, which a colour-blind reader can tell apart: boxes on the images, names below them.
"""

import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from policy import Rollout
from support import pictures
from support.text import LETTERS

GOLD, ANSWER = "#4db8ff", "#ff9a3c"
BACKGROUND, TEXT = "#202020", "#dddddd"
SIDE = 300  # pixels: an image is enlarged or shrunk to fit a square of this side
LINE = 18  # pixels a line of text
CAPTION = 3 * LINE + 6
GAP = 10
COLUMNS, SHOWN = 5, 60


def save(rollouts: list[Rollout], path: Path) -> int:
    """The sheet of those rollouts that have an image, at most SHOWN -> how many have one.

    None is written if there is no image.
    """
    seen = sorted((r for r in rollouts if r.item.image is not None), key=badness, reverse=True)
    if seen:
        path.parent.mkdir(parents=True, exist_ok=True)
        right = sum(rollout.correct for rollout in seen)
        title = f"{path.stem}: {right} of {len(seen)} right"
        if len(seen) > SHOWN:
            title += f", the worst {SHOWN} shown"
        on_one_sheet([tile(rollout) for rollout in seen[:SHOWN]], title).save(path)
    return len(seen)


def badness(rollout: Rollout) -> float:
    """From 0 for an answer that is right to 1 for one that has nothing right.

    Boxes: 1 - IoU. Grades: the distance as a share of the number of grades. Else wrong is 1.
    """
    item = rollout.item
    if item.task == "localize":
        return 1 - rollout.parts["iou"]
    if item.task == "grade" and rollout.predicted:
        place = [str(grade) for grade in item.options]
        return abs(place.index(rollout.predicted) - place.index(str(item.answer))) / len(place)
    return float(not rollout.correct)


def on_one_sheet(tiles: list[Image.Image], title: str) -> Image.Image:
    """Row by row under a line that says what the colours are."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = SIDE + GAP, max(one.height for one in tiles) + GAP
    top = 2 * LINE + 2 * GAP
    sheet = Image.new("RGB", (columns * width + GAP, top + rows * height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    write(pen, GAP, GAP, title, TEXT, sheet.width - 2 * GAP)
    write(pen, GAP, GAP + LINE, "what is right", GOLD, SIDE // 2)
    write(pen, GAP + SIDE // 2, GAP + LINE, "what was answered", ANSWER, SIDE // 2)
    for i, one in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(one, (GAP + column * width, top + row * height))
    return sheet


def tile(rollout: Rollout) -> Image.Image:
    """An item's first image, with its boxes, above its name, the right answer and the given one."""
    item = rollout.item
    sources = pictures.sources(item.image)
    picture = pictures.open_image(sources[0], item.id)
    scale = SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    # Enlarged pixels stay squares: what the model saw is not made smoother than it was.
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize(size, kind)
    right = f"right: {said(item, item.answer)}"
    answered = f"answered: {said(item, rollout.predicted)}"
    if item.task == "localize":
        draw_boxes(picture, item.answer, scale, GOLD)
        draw_boxes(picture, rollout.predicted, scale, ANSWER)
        answered += f", IoU {rollout.parts['iou']:.2f}"
    canvas = Image.new("RGB", (SIDE, size[1] + CAPTION), BACKGROUND)
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    name = item.id if len(sources) == 1 else f"first of {len(sources)} images: {item.id}"
    lines = [(name, TEXT), (right, GOLD), (answered, ANSWER)]
    for i, (text, colour) in enumerate(lines):
        write(pen, 0, size[1] + 3 + i * LINE, text, colour, SIDE)
    return canvas


def said(item, answer) -> str:
    """An answer in words."""
    if item.task == "localize":
        return f"{len(answer)} {'box' if len(answer) == 1 else 'boxes'}"
    if item.task == "choice" and answer:
        return f"{answer}. {item.options[LETTERS.index(answer)]}"
    return str(answer) or "unreadable"


def draw_boxes(picture: Image.Image, boxes, scale: float, colour: str) -> None:
    """Half-open boxes, in pixels of the image before it was scaled: at most 100 of them.

    A policy may have written anything, so coordinates are kept in a range that Pillow can draw.
    A black line on either side lets each show on any image.
    """
    pen = ImageDraw.Draw(picture)
    for box in boxes[:100]:
        x1, y1, x2, y2 = (round(min(max(x * scale, -10), 10**4)) for x in box)
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=4)
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=2)


def write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: str, width: int) -> None:
    """One line, cut to a width in pixels; Pillow's own font has ASCII only."""
    font = ImageFont.load_default(14)
    text = " ".join(text.encode("ascii", "replace").decode().split())
    cut = text
    while cut and font.getlength(cut) > width:
        cut = cut[:-1]
    pen.text((x, y), cut if cut == text else f"{cut[:-2]}...", fill=colour, font=font)


def plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", name)
