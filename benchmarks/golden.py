"""Does a change of the code keep its behaviour? Records short runs, and compares two recordings.

    python benchmarks/golden.py record OLD                  # with the code before the change
    python benchmarks/golden.py record NEW --models OLD     # after it, from the same model folders
    python benchmarks/golden.py compare OLD NEW

Each run is three steps on one thread, computed in float64: what differs then differs by more than
rounding. Completions must be equal, weights may differ by a millionth of the way they moved, and
metrics by as much of their value.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rewards
import train
from policy import Policy
from support.demo_model import demo_policy, tiny_vl_policy

TEXT = "--dataset demo --model {text} --template plain --max-new 10"
IMAGES = "--dataset demo-images --task classify --model {images} --max-new 6"
RUNS = {
    "grpo": f"{TEXT} --algo grpo --full --kl-coef 0.04",
    "grpo-2x2": f"{TEXT} --algo grpo --full --epochs 2 --minibatches 2 --micro-batch 1",
    "grpo-lora": f"{TEXT} --algo grpo --no-full --kl-coef 0.04 --micro-batch 2 --checkpointing",
    "dr_grpo": f"{TEXT} --algo dr_grpo --full --epochs 2",
    "dapo": f"{TEXT} --algo dapo --full",
    "rloo": f"{TEXT} --algo rloo --full",
    "gspo": f"{TEXT} --algo gspo --full --minibatches 2",
    "ppo-head": f"{TEXT} --algo ppo --full --critic head --critic-warmup 1 --kl-coef 0.05",
    "ppo-lora": f"{TEXT} --algo ppo --no-full --critic lora --critic-warmup 0 --kl-coef 0.05",
    "sft": f"{TEXT} --algo sft --full",
    "images": f"{IMAGES} --algo grpo --full --kl-coef 0.04",
    "images-vision": f"{IMAGES} --algo grpo --full --train-vision --kl-coef 0.04",
    "images-lora": f"{IMAGES} --algo ppo --no-full --critic lora --critic-warmup 0",
}
METRICS = ["reward", "accuracy", "length", "think_words", "groups_equal", "loss", "entropy", "kl"]
METRICS += ["clipped_low", "clipped_high", "max_ratio", "policy_grad_norm", "critic_grad_norm"]
METRICS += ["value_loss", "explained_variance", "dev_accuracy", "lr", "groups_dropped"]
SAMPLES = "--prompts 4 --samples 4"
SIZES = "--steps 3 --warmup 2 --eval-every 2 --eval-limit 5 --eval-samples 1 --log-groups 4"


def graded_by_hash(grade):
    """A random policy earns -1 everywhere: instead 0, 1 or 2, which depends on the text."""

    def by_hash(*args, **kwargs):
        found = grade(*args, **kwargs)
        digit = hashlib.sha256(args[1].encode()).digest()[0] % 3
        return dataclasses.replace(found, total=float(digit), correct=digit == 0)

    return by_hash


def in_float64() -> None:
    """Every tensor of ours becomes a double, also where the code asks for fp32."""
    load = Policy.load.__func__

    def load_wide(cls, name_or_path, device="cpu", dtype=None, **kwargs):
        return load(cls, name_or_path, device, torch.float64, **kwargs)

    Policy.load = classmethod(load_wide)
    torch.Tensor.float = torch.Tensor.double
    torch.float32 = torch.float64
    torch.set_default_dtype(torch.float64)


def make_models(folder: Path) -> None:
    """Random models as folders; logits widened, since at first all tokens would be as likely."""
    texts = ["Which outline does the lesion have? - round - irregular <think> </think>"]
    for name, policy in (("text", demo_policy(0)), ("images", tiny_vl_policy(0, texts))):
        policy.model.double().lm_head.weight.data.mul_(3)
        policy.save_folder(folder / "models" / name)


def record(folder: Path, models: Path, only: list[str]) -> None:
    if models == folder:
        make_models(folder)
    torch.set_num_threads(1)
    in_float64()
    rewards.grade = graded_by_hash(rewards.grade)
    for name, flags in RUNS.items():
        if only and name not in only:
            continue
        words = flags.format(text=models / "models/text", images=models / "models/images").split()
        words += SIZES.split() + ("--prompts 4" if name == "sft" else SAMPLES).split()
        train.main([*words, "--out", str(folder / name)])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def movement(weights: dict, start: dict) -> float:
    """The largest change of a weight. Adapters' B and the value head start at 0, A is drawn."""
    started_at_0 = (name for name in weights if ".B." in name or name.startswith("value_head"))
    start = start | dict.fromkeys(started_at_0, 0.0)
    return max(
        (weights[name] - start[name]).abs().max().item() for name in weights if name in start
    )


def compare(old: Path, new: Path) -> bool:
    """One line a run, and whether all of them are the same."""
    same = True
    for name in RUNS:
        if not (new / name).is_dir():
            print(f"{name:14} not recorded")
            same = False
            continue
        said = [[row["text"] for row in rows(run / name / "rollouts.jsonl")] for run in (old, new)]
        logs = [rows(run / name / "metrics.jsonl") for run in (old, new)]
        apart = [
            key
            for key in METRICS
            for a, b in zip(*logs)
            if abs(a.get(key, 0) - b.get(key, 0)) > 1e-6 * max(1e-3, abs(a.get(key, 0)))
        ]
        path = Path(name) / "checkpoints" / "000003" / "policy.safetensors"
        mine, theirs = load_file(old / path), load_file(new / path)
        model = "images" if name.startswith("images") else "text"
        moved = movement(mine, load_file(old / "models" / model / "model.safetensors"))
        if mine.keys() != theirs.keys():
            difference = float("inf")
        else:
            difference = max((mine[key] - theirs[key]).abs().max().item() for key in mine)
        good = said[0] == said[1] and len(said[0]) > 0 and difference <= 1e-6 * moved and not apart
        same = same and good
        print(
            f"{name:14} {len(said[0])} completions {'equal' if said[0] == said[1] else 'DIFFER'}, "
            f"weights differ by {difference:.1e} where they moved by {moved:.1e}, "
            f"metrics apart: {', '.join(dict.fromkeys(apart)) or 'none'}: "
            f"{'same' if good else 'DIFFERENT'}"
        )
    return same


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run everything and keep the run folders")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--models", type=Path, help="take the models of another recording")
    recording.add_argument("--only", nargs="*", default=[], choices=list(RUNS))
    comparing = commands.add_parser("compare", help="two recordings; exit code 1 where they differ")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = p.parse_args()
    if args.command == "record":
        record(args.folder, args.models or args.folder, args.only)
    else:
        raise SystemExit(0 if compare(args.old, args.new) else 1)


if __name__ == "__main__":
    main()
