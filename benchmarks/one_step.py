"""One step of `train.train` over rollouts that are there already: for benchmarks and tests.

The loop has no function for "the update" that could be called alone, since a reader should see it
whole. Here the loop runs for one step with its sampling, grading, optimiser and log replaced.
"""

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
    """Log-probs, advantages and the optimiser steps over these graded rollouts -> the metrics."""
    log = OneStep(step)
    with (
        mock.patch.object(train, "Log", lambda *args: log),
        mock.patch.object(train, "make_optimizer", lambda *args: optimizer),
        mock.patch.object(train, "learning_rate", lambda step, config, peak: peak),
        mock.patch.object(train, "sample", lambda *args: rollouts),
        mock.patch.object(train, "demonstrations", lambda *args: rollouts),
        mock.patch.object(train, "refill", lambda policy, rollouts, *args: rollouts),
        mock.patch.object(train.rewards, "grade_all", lambda *args: None),
    ):
        questions = [rollout.item for rollout in rollouts]
        train.train(config, None, policy, {"train": questions})
    return log.figures()


def sampled_and_graded(policy, items: list, config, step: int = 0) -> list:
    """The rollouts of a step, as the loop makes them; without DAPO's refills."""
    questions = train.data.batch_for_step(items, step, config.prompts, config.seed)
    rollouts = train.sample(policy, questions, config, train.fold(config.seed, step, 0))
    train.rewards.grade_all(rollouts, config)
    return rollouts
