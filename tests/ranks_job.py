"""One process of tests/test_ranks.py, which torchrun starts: python -m torch.distributed.run --nproc-per-node N tests/ranks_job.py FOLDER

Three steps of every setting below (or of those named after FOLDER), in float64 and with SGD, since
AdamW's first steps turn a rounding error into a whole step. Rank 0 writes what came out.
The value head is fp32 as it is shipped. Its rounding depends on how rows are batched; an update
carries that into the weights, and a later rollout may then sample another token. Therefore only the
first rollout of "ppo-fp32" is compared; "ppo" has a head in float64, and all of it must agree.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import demo
import eval as evaluation
import ranks
import train
from policy import Policy

SETTINGS = {
    "grpo": "--algo grpo --minibatches 2 --micro-batch 1 --eval-every 2",
    "emptied": "--algo grpo --weights token",                                 # only prompts 0 and 4 of 5 are left: a rank of four has none
    "dapo": "--algo dapo --clip-low 0.1",
    "dr_grpo": "--algo dr_grpo --updates 2",
    "ppo": "--algo ppo --critic head --updates 2 --critic-warmup 1 --kl-coef 0.05",
    "ppo-fp32": "--algo ppo --critic head --minibatches 1 --kl-coef 0.05 --steps 1",
    "sft": "--algo sft",
    "images": "--dataset demo-images --task classify --algo grpo --samples 2 --max-new 4",
}


def graded(rollout, config, grade=evaluation.graded):
    """A random policy earns -1 everywhere: instead a reward that depends on its tokens."""
    rollout = grade(rollout, config)
    rollout.reward, rollout.correct = float(sum(rollout.completion_ids) % 3), sum(rollout.completion_ids) % 3 == 0
    return rollout


def sgd(policy, config):
    return torch.optim.SGD([{"params": list(policy.trainable(part).values()), "lr": .5, "base_lr": .5} for part in ("policy", "critic") if policy.trainable(part)])


def wide(path: Path, config, items) -> Policy:
    """A tiny random policy in float64, its logits widened: at initialisation every token would be about equally likely."""
    if ranks.rank() == 0:
        texts = [part for item in items[:200] for part in (data.messages(item)[1]["content"], data.completion(item))]
        made = demo.tiny_vl_policy(0, texts) if config.dataset == "demo-images" else demo.demo_policy(0)
        made.model.double().lm_head.weight.data.mul_(3)
        made.save_folder(path)
    ranks.gathered([])
    return Policy.load(str(path), dtype=torch.float64, lora=0, template="plain", keep_reference=config.kl_coef > 0, critic=config.critic if config.advantage == "gae" else "")


def compute_in_float64(head: torch.nn.Linear) -> None:
    """The value head, between the fp32 states that it gets and the fp32 values that it returns."""
    head.double()
    head.register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    head.register_forward_hook(lambda module, inputs, values: values.float())


def with_tokens(policy, batch, fixed, weights, config, step, loss_of=train.loss_of):
    """A metric of one's own: the mean and the largest token id."""
    loss, stats = loss_of(policy, batch, fixed, weights, config, step)
    tokens, mask = batch.completion_ids.flatten(0, 1), batch.mask.flatten(0, 1)
    stats.mean("mean_token", tokens, weights[:, None] * mask)
    stats.max("token", tokens[mask])
    return loss, stats


def job(folder: Path, name: str, flags: str) -> None:
    given, _ = train.read_flags(flags.split())
    config = train.make_config({"full": True, "prompts": 5, "max_new": 6, "eval_every": 0, "eval_limit": 7, "steps": 3, "log_groups": 5} | ({} if name == "sft" else {"samples": 4}) | given)
    splits = train.load_splits(config)
    policy = wide(folder / f"{name}.model", config, splits["train"])
    if name == "ppo":
        compute_in_float64(policy.value_head)
    kept, gradients = [], {}
    collect, demonstrations, summed = train.collect, train.demonstrations, train.summed

    def watched(sampler):
        def sample(policy, items, config, step):
            rollouts, counts = sampler(policy, items, config, step)
            if name == "emptied":
                rollouts = [replace(r, group=r.group and 1) for r in rollouts if r.group in (0, 4)]
            kept.append([r.completion_ids for r in rollouts])
            return rollouts, counts
        return sample

    def recorded(policy, stats):
        found = summed(policy, stats)
        gradients.update({f"{len(gradients)}|{key}": p.grad.clone() for key, p in policy.trainable().items() if p.grad is not None})
        return found
    train.collect, train.demonstrations, train.summed = watched(collect), watched(demonstrations), recorded
    run = folder / f"{name}.run"
    run.mkdir(exist_ok=True)
    train.train(config, run, policy, splits)
    train.collect, train.demonstrations, train.summed = collect, demonstrations, summed
    if ranks.rank() == 0:
        save_file(gradients, folder / f"{name}.gradients")
        save_file({key: p.detach().contiguous() for key, p in policy.trainable().items()}, folder / f"{name}.weights")
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
        (folder / f"{name}.json").write_text(json.dumps({"tokens": kept, "metrics": metrics, "logged": len((run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines())}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.start()
    train.make_optimizer, evaluation.graded, train.loss_of = sgd, graded, with_tokens
    for name in sys.argv[2:] or SETTINGS:
        job(Path(sys.argv[1]), name, SETTINGS[name])
