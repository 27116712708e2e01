"""Which wording of the prompt do real models follow? MedQA questions, greedy, graded as ever.

    python benchmarks/prompts.py --screen --model Qwen=DIR --data-dir DIR --json F
    python benchmarks/prompts.py --model SmolLM2=DIR Qwen=DIR --data-dir DIR --json F

The first looks for candidates, with few questions of train; the second measures them on 64 of test.
A cell is a model, a template, a style and a wording; a cell that F has is not run again. What a
model copies from the prompt must not count: "..." has no words, so a copied skeleton is malformed,
and Z is no option, so a copied example is well formed but cannot be read. `sound` counts what is
both well formed and read, and the wording is chosen by it.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
from policy import Policy
from support import eval_cli
from support.statistics import wilson
from support.text import LETTERS

LETTER = data.WANTED["choice"]
DESCRIBED = {
    "think": f"First reason inside <think> and </think>, then give {LETTER} inside <answer> and "
    "</answer>, and nothing after it.",
    "direct": f"Give only {LETTER}, inside <answer> and </answer>.",
    "cot": f"Think step by step, then give {LETTER} inside <answer> and </answer>.",
}
FORM = {
    "think": "<think> ... </think> <answer> X </answer>",
    "direct": "<answer> X </answer>",
    "cot": "... <answer> X </answer>",
}
EXAMPLE = {
    "think": "<think> The findings fit only one option. </think> <answer> Z </answer>",
    "direct": "<answer> Z </answer>",
    "cot": "The findings fit only one option. <answer> Z </answer>",
}
# DeepSeek-R1's (arXiv 2501.12948, table 1), with our answer; it has none for the other styles.
R1 = {
    "think": "The assistant first thinks about the reasoning process in the mind and then provides "
    "the user with the answer. The reasoning process and answer are enclosed within <think> "
    "</think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    f"</think> <answer> {LETTER} </answer>.",
}
# name -> what the system turn asks for, what stands behind the options
WORDINGS = {
    "described": (DESCRIBED, None),
    "form behind the options": (DESCRIBED, FORM),
    "form described and shown": (
        {style: f"{text} The form: {FORM[style]}" for style, text in DESCRIBED.items()},
        None,
    ),
    "example behind the options": (DESCRIBED, EXAMPLE),
    "DeepSeek-R1's": (R1, None),
}
CHOSEN = "form described and shown"  # what data.py has
MAX_NEW = {"think": 192, "cot": 192, "direct": 32}
SCREEN = {"think": 128}


def messages(wording: str, item: data.Item, style: str) -> list[dict[str, str]]:
    """As `data.messages`, in this wording."""
    system, shown = WORDINGS[wording]
    listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options)]
    behind = [f"Reply in this form: {shown[style]}"] if shown else []
    user = "\n".join([item.question, *listed, *behind])
    system = f"{item.instruction} {system[style]}"
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def measured(
    policy: Policy, items: list[data.Item], style: str, wording: str, max_new: int
) -> dict:
    began = time.perf_counter()
    config = replace(eval_cli.ALONE, style=style, max_new=max_new)
    data.messages = lambda item, style="think": messages(wording, item, style)
    rollouts = evaluation.answer(policy, items, config, rows=64, label=wording)
    n = len(rollouts)
    formed = [bool(rollout.parts["format"]) for rollout in rollouts]
    read = [bool(rollout.predicted) for rollout in rollouts]
    sound = sum(a and b for a, b in zip(formed, read))
    return {
        "n": n,
        "well_formed": sum(formed) / n,
        "read": sum(read) / n,
        "sound": sound / n,
        "sound_ci95": list(wilson(sound, n)),
        "right": sum(rollout.correct for rollout in rollouts) / n,
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts) / n,
        "cut": sum(not rollout.finished for rollout in rollouts) / n,
        "seconds": round(time.perf_counter() - began),
        "first_texts": [rollout.text[:400] for rollout in rollouts[:2]],
    }


def plan(names: list[str], screen: bool) -> list[tuple[str, str, str, str]]:
    """(model, template, style, wording) of all cells, those that decide first."""
    firsts = [("chat", "think"), ("plain", "think"), ("chat", "direct"), ("plain", "direct")]
    cells = []
    for template, style in firsts[:1] if screen else (*firsts, ("chat", "cot"), ("plain", "cot")):
        for name in names:
            wordings = [w for w, (system, _) in WORDINGS.items() if style in system]
            cells += [(name, template, style, wording) for wording in wordings]
    return cells


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", nargs="+", required=True, metavar="NAME=DIR")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--screen", action="store_true", help="16 questions of train, 128 tokens")
    p.add_argument("--only", nargs="+", default=[""], help="cells whose name holds one of these")
    p.add_argument("--json", required=True, type=Path)
    args = p.parse_args()
    folders = dict(one.split("=", 1) for one in args.model)
    split, n, max_new = ("train", 16, SCREEN) if args.screen else ("test", 64, MAX_NEW)
    items = data.load("medqa", split, args.data_dir, limit=n)
    found = {"screen": {}, "cells": {}}
    if args.json.exists():
        found = json.loads(args.json.read_text(encoding="utf-8"))
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    cells, opened = found["screen" if args.screen else "cells"], None
    for name, template, style, wording in plan(list(folders), args.screen):
        cell = f"{name}, {template}, {style}, {wording}"
        if cell in cells or not any(part in cell for part in args.only):
            continue
        if opened != (name, template):
            policy = Policy.load(folders[name], template=template, stop_answer="on", lora=0)
            opened = name, template
        cells[cell] = measured(policy, items, style, wording, max_new[style])
        print(cell, {k: v for k, v in cells[cell].items() if k != "first_texts"}, flush=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
