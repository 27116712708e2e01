"""Accuracy that can be trusted: greedy and sampled, each with its interval; models side by side.

Read it with Med-RLVR (arXiv 2502.19655), section 4.2: MedQA test, the same prompt and grader as in
training. Training calls `evaluate` before, during and after, so a checkpoint evaluated here repeats
those numbers exactly. Every accuracy is a share of all items whose prompt fits (how many do not is
said): an answer that cannot be read, or was cut before it was given, is a wrong one.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import data
import rewards
from data import Item
from policy import Policy, Rollout
from support import distributed, errors, eval_cli, loading, memory, probes, runs, sheet, statistics
from support.errors import UsageError
from support.progress import Progress
from support.text import normal


# ------------------------------------------------------------------------------------- answering
def sample(policy, items, config, seed, mine: range | None = None) -> list[Rollout]:
    """G = config.samples completions of each item, an item's together, on as many rows as fit.

    `group` is an item's place in `items`, and seeds its random numbers: how many are written at
    once changes no result. Several processes share the items, and each gets all rollouts, ready to
    be trained on. mine: the places of the items to answer; then those of this process alone.
    """
    G, rollouts = config.samples, []
    places = distributed.share(len(items)) if mine is None else mine
    place, how = places.start, (config.max_new, config.temperature, seed)
    while place < places.stop:
        at_once = max(1, policy.sample_rows // G)  # items
        part, of_part = items[place : min(place + at_once, places.stop)], None
        try:
            of_part = policy.sample(part, G, *how, place * G, config.style)
        except RuntimeError as error:
            if not errors.ran_out(error):
                raise
        if of_part is None:  # not in the `except` block: the exception holds what the call had made
            memory.fewer_items(policy, len(part), G)
            continue
        for rollout in of_part:
            rollout.group += place
        rollouts += of_part
        place += len(part)
    if mine is not None or distributed.world == 1:
        return rollouts
    return with_pictures(policy, distributed.gathered(rollouts), G)


def with_pictures(policy: Policy, rollouts: list[Rollout], G: int) -> list[Rollout]:
    """Another process's rollouts come without pixels: images are opened again, once a group."""
    for row in range(0, len(rollouts), G):
        group = rollouts[row : row + G]
        if policy.vision and group[0].pictures is None:
            pictures = policy.vision.look(group[0].item, group[0].prompt_ids)
            for rollout in group:
                rollout.pictures = pictures
    return rollouts


