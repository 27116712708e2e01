"""Boxes: read, compared and matched, against counted pixels, scipy and enumeration."""

import math
import random
import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.boxes import MAX_BOXES, best_matching, box_score, iou, read_boxes

TWO = [(1, 2, 3, 4), (5, 6, 7, 8)]
READ = [
    ("[1, 2, 3, 4]", TWO[:1]),
    ("[[1,2,3,4],[5,6,7,8]]", TWO),
    ("[ [ 1 , 2 , 3 , 4 ] , [ 5 , 6 , 7 , 8 ] ]", TWO),
    (
        '```json\n[\n\t{"bbox_2d": [1, 2, 3.5, 4], "label": "polyp"},\n\t'
        '{"bbox_2d": [5, 6, 7, 8]}\n]\n```',
        [(1, 2, 3.5, 4), (5, 6, 7, 8)],
    ),
    ("[-1, 0, 3, 4]", [(-1, 0, 3, 4)]),
]
NO_BOXES = [
    *("[1, 2, 3]", "[1, 2, 3, 4, 5]", "(1, 2, 3, 4)", "1, 2, 3, 4", "[1 2 3 4]", "[1, 2, 3, 4"),
    *("[NaN, 2, 3, 4]", "[inf, 2, 3, 4]", "[1e3, 2, 3, 4]", "[1., 2, 3, 4]", "[.5, 2, 3, 4]"),
    *("[+1, 2, 3, 4]", "[0x1, 2, 3, 4]", "[" + "9" * 400 + ", 2, 3, 4]", "[١, ٢, ٣, ٤]", "", None),
]


@pytest.mark.parametrize("text, found", [*READ, *((text, []) for text in NO_BOXES)])
def test_boxes_are_read(text, found):
    assert read_boxes(text) == found


# ------------------------------------------------------------------------------------ two boxes
EXTREMES = [math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, 1e-300, 0, 5e-324]
coordinate = st.integers(-50, 50) | st.floats(-1e3, 1e3) | st.sampled_from(EXTREMES)
any_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
corner, side = st.integers(0, 12), st.integers(1, 8)


@st.composite
def small_boxes(draw):
    x, y = draw(corner), draw(corner)
    return x, y, x + draw(side), y + draw(side)


small_box = small_boxes()


def pixels(box) -> set:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@settings(max_examples=500, deadline=None)
@given(small_box, small_box)
def test_iou_by_counting_pixels(one, other):
    both, either = pixels(one) & pixels(other), pixels(one) | pixels(other)
    assert iou(one, other) == pytest.approx(len(both) / len(either))


def has_inside(box) -> bool:
    return all(-math.inf < v < math.inf for v in box) and box[0] < box[2] and box[1] < box[3]


@settings(max_examples=1000, deadline=None)
@given(any_box, any_box)
def test_iou_of_anything(one, other):
    assert 0 <= iou(one, other) <= 1 and iou(one, other) == iou(other, one)
    if not (has_inside(one) and has_inside(other)):
        assert iou(one, other) == 0
    if has_inside(one) and max(map(abs, one)) < 1e9:
        area = (one[2] - one[0]) * (one[3] - one[1])
        assert area <= 1e-300 or iou(one, one) == 1


NONE = [
    *((30, 20, 10, 10), (30, 10, 10, 20), (10, 10, 10, 20), (10, 20, 30, 10)),
    *((math.nan, 10, 30, 20), (-math.inf, -math.inf, math.inf, math.inf)),
    *((-1e308, -1e308, 1e308, 1e308), (0, 0, 10**400, 10**400)),
]


@pytest.mark.parametrize("bad", NONE, ids=lambda box: str(box)[:20])
def test_a_box_without_an_inside_never_scores(bad):
    gold = (10, 10, 30, 20)
    assert iou(bad, gold) == iou(gold, bad) == iou(bad, bad) == 0


def test_boxes_beyond_the_image_and_boxes_that_touch():
    assert iou((-5, -5, 5, 5), (0, 0, 5, 5)) == 0.25
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0  # half-open


# ------------------------------------------------------------------------------------- matching
def greatest_sum(value) -> float:
    optimize = pytest.importorskip("scipy.optimize")
    rows, columns = optimize.linear_sum_assignment(np.array(value), maximize=True)
    return np.array(value)[rows, columns].sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [3, 1000, 2**50])  # many ties; few; none
def test_matching_is_scipys(most, seed):
    rng = random.Random(seed)
    for _ in range(50):
        n = rng.randint(1, 25)
        m = rng.randint(n, 40)
        value = [[rng.randint(-1, most) for _ in range(m)] for _ in range(n)]
        column_of = best_matching(value)
        assert sorted(column_of) == list(range(n)) and len(set(column_of.values())) == n
        found = sum(value[row][column] for row, column in column_of.items())
        assert found == greatest_sum(value)


boxes = st.lists(small_box, max_size=7)


@settings(max_examples=300, deadline=None)
@given(boxes, boxes)
def test_score_is_that_of_scipys_matching(predicted, gold):
    value = np.array([[iou(box, other) for other in gold] for box in predicted])
    best = greatest_sum(value.reshape(len(predicted), len(gold)))
    assert box_score(predicted, gold) == pytest.approx(best / max(len(predicted), len(gold), 1))


def by_hand(predicted, gold) -> float:
    """The mean over all ways to pair them, by enumeration."""
    fewer, more = sorted((predicted, gold), key=len)
    ways = permutations(more, len(fewer))
    return max(sum(map(iou, fewer, chosen)) for chosen in ways) / len(more)


some = st.lists(small_box, min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(some, some)
def test_score_by_enumeration_does_not_depend_on_the_order(predicted, gold):
    assert box_score(predicted, gold) == pytest.approx(by_hand(predicted, gold))
    assert box_score(predicted[::-1], gold) == pytest.approx(box_score(predicted, gold[::-1]))


def test_greedy_matching_would_let_the_order_decide():
    """Greedy by predicted box: 2/3 + 0. Best: 1/4 + 1."""
    predicted, gold = [(0, 0, 3, 1), (0, 0, 2, 1)], [(0, 0, 2, 1), (2, 0, 4, 1)]
    assert box_score(predicted, gold) == box_score(predicted[::-1], gold) == 1.25 / 2


def many(rng, n: int, spread: int) -> list[tuple]:
    corners = [(rng.randint(0, spread), rng.randint(0, spread)) for _ in range(n)]
    return [(x, y, x + rng.randint(1, 30), y + rng.randint(1, 30)) for x, y in corners]


@pytest.mark.parametrize("spread", [0, 10, 100, 1000])
def test_thousands_of_boxes_are_matched_in_bounded_time(spread):
    rng = random.Random(1)
    gold, said = many(rng, 30, spread), many(rng, MAX_BOXES, spread)
    start = time.process_time()
    assert 0 <= box_score(said, gold) <= 30 / MAX_BOXES
    assert time.process_time() - start < 1
    # The first are matched; the others only count.
    assert box_score(gold + said, gold) == pytest.approx(30 / (30 + MAX_BOXES))
