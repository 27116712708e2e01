"""What the tests of training share: short runs of a small model, and single updates of it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import train
from benchmarks.one_step import sampled_and_graded
from policy import Policy, Rollout
from support.checkpoints import newest_checkpoint
from support.config import Config
from support.demo_model import demo_policy

DEMO = Config(**data.LOADERS["demo"].defaults)
CONFIG = replace(DEMO, prompts=4, samples=4, max_grad_norm=1e9)
QUICK = "--eval-limit 8 --eval-samples 0 --eval-every 0".split()
FAST = [
    *"--steps 6 --prompts 4 --samples 4 --warmup 2 --save-every 1".split(),
    *"--eval-limit 12 --eval-samples 1 --eval-every 2".split(),
]


# ------------------------------------------------------------------------------------ whole runs
def run(model_dir, out: Path, *flags: str) -> Path:
    """Six steps and what they take, unless the flags say otherwise."""
    train.main(["--model", str(model_dir), "--out", str(out), *FAST, *flags])
    return out


def rows(path: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def artefacts(out: Path) -> dict[str, bytes]:
    """Every byte that is a function of the run alone."""
    newest = newest_checkpoint(out)
    files = [newest / f"{name}.safetensors" for name in ("policy", "optimizer")]
    files += [out / name for name in ("metrics.jsonl", "rollouts.jsonl", "eval.json")]
    return {path.name: path.read_bytes() for path in files} | {"checkpoint": newest.name}


def weights_of(out: Path) -> dict:
    """The trained weights of a run's newest checkpoint."""
    return load_file(newest_checkpoint(out) / "policy.safetensors")


def emerged(result: dict, longer: float) -> None:
    """The demo's targets; `longer`: the accuracy on courses longer than any that was rewarded."""
    before, after = result["before"], result["after"]
    assert before["sampled_accuracy"] <= 0.30 and after["sampled_accuracy"] >= 0.90
    assert after["accuracy"] >= 0.95 and after["ood"]["accuracy"] >= longer
    assert after["think_words"] >= 4 * before["think_words"]
    assert after["faithful"] >= 0.95 and after["ood"]["faithful"] >= 0.95
    assert min(after["n"], after["ood"]["n"]) >= 200


# --------------------------------------------------------------------------------- single updates
def rollouts_for(policy: Policy, config: Config) -> list[Rollout]:
    """Sampled ones, with rewards that differ within groups whatever was said."""
    rollouts = sampled_and_graded(policy, data.load("demo", "train"), config)
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 3 == 0) - 0.1 * (i % 5)
    return rollouts


def adapted(**kwargs) -> Policy:
    """The demo's random model with adapters of rank 4."""
    made = demo_policy(0)
    return Policy(made.model, made.tokenizer, lora=4, **kwargs)


def shaken(policy: Policy, by: float = 0.1) -> Policy:
    """Every trained weight moved at random: adapters and value heads begin at 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn(p.shape, generator=generator) * by)
    return policy


def made_up(policy: Policy, items: list, lengths: list[list[int]]) -> list[Rollout]:
    """Rollouts with random completions of these lengths, [items][samples]."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for group, (item, row) in enumerate(zip(items, lengths)):
        for n in row:
            ids = torch.randint(0, policy.model.config.vocab_size, (n,), generator=generator)
            prompt = policy.prompt(item)
            rollouts.append(Rollout(item, group, prompt, ids.tolist(), [0.0] * n, True))
    return rollouts


class Recorder:
    """An optimiser that only keeps the gradients it is shown."""

    def __init__(self, policy: Policy):
        self.policy, self.seen = policy, []
        self.param_groups = [{"params": list(policy.trainable().values()), "lr": 0.0}]

    def step(self):
        gradients = [p.grad.flatten() for p in self.policy.trainable().values()]
        self.seen.append(torch.cat(gradients).clone())

    def zero_grad(self, set_to_none=True):
        for p in self.policy.trainable().values():
            p.grad = None


class Mover(Recorder):
    """Plain gradient descent that keeps the gradients it has followed."""

    def step(self):
        super().step()
        with torch.no_grad():
            for p in self.policy.trainable().values():
                p.sub_(0.5 * p.grad)