def answer(
    policy, items, config, *, n=1, temperature=0.0, seed=0, rows=128, label=""
) -> list[Rollout]:
    """n completions of each item, graded, at most `rows` of a process at a time.

    An image goes once it was seen: a test set's would fill the memory.
    """
    asked, rollouts = replace(config, samples=n, temperature=temperature), []
    mine, at_once = distributed.share(len(items)), max(1, min(rows, policy.sample_rows) // n)
    with Progress(label, len(mine)) as progress:
        for first in mine[::at_once]:
            part = range(first, min(first + at_once, mine.stop))
            of_part = sample(policy, items, asked, seed, part)
            rewards.grade_all(of_part, config)
            for rollout in of_part:
                rollout.pictures = None
            rollouts += of_part
            right = sum(rollout.correct for rollout in rollouts)
            progress.update(len(part), f"{right} of {len(rollouts)} right")
    return distributed.gathered(rollouts)


def fitting(policy: Policy, items: list[Item], config, what: str = "") -> list[Item]:
    """The items whose prompt is within max_prompt tokens. None is cut; how many go is said.

    Raises UsageError where none is left.
    """
    limit = f"--max-prompt {config.max_prompt} tokens"
    prompts = policy.encode(items, config.style)
    kept = [item for item, ids in zip(items, prompts) if len(ids) <= config.max_prompt]
    if not kept:
        images = any(item.image is not None for item in items)
        smaller = ", or shrink the images by --max-pixels" if images else ""
        raise UsageError(f"{what}no prompt is within {limit}: raise it{smaller}")
    if len(kept) < len(items):
        dropped = len(items) - len(kept)
        distributed.say(f"{what}{dropped} of {len(items)} prompts are longer than {limit}: dropped")
    return kept


# -------------------------------------------------------------------------------------- accuracy
def evaluate(policy, items, config, *, samples=1, seed=0, label="") -> tuple[dict, list[Rollout]]:
    """Greedy accuracy, and the mean of `samples` completions an item at temperature 1.

    -> (result, graded rollouts, the greedy ones first). result["accuracy"] and ["ci95"] are greedy,
    ["sampled_accuracy"] and ["sampled_ci95"] sampled (absent for samples = 0).
    """
    answered = partial(answer, policy, items, config, seed=seed)
    greedy = answered(label=label and f"{label}greedy")
    result = summary(greedy) | lenient(greedy) | of_task(greedy)
    result |= faithfulness(greedy, config.dataset)
    if not samples:
        return result, greedy
    sampled = answered(n=samples, temperature=1.0, label=label and f"{label}sampled")
    return result | of_samples(sampled, samples), greedy + sampled


def summary(rollouts: list[Rollout]) -> dict:
    """Accuracy with its Wilson interval; rates are shares of all completions, lengths in tokens."""
    n = len(rollouts)
    right = sum(rollout.correct for rollout in rollouts)
    stages = Counter(rewards.stage(r.parsed, r.item, len(r.completion_ids)) for r in rollouts)
    return {
        "accuracy": right / n,
        "ci95": list(statistics.wilson(right, n)),
        "n": n,
        "parsed": sum(bool(rollout.predicted) for rollout in rollouts) / n,
        "well_formed": sum(rollout.parsed.well_formed for rollout in rollouts) / n,
        "truncated": sum(not rollout.finished for rollout in rollouts) / n,
        "length": sum(len(rollout.completion_ids) for rollout in rollouts) / n,
        "think_words": sum(len(rollout.parsed.think.split()) for rollout in rollouts) / n,
        "stages": {name: stages[name] / n for name in rewards.STAGES},
    }


def lenient(rollouts: list[Rollout]) -> dict:
    """Accuracy where a letter that is all the model writes, such as "B.", counts as its answer too.

    A base model that knows the answer but not the form shows here. The reward stays strict, since
    it teaches the form. {} for other tasks than "choice".
    """
    if any(rollout.item.task != "choice" for rollout in rollouts):
        return {}
    right = 0
    for rollout in rollouts:
        lone = rewards.LONE_LETTER.fullmatch(normal(rollout.text))
        right += rollout.correct or bool(lone) and lone[1].upper() == rollout.item.answer
    return {"lenient_accuracy": right / len(rollouts)}


def of_task(rollouts: list[Rollout]) -> dict:
    """What the field reports beside accuracy, by task, each with its interval in "ci95_of"."""
    tasks = {rollout.item.task for rollout in rollouts}
    if len(tasks) > 1 or tasks == {"choice"}:
        return {}
    resampled = statistics.bootstrap_metrics
    if tasks == {"localize"}:
        return resampled(statistics.box_metrics, [rollout.parts["iou"] for rollout in rollouts])
    gold = [str(rollout.item.answer) for rollout in rollouts]
    predicted = [rollout.predicted for rollout in rollouts]
    scales = {rollout.item.options for rollout in rollouts}
    classes = sorted(set().union(*scales))
    found = resampled(partial(statistics.class_metrics, classes=classes), gold, predicted)
    if tasks == {"classify"} or len(scales) > 1:
        return found
    place = {str(name): i for i, name in enumerate(*scales)}  # the lowest grade is 0
    ordinal = resampled(
        partial(statistics.ordinal_metrics, n_grades=len(place)),
        [place[name] for name in gold],
        [place.get(name) for name in predicted],
    )
    return found | ordinal | {"ci95_of": found["ci95_of"] | ordinal["ci95_of"]}


def faithfulness(rollouts: list[Rollout], dataset: str) -> dict:
    """Of the right answers: how many stand behind the true steps, and nothing else.

    "faithful_labels": labels (of the demo, its days) and all. {} where a data set knows no steps.
    """
    source = data.LOADERS.get(dataset)
    if not source or not source.steps:
        return {}
    right = [(r.parsed.think, r.item.rationale) for r in rollouts if r.correct]
    n = max(1, len(right))
    steps = sum(source.steps(said) == source.steps(true) for said, true in right)
    labels = sum(said.split() == true.split() for said, true in right)
    return {"faithful": steps / n, "faithful_labels": labels / n}


RATES = ("accuracy", "well_formed", "truncated", "length", "think_words")


def of_samples(rollouts: list[Rollout], k: int) -> dict:
    """Of k sampled completions an item: their mean, the majority's accuracy (maj@k), pass@k.

    The interval of the mean is a bootstrap of items: an item's samples are not independent.
    """
    mean = summary(rollouts)
    found = {f"sampled_{x}": mean[x] for x in RATES}
    per_item = [rollouts[first : first + k] for first in range(0, len(rollouts), k)]
    n = len(per_item)
    if all(rollout.item.task != "localize" for rollout in rollouts):  # boxes have no majority
        votes = [statistics.majority([r.predicted for r in of_item]) for of_item in per_item]
        gold = [str(of_item[0].item.answer) for of_item in per_item]
        found["maj_at_k"] = sum(vote == right for vote, right in zip(votes, gold)) / n
    right = [sum(rollout.correct for rollout in of_item) for of_item in per_item]
    found |= {"samples": k, "pass_at_k": {}}
    found["sampled_ci95"] = list(statistics.bootstrap([count / k for count in right]))
    for drawn in sorted({1, k // 2 or 1, k}):
        chances = [statistics.pass_at_k(k, count, drawn) for count in right]
        found["pass_at_k"][drawn] = sum(chances) / n
    return found


def as_line(result: dict) -> str:
    """accuracy 0.910 [0.872, 0.937] (greedy, n 300), ..."""
    accuracy = eval_cli.with_interval(result, "accuracy", "ci95")
    sampled = ""
    if "sampled_accuracy" in result:
        mean, k = result["sampled_accuracy"], result["samples"]
        sampled = f", {mean:.3f} sampled at temperature 1 ({k} an item)"
    return (
        f"accuracy {accuracy} (greedy, n {result['n']}){sampled}; an answer could be read in "
        f"{result['parsed']:.0%}, {result['truncated']:.0%} cut at the limit"
    )


def change(results: dict) -> str:
    """What training changed: "accuracy 0.100 [0.071, 0.139] -> 0.910 [0.872, 0.937], n 300"."""
    shown = []
    for result in (results["before"], results["after"]):
        text = eval_cli.with_interval(result, "accuracy", "ci95")
        if "sampled_accuracy" in result:
            text += f" (sampled {result['sampled_accuracy']:.3f})"
        shown.append(text)
    return f"accuracy {' -> '.join(shown)}, n {results['after']['n']}"


# ---------------------------------------------------------------- the same items, asked otherwise
def probed(policy: Policy, greedy: list[Rollout], config, args, label: str) -> dict:
    """What the flags ask beside accuracy; where the items do not fit, that is said."""
    items = [rollout.item for rollout in greedy]
    found = {}
    if all(item.task != "localize" for item in items):
        found["letters"] = probes.letters(greedy)
    if args.likelihood and all(item.options for item in items):
        found |= by_likelihood(policy, items, f"{label}likelihood")
    elif args.likelihood:
        boxes = "--likelihood needs items with options or classes; boxes have none"
        distributed.say(f"{config.dataset}: {boxes}")
    if args.rotate and items[0].task == "choice":
        rotated = [data.rotate_options(item) for item in items]
        turned = answer(policy, rotated, config, label=f"{label}rotated")
        found["rotated_agreement"] = probes.same_option(greedy, turned)
    if args.blind and any(item.image is not None for item in items):
        found |= looking(policy, items, config, label)
    elif args.blind:
        distributed.say(f"{config.dataset}: --blind needs items with images")
    return found


def by_likelihood(policy: Policy, items: list[Item], label: str = "") -> dict:
    """Accuracy of the likeliest letter or class, and for classes the area under the ROC curve."""
    mine, scores = distributed.share(len(items)), []
    with Progress(label, len(mine)) as progress:
        for i in mine:
            scores.append(probes.likelihoods(policy, items[i]))
            progress.update()
    return probes.likeliest(items, distributed.gathered(scores))


def looking(policy: Policy, items: list[Item], config, label: str = "") -> dict:
    """Accuracy with images blank, and with images swapped: a model that looks loses by both."""
    found = {}
    shown = ("accuracy", "ci95", "n", "balanced_accuracy", "kappa", "mean_iou")
    for name, changed in (("blank", probes.blank(items)), ("swapped", probes.swapped(items))):
        if changed:
            rollouts = answer(policy, changed, config, label=f"{label}{name}")
            result = summary(rollouts) | of_task(rollouts)
            found |= {f"{name}_image_{key}": result[key] for key in shown if key in result}
    return found


# ---------------------------------------------------------------------------- models side by side
def evaluate_model(name: str, args) -> list[tuple[dict, list[Rollout]]]:
    """One model on every data set and in every style asked for -> (result, rollouts) of each."""
    trained = eval_cli.trained_as(name, args.models)
    policy, run = eval_cli.opened(name, args, trained)
    if trained and not run:
        lender = next(filter(runs.read_run, args.models))
        distributed.say(f"{name} is evaluated with the settings of {lender}, which flags beat")
    found = []
    for dataset in args.dataset or [None]:
        for style in args.style or [None]:
            config = eval_cli.settings(args, trained, dataset, style)
            items = fitting(policy, eval_cli.load_items(config, args.split, args.limit), config)
            result, rollouts = evaluate_on(policy, items, config, name, args)
            if run:
                result["seen_in_training"] = eval_cli.seen_in_training(items, run)
            found.append((result, rollouts))
    return found


def evaluate_on(policy: Policy, items: list[Item], config, name: str, args):
    """One model on one data set in one style -> (result, rollouts)."""
    what = f"{Path(name).name} {config.dataset} {config.style}"
    seed = config.seed if args.seed is None else args.seed
    result, rollouts = evaluate(
        policy, items, config, samples=args.samples, seed=seed, label=f"{what} "
    )
    greedy = rollouts[: len(items)]
    result |= probed(policy, greedy, config, args, f"{what} ") | {
        "model": name,
        "dataset": config.dataset,
        "split": args.split,
        "style": config.style,
        "template": "chat" if policy.tokens.chat else "plain",
        "stop_answer": policy.tokens.stop_answer,
        "max_new": config.max_new,
    }
    if args.save_images and distributed.rank == 0:
        stem = sheet.plain(f"{name} {config.dataset} {config.style} {args.split} {items[0].task}")
        if not sheet.save(greedy, Path(args.save_images) / f"{stem}.png"):
            distributed.say(f"{config.dataset}: --save-images needs items with images")
    return result, rollouts


def compare(a: tuple[dict, list[Rollout]], b: tuple[dict, list[Rollout]]) -> dict:
    """Two models on the items that both answered greedily, found by question and options."""
    (first, _), (second, _) = a, b
    right_a, right_b = (
        {data.fingerprint(rollout.item): rollout.correct for rollout in rollouts[: result["n"]]}
        for result, rollouts in (a, b)
    )
    shared = [key for key in right_a if key in right_b]
    names = {"a": first["model"], "b": second["model"], "dataset": first["dataset"]}
    names |= {"style_a": first["style"], "style_b": second["style"]}
    if not shared:
        return names | {"n": 0}
    pair = [right_a[key] for key in shared], [right_b[key] for key in shared]
    return names | statistics.paired(*pair)


def comparisons(found: list[list[tuple[dict, list[Rollout]]]]) -> list[dict]:
    """Each model with the first, then each model's other styles with its own first."""
    pairs = [(a, b) for of_model in found[1:] for a, b in zip(found[0], of_model)]
    pairs += [(of_model[0], other) for of_model in found for other in of_model[1:]]
    return [compare(a, b) for a, b in pairs if a[0]["dataset"] == b[0]["dataset"]]


def ask(args) -> str:
    """The first model's answer to a question of one's own."""
    trained = eval_cli.trained_as(args.models[0], args.models)
    policy, _ = eval_cli.opened(args.models[0], args, trained)
    unknown = policy.tokenizer.unk_token_id
    n = 0 if unknown is None else policy.tokenizer(args.ask).input_ids.count(unknown)
    if n:
        distributed.say(
            f"eval.py: {n} words of the question are unknown to this model, and it sees none of "
            "them"
        )
    config = eval_cli.settings(args, trained, style=args.style and args.style[0])
    [rollout] = answer(policy, [Item("ask", "choice", args.ask, (), "")], config)
    return rollout.text.strip()


def main(argv: list[str] | None = None) -> None:
    args = eval_cli.parser().parse(argv, eval_cli.GONE)
    loading.quiet()
    distributed.start()
    eval_cli.check(args)
    if args.ask:
        print(ask(args))
        return
    eval_cli.check_data(args)  # a wrong name is answered before any model is loaded
    found = [evaluate_model(name, args) for name in args.models]
    if distributed.rank == 0:
        evaluated = [one for of_model in found for one in of_model]
        eval_cli.write(args, evaluated, comparisons(found))


if __name__ == "__main__":
    errors.run(main, "eval.py")
