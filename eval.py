"""Accuracy that can be trusted: greedy and sampled, each with its interval, its parse rate and its truncation rate.

Read it with Med-RLVR (arXiv 2502.19655), section 4.2: MedQA test in distribution, the same prompt and grader as in training.
`evaluate` is what training calls before, during and after, so evaluating a checkpoint here repeats those numbers exactly.
Every accuracy is a share of *all* items: an unreadable or unfinished answer is a wrong one, and both rates stand beside it.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import policy as policies
import rewards
from data import Item, UsageError


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


def answer(policy, items: list[Item], config, *, n: int = 1, temperature: float = 0.0, seed: int = 0, rows: int = 128, label: str = ""):
    """Sample and grade n completions of each item; graded rollouts in the items' order. `rows` at a time, which changes no result."""
    rollouts, batch = [], max(1, rows // n)
    prompts = policy.encode(items, config.style)
    bar = tqdm(total=len(items), desc=label, unit="item", leave=False, disable=None if label else True)
    for start in range(0, len(items), batch):
        part = slice(start, start + batch)
        for rollout in policy.sample(items[part], n, config.max_new, temperature, seed, first_row=start * n, prompts=prompts[part]):
            rollout.group += start
            rollouts.append(graded(rollout, config))
        bar.update(len(items[part]))
    bar.close()
    return rollouts


def graded(rollout, config):
    """Fill in what the grader says of a rollout."""
    result = rewards.grade(rollout.item, rollout.text, config, rollout.finished, len(rollout.completion_ids))
    rollout.parsed, rollout.reward, rollout.parts = result.parsed, result.total, result.parts
    rollout.correct, rollout.predicted = result.correct, result.predicted
    return rollout


def summary(rollouts) -> dict:
    """Of one completion an item: {"accuracy", "ci95", "n", "parsed", "well_formed", "truncated", "length"}."""
    n, right = len(rollouts), sum(r.correct for r in rollouts)
    share = lambda flags: sum(flags) / n
    return {"accuracy": right / n, "ci95": list(wilson(right, n)), "n": n, "parsed": share(bool(r.predicted) for r in rollouts),
            "well_formed": share(r.parsed.well_formed for r in rollouts), "truncated": share(not r.finished for r in rollouts),
            "length": share(len(r.completion_ids) for r in rollouts)}


def evaluate(policy, items: list[Item], config, *, samples: int = 1, seed: int = 0, label: str = "") -> tuple[dict, list]:
    """Greedy accuracy with its Wilson interval and, of `samples` completions an item at temperature 1, the sampled mean.

    Returns (result, graded rollouts); result["accuracy"] and ["ci95"] are greedy, result["sampled_accuracy"] is sampled (absent for samples=0).
    """
    greedy = answer(policy, items, config, seed=seed, label=f"{label}greedy" if label else "")
    result, rollouts = summary(greedy), greedy
    if samples:
        sampled = answer(policy, items, config, n=samples, temperature=1.0, seed=seed, label=f"{label}sampled" if label else "")
        result |= {f"sampled_{key}": value for key, value in summary(sampled).items() if key in ("accuracy", "well_formed", "truncated", "length")}
        result["samples"] = samples
        rollouts = greedy + sampled
    return result, rollouts


def as_line(result: dict) -> str:
    """accuracy 0.910 [0.872, 0.937] (n 300), ..."""
    text = "accuracy {accuracy:.3f} [{0:.3f}, {1:.3f}] (greedy, n {n})".format(*result["ci95"], **result)
    if "sampled_accuracy" in result:
        text += f", {result['sampled_accuracy']:.3f} sampled at temperature 1 ({result['samples']} an item)"
    return text + f"; an answer could be read in {result['parsed']:.0%}, {result['truncated']:.0%} cut at the limit"


def settings(args, config: dict):
    """What sampling and grading need to know: flags first, then the run's own config, then the defaults of the paper's prompt."""
    defaults = {"dataset": "medqa", "data_dir": "", "style": "think", "max_new": 512, "max_prompt": 2048, "reward": "med-rlvr", "strict": False,
                "w_format": 1.0, "w_overlong": 0.0, "overlong_share": 0.2, "shuffle_options": False, "seed": 0}
    flags = {name: value for name, value in vars(args).items() if value is not None}
    return SimpleNamespace(**(defaults | config | flags))


def fitting(policy, items: list[Item], config, what: str = "") -> list[Item]:
    """The items whose prompt is within max_prompt tokens. None is ever truncated; how many are dropped is said."""
    kept = [item for item, ids in zip(items, policy.encode(items, config.style)) if len(ids) <= config.max_prompt]
    if len(kept) < len(items):
        print(f"{what}{len(items) - len(kept)} of {len(items)} prompts are longer than --max-prompt {config.max_prompt} tokens: dropped", file=sys.stderr)
    if not kept:
        raise UsageError(f"{what}no prompt is within --max-prompt {config.max_prompt} tokens: raise it")
    return kept


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="eval.py", description="Accuracy of a model or a run, or its answer to one question.")
    p.add_argument("model", help="a run folder of train.py, a Hugging Face folder, or a hub name")
    p.add_argument("--dataset", help=f"{', '.join(data.DATASETS)}, or a JSONL path (default: the run's, else medqa)")
    p.add_argument("--data-dir", help="folder that holds the published files, instead of the hub")
    p.add_argument("--split", default="test", help="train, dev or test (default test)")
    p.add_argument("--limit", type=int, help="the first N items only")
    p.add_argument("--style", choices=["think", "direct", "cot"], help="prompt: think-then-answer (trained), direct, or chain of thought")
    p.add_argument("--samples", type=int, default=0, help="completions an item at temperature 1, for the sampled accuracy (default none)")
    p.add_argument("--max-new", type=int, help="new tokens at most (default: the run's, else 512)")
    p.add_argument("--max-prompt", type=int, help="longer prompts are dropped and counted (default: the run's, else 2048)")
    p.add_argument("--template", choices=["auto", "chat", "plain"], help="prompt template (auto: the tokenizer's chat template, where it has one)")
    p.add_argument("--stop-answer", choices=["auto", "on", "off"], help="stop at the first </answer> (auto: with the plain template)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, help="of the sampled completions")
    p.add_argument("--json", metavar="F", help="write the result to F")
    p.add_argument("--answers", metavar="F", help="write one line of JSON an item to F")
    p.add_argument("--ask", metavar="QUESTION", help="answer this question instead, options included in its text")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    policies.quiet()
    for path in filter(None, (args.json, args.answers)):                      # before an hour of sampling, not after
        if not Path(path).resolve().parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist")
    kwargs = {name: value for name in ("template", "stop_answer") if (value := getattr(args, name))}
    run = policies.read_run(args.model)
    if not args.ask:
        config = settings(args, run)
        items = data.load(config.dataset, args.split, config.data_dir or None, args.limit)     # data first: a wrong name is answered at once
    policy, run = policies.open_policy(args.model, policies.pick_device(args.device), **kwargs)
    config = settings(args, run)
    if args.ask:
        item = Item("ask", "choice", args.ask, (), "")
        print(answer(policy, [item], config)[0].text.strip())
        return
    if config.shuffle_options:
        items = [data.shuffle_options(item, config.seed) for item in items]
    items = fitting(policy, items, config)
    result, rollouts = evaluate(policy, items, config, samples=args.samples, seed=config.seed, label=f"{config.dataset} ")
    result |= {"model": args.model, "dataset": config.dataset, "split": args.split, "style": config.style}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.answers:
        rows = [{"id": r.item.id, "gold": r.item.answer, "predicted": r.predicted, "correct": r.correct, "finished": r.finished, "text": r.text,
                 "greedy": i < len(items)} for i, r in enumerate(rollouts)]
        Path(args.answers).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.model} on {config.dataset} {args.split} ({config.style}): {as_line(result)}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
