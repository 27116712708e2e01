"""The training loop: sample, grade, compare, update; then evaluate, log, save.

Read it with Med-RLVR (arXiv 2502.19655), section 3, or DeepSeekMath (arXiv 2402.03300), Algorithm 1: `train` below is that algorithm, top to bottom.
Every algorithm is a row of `ALGOS`: settings of the same weighted sum, none has code of its own.
`python train.py` trains the demo in about two minutes on a laptop; `python train.py --dataset medqa` is the paper's task on one GPU.
"""
import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
import demo
import eval as evaluation
import grpo
import policy as policies
import preflight
import ranks
import rewards
import runs
from config import Config
from data import UsageError
from metrics import Stats, over_steps
from policy import Policy, Rollout, collate
from ranks import say
from support import report


DEFAULTS = {name: source.defaults for name, source in data.LOADERS.items()}
DEMO_ALGOS = {         # what the demo needs beside them; settings that worked in trials
    "ppo": dict(full=False, lora=16, critic="lora", critic_warmup=16, lr=1e-3, value_lr=3e-3),
    "sft": dict(prompts=32),
    # One optimiser step a rollout: at the demo's rate of 1e-3 four are too many. DAPO then samples
    # 0.91 after 100 steps, not 0.98. GSPO was not tried with four.
    "dapo": dict(minibatches=1),
    "gspo": dict(minibatches=1),
}

# One row an algorithm: the words in which it differs from GRPO. Where a paper's normaliser differs from ours by a constant factor, the README says so.
ALGOS = {
    "grpo": dict(scale="std", weights="sequence", kl="k3", kl_coef=0.04),                     # arXiv 2402.03300; beta 0.04 as in Visual-RFT and kin
    "dr_grpo": dict(scale="none", weights="constant"),                                        # arXiv 2503.20783
    # arXiv 2503.14476. Our choice: 4 optimiser steps a rollout, where the paper takes 16. With one
    # the ratio is always 1 and the clip cannot act; so it is in gspo too, where 4 are the paper's.
    "dapo": dict(scale="std", weights="token", clip_high=0.28, dynamic=True, w_overlong=1.0,
                 minibatches=4),
    "rloo": dict(scale="none", leave_one_out=True, weights="constant"),                       # arXiv 2402.14740
    "gspo": dict(scale="std", weights="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4,
                 minibatches=4),        # all of it arXiv 2507.18071, section 5.1
    "ppo": dict(advantage="gae", weights="sequence", kl="k1", kl_coef=0.01, minibatches=4),   # arXiv 1707.06347; Med-RLVR, section 3
    "sft": dict(samples=1, weights="token", temperature=1.0),                                 # cross-entropy on the completion only
}

# A recipe is a whole published setting; flags beat it, and it beats the data set's defaults.
# "task": what is learned from what: data, model, prompt, lengths, reward. It stays with any --algo.
# "algorithm": what the paper chose for its own algorithm. With another --algo it is left out, so
# that the other's row holds: GSPO keeps its clips, SFT its one completion an item. The size of a
# rollout belongs here (1,024 prompts of one sample each are PPO's, a group needs several samples),
# and with it the number of steps, the learning rates and their schedule, which fit that size only.
RECIPES = {
    # Med-RLVR (arXiv 2502.19655) gives the task, model, algorithm and reward. Its numbers are not
    # public: those of OpenRLHF, which it used, as they stood that week (commit 2734223,
    # train_ppo_ray.py) fill the gaps. Rollouts there are 1,024 prompts with one sample each,
    # trained in batches of 128.
    "med-rlvr": {
        "task": dict(
            dataset="medqa", model="Qwen/Qwen2.5-3B", reward="med-rlvr", strict=False,  # the paper
            max_prompt=1024, max_new=1024,  # OpenRLHF
            template="plain",  # our choice, and with it the stop at </answer>
        ),
        "algorithm": dict(
            algo="ppo",  # the paper
            gamma=1.0, lam=0.95, clip_low=0.2, clip_high=0.2, value_clip=0.2,  # OpenRLHF
            kl="k1", kl_coef=0.01,  # OpenRLHF
            samples=1, prompts=1024, minibatches=8, updates=1, temperature=1.0,  # OpenRLHF
            max_grad_norm=1.0, weight_decay=0.0, beta2=0.95,  # OpenRLHF
            # Our choice: 10 times OpenRLHF's 1e-6 and 9e-6. Those are for all weights, these for
            # adapters.
            lr=1e-5, value_lr=9e-5,
            # Our choice: OpenRLHF has a separate full critic (see the README on memory).
            critic="lora", critic_warmup=2,
            schedule="cosine", warmup=0.03,  # OpenRLHF: over 3% of the steps
            steps=100,  # our choice
        ),
    },
    # VRFT-Aug (arXiv 2602.10619) trains Qwen2.5-VL-3B by GRPO; nothing else about its numbers is
    # public. Those of Visual-RFT, VLM-R1 and MedLoc-R1 fill the gaps. The data set is our choice,
    # and so are learning rate, steps and lengths, which stand in the data set's defaults. v-rft is
    # the paper's baseline.
    "v-rft": {
        "task": dict(dataset="retinamnist", reward="acc-format", w_format=1.0),
        "algorithm": dict(
            algo="grpo", samples=8, kl_coef=0.04, clip_low=0.2, clip_high=0.2, temperature=1.0
        ),
    },
}
# Of its four augmentations three are flags; the fourth, boxes first, is a run of its own before:
# --recipe v-rft --task localize, then --init. -0.5: our choice, with the sign that generalised
# better in the paper.
AUGMENTED = dict(knowledge="class", reward="fuzzy", fuzzy="tenth", recite=-0.5)
RECIPES["vrft-aug"] = RECIPES["v-rft"] | {"task": RECIPES["v-rft"]["task"] | AUGMENTED}


