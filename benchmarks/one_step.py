"""One step of `train.train` over rollouts that are there already: for benchmarks and tests.

The loop has no function for "the update" that could be called alone, since a reader should see it
whole. Here the loop runs for one step with its sampling and grading replaced.
"""

from dataclasses import replace
from unittest import mock

import train
from support.metrics import over_steps


class OneStep:
    """Stands in for support.log.Log: one step, nothing written. `figures` are its metrics."""

    def __init__(self, step: int):
        self.step, self.metrics, self.updates = step, {}, []

    def steps(self):
        yield self.step

    def updated(self, stats) -> None:
        self.updates.append(stats)

    def write(self, batch, **in_use) -> None:
        self.batch = batch

    def due(self, every: int) -> bool:
        return False

    def sampled(self, rollouts) -> None:
        """Nothing: the rollouts were given."""

    def save(self) -> None:
        """Nothing is kept."""

    def figures(self) -> dict:
        return over_steps(self.updates) | self.metrics


def update(policy, optimizer, rollouts: list, config, step: int = 0) -> dict:
    """Log-probs, advantages and the optimiser steps over these graded rollouts -> the metrics.

    At the optimiser's own learning rates.
    """
    log = OneStep(step)
    config = replace(config, dynamic=False, schedule="constant", warmup=0)
    with (
        mock.patch.object(train.evaluation, "sample", lambda *args: rollouts),
        mock.patch.object(train, "demonstrations", lambda *args: rollouts),
        mock.patch.object(train.rewards, "grade_all", lambda *args: None),
    ):
        questions = [rollout.item for rollout in rollouts]
        train.train(config, policy, optimizer, {"train": questions}, log)
    return log.figures()


def sampled_and_graded(policy, items: list, config, step: int = 0) -> list:
    """The rollouts of a step, as the loop makes them; without DAPO's refills."""
    questions = train.data.batch_for_step(items, step, config.prompts, config.seed)
    seed = train.fold(config.seed, step, 0)
    rollouts = train.evaluation.sample(policy, questions, config, seed)
    train.rewards.grade_all(rollouts, config)
    return rollouts
