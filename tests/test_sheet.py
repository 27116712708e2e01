"""The contact sheet: the worst first, right and given boxes where they are."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data import Item
from policy import Rollout
from support import sheet

BLUE, ORANGE = [77, 184, 255], [255, 154, 60]  # sheet.GOLD and sheet.ANSWER
BLACK = np.zeros((2, 4, 3), np.uint8)
BOXES = Item("b", "localize", "Q", (), ((0, 0, 2, 2),), image=BLACK)
GRADES = Item("g", "grade", "Q", (0, 1, 2, 3), 0, image=BLACK)
NAMES = Item("a/b c", "classify", "Q", ("round", "irregular"), "round", image=BLACK)


def answered(item: Item, predicted, iou: float = 0.0) -> Rollout:
    correct = predicted == str(item.answer)
    return Rollout(
        item, 0, [], [], [], True, predicted=predicted, parts={"iou": iou}, correct=correct
    )


def drawn(rollout: Rollout) -> np.ndarray:
    return np.asarray(sheet.tile(rollout))


def test_boxes_are_drawn_on_the_enlarged_image():
    """4 x 2 pixels become 300 x 150; right is the left half, and the answer leaves the image."""
    tile = drawn(answered(BOXES, ((3, 0, 1e9, 1e9),)))
    assert tile.shape == (150 + sheet.CAPTION, 300, 3)
    assert tile[75, 149].tolist() == BLUE and tile[75, 225].tolist() == ORANGE
    assert tile[75, 151].tolist() == tile[75, 100].tolist() == [0, 0, 0]  # half-open, hollow


def test_a_large_image_is_shrunk_with_its_boxes():
    large = replace(BOXES, image=np.zeros((300, 600, 3), np.uint8), answer=((200, 0, 400, 300),))
    tile = drawn(answered(large, ()))
    assert tile[75, 100].tolist() == tile[75, 199].tolist() == BLUE


@pytest.mark.parametrize(
    "rollout, text",
    [
        (answered(BOXES, ((0, 0, 1, 2), (1, 0, 2, 2))), "2 boxes"),
        (answered(GRADES, ""), "unreadable"),
        (answered(NAMES, "irregular"), "irregular"),
        (answered(Item("c", "choice", "Q", ("LAD", "RCA"), "A", image=BLACK), "B"), "B. RCA"),
    ],
)
def test_answers_in_words(rollout, text):
    assert sheet.said(rollout.item, rollout.predicted) == text
    assert sheet.said(GRADES, 0) == "0"


def test_the_worst_come_first():
    """Grades: unreadable, three off, one off, right. Boxes: by IoU."""
    said = ["0", "1", "", "3"]
    order = sorted((answered(GRADES, s) for s in said), key=sheet.badness, reverse=True)
    assert [rollout.predicted for rollout in order] == ["", "3", "1", "0"]
    assert [sheet.badness(answered(BOXES, (), iou)) for iou in (0.0, 0.75)] == [1.0, 0.25]
    assert [sheet.badness(answered(NAMES, name)) for name in ("round", "irregular")] == [0, 1]


def test_a_sheet_has_five_columns_and_at_most_sixty_images(tmp_path, monkeypatch):
    """Seven images of 300 x 150 in two rows; those beyond the limit and without image are not."""
    rollouts = [answered(NAMES, "round"), answered(replace(NAMES, image=None), "")]
    rollouts += [answered(NAMES, "\u2603 ☃ \n long" * 30)] * 6
    assert sheet.save(rollouts, tmp_path / "new" / "x.png") == 7
    assert sheet.save(rollouts[1:2], tmp_path / "none.png") == 0
    with Image.open(tmp_path / "new" / "x.png") as image:
        top, tile = 2 * sheet.LINE + 2 * sheet.GAP, 150 + sheet.CAPTION + sheet.GAP
        assert image.size == (5 * (300 + sheet.GAP) + sheet.GAP, top + 2 * tile)
        assert (np.asarray(image)[: sheet.GAP + sheet.LINE] > 128).any()  # the title
    monkeypatch.setattr(sheet, "SHOWN", 5)
    sheet.save(rollouts, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.height == top + tile
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.png"]


def test_a_name_becomes_one_that_any_file_system_takes():
    assert sheet.plain("runs/a b: c") == "runs_a_b__c"