NON_FINITE = 5                                          # steps in a row without a finite update after which a run is stopped
SIZES = ("micro_batch", "sample_rows")                  # chosen by preflight.py, for memory only


# --------------------------------------------------------------------------------------------- the loop
def train(config: Config, run: Path, policy: Policy, splits: dict, stopping: list[int] | tuple = ()) -> None:
    """From the newest checkpoint to config.steps, or until a signal's number stands in `stopping`.

    All randomness is a function of (seed, step), so a resumed run does what the first would have done.
    """
    optimizer = make_optimizer(policy, config)
    first, state = runs.restore(run, policy, optimizer)
    config = replace(config, **{name: state.get(name, getattr(config, name)) for name in SIZES})                         # those that fitted then
    log = runs.Log(run, first)
    history = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    begin = config.tau
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="train", unit="step", disable=None if ranks.rank() == 0 else True)
    for step in bar:
        start = time.perf_counter()
        if config.box_reward == "tighten":
            config = replace(config, tau=tightened(history, begin, config))
        rollouts, counts = (demonstrations if config.algo == "sft" else collect)(policy, splits["train"], config, step)       # sample and grade
        sampled = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, group["base_lr"])
        metrics = {"step": step + 1, **counts, **describe(rollouts)}
        if rollouts:
            if config.advantage == "group":
                set_advantages(rollouts, config)
            metrics |= update(policy, optimizer, rollouts, config, step)                      # compare and learn
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "kl_coef": config.kl_coef, "temperature": config.temperature}
        metrics |= {"tau": config.tau} if config.box_reward == "tighten" else {}
        if config.eval_every and (step + 1) % config.eval_every == 0:
            dev, _ = evaluation.evaluate(policy, splits["dev"], config, samples=0, label="dev ")
            metrics |= {f"dev_{name}": dev[name] for name in ("accuracy", "ci95", "kappa", "mean_iou") if name in dev}
        history.append(metrics)
        if found := alarms(history):
            metrics["alarms"] = found
        # Demonstrations are all right: equal rewards are no trouble there.
        trouble = [] if config.algo == "sft" else troubles(history)
        for message in (*trouble, *(f"ALARM: {text}" for text in found)):
            say(f"step {step + 1}: {message}")
        shown = rollouts[:config.log_groups * config.samples]
        look_closer(policy, shown, config)
        log.write(metrics, shown,
                  {"sample_s": sampled - start, "step_s": time.perf_counter() - start, "tokens": sum(len(r.completion_ids) for r in rollouts), "micro_batch": config.micro_batch})
        if config.report_every and ranks.rank() == 0 and (step + 1) % config.report_every == 0:
            report.write(run, items=splits["train"])
        figures = {name: f"{metrics[name]:.3f}" for name in ("reward", "accuracy", "length") if name in metrics}
        bar.set_postfix(figures)
        if bar.disable and (step + 1) % 10 == 0:                                              # no terminal: a line now and then
            say(f"step {step + 1} of {config.steps}: {', '.join(f'{name} {value}' for name, value in figures.items())}, {time.perf_counter() - start:.1f} s")
        secure(run, policy, optimizer, history, config, stopping)
    log.close()


def secure(run: Path, policy: Policy, optimizer, history: list[dict], config: Config, stopping) -> None:
    """The checkpoints that are due after a step; and the end of the run where a signal or five bad steps in a row ask for it."""
    step, dev = history[-1]["step"], [m["dev_accuracy"] for m in history if "dev_accuracy" in m]
    save = lambda **kwargs: runs.save_checkpoint(run, policy, optimizer, step, config.keep, {name: getattr(config, name) for name in SIZES}, **kwargs)
    if "dev_accuracy" in history[-1] and dev[-1] > max(dev[:-1], default=-1):
        save(best=True)                                                                       # first: once the next one is there, this step is not done again
    stopping = ranks.gathered(list(stopping))                                                # a signal may reach one process a step before another
    hopeless = len(history) >= NON_FINITE and all(m.get("skipped") == 1 for m in history[-NON_FINITE:])
    if step == config.steps or (config.save_every and step % config.save_every == 0) or stopping or hopeless:
        save()
    if hopeless:
        raise UsageError(f"{NON_FINITE} steps in a row had no finite loss and gradient; the checkpoint of step {step} is kept. "
                         f"A smaller --lr or --max-grad-norm would help, in a new run from --init {run}")
    if stopping and step < config.steps:
        say(f"stopped after step {step}; go on with: python train.py --resume {run}")
        raise SystemExit(128 + stopping[0])


@contextmanager
def stop_signals():
    """Within it SIGINT and SIGTERM let the step finish: their number appears in the list. A second one ends the process at once."""
    seen: list[int] = []
    def handler(number, frame):
        if seen and (ranks.world() == 1 or number in seen):                                   # torchrun sends SIGTERM after the SIGINT that all got
            os._exit(128 + number)
        seen.append(number)
        say("stopping when this step is done and written; once more stops at once")
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()      # Python's rule
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield seen
    finally:
        for number, old in zip(numbers, before):
            signal.signal(number, old)


