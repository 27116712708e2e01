"""Does a model read the options, look at the image, and know more than it says?

Each probe asks the same items in another way: images blank or swapped, options rotated, or the
likelihood of every answer instead of a written one. What is asked is made here and what came of it
is read here; eval.py does the answering.
"""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import rewards
from data import Item
from policy import Policy, Rollout, collate
from support import pictures
from support.statistics import auc, bootstrap_metrics, wilson


# --------------------------------------------------------------------------------------- options
def letters(rollouts: list[Rollout]) -> dict:
    """Position bias: how often each letter is predicted and is gold, and its accuracy as gold."""
    predicted = Counter(rollout.predicted or "none" for rollout in rollouts)
    gold = Counter(rollout.item.answer for rollout in rollouts)
    right = Counter(rollout.item.answer for rollout in rollouts if rollout.correct)
    return {
        "predicted": dict(sorted(predicted.items())),
        "gold": dict(sorted(gold.items())),
        "accuracy": {letter: right[letter] / gold[letter] for letter in sorted(gold)},
    }


def same_option(rollouts: list[Rollout], turned: list[Rollout]) -> float:
    """Share of items for which the same option *text* is named when the options are rotated.

    At 1 their order does not matter to the model. What cannot be read agrees with nothing.
    """
    agree = 0
    for before, after in zip(rollouts, turned):
        text = option_text(before)
        agree += text is not None and text == option_text(after)
    return agree / len(rollouts)


def option_text(rollout: Rollout) -> str | None:
    if not rollout.predicted:
        return None
    return rollout.item.options[rewards.LETTERS.index(rollout.predicted)]


# ---------------------------------------------------------------------------------------- images
def blank(items: list[Item]) -> list[Item]:
    """The items that have images, each image grey and as large as it was."""

    @functools.cache
    def grey(size):
        return Image.new("RGB", size, (128, 128, 128))

    changed = []
    for item in items:
        if item.image is not None:
            sizes = map(pictures.size_of, pictures.sources(item.image))
            changed.append(replace(item, image=tuple(map(grey, sizes))))
    return changed


def swapped(items: list[Item]) -> list[Item]:
    """The items that have images, each with those of the next item of another answer.

    That one must have as many images; where there is none the item is left out.
    """
    items = [item for item in items if item.image is not None]
    changed = []
    for i, item in enumerate(items):
        for other in items[i + 1 :] + items[:i]:
            as_many = len(pictures.sources(other.image)) == len(pictures.sources(item.image))
            if as_many and other.answer != item.answer:
                changed.append(replace(item, frame=None, image=other.image))
                break
    return changed


# ------------------------------------------------------------------------------------ likelihood
def names_of(item: Item) -> list[str]:
    """What an answer to this item may say: its letters, classes or grades."""
    if item.task == "choice":
        return list(rewards.LETTERS[: len(item.options)])
    return [str(name) for name in item.options]


@torch.no_grad()
def likelihoods(policy: Policy, item: Item) -> list[float]:
    """log p("<answer> X </answer>" | direct prompt) for every X of names_of(item), in nats.

    So do evaluation harnesses ask. Prompt and image are computed once for all.
    """
    started = policy.start(item, 0, "direct")
    rows = [policy.written(started, f"<answer> {name} </answer>") for name in names_of(item)]
    logps = policy.score(collate(rows, policy.device), values_too=False).logps  # [1, G, T]
    return logps[0].sum(-1).tolist()


def likeliest(items: list[Item], scores: list[list[float]]) -> dict:
    """Accuracy of the likeliest answer, and for one set of classes the area under the ROC curve.

    scores: `likelihoods` of each item.
    """
    right = 0
    for item, of_item in zip(items, scores):
        right += names_of(item)[int(np.argmax(of_item))] == str(item.answer)
    n = len(items)
    found = {"likelihood_accuracy": right / n, "likelihood_ci95": list(wilson(right, n))}
    if items[0].task == "choice" or len({frozenset(names_of(item)) for item in items}) > 1:
        return found
    classes = sorted(names_of(items[0]))
    gold = [classes.index(str(item.answer)) for item in items]
    chances = [probabilities(item, of_item, classes) for item, of_item in zip(items, scores)]
    area = bootstrap_metrics(auc_metric, chances, gold)
    return found | {"auc": area["auc"], "auc_ci95": area["ci95_of"]["auc"]}


def probabilities(item: Item, logps: list[float], classes: list[str]) -> list[float]:
    """The likelihoods of an item's names as probabilities, in the order of `classes`."""
    shares = np.exp(np.array(logps) - np.logaddexp.reduce(logps))
    by_name = dict(zip(names_of(item), shares.tolist()))
    return [by_name[name] for name in classes]


def auc_metric(chances: list[list[float]], gold: list[int]) -> dict:
    return {"auc": auc(chances, gold)}
