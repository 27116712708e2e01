"""One process of tests/test_distributed.py, which torchrun starts with FOLDER [SETTING ...].

Three steps of every setting below (or of those that are named), in float64 and with SGD, since
AdamW's first steps turn a rounding error into a whole step. Rank 0 writes what came out.
The value head is fp32 as it is shipped. Its rounding depends on how rows are batched; an update
carries that into the weights, and a later rollout may then sample another token. Therefore only the
first rollout of "ppo-fp32" is compared; "ppo" has a head in float64, and all of it must agree.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import rewards
import train
from policy import Policy
from support import cli, distributed
from support.demo_model import demo_policy, tiny_vl_policy
from support.splits import load_splits

SETTINGS = {
    "grpo": "--algo grpo --minibatches 2 --micro-batch 1 --eval-every 2",
    # Only prompts 0 and 4 of 5 are left: a rank of four has none.
    "emptied": "--algo grpo --weights token",
    "dapo": "--algo dapo --clip-low 0.1",
    "dr_grpo": "--algo dr_grpo --epochs 2",
    "ppo": "--algo ppo --critic head --epochs 2 --critic-warmup 1 --kl-coef 0.05",
    "ppo-fp32": "--algo ppo --critic head --minibatches 1 --kl-coef 0.05 --steps 1",
    "sft": "--algo sft",
    "images": "--dataset demo-images --task classify --algo grpo --samples 2 --max-new 4",
}
SMALL = dict(full=True, prompts=5, max_new=6, steps=3, eval_every=0, eval_limit=7, log_groups=5)


def by_words(item, text, *args, grade=rewards.grade, **kwargs):
    """A random policy earns -1 everywhere: instead 0, 1 or 2, which depends on the text."""
    found = grade(item, text, *args, **kwargs)
    digit = sum(text.encode()) % 3
    return replace(found, total=float(digit), correct=digit == 0)


def sgd(policy: Policy, config) -> torch.optim.SGD:
    groups = []
    for part in ("policy", "critic"):
        if parameters := list(policy.trainable(part).values()):
            groups.append({"params": parameters, "lr": 0.5})
    return torch.optim.SGD(groups)


def wide(path: Path, config, items) -> Policy:
    """A tiny random policy in float64.

    Its logits are widened: at initialisation every token would be about equally likely.
    """
    if distributed.rank == 0:
        texts = []
        for item in items[:200]:
            texts += [data.messages(item)[1]["content"], data.completion(item)]
        made = tiny_vl_policy(0, texts) if config.dataset == "demo-images" else demo_policy(0)
        made.model.double().lm_head.weight.data.mul_(3)
        made.save_folder(path)
    distributed.gathered([])
    return Policy.load(
        str(path),
        dtype=torch.float64,
        lora=0,
        template="plain",
        keep_reference=config.kl_coef > 0,
        critic=config.critic if config.advantage == "gae" else "",
    )


def compute_in_float64(head: torch.nn.Linear) -> None:
    """The value head, between the fp32 states that it gets and the fp32 values that it returns."""
    head.double()
    head.register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    head.register_forward_hook(lambda module, inputs, values: values.float())


def with_tokens(policy, batch, config, step, loss_of=train.loss_of):
    """A metric of one's own: the mean and the largest token id."""
    loss, stats = loss_of(policy, batch, config, step)
    stats.mean("mean_token", batch.completion_ids, batch.token_weights[..., None] * batch.mask)
    stats.max("token", batch.completion_ids[batch.mask])
    return loss, stats


class Watch:
    """Stands in for the loop's sampler and its clip; keeps the completions and the gradients."""

    def __init__(self, name: str, policy: Policy):
        self.name, self.policy, self.tokens, self.gradients = name, policy, [], {}
        self.sampler = train.demonstrations if name == "sft" else evaluation.sample
        self.clip_gradients = train.clip_gradients

    def sample(self, *args) -> list:
        rollouts = self.sampler(*args)
        if len(args) == 5:  # a part of an evaluation, of this process alone
            return rollouts
        if self.name == "emptied":
            rollouts = [replace(r, group=min(r.group, 1)) for r in rollouts if r.group in (0, 4)]
        self.tokens.append([rollout.completion_ids for rollout in rollouts])
        return rollouts

    def clip(self, optimizer, config, stats) -> bool:
        step = len(self.gradients)
        for name, p in self.policy.trainable().items():
            if p.grad is not None:
                self.gradients[f"{step}|{name}"] = p.grad.clone()
        return self.clip_gradients(optimizer, config, stats)


def job(folder: Path, name: str) -> None:
    given, _ = cli.read_flags(SETTINGS[name].split())
    samples = {} if name == "sft" else {"samples": 4}
    config = cli.make_config(SMALL | samples | given)
    splits = load_splits(config)
    policy = wide(folder / f"{name}.model", config, splits["train"])
    if name == "ppo":
        compute_in_float64(policy.value_head)
    run, watch = folder / f"{name}.run", Watch(name, policy)
    run.mkdir(exist_ok=True)
    with (
        mock.patch.object(
            train if name == "sft" else evaluation, watch.sampler.__name__, watch.sample
        ),
        mock.patch.object(train, "clip_gradients", watch.clip),
        mock.patch.object(train, "make_optimizer", sgd),
        mock.patch.object(train, "loss_of", with_tokens),
        mock.patch.object(rewards, "grade", by_words),
    ):
        train.train_on(config, run, policy, splits)
    if distributed.rank:
        return
    weights = {key: p.detach().contiguous() for key, p in policy.trainable().items()}
    save_file(watch.gradients, folder / f"{name}.gradients")
    save_file(weights, folder / f"{name}.weights")
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines]
    logged = len((run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines())
    found = {"tokens": watch.tokens, "metrics": metrics, "logged": logged}
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    for setting in sys.argv[2:] or SETTINGS:
        job(Path(sys.argv[1]), setting)