def collect(policy: Policy, items: list, config: Config, step: int) -> tuple[list[Rollout], dict]:
    """The graded rollouts of one step, groups numbered 0..P-1. Under --dynamic without the groups that are all right or all wrong, refilled."""
    kept: list[Rollout] = []
    dropped, rounds = 0, config.refills + 1 if config.dynamic else 1
    for k in range(rounds):
        missing = config.prompts - len(kept) // config.samples
        if not missing:
            break
        batch = data.batch_for_step(items, step, missing, (config.seed, k) if k else config.seed)
        mine, rollouts = ranks.share(missing), []
        while (first := mine.start + len(rollouts) // config.samples) < mine.stop:
            part = batch[first:min(mine.stop, first + max(1, config.sample_rows // config.samples))]
            try:
                rollouts += policy.sample(part, config.samples, config.max_new, config.temperature, fold(config.seed, step, k), first_row=first * config.samples, style=config.style)
            except torch.OutOfMemoryError:
                config.sample_rows = preflight.smaller(config, "sample_rows", f"step {step + 1}")
        rollouts = ranks.gathered(rollouts)
        for first in range(0, len(rollouts), config.samples):
            group = [evaluation.graded(rollout, config) for rollout in rollouts[first:first + config.samples]]
            if config.dynamic and len({rollout.correct for rollout in group}) == 1:
                dropped += 1
                continue
            if group[0].pictures is None:                                                     # sampled by another process
                group[0].pictures = policy.look(group[0].item, group[0].prompt_ids)
            for rollout in group:
                rollout.group = len(kept) // config.samples
            kept += group
    unfilled = config.prompts - len(kept) // config.samples
    if not kept:
        say(f"step {step + 1}: every group was all right or all wrong after {rounds} rounds; the update is skipped. Harder or easier items would help")
    return kept, {"groups_dropped": dropped, "groups_unfilled": unfilled} if config.dynamic else {}


def demonstrations(policy: Policy, items: list, config: Config, step: int) -> tuple[list[Rollout], dict]:
    """Supervised fine-tuning in the same loop: rollouts that nobody sampled, one an item, which say what `data.completion` teaches."""
    batch = data.batch_for_step(items, step, config.prompts, config.seed)
    return [demonstration(policy, item, group, config) for group, item in enumerate(batch)], {}


def demonstration(policy: Policy, item, group: int, config: Config) -> Rollout:
    started = policy.start(item, group, config.style)
    return evaluation.graded(policy.written(started, data.completion(started.item, config.style), end=True), config)


def set_advantages(rollouts: list[Rollout], config: Config) -> None:
    advantages = grpo.group_advantages(torch.tensor([r.reward for r in rollouts], dtype=torch.float32), torch.tensor([r.group for r in rollouts]),
                                       config.scale, leave_one_out=config.leave_one_out)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage


@dataclass
class Fixed:
    """What an update compares the policy with, all [P, G, T] and without gradient; None where the algorithm does not need it."""
    advantages: Tensor
    sampled: Tensor                     # log-probs recorded while sampling
    old: Tensor | None = None           # the policy's before the first optimiser step; None where there is only one: then they are its own
    ref: Tensor | None = None           # the reference's
    values: Tensor | None = None        # the critic's, before the first optimiser step
    returns: Tensor | None = None       # what the critic should have said

    def rows(self, prompts: Tensor, T: int) -> "Fixed":
        """Of some prompts, as rows: [P, G, T] -> [N, T]"""
        return Fixed(*(x if x is None else x[prompts, :, :T].flatten(0, 1) for x in vars(self).values()))


def update(
    policy: Policy, optimizer, rollouts: list[Rollout], config: Config, step: int
) -> dict[str, float]:
    """config.updates passes of config.minibatches optimiser steps over one rollout.

    Returns the metrics: means over the optimiser steps, or their maximum.

    The loss of an optimiser step is one weighted sum over its rows. The weights are fixed before the first micro-batch, so micro-batches are parts of a sum.
    """
    batch = collate(rollouts, policy.device)
    P, G, T = batch.mask.shape
    spread = lambda values: torch.zeros(P, G, T, device=policy.device).masked_scatter(batch.mask, torch.tensor(values, device=policy.device))
    fixed = Fixed(advantages=spread([r.advantage for r in rollouts for _ in r.completion_ids]), sampled=spread([x for r in rollouts for x in r.sample_logps]))
    gae = config.advantage == "gae"
    if gae or config.updates * config.minibatches > 1:
        fixed.old, fixed.values = halving(lambda: scored(policy, batch, config), config, f"step {step + 1}")
    if config.kl_coef and config.algo != "sft":
        with policy.reference():
            fixed.ref, _ = halving(lambda: scored(policy, batch, config, values_too=False), config, f"step {step + 1}")
    first = gae_advantages(fixed, batch, [r.reward for r in rollouts], config) if gae else {}
    history = []
    for epoch in range(config.updates):
        order = torch.randperm(P, generator=torch.Generator().manual_seed(fold(config.seed, step, "order", epoch)))
        for mini in order.tensor_split(min(config.minibatches, P)):
            weights = grpo.token_weights(batch.mask[mini].sum(2).flatten(), config.weights, config.max_new).view(-1, G)
            stats = halving(lambda: accumulate(policy, batch, fixed, mini, weights, config, step), config, f"step {step + 1}")
            # Each by itself: a large error of the critic must not shrink the policy's step.
            for part in ("policy", "critic") if gae else ("policy",):
                parameters = list(policy.trainable(part).values())
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                stats.sum(f"{part}_grad_norm", norm)
            finite = all(math.isfinite(figure) for figure in stats.figures().values())
            stats.sum("skipped", not finite)
            if finite:
                optimizer.step()
            else:
                bad = [row for row, logps in enumerate(scored(policy, batch, config, values_too=False)[0].flatten(0, 1)) if not logps.isfinite().all()]
                say(f"step {step + 1}: loss {stats['loss']}, gradient norm {stats['policy_grad_norm']}: this update is skipped and the weights stay. "
                    + (f"Rows without finite log-probs: {bad[:8]}, of items {sorted({rollouts[row].item.id for row in bad[:8]})}" if bad else "The log-probs of every row are finite"))
            optimizer.zero_grad(set_to_none=True)
            history.append(stats)
    # The gap of the first step only, before any weight moved: how far sampler and scorer differ.
    gap = {"max_sampler_gap": history[0]["max_sampler_gap"]}
    return over_steps(history) | first | gap


def halving(work, config: Config, where: str):
    """work(), and again with half the micro-batch whenever memory runs out. The new size stays in force and is written to the checkpoint."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            config.micro_batch = preflight.smaller(config, "micro_batch", where)


def accumulate(policy: Policy, batch: policies.Batch, fixed: Fixed, mini: Tensor, weights: Tensor,
               config: Config, step: int) -> Stats:
    """The gradient of one optimiser step, a micro-batch at a time, and its metrics.

    mini: the indices of its prompts; weights [len(mini), G].
    """
    stats = Stats()
    for p in policy.trainable().values():
        p.grad = None                                                                         # what a first try that ran out of memory left
    for part in shares(len(mini), config.micro_batch):
        some = batch.prompts(mini[part])
        fixed_rows = fixed.rows(mini[part], some.mask.shape[2])
        loss, of_part = loss_of(policy, some, fixed_rows, weights[part].flatten(), config, step)
        loss.backward()
        stats.merge(of_part)
    return summed(policy, stats)


def shares(n: int, size: int) -> list[Tensor]:
    """The indices 0..n-1 that are this process's, in micro-batches of `size`; 0 = all at once."""
    mine, size = ranks.share(n), size or max(n, 1)
    return [torch.arange(first, min(first + size, mine.stop)) for first in mine[::size]]


def summed(policy: Policy, stats: Stats) -> Stats:
    """The gradient and the metrics of all processes together.

    The token weights already hold the normaliser, so gradients are added, not averaged.
    """
    moved_here = [name for name, p in policy.trainable().items() if p.grad is not None]
    everyone = ranks.gathered([(stats, moved_here)])
    for name, p in policy.trainable().items():
        if any(name in moved for _, moved in everyone):                                       # not in the critic's warm-up, for one
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            ranks.add_up(p.grad)
    merged = Stats()
    for of_one, _ in everyone:
        merged.merge(of_one)
    return merged


def gae_advantages(fixed: Fixed, batch: policies.Batch, rewards: list[float], config: Config) -> dict:
    """PPO's signal (Med-RLVR, section 3): each token's reward is -kl_coef log(pi / ref), the last one's also the grader's. Fills in advantages and returns."""
    rows, mask = (lambda x: x.flatten(0, 1)), batch.mask.flatten(0, 1)                        # [P, G, T] -> [N, T]
    per_token = torch.zeros_like(rows(fixed.old))
    kl = grpo.kl_term(rows(fixed.old), rows(fixed.ref), "k1") * mask if fixed.ref is not None else per_token
    last = mask.sum(1) - 1                                                                    # [N] the last counted token, the EOS where one was sampled
    per_token[torch.arange(len(last)), last] = torch.tensor(rewards, dtype=per_token.dtype, device=per_token.device)
    values = rows(fixed.values)
    advantages, returns = grpo.gae(per_token - config.kl_coef * kl, values, mask, config.gamma, config.lam)
    fixed.advantages, fixed.returns = grpo.whiten(advantages, mask).view_as(fixed.old), returns.view_as(fixed.old)
    return {"kl": float(kl.sum() / mask.sum()), "explained_variance": float(grpo.explained_variance(values, returns, mask)),
            "value": float((values * mask).sum() / mask.sum())}


def loss_of(policy: Policy, batch: policies.Batch, fixed: Fixed, weights: Tensor, config: Config,
            step: int) -> tuple[Tensor, Stats]:
    """What these rows contribute to the loss and to its metrics. weights [N]

    A metric of your own is one line here: `stats.mean("logp", logps, each)`.
    """
    scores = policy.score(batch, config.temperature)
    logps, mask = scores.logps.flatten(0, 1), batch.mask.flatten(0, 1)                        # [N, T]
    each = weights[:, None] * mask                                                            # [N, T] the weight of each token
    if config.algo == "sft":
        loss, stats = -(each * logps).sum(), Stats()
        stats.max("max_sampler_gap", 0.0)                                     # nobody sampled these
    else:
        old = logps.detach() if fixed.old is None else fixed.old
        loss, stats = grpo.policy_loss(
            logps, old, fixed.advantages, mask, weights, clip_low=config.clip_low,
            clip_high=config.clip_high, ratio=config.ratio, dual_clip=config.dual_clip or None)
        stats.max("max_sampler_gap", (logps - fixed.sampled).abs()[mask])
    if fixed.returns is not None:
        error = grpo.value_loss(scores.values.flatten(0, 1), fixed.values, fixed.returns, mask, weights, config.value_clip or None)
        loss = error + (loss if step >= config.critic_warmup else 0.0)
        stats.mean("value_loss", error / each.sum(), each.sum())              # from a weighted sum
    elif fixed.ref is not None:
        kl = grpo.kl_term(logps, fixed.ref, config.kl)                        # [N, T]
        loss = loss + config.kl_coef * (each * kl).sum()
        stats.mean("kl", kl, each)
    stats.sum("loss", loss)
    stats.mean("entropy", scores.entropy.flatten(0, 1), each)
    return loss, stats


@torch.no_grad()
def scored(policy: Policy, batch: policies.Batch, config: Config, values_too: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probs and, where there is a critic, values, without gradient, a micro-batch at a time. -> [P, G, T] x 2"""
    logps, values = torch.zeros(batch.mask.shape, device=policy.device), torch.zeros(batch.mask.shape, device=policy.device)
    for some in shares(len(logps), config.micro_batch):
        part = batch.prompts(some)
        scores = policy.score(part, config.temperature, values_too)
        logps[some, :, :part.mask.shape[2]] = scores.logps
        if scores.values is not None:
            values[some, :, :part.mask.shape[2]] = scores.values
    ranks.add_up(logps, values)
    return logps, values


@torch.no_grad()
def look_closer(policy: Policy, rollouts: list[Rollout], config: Config) -> None:
    """What rollouts.jsonl and the report say of some rollouts after the update: the stage and, of each token, its entropy and pi / pi_sampled."""
    for first in range(0, len(rollouts), config.samples):
        group = rollouts[first:first + config.samples]
        scores = policy.score(collate(group, policy.device), config.temperature, values_too=False)
        for r, logps, entropy in zip(group, scores.logps[0].tolist(), scores.entropy[0].tolist()):
            r.closer = {"stage": rewards.stage(r.parsed, r.item, len(r.completion_ids)), "predicted": r.predicted, "pieces": [policy.tokenizer.decode([token]) for token in r.completion_ids],
                        "entropy": [round(x, 3) for x in entropy[:len(r.completion_ids)]]}
            if config.algo != "sft":                                                          # nobody sampled those
                r.closer["ratio"] = [round(math.exp(min(new - old, 50.0)), 3) for new, old in zip(logps, r.sample_logps)]


def describe(rollouts: list[Rollout]) -> dict:
    """The metrics of a step's rollouts: means over completions. Empty where none was kept."""
    if not rollouts:
        return {}
    mean = lambda values: sum(values) / len(rollouts)
    groups: dict[int, list] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    stages = [rewards.stage(r.parsed, r.item, len(r.completion_ids)) for r in rollouts]
    boxes = {"box_spread": statistics.pstdev(sum(r.parts["box"] for r in group) / len(group) for group in groups.values())} if rollouts[0].item.task == "localize" else {}
    return boxes | {"reward": mean(r.reward for r in rollouts), "accuracy": mean(r.correct for r in rollouts), "think_words": mean(len(r.parsed.think.split()) for r in rollouts),
            "stages": {name: stages.count(name) / len(stages) for name in rewards.STAGES},
            "length": mean(len(r.completion_ids) for r in rollouts), "groups_equal": sum(len({r.reward for r in group}) == 1 for group in groups.values()) / len(groups),
            **{f"part_{name}": mean(r.parts[name] for r in rollouts) for name in rollouts[0].parts}}


def tightened(history: list[dict], tau: float, config: Config) -> float:
    """MedLoc-R1's threshold (arXiv 2603.28120) for the next step: it rises from `tau` once the policy masters it, to config.tau_end.

    Mastered: over the last 30 groups enough boxes reach it, with little spread between groups, and the mean IoU is 0.1 above it; then half the groups are
    forgotten. It is a function of the metrics so far, so that a resumed run goes on with the same. Limits and steps come from a third party's port.
    """
    window: list[dict] = []
    steps = math.ceil(30 / config.prompts)
    for metrics in history:
        window = [*window, metrics][-steps:]
        mean = lambda name: sum(m.get(name, 0.0) for m in window) / len(window)
        enough, spread = next((least, most) for above, least, most in ((.75, .55, .40), (.60, .75, .35), (0, .80, .20)) if tau >= above)
        if len(window) == steps and mean("part_box") >= enough and mean("box_spread") <= spread and mean("part_iou") >= tau + .1:
            tau = min(config.tau_end, tau + (.15 if tau < .55 else .10 if tau < .75 else .05))
            window = window[(steps + 1) // 2:]
    return tau


def troubles(history: list[dict], window: int = 5) -> list[str]:
    """Why nothing may be learned, and what to do; looked at after 5, 10, 20, 40, ... steps, so that it is said but does not fill the screen."""
    last, times = [m for m in history[-window:] if "reward" in m], len(history) // window
    if len(history) % window or len(last) < window or times & (times - 1):
        return []
    found, words = [], f"in the last {window} steps"
    if all(m["groups_equal"] == 1 for m in last):
        always = f", always {last[0]['reward']:.2f}" if len({m["reward"] for m in last}) == 1 else ""
        found.append(f"every group {words} had equal rewards{always}: nothing is learned from "
                     "them. Look at rollouts.jsonl; --algo sft first, which teaches the form too, "
                     "then --init with its run, other items, or a higher --temperature would help")
    if all(m["part_truncated"] == 1 for m in last):
        found.append(f"every completion {words} was cut at --max-new: raise it, or see in rollouts.jsonl why none ends")
    return found


def alarms(history: list[dict], window: int = 5, back: int = 10) -> list[str]:
    """Signs of reward hacking: the reward has risen over the last `back` steps (means of `window`), while what it should stand for has fallen."""
    mean = lambda name, steps: sum(m[name] for m in steps) / len(steps)
    history = [m for m in history if "reward" in m]
    if len(history) < back + window or len(history) % back:                                   # looked at every `back` steps
        return []
    then, now = history[-back - window:-back], history[-window:]
    if mean("reward", now) <= mean("reward", then) + .02:
        return []
    rose = f"reward rose from {mean('reward', then):.2f} to {mean('reward', now):.2f}"
    found = []
    if mean("think_words", now) < .8 * mean("think_words", then):
        found.append(f"{rose} while thinking shrank from {mean('think_words', then):.0f} to {mean('think_words', now):.0f} words")
    dev = [m["dev_accuracy"] for m in history[-back - window:] if "dev_accuracy" in m]
    if len(dev) > 1 and dev[-1] < dev[0] - .05:
        found.append(f"{rose} while held-out accuracy fell from {dev[0]:.2f} to {dev[-1]:.2f}")
    moved = [sum(m["stages"]["step-by-step exploit"] for m in part) / window for part in (then, now)]
    if moved[1] > moved[0] + .2:
        found.append(f"{rose} while reasoning moved in front of <think> (step-by-step exploit) in {moved[1]:.0%} of completions, from {moved[0]:.0%}; see --w-before")
    return found


# --------------------------------------------------------------------------------------------- optimiser, seeds
def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """Two groups, in this order: the policy, and the critic with a learning rate of its own."""
    groups = [{"params": list(policy.trainable(part).values()), "lr": lr, "base_lr": lr} for part, lr in (("policy", config.lr), ("critic", config.value_lr))]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: Config, peak: float) -> float:
    """The rate of step 0, 1, ..., S - 1: the policy's for peak = lr, the critic's for value_lr.

    With s = step + 1, W steps of warm-up and S = config.steps:
        s < W:            peak s / W
        then, constant:   peak
        then, cosine:     peak (0.1 + 0.9 (1 + cos(pi (s - W) / (S - W))) / 2)
    The cosine is OpenRLHF's cosine_with_min_lr, whose s counts from 0: there the first step of a
    warm-up moves nothing. OpenRLHF counts optimiser steps, here a step is a rollout.
    """
    s, S, W = step + 1, config.steps, config.warmup
    if W < 1:
        W = math.ceil(W * S)
    if s < W:
        return peak * s / W
    if config.schedule == "constant":
        return peak
    progress = (s - W) / max(1, S - W)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def fold(*parts) -> int:
    """Any parts -> a 64-bit seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


# --------------------------------------------------------------------------------------------- setting up
def load_splits(config: Config) -> dict[str, list]:
    """train, dev and test, no item in two of them; what was dropped is said."""
    splits = {name: data.load(config.dataset, name, config.data_dir or None, task=config.task) for name in data.SPLITS}
    for name, held_out in (("dev", splits["test"]), ("train", splits["dev"] + splits["test"])):
        kept = data.without(splits[name], held_out)
        if len(kept) < len(splits[name]):
            say(f"{config.dataset}: {len(splits[name]) - len(kept)} items of {name} stand in a held-out split too: dropped from {name}")
        if not kept:
            raise UsageError(f"{config.dataset}: no item of {name} is left that is not held out")
        splits[name] = kept
    if config.shots:
        splits["train"] = data.few_shot(splits["train"], config.shots, config.seed)
    splits = {name: items[:(config.limit if name == "train" else config.eval_limit) or None] for name, items in splits.items()}
    splits = {name: data.with_knowledge(items, config.dataset, config.knowledge, config.knowledge_file) for name, items in splits.items()}
    if config.shuffle_options:
        splits = {name: [data.shuffle_options(item, config.seed) for item in items] for name, items in splits.items()}
    return splits


def first_policy(config: Config, run: Path, splits: dict, results: dict, dry_run: bool = False) -> None:
    """The demo's model: random, taught and spoilt (see `demo.warm_start`), then saved as a model folder in the run."""
    seed = fold(config.seed, "model")
    if splits["train"][0].image is not None or config.model == "tiny-vl":
        texts = [part for item in splits["train"][:200] for part in (data.messages(item)[1]["content"], data.completion(item))]
        policy = demo.tiny_vl_policy(seed, texts, train_vision=True)
    else:
        policy = demo.demo_policy(seed)
    if config.model == "tiny-vl" or dry_run:
        stages = ()
    else:
        say("a tiny model is made first, taught the task and then spoilt: one to two minutes on a CPU")
        stages = demo.warm_start(policy, splits["train"], config)
    for name in stages:
        if name == "clean":
            results["clean"], _ = evaluation.evaluate(policy, splits["test"], config, samples=config.eval_samples, label="clean warm start ")
    if ranks.rank() == 0:
        policy.save_folder(run / "model")


def validate(config: Config) -> None:
    """Combinations that cannot work, before any model or data is touched."""
    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise UsageError(message)
    refuse(config.samples < 2 and config.advantage == "group" and config.algo != "sft", f"--samples {config.samples}: {config.algo} compares the samples of a group, and a group of 1 has nothing to compare; use at least 2")
    data.source_of(config.dataset, config.data_dir, config.task)
    refuse(not config.model and config.dataset not in ("demo", "demo-images"), f"--dataset {config.dataset} needs --model: a Hugging Face folder or hub name")
    for least, names in ((1, ("prompts", "samples", "sample_rows", "max_new", "max_prompt", "steps", "updates", "minibatches", "keep")),
                         (0, ("micro_batch", "eval_samples", "eval_every", "save_every", "min_think", "refills", "limit", "eval_limit", "warmup", "critic_warmup", "kl_coef", "shots", "max_pixels",
                              "w_leak", "w_before", "w_short", "w_overlong", "log_groups", "report_every", "value_clip", "dual_clip"))):
        for name in names:
            refuse(not getattr(config, name) >= least, f"--{name.replace('_', '-')} must be at least {least}")
    refuse(config.temperature <= 0, "--temperature must be above 0 in training: greedy samples of a group are all the same")
    refuse(config.hackable and (config.dataset != "demo" or bool(config.model)), "--hackable is for the demo and its own model")
    refuse(config.algo == "sft" and config.samples != 1, "--algo sft learns one completion an item: leave --samples at 1")
    gae = config.advantage == "gae"
    refuse(config.kl == "k1" and not gae, "--kl k1 in a loss has no gradient in expectation (see grpo.kl_term): use k2 or k3")
    refuse(gae and config.kl != "k1", f"--advantage gae puts the KL into the reward, where it must be --kl k1, not {config.kl}")
    refuse(gae and config.dynamic, "--dynamic filters groups, and --advantage gae compares with a critic: leave one out")
    refuse(not 0 <= config.beta2 < 1 or config.weight_decay < 0 or not config.max_grad_norm > 0, "--beta2 must be in [0, 1), --weight-decay at least 0, --max-grad-norm above 0")
    refuse(not 0 <= config.gamma <= 1 or not 0 <= config.lam <= 1, "--gamma and --lam must be in [0, 1]")
    refuse(config.critic == "lora" and config.advantage == "gae" and config.full, "--critic lora needs a frozen base: not with --full; use --critic head")
    refuse(config.lora < 1 and not config.full, "--lora 0 trains nothing: use --full to train all weights")
    refuse(not 0 <= config.w_format <= 1, "--w-format must be between 0 and 1: a format reward above the 1 of a right answer would be the goal")
    try:
        rewards.fuzzy_tables(config.fuzzy)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    refuse(not -1 <= config.recite <= 1, "--recite must be between -1 and 1: beyond that reciting would weigh more than a right answer")
    refuse(not 0 < config.tau <= 1 or not 0 < config.tau_end <= 1, "--tau and --tau-end must be above 0 and at most 1")
    refuse(config.box_reward == "tighten" and config.tau > config.tau_end, f"--box-reward tighten raises --tau {config.tau} to --tau-end {config.tau_end}: the first must not be the larger")
    refuse(bool(config.knowledge_file) and config.knowledge == "none", "--knowledge-file is only read with --knowledge task or class")
    refuse(bool(config.recite) and config.knowledge == "none", "--recite compares with the knowledge in the prompt: give --knowledge task or class")
    refuse(not 0 < config.overlong_share <= 1, "--overlong-share must be above 0 and at most 1")
    refuse(not 0 < config.lr < 1 or not 0 < config.value_lr < 1, "--lr and --value-lr must be above 0 and below 1")
    refuse(not 0 <= config.clip_low < 1 or config.clip_high < 0, "--clip-low must be in [0, 1) and --clip-high at least 0")


GONE = {
    "--target": "use --dataset bccd-rbc or --dataset bccd-platelets; bccd is the white cells",
    "--balanced": "repeat the items of rarer classes in a JSONL file of your own",
}


def read_flags(argv: list[str] | None) -> tuple[dict, Path | None]:
    """The flags that were given, by field name, and the folder of --resume."""
    p = evaluation.Parser(prog="train.py", description="Reinforcement fine-tuning with verifiable rewards. Without flags: the demo. "
                          "What a data set or a recipe needs stands before the defaults below: LOADERS in data.py, RECIPES in train.py.", allow_abbrev=False)
    p.add_argument("--recipe", choices=tuple(RECIPES), default=argparse.SUPPRESS, help="a published setting; flags beat it")
    p.add_argument("--export", metavar="DIR", default=argparse.SUPPRESS, help="at the end, write the trained model as a plain Hugging Face folder; with --resume also of a run that is done")
    p.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS, help="only check everything, print the memory table and run the longest batch; nothing is written")
    p.add_argument("--resume", metavar="RUN",
                   help="go on with a run where its newest checkpoint stands; of the flags only "
                   "--steps (with a constant learning rate) and --device may change")
    for f in fields(Config):
        options = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default), "choices": f.metadata["choices"]}
        p.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options,
                       help=f"{f.metadata['help']} (default {'as --algo has it' if any(f.name in row for row in ALGOS.values()) else repr(f.default)})")
    args, unknown = p.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if flag in ("--top-p", "--top-k"):
            raise UsageError(f"{flag} is not for training: tokens that the sampler never draws would still have probability in the loss")
        if flag in GONE:
            raise UsageError(f"{flag} is gone: {GONE[flag]}")
        close = difflib.get_close_matches(flag, [option for action in p._actions for option in action.option_strings], 1)
        raise UsageError(f"unknown flag {unknown[0]}" + (f": did you mean {close[0]}?" if close else ": see --help"))
    given = vars(args)
    resume = given.pop("resume")
    return given, Path(resume) if resume else None


def make_config(given: dict) -> Config:
    """The algorithm's row, then the data set's defaults, then the recipe, then the flags."""
    recipe = RECIPES.get(given.pop("recipe", ""), {"task": {}, "algorithm": {}})
    dataset = given.get("dataset", recipe["task"].get("dataset", Config.dataset))
    own_algo = recipe["algorithm"].get("algo", Config.algo)
    algo = given.get("algo", own_algo)
    published = recipe["task"] | (recipe["algorithm"] if algo == own_algo else {})
    demo = DEMO_ALGOS.get(algo, {}) if dataset in ("demo", "demo-images") else {}
    defaults = dict(DEFAULTS.get(dataset, {}))
    if algo == "sft":
        defaults.pop("samples", None)
    if given.get("hackable"):
        demo = demo | dict(max_new=40, steps=60)
    return Config(**(ALGOS[algo] | defaults | demo | published | given))


def resumed_config(run: Path, given: dict) -> Config:
    saved = runs.read_run(str(run))
    if not saved:
        raise UsageError(f"--resume {run}: there is no run.json; a run folder is what --out named")
    if set(saved) != {f.name for f in fields(Config)}:
        raise UsageError(f"--resume {run}: that run was written by another version of train.py")
    changed = [name for name, value in given.items() if name not in ("steps", "device", "out") and value != saved.get(name)]
    if changed:
        name = changed[0]
        if name == "recipe":
            raise UsageError(f"--resume {run}: a run keeps the settings it began with; leave --recipe out")
        raise UsageError(f"--resume {run}: that run has --{name.replace('_', '-')} {saved[name]!r}, not {given[name]!r}; start a new run to change it")
    done = runs.newest_checkpoint(run)
    if done and given.get("steps", saved["steps"]) < int(done.name):
        raise UsageError(f"--resume {run}: --steps {given['steps']}, and that run stands at step {int(done.name)} already")
    depends = saved["schedule"] == "cosine" or 0 < saved["warmup"] < 1
    if depends and given.get("steps", saved["steps"]) != saved["steps"]:
        raise UsageError(f"--resume {run}: its learning rates were laid out over its --steps "
                         f"{saved['steps']} (--schedule {saved['schedule']}, --warmup "
                         f"{saved['warmup']}): leave --steps out, or begin a new run with "
                         f"--init {run}")
    return Config(**(saved | given | {"out": str(run)}))


def next_free(config: Config) -> str:
    stem = f"runs/{Path(config.dataset).stem}-{config.algo}"
    return next(path for n in range(1, 10**6) if not Path(path := f"{stem}-{n}").exists())


def main(argv: list[str] | None = None) -> None:
    began = time.perf_counter()
    policies.quiet()
    ranks.start()
    given, resume = read_flags(argv)
    export = given.pop("export", "")
    if export and Path(export).exists():
        raise UsageError(f"--export {export} exists: name a new folder")
    if given.pop("dry_run", False):
        if not resume and given.get("out") and Path(given["out"]).exists():
            raise UsageError(f"--out {given['out']} exists: go on with it by --resume {given['out']}, or name another folder")
        with tempfile.TemporaryDirectory() as folder:
            return main_run(given | {"out": f"{folder}/run"}, None, began, dry_run=True)
    main_run(given, resume, began, export)


def export_folder(policy: Policy, run: Path, folder: Path, config: Config, results: dict) -> None:
    """The trained policy as a plain Hugging Face folder: adapters merged, tokenizer, generation config, and a README with the run's facts."""
    beside = folder.with_name(f"{folder.name}.tmp")
    policy.merge()
    with runs.writing(run, f"the export {folder}"):
        policy.save_folder(beside)
        facts = "\n".join(f"- {name}: {value}" for name, value in asdict(config).items() if value not in ("", 0, False))
        (beside / "README.md").write_text(f"# {config.model or config.dataset}, trained by {config.algo} on {config.dataset}\n\nOn the test split before: {evaluation.as_line(results['before'])}.\n"
                                          f"After: {evaluation.as_line(results['after'])}.\n\nResearch only, no medical device.{' AutoProcessor needs torchvision.' if policy.image_processor else ''} Settings of the run {run.name}:\n\n{facts}\n", encoding="utf-8")
        for path in beside.iterdir():
            path.chmod(0o644)                                                                 # safetensors writes files that only their owner may read
        beside.rename(folder)
    print(f"exported to {folder}")


def main_run(given: dict, resume: Path | None, began: float, export: str = "", dry_run: bool = False) -> None:
    config = resumed_config(resume, given) if resume else make_config(given)
    validate(config)
    name = config.out or next_free(config)
    name, there = ranks.gathered([(name, Path(name).exists())])[0]                            # before the first process makes it
    run = Path(name)
    if there and not resume:
        raise UsageError(f"--out {run} exists: go on with it by --resume {run}, or name another folder")
    config.out = str(run)
    policies.pick_device(config.device)                                                       # a GPU that is not there is said before anything is loaded
    if config.model not in runs.MADE_HERE:
        preflight.check_hub(config)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)                                                              # so small that threads wait for each other: 0 to 20% slower, but beside other work 5 times faster
    splits = load_splits(config)
    facts = {"config": asdict(config), "data": {name: data.set_fingerprint(items) for name, items in splits.items()},
             "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
             "machine": {"threads": torch.get_num_threads(), "device": policies.pick_device(config.device), "processes": ranks.world()}}
    if resume:
        saved = runs.read_json(run / "run.json", "start a new run")
        if saved["data"] != facts["data"]:
            raise UsageError(f"--resume {run}: the data set is not the one that this run began with")
        if changed := [name for name in ("versions", "machine") if saved.get(name) != facts[name]]:
            say(f"this run began with {', '.join(str(saved.get(name)) for name in changed)}, and here it is {', '.join(str(facts[name]) for name in changed)}: "
                "it goes on, equal up to rounding and no longer bit for bit")
    results = runs.read_json(run / "eval.json", "delete it, and the evaluations are made again") if resume and (run / "eval.json").exists() else {}
    init = runs.initial_weights(config, run)
    if config.model in runs.MADE_HERE and ranks.gathered([not (run / "model" / "config.json").exists()])[0]:
        run.mkdir(parents=True, exist_ok=True)
        runs.write_json(run / "run.json", facts)                                                   # so that a kill from here on leaves a run to resume
        if not config.init:
            first_policy(config, run, splits, results, dry_run)
            runs.write_json(run / "eval.json", results)
        elif ranks.rank() == 0:
            shutil.copytree(runs.run_of(config.init)[0] / "model", run / "model")
        ranks.gathered([])                                                                        # the model is there for all
    policy = Policy.load(runs.base_model(run, asdict(config)), policies.pick_device(config.device), checkpointing=config.checkpointing,
                         keep_reference=config.kl_coef > 0 and config.algo != "sft", critic=config.critic if config.advantage == "gae" else "",
                         init=init, **runs.policy_settings(asdict(config)))
    splits = {name: evaluation.fitting(policy, items, config, f"{name}: ") for name, items in splits.items()}
    if sizes := resume and saved.get("sizes"):
        config, policy.head_chunk = replace(config, **{name: sizes[name] for name in SIZES}), sizes["head_chunk"]
    else:
        config = preflight.preflight(policy, splits["train"], config)
    facts["sizes"] = {name: getattr(config, name) for name in SIZES} | {"head_chunk": policy.head_chunk}
    if dry_run:
        return print(f"dry run: {len(splits['train'])} items to train on; nothing was written") if ranks.rank() == 0 else None
    run.mkdir(parents=True, exist_ok=True)
    runs.write_json(run / "run.json", facts)
    if init is not None and ranks.rank() == 0:
        save_file(init, run / "init.safetensors")
    say(f"run folder {run}")
    if "before" not in results:
        results["before"], _ = evaluation.evaluate(policy, splits["test"], config, samples=config.eval_samples, seed=config.seed, label="before ")
        runs.write_json(run / "eval.json", results)
        say(f"before: {evaluation.as_line(results['before'])}")
    with stop_signals() as stopping:
        train(config, run, policy, splits, stopping)
    results["after"], _ = evaluation.evaluate(policy, splits["test"], config, samples=config.eval_samples, seed=config.seed, label="after ")
    runs.write_json(run / "eval.json", results)
    say(f"after: {evaluation.as_line(results['after'])}")
    if ranks.rank():
        return
    report.write(run, items=splits["train"])
    before, after = results["before"], results["after"]
    shown = lambda r: f"{r['accuracy']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]" + (f" (sampled {r['sampled_accuracy']:.3f})" if "sampled_accuracy" in r else "")
    print(f"{run}: accuracy {shown(before)} -> {shown(after)}, n {after['n']}, {time.perf_counter() - began:.0f} s; see {run / 'report.html'}")
    if export:
        export_folder(policy, run, Path(export), config, results)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume RUN goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
