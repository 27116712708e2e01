"""Why nothing may be learned, and the signs of a reward that is hacked, by hand."""

import pytest

from rewards import STAGES
from support.alarms import alarms, troubles
from support.statistics import wilson

FINE = {"reward": 0.5, "groups_equal": 0.5, "part_truncated": 0}


def test_equal_rewards_are_said_after_five_steps():
    equal = FINE | {"groups_equal": 1}
    assert troubles([FINE] * 5) == []
    assert troubles([equal] * 4) == []
    assert "always 0.50" in troubles([equal] * 5)[0]
    assert "always" not in troubles([equal | {"reward": i / 9} for i in range(5)])[0]
    assert "rollouts.jsonl" in troubles([equal] * 5)[0]


def test_no_reward_at_all_leads_to_supervised_fine_tuning():
    (said,) = troubles([FINE | {"reward": -1, "groups_equal": 1}] * 5)
    assert "--algo sft first, which teaches the form too, then --init" in said


def test_completions_that_are_all_cut_are_said():
    cut = FINE | {"part_truncated": 1}
    assert "--max-new" in troubles([cut] * 10)[0]
    assert troubles([cut] * 4 + [FINE]) == []


def test_troubles_are_not_said_every_step():
    cut = FINE | {"part_truncated": 1}
    said = [n for n in range(1, 50) if troubles([cut] * n)]
    assert said == [5, 10, 20, 40]


def history(n: int, exploit=lambda i: 0.0, **series) -> list[dict]:
    """n steps; each of `series` gives a metric by the number of the step, None to leave it out."""
    steps = []
    for i in range(n):
        stages = dict.fromkeys(STAGES, 0.0) | {"step-by-step exploit": exploit(i)}
        metrics = {"step": i + 1, "reward": 0.0, "accuracy": 0.0, "think_words": 40.0}
        metrics["stages"] = stages
        found = {name: of_step(i) for name, of_step in series.items()}
        steps.append(metrics | {name: x for name, x in found.items() if x is not None})
    return steps


def rises(i: int) -> float:
    return i / 20


def shrinks(i: int) -> float:
    return 40 - 2 * i


def test_alarm_when_reward_rises_while_what_it_stands_for_falls():
    assert alarms(history(20, reward=rises)) == []
    assert "thinking shrank" in alarms(history(20, reward=rises, think_words=shrinks))[0]
    fell = looks({5: (0.6, 100), 18: (0.3, 100)})
    assert (
        "held-out accuracy fell from 0.60 to 0.30" in alarms(history(20, reward=rises, **fell))[0]
    )
    flat = looks({5: (0.2, 100), 18: (0.2, 100)})
    (alarm,) = alarms(history(20, reward=rises, accuracy=rises, **flat))
    assert "accuracy in training to 0.85" in alarm and "holds in training only" in alarm
    high = looks({5: (0.2, 100), 19: (0.8, 100)})
    assert alarms(history(20, reward=rises, accuracy=rises, **high)) == []
    assert "--w-before" in alarms(history(20, reward=rises, exploit=rises))[0]


def looks(found: dict) -> dict:
    """step -> (accuracy, items) as the metrics of evaluations."""
    intervals = {i: list(wilson(round(share * n), n)) for i, (share, n) in found.items()}
    accuracies = {i: share for i, (share, _) in found.items()}
    return {"dev_accuracy": accuracies.get, "dev_ci95": intervals.get}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_alarm_from_a_handful_of_held_out_items(n):
    """From all right to none right: of so few items that is no sign."""
    few = looks({5: (1.0, n), 19: (0.0, n)})
    assert alarms(history(20, reward=rises, accuracy=lambda i: 0.5, **few)) == []


def test_an_alarm_whatever_was_skipped():
    """A step in which no group was kept has no reward; the others are looked at when they were."""
    flat = looks({19: (0.2, 100)})
    steps = history(20, reward=rises, accuracy=rises, **flat)
    del steps[7]["reward"]
    assert len(alarms(steps)) == 1


def test_no_alarm_without_a_higher_reward_or_too_early():
    assert alarms(history(20, think_words=shrinks)) == []
    assert alarms(history(12, reward=rises, think_words=shrinks)) == []
