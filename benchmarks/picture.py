"""The README's picture: accuracy, words of thinking and stages over the steps of a run.

python train.py --out RUN
python benchmarks/picture.py RUN --out docs/demo.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# What the demo shows of the six stages, and how a reader would call it.
STAGES = {
    "format failure": ("broken form", "#c0504d"),
    "direct answer hacker": ("answers at once", "#f0b050"),
    "concise structurer": ("a few words", "#c9c9c9"),
    "reintegrated reasoning": ("reasons", "#4a8f5c"),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", type=Path)
    p.add_argument("--out", required=True)
    args = p.parse_args()
    with (args.run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    steps = [m["step"] for m in metrics]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")

    accuracy = [m["accuracy"] for m in metrics]
    left.plot(steps, accuracy, color="#2b5f8a", label="accuracy of the samples (left)")
    left.axhline(0.2, color="#2b5f8a", linewidth=0.8, linestyle=":")
    left.text(steps[-1], 0.215, "chance", color="#2b5f8a", ha="right", fontsize=9)
    left.set(ylim=(0, 1), xlabel="step of GRPO")
    words = left.twinx()
    words.plot(steps, [m["think_words"] for m in metrics], color="#b0662f")
    words.set_ylim(0, None)
    left.plot([], [], color="#b0662f", label="words inside <think> (right)")
    left.legend(loc="lower right", frameon=False, fontsize=9)

    shares = [[m["stages"][name] for m in metrics] for name in STAGES]
    names, colours = zip(*STAGES.values())
    right.stackplot(steps, shares, labels=names, colors=colours)
    right.set(ylim=(0, 1), xlim=(steps[0], steps[-1]), xlabel="step of GRPO")
    right.set_title("share of the completions", fontsize=11, loc="left")
    right.legend(loc="center right", fontsize=9)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
