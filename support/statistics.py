"""Shares and scores with their intervals, and two models compared on the same items.

Numbers in, numbers out; numpy only. An answer that cannot be read is always a wrong answer here,
never a missing one: otherwise silence on hard items would raise a score.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


# ------------------------------------------------------------------------------------- intervals
def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927), which stays inside [0, 1]; honest for small n.

    With p = successes / n:
        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z
    centre = p + zz / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (centre - half) / (1 + zz / n)), min(1.0, (centre + half) / (1 + zz / n))


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% percentile interval of the mean, from values drawn with replacement.

    One value an *item*: k samples of an item are not k independent items.

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    values = np.asarray(values, dtype=float)
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return low, high


def bootstrap_metrics(
    function: Callable[..., dict], *columns: list, seed: int = 0, draws: int = 1000
) -> dict:
    """`function(*columns)`, a dict of metrics that are no means, each with its interval.

    The 95% percentile intervals stand under "ci95_of". Items are drawn with replacement, and the
    columns of an item (its gold answer, its prediction) stay together.

    >>> def metrics(gold, predicted):
    ...     return class_metrics(gold, predicted, "ab")
    >>> bootstrap_metrics(metrics, ["a", "b"], ["a", "b"])["ci95_of"]
    {'balanced_accuracy': [1.0, 1.0], 'macro_f1': [1.0, 1.0]}
    """
    found = function(*columns)
    rng, n = np.random.default_rng(seed), len(columns[0])
    drawn = []
    for _ in range(draws):
        chosen = rng.integers(0, n, n).tolist()
        drawn.append(function(*([column[i] for i in chosen] for column in columns)))
    intervals = {}
    for name in found:
        values = [metrics[name] for metrics in drawn]
        intervals[name] = np.percentile(values, [2.5, 97.5]).tolist()
    return found | {"ci95_of": intervals}


# ------------------------------------------------------------------------------------ two models
def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test.

    Of n = only_a + only_b items exactly one of two models gets right: are they split as n coin
    flips would be? p = 2 sum_{k <= min} C(n, k) / 2^n, at most 1.

    >>> mcnemar(1, 5), mcnemar(0, 0)  # 2 (C(6, 0) + C(6, 1)) / 2^6
    (0.21875, 1.0)
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired(right_a: Sequence[bool], right_b: Sequence[bool]) -> dict:
    """Which of the same items two models get right -> how they differ, b - a.

    The interval is a bootstrap of the items, so it is paired as the test is.

    >>> found = paired([True, False, True], [True, True, True])
    >>> found["only_a"], found["only_b"], round(found["difference"], 3), found["mcnemar_p"]
    (0, 1, 0.333, 1.0)
    """
    difference = [int(b) - int(a) for a, b in zip(right_a, right_b)]
    only_a, only_b = difference.count(-1), difference.count(1)
    return {
        "n": len(difference),
        "only_a": only_a,
        "only_b": only_b,
        "difference": sum(difference) / len(difference),
        "difference_ci95": list(bootstrap(difference)),
        "mcnemar_p": mcnemar(only_a, only_b),
    }


# -------------------------------------------------------------------------------- several samples
def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right (arXiv 2107.03374, equation 1).

    Of n samples `right` were: 1 - C(n - right, k) / C(n, k).

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.5, 1.0)
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(predictions: list[str]) -> str:
    """The answer given most often; of equals the one given first; "" (unreadable) has no vote.

    >>> majority(["", "B", "A", "A", "B", ""])
    'B'
    """
    votes = Counter(filter(None, predictions))
    return max(votes, key=votes.get) if votes else ""


# ------------------------------------------------------------------------- classes, grades, boxes
def class_metrics(gold: list[str], predicted: list[str], classes: Sequence[str]) -> dict:
    """Balanced accuracy and macro F1 over those of `classes` that occur in gold.

    balanced_accuracy is the mean recall TP / (TP + FN), macro_f1 the mean of
    2 TP / (2 TP + FP + FN). "" = unreadable: a miss of its class, nobody's false alarm.

    >>> class_metrics(["a", "a", "a", "b"], ["a", "a", "b", ""], "abc")  # recalls 2/3, 0; F1 4/5, 0
    {'balanced_accuracy': 0.3333333333333333, 'macro_f1': 0.4}
    """
    there, said = Counter(gold), Counter(predicted)  # TP + FN and TP + FP of each class
    hits = Counter(g for g, p in zip(gold, predicted) if g == p)
    names = [name for name in classes if name in there]
    recall = [hits[name] / there[name] for name in names]
    f1 = [2 * hits[name] / (there[name] + said[name]) for name in names]
    return {"balanced_accuracy": sum(recall) / len(names), "macro_f1": sum(f1) / len(names)}


def ordinal_metrics(gold: list[int], predicted: list[int | None], n_grades: int) -> dict:
    """Quadratic kappa, the mean error and how often it is one grade; grades are 0 .. n_grades - 1.

    kappa = 1 - mean (g - p)^2 / E, where E is what that mean would be if g and p were independent:
    var(g) + var(p) + (mean g - mean p)^2. Where E is 0 (one grade only) kappa is 0: agreement is
    not shown to beat chance.

    None = unreadable counts as the grade farthest from gold. Otherwise a model could raise its
    score by staying silent on hard images.

    >>> ordinal_metrics([0, 1, 2, 2], [0, 2, 2, None], 3)  # None counts as 0: kappa 1 - 5/7
    {'kappa': 0.2857142857142857, 'mae': 0.75, 'off_by_one': 0.25}
    """
    read = []
    for right, said in zip(gold, predicted):
        farthest = 0 if right >= n_grades - 1 - right else n_grades - 1
        read.append(farthest if said is None else said)
    g, p = np.array(gold), np.array(read)
    error = np.abs(g - p)
    expected = g.var() + p.var() + (g.mean() - p.mean()) ** 2
    return {
        "kappa": float(1 - np.mean(error**2) / expected) if expected else 0.0,
        "mae": float(np.mean(error)),
        "off_by_one": float(np.mean(error == 1)),
    }


def box_metrics(scores: list[float]) -> dict:
    """Mean IoU, and the share of items that reach 0.5, 0.8, and on average 0.50, 0.55, ..., 0.95.

    One score an item, the mean IoU of its boxes (rewards.box_score); MedLoc-R1's thresholds.

    >>> box_metrics([1.0, 0.5])  # 0.5 reaches one of the ten thresholds
    {'mean_iou': 0.75, 'accuracy_50': 1.0, 'accuracy_80': 0.5, 'accuracy_50_95': 0.55}
    """
    scores = np.asarray(scores, dtype=float)
    reach = {percent: float(np.mean(scores >= percent / 100)) for percent in range(50, 100, 5)}
    return {
        "mean_iou": float(scores.mean()),
        "accuracy_50": reach[50],
        "accuracy_80": reach[80],
        "accuracy_50_95": sum(reach.values()) / len(reach),
    }


def auc(scores: list[list[float]], gold: list[int]) -> float:
    """Area under the ROC curve, one class against the rest, mean over the classes.

    It is the chance that an item of the class scores higher than another, a tie counting half:
    (sum of the positives' ranks - P (P + 1) / 2) / (P N), for P positives and N negatives.
    scores: each item's class probabilities; gold: class numbers. A class without positives or
    negatives is left out; 0.5 where no class is left.

    >>> auc([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]], [0, 0, 1, 1])  # 3 of 4 pairs in order
    0.75
    """
    areas = []
    for number, column in enumerate(np.asarray(scores, dtype=float).T):
        positive = np.asarray(gold) == number
        P = int(positive.sum())
        N = len(positive) - P
        if not P or not N:
            continue
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        rank_of_value = (
            counts.cumsum() - (counts - 1) / 2
        )  # of equal scores, the mean of their ranks
        ranks = rank_of_value[place]
        areas.append((ranks[positive].sum() - P * (P + 1) / 2) / (P * N))
    return float(np.mean(areas)) if areas else 0.5
