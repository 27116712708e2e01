"""Every statistic against a published package, a count by hand or an enumeration."""

import doctest
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import statistics


def test_doctests():
    failed, tried = doctest.testmod(statistics)
    assert tried >= 12 and not failed


# ------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 7), (150, 300), (1, 1273)])
def test_wilson_is_statsmodels(right, n):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    theirs = proportion.proportion_confint(right, n, method="wilson")
    assert statistics.wilson(right, n) == pytest.approx(theirs, abs=1e-9)


def test_bootstrap_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).random(200)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = statistics.bootstrap(values)
    assert found == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_bootstrap_of_a_metric_is_scipys():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(3)
    gold = rng.integers(0, 3, 120)
    predicted = np.where(rng.random(120) < 0.6, gold, rng.integers(0, 3, 120))

    def squared(g, p):
        return float(np.mean(np.array(g) == np.array(p)) ** 2)

    def both(g, p):
        return {"squared": squared(g, p), "share": float(np.mean(np.array(g) == 0))}

    theirs = stats.bootstrap(
        (gold, predicted),
        squared,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    columns = gold.tolist(), predicted.tolist()
    found = statistics.bootstrap_metrics(both, *columns, draws=4000)
    assert set(found) == {"squared", "share", "ci95_of"}
    assert found["squared"] == squared(*columns)
    expected = pytest.approx([theirs.low, theirs.high], abs=1.5e-2)
    assert found["ci95_of"]["squared"] == expected
    assert found == statistics.bootstrap_metrics(both, *columns, draws=4000)


def test_a_bootstrap_keeps_gold_and_prediction_together():
    def metrics(gold, predicted):
        return statistics.ordinal_metrics(gold, predicted, 3)

    gold = [0, 1, 2, 1, 0, 2]
    perfect = statistics.bootstrap_metrics(metrics, gold, gold, draws=200)
    assert perfect["kappa"] == 1
    assert perfect["ci95_of"]["mae"] == [0, 0] and perfect["ci95_of"]["kappa"][1] == 1


# ------------------------------------------------------------------------------------ two models
@pytest.mark.parametrize("b, c", [(0, 0), (1, 5), (10, 10), (3, 30), (40, 22)])
def test_mcnemar_is_statsmodels(b, c):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = 1.0
    if b + c:
        expected = tables.mcnemar([[50, b], [c, 50]], exact=True).pvalue
    assert statistics.mcnemar(b, c) == pytest.approx(expected, abs=1e-12)


def test_a_pair_by_hand():
    found = statistics.paired([True, True, False, False], [True, False, True, True])
    assert (found["n"], found["only_a"], found["only_b"]) == (4, 1, 2)
    assert found["difference"] == 0.25
    assert found["mcnemar_p"] == 1  # 2 (1 + 3) / 2^3
    low, high = found["difference_ci95"]
    assert -1 <= low < 0.25 < high <= 1


# -------------------------------------------------------------------------------- several samples
def test_pass_at_k_by_enumeration():
    for n, right in ((5, 0), (5, 2), (6, 6), (4, 1)):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            draws = list(combinations(samples, k))
            expected = sum(map(any, draws)) / len(draws)
            assert statistics.pass_at_k(n, right, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    "said, vote", [("AB_B", "B"), ("__C", "C"), ("BAAB", "B"), ("__", ""), ("", "")]
)
def test_majority(said, vote):
    assert statistics.majority(["" if one == "_" else one for one in said]) == vote


# ------------------------------------------------------------------------- classes, grades, boxes
ANSWERS = st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", "d", ""]))


@pytest.mark.filterwarnings("ignore:A single label")
@settings(max_examples=200, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=30))
def test_class_metrics_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = map(list, zip(*rows))
    how = dict(labels=sorted(set(gold)), average="macro", zero_division=0)
    found = statistics.class_metrics(gold, predicted, ["a", "b", "c", "d"])
    assert found["balanced_accuracy"] == pytest.approx(metrics.recall_score(gold, predicted, **how))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(gold, predicted, **how))
    if set(predicted) <= set(gold):
        theirs = metrics.balanced_accuracy_score(gold, predicted)
        assert found["balanced_accuracy"] == pytest.approx(theirs)


GRADES = st.tuples(st.integers(0, 4), st.integers(0, 4) | st.none())


@settings(max_examples=200, deadline=None)
@given(st.lists(GRADES, min_size=1, max_size=30))
def test_ordinal_metrics_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = map(list, zip(*rows))
    read = [(0 if g >= 2 else 4) if p is None else p for g, p in rows]  # the grade farthest off
    found = statistics.ordinal_metrics(gold, predicted, 5)
    expected = 0
    if len(set(gold) | set(read)) > 1:
        expected = metrics.cohen_kappa_score(gold, read, weights="quadratic", labels=range(5))
    assert found["kappa"] == pytest.approx(expected)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(gold, read))
    off_by_one = sum(abs(g - p) == 1 for g, p in zip(gold, read)) / len(gold)
    assert found["off_by_one"] == pytest.approx(off_by_one)


def test_refusing_to_answer_never_pays():
    gold = [0, 1, 2, 3, 4, 4, 3]
    wrong = statistics.ordinal_metrics(gold, [1, 2, 3, 4, 3, 3, 2], 5)
    silent = statistics.ordinal_metrics(gold, [None] * 7, 5)
    assert silent["mae"] > wrong["mae"] and silent["kappa"] < wrong["kappa"]


def test_box_metrics_by_counting():
    scores = [k / 40 for k in range(41)]  # 0, .025, ..., 1: thresholds fall on scores
    found = statistics.box_metrics(scores)
    # The same in whole numbers.
    reach = [sum(40 * t <= 100 * k for k in range(41)) / 41 for t in range(50, 100, 5)]
    assert found == {
        "mean_iou": pytest.approx(0.5),
        "accuracy_50": reach[0],
        "accuracy_80": reach[6],
        "accuracy_50_95": pytest.approx(sum(reach) / 10),
    }


SCORED = st.tuples(st.integers(0, 1), st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(st.lists(SCORED, min_size=2, max_size=25))
def test_binary_auc_is_scikit_learns_and_counts_pairs(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold = [g for g, _ in rows]
    score = [s / 8 for _, s in rows]  # eighths: 1 - s is exact, ties stay ties
    found = statistics.auc([[1 - s, s] for s in score], gold)
    if len(set(gold)) == 1:
        assert found == 0.5
        return
    positive = [s for s, g in zip(score, gold) if g]
    negative = [s for s, g in zip(score, gold) if not g]
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert found == pytest.approx(metrics.roc_auc_score(gold, score))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_macro_auc_is_scikit_learns():
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(0)
    for _ in range(20):
        gold = [0, 1, 2, 3, *rng.integers(0, 4, 40).tolist()]
        scores = rng.integers(1, 6, (44, 4)).astype(float)
        scores /= scores.sum(1, keepdims=True)
        theirs = metrics.roc_auc_score(gold, scores, multi_class="ovr", average="macro")
        assert statistics.auc(scores.tolist(), gold) == pytest.approx(theirs)
    # Class 3 does not occur: the mean is over three.
    gold = [g if g < 3 else 0 for g in gold]
    areas = [metrics.roc_auc_score(np.array(gold) == k, scores[:, k]) for k in range(3)]
    assert statistics.auc(scores.tolist(), gold) == pytest.approx(np.mean(areas))
