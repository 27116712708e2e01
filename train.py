"""The training loop: sample, grade, compare, update; then log, evaluate, save.

Read `train` with DeepSeekMath (arXiv 2402.03300), Algorithm 1, or with Med-RLVR (arXiv 2502.19655),
section 3: one iteration of its loop is one step here, and `loss_of` is its loss. The algorithms are
rows of `ALGOS` in grpo.py: settings of one weighted sum.
`python train.py` trains the demo on a laptop; `python train.py --dataset medqa` is the paper's task
on one GPU.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import data
import eval as evaluation
import grpo
import rewards
from grpo import ALGOS
from policy import Batch, Policy, Rollout, collate
from support import cli, distributed, errors, loading, memory, pass_rates, report, runs
from support.config import RECIPES, Config
from support.distributed import say
from support.errors import UsageError
from support.log import Log, stop_signals
from support.metrics import Stats
from support.seeds import fold
from support.splits import load_splits
from support.warm_start import first_policy

__all__ = ["ALGOS", "RECIPES", "Config", "loss_of", "main", "train"]
REFILLS = 3  # rounds of sampling for the groups that DAPO drops; our choice


# -------------------------------------------------------------------------------------- the loop
def train(  # noqa: C901, PLR0912, PLR0915 (the whole algorithm in sight)
    config: Config, policy: Policy, optimizer: torch.optim.Optimizer, splits: dict, log: Log
) -> None:
    """P prompts a step, G completions each, of at most T tokens; `log` knows which steps are left.

    All randomness is a function of (seed, step), so a resumed run does what the first would have
    done: on a CPU bit for bit, on a GPU up to rounding.
    """
    for step in log.steps():
        for group in optimizer.param_groups:  # the policy's, and the critic's
            peak = group.setdefault("initial_lr", group["lr"])
            group["lr"] = learning_rate(step, config, peak)

        # 1. Sample G completions of each of P questions; each prompt is computed once per group.
        questions = data.batch_for_step(splits["train"], step, config.prompts, config.seed)
        if config.algo == "sft":  # nobody samples: what the data set teaches to write
            rollouts = demonstrations(policy, questions, config)
        else:
            rollouts = evaluation.sample(policy, questions, config, fold(config.seed, step, 0))

        # 2. Reward: a rule, not a model, turns each completion into a number.
        rewards.grade_all(rollouts, config)
        if config.dynamic:  # DAPO: others for the groups that are all right or all wrong
            rollouts = refill(policy, rollouts, splits["train"], config, step, log)
        log.sampled(rollouts)

        # 3. Log-probs of the sampled tokens, without gradient: before the update, and reference.
        batch = collate(rollouts, policy.device)  # every field [P, G, T]
        if config.epochs * config.minibatches > 1 or config.advantage == "gae":
            batch.old_logps, batch.values = score(policy, batch, config)
        if config.kl_coef > 0 and config.algo != "sft":
            with policy.reference():
                batch.ref_logps, _ = score(policy, batch, config, values_too=False)

        # 4. Advantage: better than its siblings (GRPO), or than the critic expected (PPO)?
        if config.advantage == "gae":
            batch.advantages, batch.returns = ppo_advantages(batch, config, log)
        else:
            of_others = config.advantage == "others"
            of_row = grpo.group_advantages(batch.rewards, config.scale, of_others)
            batch.advantages = of_row[:, :, None].expand(batch.mask.shape)  # of every token alike

        # 5. Update: one optimiser step per minibatch; micro-batches are parts of its sum.
        for _ in range(config.epochs):
            for minibatch in batch.minibatches(config.minibatches):
                weights = grpo.token_weights(minibatch.mask.sum(2), config.weights, config.max_new)
                minibatch.token_weights = weights  # [P, G], over all rows of the optimiser step
                stats = Stats()
                for part in minibatch.split(config.micro_batch, distributed.share(len(weights))):
                    loss, of_part = loss_of(policy, part, config, step)
                    loss.backward()
                    stats.merge(of_part)
                if distributed.world > 1:
                    stats = distributed.add_gradients(policy.trainable(), stats)
                if clip_gradients(optimizer, config, stats):
                    optimizer.step()
                else:
                    say_skipped(policy, batch, rollouts, config, step, stats)
                optimizer.zero_grad(set_to_none=True)
                log.updated(stats)

        # 6. Log, evaluate, save: none of it changes the policy.
        if log.due(config.eval_every):
            dev, _ = evaluation.evaluate(policy, splits["dev"], config, samples=0, label="dev ")
            log.on_dev(dev)
        log.write(batch, lr=optimizer.param_groups[0]["lr"])
        log.save()


def loss_of(policy: Policy, batch: Batch, config: Config, step: int) -> tuple[Tensor, Stats]:
    """sum_i w_i sum_t [- min(rho A, clip(rho) A) + kl_coef KL]: what the rows of `batch` add to it.

    PPO has its KL in the rewards and the critic's error beside it; SFT is - sum_i w_i sum_t log pi.
    A metric of your own is one line here: `stats.mean("logp", logps, each)` weighs tokens as the
    loss does, `mask` in place of `each` gives the plain mean over tokens.
    """
    scores = policy.score(batch, config.temperature)
    logps, mask = scores.logps.flatten(0, 1), batch.mask.flatten(0, 1)  # [P, G, T] -> [N, T]
    weights = batch.token_weights.flatten()  # [N]
    each = weights[:, None] * mask  # [N, T] the weight of each counted token
    if config.algo == "sft":
        loss, stats = -(each * logps).sum(), Stats()
    else:
        # With one optimiser step a rollout the policy before the update is the policy itself.
        old_logps = logps.detach()
        if batch.old_logps is not None:
            old_logps = batch.old_logps.flatten(0, 1)
        loss, stats = grpo.policy_loss(
            logps,
            old_logps,
            batch.advantages.flatten(0, 1),
            mask,
            weights,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            ratio=config.ratio,
        )
        sampler_gap = (old_logps - batch.sample_logps.flatten(0, 1)).abs()
        stats.max("max_sampler_gap", sampler_gap * mask)
    if config.advantage == "gae":  # its KL is in the rewards
        parts = (scores.values, batch.values, batch.returns)
        values, old_values, returns = (x.flatten(0, 1) for x in parts)
        clip = config.value_clip or None
        error = grpo.value_loss(values, old_values, returns, mask, weights, clip)
        loss = error + (loss if step >= config.critic_warmup else 0.0)
        stats.mean("value_loss", error / each.sum(), each.sum())
    elif batch.ref_logps is not None:
        kl = grpo.kl_term(logps, batch.ref_logps.flatten(0, 1), config.kl)
        loss = loss + config.kl_coef * (each * kl).sum()
        stats.mean("kl", kl, each)
    stats.sum("loss", loss)
    stats.mean("entropy", scores.entropy.flatten(0, 1), each)
    return loss, stats


# ------------------------------------------------------------------------------- its six parts
def demonstrations(policy: Policy, items: list, config: Config) -> list[Rollout]:
    """Supervised fine-tuning in the same loop: one rollout an item, which nobody sampled."""
    rollouts = []
    for group, item in enumerate(items):
        started = policy.start(item, group, config.style)
        text = data.completion(started.item, config.style)
        rollouts.append(policy.written(started, text, end=True))
    return rollouts


def refill(
    policy: Policy, rollouts: list[Rollout], items: list, config: Config, step: int, log: Log
) -> list[Rollout]:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2).

    A group that is all right or all wrong does not tell right from wrong. It is dropped, even where
    its form still differs, and another question is sampled for it, at most REFILLS times a step.
    Groups are numbered anew.
    """
    kept: list[list[Rollout]] = []
    dropped = 0
    for k in range(1, REFILLS + 2):
        for first in range(0, len(rollouts), config.samples):
            group = rollouts[first : first + config.samples]
            if len({rollout.correct for rollout in group}) == 1:
                dropped += 1
            else:
                kept.append(group)
        missing = config.prompts - len(kept)
        if not missing or k > REFILLS:
            break
        questions = data.batch_for_step(items, step, missing, (config.seed, k))
        rollouts = evaluation.sample(policy, questions, config, fold(config.seed, step, k))
        rewards.grade_all(rollouts, config)
    for number, group in enumerate(kept):
        for rollout in group:
            rollout.group = number
    if not kept:
        say(
            f"step {step + 1}: every group was all right or all wrong after {REFILLS + 1} rounds; "
            "the update is skipped. Harder or easier items would help"
        )
    log.metrics |= {"groups_dropped": dropped, "groups_unfilled": missing}
    return [rollout for group in kept for rollout in group]


