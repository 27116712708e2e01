"""Accuracy that can be trusted: greedy and sampled, each with its interval, its parse rate and its truncation rate.

Read it with Med-RLVR (arXiv 2502.19655), section 4.2: MedQA test in distribution, the same prompt and grader as in training.
`evaluate` is what training calls before, during and after, so evaluating a checkpoint here repeats those numbers exactly.
Every accuracy is a share of *all* items: an unreadable or unfinished answer is a wrong one, and both rates stand beside it.
"""
import argparse
import functools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import policy as policies
import ranks
import rewards
import runs
from config import Config
from data import Item, UsageError
from support import hub, pictures


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% Wilson score interval of a share (Wilson 1927): honest near 0 and 1 and for small n.

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z
    centre, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (centre - half) / (1 + zz / n)), min(1.0, (centre + half) / (1 + zz / n))


def bootstrap(values, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`, one value an *item*: the k samples of an item are no k independent items."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: are the items that only one of two models gets right split like coin flips?

    >>> mcnemar(1, 5), mcnemar(0, 0)                                  # 2 (C(6,0) + C(6,1)) / 2^6
    (0.21875, 1.0)
    """
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which `right` were (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.5, 1.0)
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(predictions: list[str]) -> str:
    """The answer given most often; of equals the one given first; unreadable answers have no vote."""
    votes = Counter(filter(None, predictions))
    return max(votes, key=votes.get) if votes else ""


def class_metrics(gold: list[str], predicted: list[str], classes) -> dict:
    """{"balanced_accuracy": mean recall, "macro_f1": mean of 2 TP / (2 TP + FP + FN)}, over those of `classes` that occur in gold.

    "" = unreadable: a wrong answer, a miss of its class and nobody's false alarm.

    >>> class_metrics(["a", "a", "a", "b"], ["a", "a", "b", ""], ["a", "b", "c"])                 # recalls 2/3, 0; F1 4/5, 0
    {'balanced_accuracy': 0.3333333333333333, 'macro_f1': 0.4}
    """
    there, said = Counter(gold), Counter(predicted)
    hits = Counter(g for g, p in zip(gold, predicted) if g == p)
    names = [name for name in classes if name in there]
    return {"balanced_accuracy": sum(hits[name] / there[name] for name in names) / len(names),
            "macro_f1": sum(2 * hits[name] / (there[name] + said[name]) for name in names) / len(names)}


def ordinal_metrics(gold: list[int], predicted: list[int | None], n_grades: int) -> dict:
    """{"kappa": 1 - sum (g - p)^2 / its expectation if g and p were independent, "mae": mean |g - p|, "off_by_one": share with |g - p| = 1}.

    None = unreadable: it counts as the grade farthest from gold, else refusing the hard images would pay. Quadratic kappa needs no table of counts:
    the expectation is var(g) + var(p) + (mean g - mean p)^2. Where that is 0 (one grade only) kappa is 0: agreement is not shown to beat chance.

    >>> ordinal_metrics([0, 1, 2, 2], [0, 2, 2, None], 3)                                          # None counts as 0: kappa 1 - 5/7
    {'kappa': 0.2857142857142857, 'mae': 0.75, 'off_by_one': 0.25}
    """
    farthest = [max((0, n_grades - 1), key=lambda grade: abs(grade - g)) for g in gold]
    g, p = np.array(gold), np.array([far if p is None else p for p, far in zip(predicted, farthest)])
    expected = g.var() + p.var() + (g.mean() - p.mean()) ** 2
    return {"kappa": float(1 - np.mean((g - p) ** 2) / expected) if expected else 0.0, "mae": float(np.mean(abs(g - p))), "off_by_one": float(np.mean(abs(g - p) == 1))}


def box_metrics(scores: list[float]) -> dict:
    """Of one score an item (rewards.box_score, a mean IoU): its mean, and the share that reaches 0.5, 0.8, and on average 0.50, 0.55, ..., 0.95 (MedLoc-R1).

    >>> box_metrics([1.0, 0.5])                                                     # 0.5 reaches one of the ten thresholds
    {'mean_iou': 0.75, 'accuracy_50': 1.0, 'accuracy_80': 0.5, 'accuracy_50_95': 0.55}
    """
    scores = np.asarray(scores, dtype=float)
    reach = lambda percent: float(np.mean(scores >= percent / 100))
    return {"mean_iou": float(scores.mean()), "accuracy_50": reach(50), "accuracy_80": reach(80), "accuracy_50_95": sum(map(reach, range(50, 100, 5))) / 10}


def auc(scores: list[list[float]], gold: list[int]) -> float:
    """Area under the ROC curve: the chance that an item of the class scores higher than another, ties half; one class against the rest, mean over classes.

    scores: each item's class probabilities, gold: class numbers. AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N). A class without
    positives or without negatives has none and is left out; 0.5 where no class is left.

    >>> auc([[.9, .1], [.4, .6], [.6, .4], [.2, .8]], [0, 0, 1, 1])                                 # 3 of 4 pairs are in order
    0.75
    """
    areas = []
    for k, column in enumerate(np.asarray(scores, dtype=float).T):
        positive = np.asarray(gold) == k
        P, N = int(positive.sum()), int((~positive).sum())
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts - 1) / 2)[place]                     # of equal scores, the mean of their ranks
        if P and N:
            areas.append((ranks[positive].sum() - P * (P + 1) / 2) / (P * N))
    return float(np.mean(areas)) if areas else 0.5


def bootstrap_metrics(function, *columns, seed: int = 0, draws: int = 1000) -> dict:
    """`function(*columns)`, a dict of metrics that are no means, and "ci95_of": the 95% percentile interval of each, from items drawn with replacement.

    >>> bootstrap_metrics(lambda gold, said: class_metrics(gold, said, "ab"), ["a", "b"], ["a", "b"])["ci95_of"]
    {'balanced_accuracy': [1.0, 1.0], 'macro_f1': [1.0, 1.0]}
    """
    rng, n = np.random.default_rng(seed), len(columns[0])
    found, drawn = function(*columns), []
    for _ in range(draws):
        chosen = rng.integers(0, n, n).tolist()
        drawn.append(function(*([column[i] for i in chosen] for column in columns)))          # the columns of an item stay together
    return found | {"ci95_of": {name: np.percentile([metrics[name] for metrics in drawn], [2.5, 97.5]).tolist() for name in found}}


def answer(policy, items: list[Item], config, *, n: int = 1, temperature: float = 0.0, seed: int = 0, rows: int = 128, label: str = ""):
    """Sample and grade n completions of each item; graded rollouts in the items' order. `rows` at a time, which changes no result."""
    rollouts, batch, mine = [], max(1, rows // n), ranks.share(len(items))
    bar = tqdm(total=len(mine), desc=label, unit="item", leave=False, disable=None if label and ranks.rank() == 0 else True)
    for start in mine[::batch]:
        part = slice(start, min(start + batch, mine.stop))
        for rollout in policy.sample(items[part], n, config.max_new, temperature, seed, first_row=start * n, style=config.style):
            rollout.group += start
            rollout.pictures = None                                           # pixels and features are not needed any more
            rollouts.append(graded(rollout, config))
        bar.update(len(items[part]))
    bar.close()
    return ranks.gathered(rollouts)


def graded(rollout, config):
    """Fill in what the grader says of a rollout."""
    result = rewards.grade(rollout.item, rollout.text, config, rollout.finished, len(rollout.completion_ids))
    rollout.parsed, rollout.reward, rollout.parts = result.parsed, result.total, result.parts
    rollout.correct, rollout.predicted = result.correct, result.predicted
    return rollout


def summary(rollouts) -> dict:
    """Of graded completions: {"accuracy", "ci95", "n", "parsed", "well_formed", "truncated", "length", "stages"}; rates are shares of all of them."""
    n, right = len(rollouts), sum(r.correct for r in rollouts)
    share = lambda flags: sum(flags) / n
    return {"accuracy": right / n, "ci95": list(wilson(right, n)), "n": n, "parsed": share(bool(r.predicted) for r in rollouts),
            "well_formed": share(r.parsed.well_formed for r in rollouts), "truncated": share(not r.finished for r in rollouts),
            "length": share(len(r.completion_ids) for r in rollouts),
            "stages": {name: share(rewards.stage(r.parsed, r.item, len(r.completion_ids)) == name for r in rollouts) for name in rewards.STAGES}}


def letters(rollouts) -> dict:
    """Position bias: how often each letter is predicted and is gold, and the accuracy where it is gold."""
    predicted, gold = Counter(r.predicted or "none" for r in rollouts), Counter(r.item.answer for r in rollouts)
    right = Counter(r.item.answer for r in rollouts if r.correct)
    return {"predicted": dict(sorted(predicted.items())), "gold": dict(sorted(gold.items())), "accuracy": {letter: right[letter] / gold[letter] for letter in sorted(gold)}}


def of_task(rollouts) -> dict:
    """What the field reports beside accuracy, by kind of task, each with its bootstrap interval under "ci95_of"."""
    gold, predicted = [str(r.item.answer) for r in rollouts], [r.predicted for r in rollouts]
    tasks, names = {r.item.task for r in rollouts}, rollouts[0].item.options
    if len(tasks) > 1 or tasks == {"choice"}:
        return {}
    if tasks == {"localize"}:
        return bootstrap_metrics(box_metrics, [r.parts["iou"] for r in rollouts])
    classes = sorted({name for r in rollouts for name in r.item.options})
    found = bootstrap_metrics(lambda g, p: class_metrics(g, p, classes), gold, predicted)
    if tasks == {"grade"} and len({r.item.options for r in rollouts}) == 1:
        place = {str(name): i for i, name in enumerate(names)}
        ordinal = bootstrap_metrics(lambda g, p: ordinal_metrics(g, p, len(names)), [place[g] for g in gold], [place.get(p) for p in predicted])
        found = {**found, **ordinal, "ci95_of": found["ci95_of"] | ordinal["ci95_of"]}
    return found


def likelihoods(policy, item: Item) -> list[float]:
    """log p("<answer> X </answer>" | direct prompt) for every letter or class name X, as evaluation harnesses ask. Prompt and image are computed once for all."""
    names = rewards.LETTERS[:len(item.options)] if item.task == "choice" else item.options
    started = policy.start(item, 0, "direct")
    rows = [policy.written(started, f"<answer> {name} </answer>") for name in names]
    with torch.no_grad():
        return policy.score(policies.collate(rows, policy.device), values_too=False).logps[0].sum(-1).tolist()              # [G]


def by_likelihood(policy, items: list[Item], label: str = "") -> dict:
    """Accuracy of the likeliest letter or class, and for classes the area under the ROC curve."""
    mine = [items[i] for i in ranks.share(len(items))]
    scores = ranks.gathered([likelihoods(policy, item) for item in tqdm(mine, desc=label, unit="item", leave=False, disable=None if label and ranks.rank() == 0 else True)])
    names = lambda item: list(rewards.LETTERS[:len(item.options)]) if item.task == "choice" else list(map(str, item.options))
    right = [names(item)[int(np.argmax(of_item))] == str(item.answer) for item, of_item in zip(items, scores)]
    found = {"likelihood_accuracy": sum(right) / len(right), "likelihood_ci95": list(wilson(sum(right), len(right)))}
    if items[0].task != "choice" and len({frozenset(names(item)) for item in items}) == 1:
        classes = sorted(names(items[0]))
        probabilities = [[dict(zip(names(item), np.exp(np.array(of_item) - np.logaddexp.reduce(of_item))))[name] for name in classes] for item, of_item in zip(items, scores)]
        gold = [classes.index(str(item.answer)) for item in items]
        found["auc"] = auc(probabilities, gold)
        found["auc_ci95"] = list(bootstrap_metrics(lambda p, g: {"auc": auc(p, g)}, probabilities, gold)["ci95_of"]["auc"])
    return found


def looking(policy, rollouts, config, label: str = "") -> dict:
    """Accuracy with every image made blank, and with each image given to another item of another answer: a model that looks loses by both."""
    items, found = [r.item for r in rollouts if r.item.image is not None], {}
    grey = functools.cache(lambda size: Image.new("RGB", size, (128, 128, 128)))
    blank = [replace(item, image=tuple(grey(pictures.size_of(source)) for source in pictures.sources(item.image))) for item in items]
    swapped = []
    for i, item in enumerate(items):                                          # of as many images; an item without such a partner is left out
        others = (items[(i + k) % len(items)] for k in range(1, len(items)))
        fitting_others = (other for other in others if other.answer != item.answer and len(pictures.sources(other.image)) == len(pictures.sources(item.image)))
        swapped += [replace(item, frame=None, image=other.image) for other in islice(fitting_others, 1)]
    for name, changed in (("blank", blank), ("swapped", swapped)):
        if changed:
            seen = answer(policy, changed, config, label=f"{label}{name}")
            result = summary(seen) | of_task(seen)
            found |= {f"{name}_image_{key}": result[key] for key in ("accuracy", "ci95", "n", "balanced_accuracy", "kappa", "mean_iou") if key in result}
    return found


def draw(rollout, path: Path) -> None:
    """A PNG of an item's first image with what was asked (green) and what was answered (red): boxes on it, names below it."""
    picture = pictures.open_image(pictures.sources(rollout.item.image)[0]).copy()
    enlarge = max(1, 448 // max(picture.size))
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (max(picture.width, 320), picture.height + 32), "white")
    canvas.paste(picture)
    pen, gold, predicted = ImageDraw.Draw(canvas), rollout.item.answer, rollout.predicted
    if rollout.item.task == "localize":
        for boxes, colour in ((gold, "lime"), (predicted, "red")):
            for box in boxes[:100]:
                x1, y1, x2, y2 = (min(max(x * enlarge, -10), 10**5) for x in box)
                pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        gold, predicted = f"{len(gold)} boxes", f"{len(predicted)} boxes, IoU {rollout.parts['iou']:.2f}"
    for line, (text, colour) in enumerate(((f"gold: {gold}", "green"), (f"answer: {predicted or 'unreadable'}", "red"))):
        pen.text((4, picture.height + 2 + 14 * line), text[:80].encode("ascii", "replace").decode(), fill=colour)
    canvas.save(path)


def rotated_agreement(policy, rollouts, config, label: str = "") -> float:
    """Share of items for which the model names the same option *text* when all options move up one place. 1: the order does not matter to it."""
    turned = answer(policy, [data.rotate_options(r.item) for r in rollouts], config, label=label)
    text = lambda r: r.item.options[rewards.LETTERS.index(r.predicted)] if r.predicted else None
    return sum(text(a) is not None and text(a) == text(b) for a, b in zip(rollouts, turned)) / len(rollouts)


def evaluate(policy, items: list[Item], config, *, samples: int = 1, seed: int = 0, label: str = "") -> tuple[dict, list]:
    """Greedy accuracy with its Wilson interval and, of `samples` completions an item at temperature 1, the sampled mean.

    Returns (result, graded rollouts); result["accuracy"] and ["ci95"] are greedy, result["sampled_accuracy"] is sampled (absent for samples=0).
    """
    greedy = answer(policy, items, config, seed=seed, label=f"{label}greedy" if label else "")
    result, rollouts = summary(greedy) | of_task(greedy), greedy
    if samples:
        sampled = answer(policy, items, config, n=samples, temperature=1.0, seed=seed, label=f"{label}sampled" if label else "")
        result |= {f"sampled_{key}": value for key, value in summary(sampled).items() if key in ("accuracy", "well_formed", "truncated", "length")}
        per_item = [sampled[i:i + samples] for i in range(0, len(sampled), samples)]
        counts = [sum(r.correct for r in of_item) for of_item in per_item]
        if all(item.task != "localize" for item in items):                    # boxes have no majority
            result["maj_at_k"] = sum(majority([r.predicted for r in of_item]) == str(of_item[0].item.answer) for of_item in per_item) / len(per_item)
        result |= {"samples": samples, "sampled_ci95": list(bootstrap([c / samples for c in counts])),
                   "pass_at_k": {k: sum(pass_at_k(samples, c, k) for c in counts) / len(counts) for k in sorted({1, samples // 2 or 1, samples})}}
        rollouts = greedy + sampled
    return result, rollouts


def as_line(result: dict) -> str:
    """accuracy 0.910 [0.872, 0.937] (n 300), ..."""
    text = "accuracy {accuracy:.3f} [{0:.3f}, {1:.3f}] (greedy, n {n})".format(*result["ci95"], **result)
    if "sampled_accuracy" in result:
        text += f", {result['sampled_accuracy']:.3f} sampled at temperature 1 ({result['samples']} an item)"
    return text + f"; an answer could be read in {result['parsed']:.0%}, {result['truncated']:.0%} cut at the limit"


# A model alone is evaluated with training's defaults, but for these two: the paper's test set, and
# a prompt that fits a model is not dropped.
ALONE = Config(dataset="medqa", max_prompt=2048)
# --samples, --limit and --seed say other things here than in training, so they are not among these.
FLAGS = ("data_dir", "task", "knowledge", "knowledge_file", "max_pixels", "max_new",
         "max_prompt", "template", "stop_answer")


def settings(args, run: dict, dataset: str | None = None, style: str | None = None) -> Config:
    """What prompts, sampling and grading need to know: the flags, then the run's own settings, then `ALONE`.

    The seed stays the run's: options stand as in training, whatever --seed is.
    """
    if dataset and dataset != run.get("dataset"):
        own = ("task", "knowledge", "knowledge_file")               # of the run's own data set
        run = {name: value for name, value in run.items() if name not in own}
    trained = {f.name: run[f.name] for f in fields(Config) if f.name in run}
    flags = {name: value for name in FLAGS if (value := getattr(args, name, None)) is not None}
    chosen = {name: value for name, value in (("dataset", dataset), ("style", style)) if value}
    return replace(ALONE, **(trained | flags | chosen))


def fitting(policy, items: list[Item], config, what: str = "") -> list[Item]:
    """The items whose prompt is within max_prompt tokens. None is ever truncated; how many are dropped is said."""
    kept = [item for item, ids in zip(items, policy.encode(items, config.style)) if len(ids) <= config.max_prompt]
    if len(kept) < len(items):
        ranks.say(f"{what}{len(items) - len(kept)} of {len(items)} prompts are longer than --max-prompt {config.max_prompt} tokens: dropped")
    if not kept:
        smaller = ", or shrink the images by --max-pixels" if any(item.image is not None for item in items) else ""
        raise UsageError(f"{what}no prompt is within --max-prompt {config.max_prompt} tokens: raise it{smaller}")
    return kept


def load_items(config, split: str, limit: int | None) -> list[Item]:
    items = data.load(config.dataset, split, config.data_dir or None, limit, config.task)
    items = data.with_knowledge(items, config.dataset, config.knowledge, config.knowledge_file)
    return [data.shuffle_options(item, config.seed) for item in items] if config.shuffle_options else items


def seen_in_training(items: list[Item], run: dict) -> int | None:
    """How many of the items stand in the training data of a run, by question and options. None where that data is not at hand."""
    try:
        train, dev, test = (data.load(run["dataset"], split, run["data_dir"] or None, task=run["task"]) for split in data.SPLITS)
    except UsageError as error:
        print(f"test items in the training data: not checked ({error})", file=sys.stderr)
        return None
    return len(items) - len(data.without(items, data.without(train, dev + test)[:run["limit"] or None]))


def trained_as(name: str, models: list[str]) -> dict:
    """The settings a run was trained with; for a model those of the first run beside it, else {}.

    A base model and what was made of it are compared only where both get the same prompt, stop and
    limit, and are graded alike.
    """
    return runs.read_run(name) or next(filter(None, map(runs.read_run, models)), {})


def opened(name: str, args, trained: dict):
    """The policy, with the template, the stop and the image size that `settings` gives."""
    config = settings(args, trained)
    how = {key: getattr(config, key) for key in ("template", "stop_answer", "max_pixels")}
    return runs.open_policy(name, policies.pick_device(args.device), **how)


def evaluate_model(name: str, args) -> list[tuple[dict, list]]:
    """One model on every data set and in every style asked for -> (result, greedy rollouts) of each."""
    trained = trained_as(name, args.models)
    policy, run = opened(name, args, trained)
    if trained and not run:
        lender = next(filter(runs.read_run, args.models))
        ranks.say(f"{name} is evaluated with the settings of {lender}, which flags beat")
    found = []
    for dataset in args.dataset or [None]:
        for style in args.style or [None]:
            config = settings(args, trained, dataset, style)
            items = fitting(policy, load_items(config, args.split, args.limit), config)
            label = f"{Path(name).name} {config.dataset} {config.style} "
            seed = config.seed if args.seed is None else args.seed
            result, rollouts = evaluate(policy, items, config, samples=args.samples, seed=seed, label=label)
            greedy = rollouts[:len(items)]
            result |= {"model": name, "dataset": config.dataset, "split": args.split,
                       "style": config.style, "template": "chat" if policy.chat else "plain",
                       "stop_answer": policy.stop_answer, "max_new": config.max_new}
            if all(item.task != "localize" for item in items):
                result["letters"] = letters(greedy)
            if run:
                result["seen_in_training"] = seen_in_training(items, run)
            if args.likelihood and not all(item.options for item in items):
                ranks.say(f"{config.dataset}: --likelihood needs items with options or classes; boxes have none")
            elif args.likelihood:
                result |= by_likelihood(policy, items, f"{label}likelihood")
            if args.rotate and items[0].task == "choice":
                result["rotated_agreement"] = rotated_agreement(policy, greedy, config, f"{label}rotated")
            if args.blind and all(item.image is None for item in items):
                ranks.say(f"{config.dataset}: --blind needs items with images")
            elif args.blind:
                result |= looking(policy, greedy, config, label)
            if args.save_images and ranks.rank() == 0:
                folder = Path(args.save_images)
                if len(args.models) * len(args.dataset or [0]) * len(args.style or [0]) > 1:
                    folder /= re.sub(r"[^A-Za-z0-9.-]", "_", f"{Path(name).name} {config.dataset} {config.style}")
                    folder.mkdir(exist_ok=True)
                for i, r in enumerate(greedy):
                    if r.item.image is not None:
                        draw(r, folder / f"{i:05d}-{re.sub(r'[^A-Za-z0-9.-]', '_', r.item.id)[:80]}.png")
            found.append((result, rollouts))
    return found


def compare(a: tuple[dict, list], b: tuple[dict, list]) -> dict:
    """Two models on the same items (by question and options): who is right where the other is not, exact McNemar, the difference with a paired bootstrap."""
    (first, _), (second, _) = a, b
    right_a, right_b = ({data.fingerprint(r.item): r.correct for r in rows[:result["n"]]} for result, rows in (a, b))
    shared = [key for key in right_a if key in right_b]
    difference = [right_b[key] - right_a[key] for key in shared]
    if not shared:
        return {"a": first["model"], "b": second["model"], "dataset": first["dataset"], "n": 0}
    return {"a": first["model"], "b": second["model"], "style_a": first["style"], "style_b": second["style"], "dataset": first["dataset"], "n": len(shared),
            "only_a": difference.count(-1), "only_b": difference.count(1), "difference": sum(difference) / len(shared),
            "difference_ci95": list(bootstrap(difference)), "mcnemar_p": mcnemar(difference.count(-1), difference.count(1))}


def asked_how(result: dict) -> str:
    """Template, stop rule and limit of new tokens, as in force: "plain, at </answer>, 512"."""
    stop = "at </answer>" if result["stop_answer"] else "at the end token"
    return f"{result['template']}, {stop}, {result['max_new']}"


def table(results: list[dict]) -> str:
    """Markdown, a row a model, data set and style."""
    columns = [("model", lambda r: Path(r["model"]).name),
               ("data", lambda r: f"{r['dataset']} {r['split']}"), ("prompt", lambda r: r["style"]),
               ("template, stop, limit", asked_how), ("n", lambda r: r["n"]),
               ("greedy", lambda r: f"{r['accuracy']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]")]
    if any("samples" in r for r in results):
        columns += [("sampled", lambda r: f"{r['sampled_accuracy']:.3f} [{r['sampled_ci95'][0]:.3f}, {r['sampled_ci95'][1]:.3f}]"),
                    (f"maj@{results[0]['samples']}", lambda r: f"{r['maj_at_k']:.3f}" if "maj_at_k" in r else "-"), (f"pass@{results[0]['samples']}", lambda r: f"{r['pass_at_k'][r['samples']]:.3f}")]
    for key, title in (("likelihood_accuracy", "likeliest answer"), ("auc", "AUC"), ("balanced_accuracy", "balanced"), ("macro_f1", "macro F1"), ("kappa", "kappa"), ("mae", "MAE"),
                       ("off_by_one", "off by one"), ("mean_iou", "mean IoU"), ("accuracy_80", "IoU over .8"), ("accuracy_50_95", "IoU .5 to .95"),
                       ("blank_image_accuracy", "blank image"), ("swapped_image_accuracy", "swapped image")):
        if any(key in r for r in results):
            columns.append((title, lambda r, key=key: f"{r[key]:.3f}" if key in r else "-"))
    if any("rotated_agreement" in r for r in results):
        columns.append(("same when rotated", lambda r: f"{r['rotated_agreement']:.3f}"))
    columns += [("read", lambda r: f"{r['parsed']:.0%}"), ("cut", lambda r: f"{r['truncated']:.0%}"),
                ("main stage", lambda r: max(r["stages"], key=r["stages"].get)), ("seen in training", lambda r: r.get("seen_in_training", "-"))]
    rows = [[name for name, _ in columns], ["---"] * len(columns), *([str(cell(r)) for _, cell in columns] for r in results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):                                            # one line instead of the whole usage
        way_on = "use --dataset bccd-rbc or bccd-platelets" if "--target" in message else "see --help"
        raise UsageError(f"{message}; {way_on}")


def parser() -> Parser:
    p = Parser(prog="eval.py", description="Accuracy of models and runs, side by side; or an answer to one question.")
    p.add_argument("models", nargs="+", metavar="MODEL_OR_RUN",
                   help="a run folder of train.py, a Hugging Face folder, or a hub name; each is "
                   "compared with the first. A model beside a run is evaluated with the first "
                   "run's settings; flags beat them")
    p.add_argument("--dataset", nargs="+", help=f"{data.OFFERED}, or a JSONL path "
                   "(default: the run's, else medqa)")
    p.add_argument("--data-dir", help="folder that holds the published files, instead of the hub")
    p.add_argument("--split", default="test", choices=data.SPLITS, help="default test")
    p.add_argument("--limit", type=int, help="the first N items only")
    p.add_argument("--style", nargs="+", choices=list(data.INSTRUCTIONS), help="prompts: think (as trained), direct, cot (chain of thought): the paper's baselines")
    p.add_argument("--samples", type=int, default=0, help="completions an item at temperature 1: sampled mean, maj@k, pass@k (default none)")
    p.add_argument("--likelihood", action="store_true", help="also the accuracy of the likeliest letter or class name, as harnesses report it, and for classes the AUC")
    p.add_argument("--blind", action="store_true", help="also with blank and with swapped images: does the model look at all?")
    p.add_argument("--save-images", metavar="DIR", help="write each image with gold and predicted boxes or labels as PNG")
    p.add_argument("--task", choices=("classify", "grade", "localize"), help="where a data set offers several")
    p.add_argument("--knowledge", choices=("none", "task", "class"), help="prior knowledge in the prompt (default: the run's, else none)")
    p.add_argument("--knowledge-file", help="a file of your own for it")
    p.add_argument("--max-pixels", type=int, help="images are shrunk to at most so many pixels (default: the run's)")
    p.add_argument("--rotate", action="store_true", help="also the agreement of a model with itself when the options are rotated")
    p.add_argument("--max-new", type=int, help="new tokens at most (default: the run's, else 512)")
    p.add_argument("--max-prompt", type=int, help="longer prompts are dropped and counted (default: the run's, else 2048)")
    p.add_argument("--template", choices=["auto", "chat", "plain"], help="prompt template (auto: the tokenizer's chat template, where it has one)")
    p.add_argument("--stop-answer", choices=["auto", "on", "off"], help="stop at the first </answer> (auto: with the plain template)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, help="of the sampled completions")
    p.add_argument("--json", metavar="F", help="write the result to F: one object for one model, data set and style, else {results, comparisons}")
    p.add_argument("--answers", metavar="F", help="write one line of JSON a completion to F")
    p.add_argument("--ask", metavar="QUESTION", help="answer this question instead, options included in its text")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    policies.quiet()
    ranks.start()
    for path in filter(None, (args.json, args.answers)):                      # before an hour of sampling, not after
        if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    if args.save_images:
        try:
            Path(args.save_images).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--save-images {args.save_images}: {error.strerror}") from None
    for name, least in (("limit", 1), ("max_new", 1), ("max_prompt", 1), ("max_pixels", 1), ("samples", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in args.models:
        if not Path(name).is_dir() and (hub.is_path(name) or not hub.cached(name, "config.json", "model") and not hub.online()):
            raise UsageError(f"{name}: no such folder" + ("" if hub.is_path(name) else ", and the hub cannot be reached"))
        if Path(name).is_dir() and not runs.read_run(name) and not (Path(name) / "config.json").is_file():
            raise UsageError(f"{name}: neither a run folder (no run.json) nor a Hugging Face folder (no config.json)")
    if args.ask:
        trained = trained_as(args.models[0], args.models)
        policy, _ = opened(args.models[0], args, trained)
        unknown = policy.tokenizer.unk_token_id
        if unknown is not None and (n := policy.tokenizer(args.ask).input_ids.count(unknown)):
            print(f"eval.py: {n} words of the question are unknown to this model, and it sees none of them", file=sys.stderr)
        config = settings(args, trained, style=(args.style or [None])[0])
        print(answer(policy, [Item("ask", "choice", args.ask, (), "")], config)[0].text.strip())
        return
    for name in args.models:                                                  # data first: a wrong name is answered before any model is loaded
        for dataset in args.dataset or [None]:
            config = settings(args, trained_as(name, args.models), dataset)
            load_items(config, args.split, args.limit)
    found = [evaluate_model(name, args) for name in args.models]
    if ranks.rank():
        return
    results = [result for of_model in found for result, _ in of_model]
    comparisons = [compare(a, b) for of_model in found[1:] for a, b in zip(found[0], of_model) if a[0]["dataset"] == b[0]["dataset"]]
    comparisons += [compare(of_model[0], other) for of_model in found for other in of_model[1:] if other[0]["dataset"] == of_model[0][0]["dataset"]]
    print(table(results))
    for c in comparisons:
        if not c["n"]:
            print(f"{c['dataset']}: {Path(c['a']).name} and {Path(c['b']).name} share no item, so they are not compared")
            continue
        print(f"{c['dataset']}: {Path(c['b']).name} ({c['style_b']}) - {Path(c['a']).name} ({c['style_a']}) = {c['difference']:+.3f} "
              f"[{c['difference_ci95'][0]:+.3f}, {c['difference_ci95'][1]:+.3f}] on {c['n']} shared items; right alone {c['only_b']} : {c['only_a']}, McNemar p {c['mcnemar_p']:.2g}")
    if args.json:
        content = results[0] if len(results) == 1 else {"results": results, "comparisons": comparisons}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.answers:
        rows = [{"model": result["model"], "dataset": result["dataset"], "style": result["style"], "id": r.item.id, "gold": r.item.answer, "predicted": r.predicted,
                 "correct": r.correct, "finished": r.finished, "greedy": i < result["n"], "text": r.text}
                for of_model in found for result, rollouts in of_model for i, r in enumerate(rollouts)]
        Path(args.answers).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
