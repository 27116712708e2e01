"""Boxes (x1, y1, x2, y2): read from an answer, compared, matched one to one and scored.

They are half-open. The score is Visual-RFT's: the mean IoU of the best matching, in which each
missed and each superfluous box counts 0. The matching is exact, and scipy is not needed to run.
"""

import re
from itertools import islice

MAX_BOXES = 10_000  # read from one answer
LARGEST = 1e150  # of a coordinate: the product of two is still finite
# Every repeat is bounded, so that no text takes more than linear time. No exponents, no NaN.
_NUMBER = r"\s{0,9}(-?[0-9]{1,7}(?:\.[0-9]{1,9})?)\s{0,9}"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")


def read_boxes(text: str | None, limit: int = MAX_BOXES) -> list[tuple]:
    """The first `limit` boxes of a text: [[...], [...]] and Qwen's [{"bbox_2d": [...]}] alike.

    >>> read_boxes('{"bbox_2d": [ 3 , 4 , 5.5 , 6 ]} [1, 2, 3] [1e3, 2, 3, NaN] [0, 0, -1, 9]')
    [(3.0, 4.0, 5.5, 6.0), (0.0, 0.0, -1.0, 9.0)]
    """
    found = islice(_BOX.finditer(text or ""), limit)
    return [tuple(map(float, match.groups())) for match in found]


def is_box(box) -> bool:
    """Whether it has an inside: not reversed, empty or NaN, nor too large to multiply."""
    x1, y1, x2, y2 = box
    return -LARGEST < x1 < x2 < LARGEST and -LARGEST < y1 < y2 < LARGEST


def iou(box_a, box_b) -> float:
    """Intersection over union as continuous areas; 0 if one of the two is no box.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))  # 2 / (4 + 4 - 2)
    0.3333333333333333
    >>> iou((0, 0, 2, 2), (2, 0, 0, 2))
    0.0
    """
    if not (is_box(box_a) and is_box(box_b)):
        return 0.0
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    intersection = max(0, width) * max(0, height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box_a, box_b)]
    union = sum(areas) - intersection
    return intersection / union if union else 0.0  # the area of a box may round to 0


def best_matching(value: list[list[int]]) -> dict[int, int]:
    """A column for each row, no column twice, so that the sum of value[row][column] is greatest.

    value: [n rows][m columns] whole numbers, n <= m. The rows come in one after another. A newcomer
    may take a column that another row holds; that row then takes another one, and so on, until
    a free column ends the chain. The chain that gains most keeps the matching the best one for the
    rows so far (successive longest paths, by Bellman and Ford; about n^3 m steps at most).

    >>> best_matching([[50, 66], [0, 100]]), best_matching([[50, 66], [40, 0]])
    ({0: 0, 1: 1}, {0: 1, 1: 0})
    """
    column_of: dict[int, int] = {}
    for newcomer in range(len(value)):
        gain = list(value[newcomer])  # of the best chain so far that ends with this column taken
        taker = [newcomer] * len(gain)  # by which row
        improved = True
        while improved:
            improved = False
            for row, held in column_of.items():
                # Another row takes what this one holds, and this one takes `column` instead.
                before = gain[held] - value[row][held]
                for column, worth in enumerate(value[row]):
                    if before + worth > gain[column]:
                        gain[column], taker[column] = before + worth, row
                        improved = True
        free = set(range(len(gain))) - set(column_of.values())
        column = max(free, key=gain.__getitem__)
        while column is not None:  # from the end of the chain back to the newcomer, who held none
            row = taker[column]
            column_of[row], column = column, column_of.get(row)
    return column_of


def box_score(predicted, gold) -> float:
    """Sum of the matched IoU / max(n_predicted, n_gold); 0 where there are no gold boxes.

    Only the first 2 n_gold + 10 predicted boxes can be matched, for bounded time; the others are
    superfluous.

    >>> box_score([(0, 0, 2, 2), (0, 0, 2, 2)], [(0, 0, 2, 2)])  # said twice
    0.5
    >>> box_score([], [(0, 0, 2, 2)])
    0.0
    """
    considered = predicted[: 2 * len(gold) + 10]
    fewer, more = sorted((considered, gold), key=len)
    values = [[iou(box, other) for other in more] for box in fewer]
    # Compared as whole numbers: in floats, a chain round a circle could seem to gain by rounding.
    whole = [[round(value * 2**50) for value in row] for row in values]
    matched = [values[row][column] for row, column in best_matching(whole).items()]
    return sum(matched) / max(len(gold), len(predicted), 1)