@torch.no_grad()
def score(
    policy: Policy, batch: Batch, config: Config, values_too: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and, where there is a critic, its values, of all completions. -> [P, G, T] x 2

    In the very micro-batches of the loss: in bf16 other rows beside it, or more padding, change a
    row's rounding, and the ratio pi / pi_old would show it before any weight has moved.
    """
    found = torch.zeros(2, *batch.mask.shape, device=policy.device)
    begin = 0  # the minibatch's first prompt
    for minibatch in batch.minibatches(config.minibatches):
        mine = distributed.share(len(minibatch.mask))
        first = begin + mine.start
        for part in minibatch.split(config.micro_batch, mine):
            scores = policy.score(part, config.temperature, values_too)
            rows = slice(first, first + len(part.mask))
            for kind, x in enumerate((scores.logps, scores.values)):
                if x is not None:
                    found[kind, rows, :, : x.shape[2]] = x
            first += len(part.mask)
        begin += len(minibatch.mask)
    if distributed.world > 1:
        distributed.add_up(found)
    return found[0], found[1] if policy.critic else None


def ppo_advantages(batch: Batch, config: Config, log: Log) -> tuple[Tensor, Tensor]:
    """PPO's signal (Med-RLVR, section 3) -> advantages, returns [P, G, T].

    The reward of token t is - kl_coef log(pi / ref), and of the last one also the grader's.
    """
    parts = (batch.mask, batch.old_logps, batch.values)
    mask, old_logps, values = (x.flatten(0, 1) for x in parts)  # [P, G, T] -> [N, T]
    kl = torch.zeros_like(old_logps)
    if batch.ref_logps is not None:
        kl = grpo.kl_term(old_logps, batch.ref_logps.flatten(0, 1), "k1") * mask
    token_rewards = -config.kl_coef * kl
    last = mask.sum(1) - 1  # [N] the last counted token, the EOS where one was sampled
    token_rewards[torch.arange(len(last)), last] += batch.rewards.flatten()
    advantages, returns = grpo.gae(token_rewards, values, mask, config.gamma, config.gae_lambda)
    log.metrics |= {
        "kl": float(kl.sum() / mask.sum()),
        "value": float((values * mask).sum() / mask.sum()),
        "explained_variance": float(grpo.explained_variance(values, returns, mask)),
    }
    shape = batch.mask.shape
    return grpo.whiten(advantages, mask).view(shape), returns.view(shape)


# ------------------------------------------------------------------------------- the optimiser
def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """Two groups: the policy, and the critic with a learning rate of its own.

    beta2 and no weight decay: OpenRLHF's.
    """
    groups = []
    for part, lr in (("policy", config.lr), ("critic", config.value_lr)):
        if parameters := list(policy.trainable(part).values()):
            groups.append({"params": parameters, "lr": lr})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def clip_gradients(optimizer: torch.optim.Optimizer, config: Config, stats: Stats) -> bool:
    """Scale gradients down to max_grad_norm -> whether they and the loss are finite.

    Each part by itself: a large error of the critic must not shrink the policy's step.
    """
    for part, group in zip(("policy", "critic"), optimizer.param_groups):
        norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        stats.sum(f"{part}_grad_norm", norm)
    finite = all(math.isfinite(figure) for figure in stats.figures().values())
    stats.sum("skipped", not finite)
    return finite


def say_skipped(
    policy: Policy, batch: Batch, rollouts: list[Rollout], config: Config, step: int, stats: Stats
) -> None:
    """An update that is not finite never reaches the weights; which rows may be the reason."""
    logps, _ = score(policy, batch, config, values_too=False)
    finite = logps.isfinite().all(2).flatten().tolist()
    rows = [row for row, is_finite in enumerate(finite) if not is_finite][:8]
    reason = "The log-probs of every row are finite"
    if rows:
        items = sorted({rollouts[row].item.id for row in rows})
        reason = f"Rows without finite log-probs: {rows}, of items {items}"
    say(
        f"step {step + 1}: loss {stats['loss']}, gradient norm {stats['policy_grad_norm']}: this "
        f"update is skipped and the weights stay. {reason}"
    )


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


# ---------------------------------------------------------------------------- from flags to a run
def main(argv: list[str] | None = None) -> None:
    """A new run, one that goes on, or (--dry-run) only a look at what it would take."""
    loading.quiet()
    distributed.start()
    given, resume = cli.read_flags(argv)
    export, dry_run = given.pop("export", ""), given.pop("dry_run", False)
    if export and Path(export).exists():
        raise UsageError(f"--export {export} exists: name a new folder")
    if not dry_run:
        main_run(given, resume, export)
    elif resume:
        raise UsageError("--dry-run is for a new run: leave --resume out")
    else:
        runs.free_folder(given.get("out", ""))
        with tempfile.TemporaryDirectory() as folder:
            main_run(given | {"out": f"{folder}/run"}, None, dry_run=True)


def main_run(given: dict, resume: Path | None, export: str = "", dry_run: bool = False) -> None:
    """Check, load, evaluate, train, evaluate, report."""
    began = time.perf_counter()
    config = runs.resumed_config(resume, given) if resume else cli.make_config(given)
    cli.validate(config)
    config.out = str(resume) if resume else runs.free_folder(config.out, config)
    run = Path(config.out)
    device = loading.pick_device(config.device)  # said before anything is loaded
    if config.model in runs.MADE_HERE:
        loading.one_thread()
    else:
        memory.check_hub(config)
    splits = load_splits(config)
    facts = runs.facts_of(config, splits, device)
    results = runs.unfinished(run, facts) if resume else {}
    if "micro_batch" in given:
        facts.pop("sizes", None)  # those that the run began with
    init = runs.initial_weights(config, run)
    make_first_model(config, run, splits, facts, dry_run)
    policy = runs.new_policy(config, run, device, init)
    for name, items in splits.items():
        splits[name] = evaluation.fitting(policy, items, config, f"{name}: ")
    config = memory.chosen_sizes(policy, splits["train"], config, facts)
    if dry_run:
        first_look(policy, splits["train"], config)
        if distributed.rank == 0:
            print(f"dry run: {len(splits['train'])} items to train on; nothing was written")
        return
    runs.write_beginning(run, facts, init)
    if "before" not in results:
        look_at_test("before", policy, splits, config, results)
    policy = train_within_memory(config, run, policy, splits, facts, init)
    look_at_test("after", policy, splits, config, results)
    if distributed.rank:
        return
    report.write(run, items=splits["train"])
    seconds = time.perf_counter() - began
    print(f"{run}: {evaluation.change(results)}, {seconds:.0f} s; see {run / 'report.html'}")
    if export:
        told = [f"{when}: {evaluation.as_line(results[when])}" for when in ("before", "after")]
        runs.export(policy, run, Path(export), config, ["On the test split", *told])


def train_on(
    config: Config, run: Path, policy: Policy, splits: dict, stopping: Sequence[int] = ()
) -> None:
    """`train`, from the newest checkpoint of the run to config.steps.

    stopping: the run ends after the step in which a signal's number appears there.
    """
    optimizer = make_optimizer(policy, config)
    log = Log(run, policy, optimizer, config, stopping)
    with log.progress:
        train(config, policy, optimizer, splits, log)


def train_within_memory(
    config: Config, run: Path, policy: Policy, splits: dict, facts: dict, init: dict | None
) -> Policy:
    """`train_on`, and where memory runs out in a step: again, with half the prompts a pass.

    Then it goes on as any resumed run does, from the newest checkpoint or from the beginning, so
    nothing of the step that failed is left.
    """
    with stop_signals() as stopping:
        while True:
            try:
                train_on(config, run, policy, splits, stopping)
                return policy
            except RuntimeError as error:
                if not errors.ran_out(error):
                    raise
            # The exception held what the step had made: it ended with its block.
            sizes = memory.sizes_of(policy, config)  # sampling may have found fewer rows
            # The caller holds the policy too, and its weights must go before others come: from
            # here on nobody may use it.
            vars(policy).clear()
            config = memory.halved(config, "training")
            facts["sizes"] = sizes | {"micro_batch": config.micro_batch}
            if distributed.world > 1:
                raise UsageError(
                    "the other processes cannot be called back in the middle of a step; go on with "
                    f"--resume {run} --micro-batch {config.micro_batch}"
                )
            runs.write_json(run / "run.json", facts)
            policy = runs.new_policy(config, run, facts["machine"]["device"], init)
            config = memory.chosen_sizes(policy, splits["train"], config, facts)


def first_look(policy: Policy, items: list, config: Config) -> None:
    """Can this learn? Say what G completions of each of 32 questions would teach.

    With one completion an item, as PPO may have it, 8 are sampled.
    """
    if config.algo == "sft" or (config.model in runs.MADE_HERE and not config.init):
        return  # nobody samples, or the model has not had its warm start
    questions = data.batch_for_step(items, 0, min(32, len(items)), config.seed)
    rollouts = evaluation.answer(
        policy,
        questions,
        config,
        n=config.samples if config.samples > 1 else 8,
        temperature=config.temperature,
        seed=fold(config.seed, "first look"),
        label="first look",
    )
    for line in pass_rates.told(rollouts, config):
        say(line)


def look_at_test(when: str, policy: Policy, splits: dict, config: Config, results: dict) -> None:
    """Accuracy on test, which is looked at before and after only, into eval.json.

    Under "ood" the same figures of the further test split, where the data set has one.
    """
    found = {}
    for name in ("test", data.OOD):
        if name in splits:
            found[name], _ = evaluation.evaluate(
                policy,
                splits[name],
                config,
                samples=config.eval_samples,
                seed=config.seed,
                label=f"{when} {name} ",
            )
            say(f"{when}, {name}: {evaluation.as_line(found[name])}")
    results[when] = found.pop("test") | found
    runs.write_json(Path(config.out) / "eval.json", results)


def make_first_model(config: Config, run: Path, splits: dict, facts: dict, dry_run: bool) -> None:
    """A model that is made in code lies in the run folder, so that a resumed run has the same."""
    there = (run / "model" / "config.json").exists()
    if config.model not in runs.MADE_HERE or distributed.gathered([there])[0]:
        return
    run.mkdir(parents=True, exist_ok=True)
    runs.write_json(run / "run.json", facts)  # a kill from here on leaves a run to resume
    if config.init:
        if distributed.rank == 0:
            shutil.copytree(runs.run_of(config.init)[0] / "model", run / "model")
    else:
        policy = first_policy(config, splits["train"], warm=not dry_run)
        if distributed.rank == 0:
            policy.save_folder(run / "model")
    distributed.gathered([])  # the model is there for all


if __name__ == "__main__":
    errors.run(main, "train.py")
