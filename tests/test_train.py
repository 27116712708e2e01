"""The loop: one gradient whatever the micro-batch, and a resumed run that is the same run."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import refused
from training import (
    CONFIG,
    QUICK,
    Mover,
    Recorder,
    artefacts,
    emerged,
    read,
    rollouts_for,
    rows,
    run,
    weights_of,
)

import data
import grpo
import rewards
import train
from benchmarks.one_step import OneStep, sampled_and_graded, update
from policy import Policy, collate
from support import cli
from support.config import Config
from support.demo_model import demo_policy

ROOT = Path(train.__file__).parent
TRAIN = data.load("demo", "train")


# ---------------------------------------------------------------------------------------- exactness
FULL = "--full --kl-coef 0.02 --epochs 2 --minibatches 2".split()
ADAPTERS = "--no-full --lora 4 --algo dapo".split()


@pytest.mark.parametrize("flags", [FULL, ADAPTERS])
def test_a_resumed_run_is_the_same_run(model_dir, tmp_path, flags):
    whole = run(model_dir, tmp_path / "whole", *flags)
    half = run(model_dir, tmp_path / "half", *flags, "--steps", "3")
    later = json.dumps({"step": 9, "text": "a\u2028b\u0085c"}, ensure_ascii=False)
    with (half / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(later + "\n")
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward"')  # as a kill in the middle of a line would leave it
    train.main(["--resume", str(half), "--steps", "6"])
    assert artefacts(half) == artefacts(whole)
    assert [line["step"] for line in rows(half / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_same_seed_same_first_samples(model_dir):
    def said(step: int) -> list[list[int]]:
        policy = Policy.load(model_dir, lora=4)
        return [r.completion_ids for r in sampled_and_graded(policy, TRAIN, CONFIG, step)]

    assert said(5) == said(5) != said(6)


def test_running_out_of_memory_goes_on_from_the_newest_checkpoint_with_half(
    model_dir, tmp_path, monkeypatch, capsys
):
    flags = "--no-full --lora 4 --micro-batch 2 --kl-coef 0.04".split()
    whole = run(model_dir, tmp_path / "whole", *flags)
    out, score = tmp_path / "out", Policy.score

    def limited(self, batch, *args, **kwargs):
        late = any((out / f"checkpoints/00000{step}").exists() for step in (3, 4, 5, 6))
        if late and len(batch.mask) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no more")
        return score(self, batch, *args, **kwargs)

    monkeypatch.setattr(Policy, "score", limited)
    limit = 1
    run(model_dir, out, *flags)
    assert "training: out of memory; from here on --micro-batch 1" in capsys.readouterr().err
    assert read(out / "run.json")["sizes"]["micro_batch"] == 1
    for mine, other in zip(rows(out / "rollouts.jsonl"), rows(whole / "rollouts.jsonl")):
        assert mine["text"] == other["text"]
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(out)[name], weight, rtol=0, atol=1e-4)
    limit = 0
    refused(lambda: train.main(["--resume", str(out), "--steps", "7"]), "one prompt at a time")


# ----------------------------------------------------------------------------------- one gradient
@pytest.mark.parametrize("algo", [algo for algo in train.ALGOS if algo != "sft"])
def test_micro_batches_and_order_cannot_change_the_gradient(algo, model_dir):
    config = replace(CONFIG, **train.ALGOS[algo] | dict(dynamic=False, minibatches=1))
    critic = "head" if algo == "ppo" else ""
    policy = Policy.load(model_dir, lora=0, keep_reference=True, critic=critic)
    rollouts = rollouts_for(policy, config)
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    shuffled = random.Random(0).sample(rollouts, len(rollouts))
    gradients, metrics = [], []
    for micro_batch, order in ((0, rollouts), *((n, rollouts) for n in (1, 2, 3)), (0, shuffled)):
        recorder = Recorder(policy)
        some = replace(config, micro_batch=micro_batch)
        metrics.append(update(policy, recorder, order, some))
        gradients += recorder.seen
    assert len(gradients) == 5 and gradients[0].norm() > 0
    for gradient, values in zip(gradients[1:], metrics[1:]):
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-6
        assert values == pytest.approx(metrics[0], abs=1e-5)


def test_old_logps_are_scored_in_the_micro_batches_of_the_loss(model_dir, monkeypatch):
    """In bf16 other rows beside it, or more padding, change a row's rounding, and with it rho."""
    config = replace(CONFIG, prompts=5, epochs=2, minibatches=2, micro_batch=2)
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, config)
    score, seen = policy.score, {False: [], True: []}

    def recorded(batch, *args):
        seen[torch.is_grad_enabled()].append((batch.prompt_ids.tolist(), batch.mask.tolist()))
        return score(batch, *args)

    monkeypatch.setattr(policy, "score", recorded)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    metrics = update(policy, optimizer, rollouts, config)
    assert seen[True] == 2 * seen[False]
    assert [len(mask) for _, mask in seen[False]] == [2, 1, 2]
    assert len({len(prompts[0]) for prompts, _ in seen[False]}) > 1  # padding differs, and is equal
    assert metrics["max_ratio"] == 1  # not up to rounding


def test_shuffled_rollouts_have_the_same_advantages(model_dir):
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    for i, rollout in enumerate(rollouts):
        rollout.reward = i**0.5  # each its own, to be known by
    expected = {}
    for rollout in rollouts:
        of_group = [other.reward for other in rollouts if other.group == rollout.group]
        expected[rollout.reward] = rollout.reward - sum(of_group) / 4
    for seed in range(3):
        batch = collate(random.Random(seed).sample(rollouts, len(rollouts)))
        advantages = grpo.group_advantages(batch.rewards, "none").flatten().tolist()
        for reward, advantage in zip(batch.rewards.flatten().tolist(), advantages):
            nearest = min(expected, key=lambda known: abs(known - reward))
            assert advantage == pytest.approx(expected[nearest], abs=1e-6)


def with_loss(monkeypatch, change) -> None:
    """loss_of, and then `change(loss, stats, batch)` of what it returns."""
    real = train.loss_of

    def changed(policy, batch, config, step):
        loss, stats = real(policy, batch, config, step)
        return change(loss, stats, batch), stats

    monkeypatch.setattr(train, "loss_of", changed)


@pytest.mark.parametrize("weights", ["sequence", "token", "constant"])
def test_a_metric_of_ones_own_is_the_same_for_every_micro_batch(weights, model_dir, monkeypatch):
    """The mean and the largest token id of the completions, against the same by hand."""
    config = replace(CONFIG, weights=weights)
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, config)
    ids = [rollout.completion_ids for rollout in rollouts]
    assert len({len(row) for row in ids}) > 1
    if weights == "sequence":
        expected = sum(sum(row) / len(row) for row in ids) / len(ids)
    else:
        expected = sum(map(sum, ids)) / sum(map(len, ids))

    def with_tokens(loss, stats, batch):
        stats.mean("mean_token", batch.completion_ids, batch.token_weights[..., None] * batch.mask)
        stats.max("token", batch.completion_ids[batch.mask])
        return loss

    with_loss(monkeypatch, with_tokens)
    for micro_batch in (1, 2, 4):
        some = replace(config, micro_batch=micro_batch)
        metrics = update(policy, Recorder(policy), rollouts, some)
        assert metrics["mean_token"] == pytest.approx(expected, rel=1e-6)
        assert metrics["token"] == max(map(max, ids))


@pytest.mark.parametrize("value", [1.0, torch.tensor(1.0)])
def test_a_metric_that_does_not_say_how_it_merges_is_refused(value, model_dir, monkeypatch):
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)

    def by_hand(loss, stats, batch):
        stats["mean_logp"] = value
        return loss

    with_loss(monkeypatch, by_hand)
    with pytest.raises(TypeError, match="stats.mean"):
        update(policy, Recorder(policy), rollouts, CONFIG)


def test_temperature_holds_for_sampler_scorer_and_reference(model_dir):
    """At 0.5 as at 1, log-probs of sampling are those of every later pass over the same weights."""
    config = replace(CONFIG, temperature=0.5, kl_coef=0.1, minibatches=2)
    policy = Policy.load(model_dir, lora=0, keep_reference=True)
    rollouts = rollouts_for(policy, config)
    batch = collate(rollouts)
    sampled = batch.sample_logps[batch.mask]
    logps, _ = train.score(policy, batch, config)
    torch.testing.assert_close(logps[batch.mask], sampled, rtol=0, atol=1e-4)
    at_one = policy.score(batch).logps[batch.mask]
    assert (at_one - sampled).abs().max() > 0.1  # or nothing would show
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    metrics = update(policy, optimizer, rollouts, config)
    assert metrics["max_sampler_gap"] < 1e-4
    assert metrics["max_ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(metrics["kl"]) < 1e-6


@pytest.mark.parametrize("algo", ["gspo", "dapo"])
def test_ratio_and_clip_act_with_the_rows_of_gspo_and_dapo(algo, model_dir):
    """On the first optimiser step of a rollout every ratio is 1: only a later one can differ."""
    row = train.ALGOS[algo] | dict(dynamic=False)  # every group is kept
    unclipped = row | dict(ratio="token", clip_low=0.999, clip_high=1e9)
    gradients = []
    for settings in (row, unclipped):
        config = replace(CONFIG, **settings)
        policy = Policy.load(model_dir, lora=0)
        mover = Mover(policy)
        update(policy, mover, rollouts_for(policy, config), config)
        gradients.append(mover.seen)
    assert [len(steps) for steps in gradients] == [4, 4]
    far = [float((a - b).norm() / b.norm()) for a, b in zip(*gradients)]
    assert far[0] < 1e-5 and max(far[1:]) > 0.01


def test_kl_is_positive_away_from_the_reference_and_the_update_reduces_it(model_dir):
    policy = Policy.load(model_dir, lora=0, keep_reference=True)
    head = policy.model.lm_head.weight
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        head.add_(torch.randn(head.shape, generator=generator) * 0.05)
    config = replace(CONFIG, kl_coef=1.0, kl="k2", prompts=8, max_grad_norm=1.0)
    rollouts = sampled_and_graded(policy, TRAIN, config)
    for rollout in rollouts:
        rollout.reward = 0.0  # only the KL acts
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.02)
    kls = [update(policy, optimizer, rollouts, config)["kl"] for _ in range(5)]
    assert 0 < kls[-1] < kls[0]


# ------------------------------------------------------------------------------------ the optimiser
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(model_dir, capsys):
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    rollouts[3].reward = float("nan")
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1)
    metrics = update(policy, optimizer, rollouts, CONFIG, step=41)
    assert all(torch.equal(before[name], p) for name, p in policy.trainable().items())
    assert metrics["skipped"] == 1 and "step 42: loss nan" in capsys.readouterr().err


def test_the_row_whose_log_probs_are_not_finite_is_named(model_dir, capsys):
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    score = policy.score

    def spoilt(batch, *args, **kwargs):
        scores = score(batch, *args, **kwargs)
        if len(batch.mask) == 4:
            scores.logps[2, 1] = float("inf")
        return scores

    policy.score = spoilt
    update(policy, train.make_optimizer(policy, CONFIG), rollouts, CONFIG)
    # Group 2, sample 1, of groups of 4.
    assert f"[9], of items ['{rollouts[9].item.id}']" in capsys.readouterr().err


def test_gradients_are_clipped_and_logged_before(model_dir):
    policy = Policy.load(model_dir, lora=0)
    recorder = Recorder(policy)
    config = replace(CONFIG, max_grad_norm=1e-3)
    metrics = update(policy, recorder, rollouts_for(policy, config), config)
    assert float(recorder.seen[0].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert metrics["policy_grad_norm"] > 1e-2


def rates(**settings) -> list[float]:
    config = Config(**settings)
    return [train.learning_rate(step, config, 1.0) for step in range(config.steps)]


# 0.1 + 0.9 (1 + cos(pi k / 4)) / 2 for k = 1, 2, 3, 4
FALLS = [0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1]


def test_the_learning_rate_by_hand():
    assert rates(steps=4, warmup=2) == [0.5, 1, 1, 1]
    assert rates(steps=2, warmup=0) == [1, 1]
    assert rates(steps=100, warmup=0.03)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(steps=6, warmup=2, schedule="cosine") == pytest.approx([0.5, 1, *FALLS])


@pytest.mark.parametrize("steps, warmup", [(100, 3), (10, 0), (7, 7)])
def test_the_cosine_is_transformers(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=0.1
    )
    theirs = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()  # its first step would be at 0
        theirs += scheduler.get_last_lr()
    assert rates(steps=steps, warmup=warmup, schedule="cosine") == pytest.approx(theirs)


def test_the_recipe_warms_up_over_3_percent_of_its_steps_then_falls_to_a_tenth():
    config = cli.make_config({"recipe": "med-rlvr", "steps": 200})
    found = [train.learning_rate(step, config, config.lr) for step in (0, 5, 199)]
    assert found == pytest.approx([1e-5 / 6, 1e-5, 1e-6])


def test_the_rate_in_use_is_logged_and_a_falling_one_keeps_its_steps(model_dir, tmp_path):
    flags = "--lr 0.01 --warmup 0 --schedule cosine --steps 4".split()
    out = run(model_dir, tmp_path / "run", *flags)
    logged = [line["lr"] for line in rows(out / "metrics.jsonl")]
    assert logged == pytest.approx([0.01 * x for x in FALLS])
    refused(
        lambda: train.main(["--resume", str(out), "--steps", "6"]), "--steps 4", "--schedule cosine"
    )
    train.main(["--resume", str(out), "--steps", "4"])  # the same number is no change
    share = run(model_dir, tmp_path / "share", "--warmup", "0.5", "--steps", "2")
    refused(
        lambda: train.main(["--resume", str(share), "--steps", "3"]), "--steps 2", "--warmup 0.5"
    )


# -------------------------------------------------------------------------------- dynamic sampling
def test_dapo_drops_equal_groups_refills_and_counts(model_dir):
    policy, log = Policy.load(model_dir, lora=0), OneStep(0)
    config = replace(CONFIG, dynamic=True, prompts=6)
    first = sampled_and_graded(policy, TRAIN, config)
    rollouts = train.refill(policy, first, TRAIN, config, 0, log)
    groups = [rollouts[i : i + 4] for i in range(0, len(rollouts), 4)]
    for number, group in enumerate(groups):
        assert {rollout.group for rollout in group} == {number}
        assert {rollout.correct for rollout in group} == {True, False}
        assert len({rollout.item.id for rollout in group}) == 1
    asked = [r.item for r in first[::4]]
    equal = [len({r.correct for r in first[i : i + 4]}) == 1 for i in range(0, 24, 4)]
    assert 0 < sum(equal) < 6  # or nothing would show
    assert log.metrics["groups_dropped"] >= sum(equal)
    assert log.metrics["groups_unfilled"] == 6 - len(groups)
    kept = [item for item, is_equal in zip(asked, equal) if not is_equal]
    assert [group[0].item for group in groups][: len(kept)] == kept
    assert len(groups) > len(kept)  # others were sampled


def test_a_step_whose_groups_are_all_equal_is_said_and_moves_nothing(
    model_dir, tmp_path, monkeypatch, capsys
):
    def never_right(rollouts, config, grade_all=rewards.grade_all):
        grade_all(rollouts, config)
        for rollout in rollouts:
            rollout.correct = False

    monkeypatch.setattr(rewards, "grade_all", never_right)
    flags = "--algo dapo --steps 1 --prompts 2".split()
    out = run(model_dir, tmp_path / "run", *flags, *QUICK)
    shown = capsys.readouterr().err
    assert "step 1: every group was all right or all wrong after 4 rounds; the update" in shown
    (metrics,) = rows(out / "metrics.jsonl")
    assert (metrics["groups_dropped"], metrics["groups_unfilled"]) == (8, 2)
    assert not {"policy_grad_norm", "skipped", "reward"} & set(metrics)  # there was no update
    for name, p in Policy.load(model_dir, lora=0).trainable().items():
        assert torch.equal(weights_of(out)[name], p)


# ----------------------------------------------------------------------- supervised fine-tuning
def test_sft_counts_completion_tokens_only(model_dir):
    policy = Policy.load(model_dir, lora=0)
    config = replace(CONFIG, **train.ALGOS["sft"] | dict(algo="sft"))
    taught = train.demonstrations(policy, TRAIN[:3], config)
    total = 0.0
    for rollout in taught:
        total -= policy.score(collate([replace(rollout, group=0)])).logps.sum().item()
    expected = total / sum(len(rollout.completion_ids) for rollout in taught)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    loss = update(policy, optimizer, taught, config)["loss"]
    assert loss == pytest.approx(expected, abs=1e-5)


def test_the_advice_for_no_reward_leads_to_reward():
    """SFT on questions without rationales, such as MedQA's.

    A random model that earned -1 on every sample then writes the form, and is right now and then.
    """
    questions = [replace(item, rationale="") for item in TRAIN[:100]]
    policy = demo_policy(0)
    config = replace(CONFIG, prompts=8, samples=8, max_new=16)
    sft = replace(config, **train.ALGOS["sft"] | dict(algo="sft", prompts=16, lr=5e-3))

    def earned() -> list[float]:
        return [rollout.reward for rollout in sampled_and_graded(policy, questions, config)]

    assert set(earned()) == {-1}
    optimizer = train.make_optimizer(policy, sft)
    for step in range(30):
        batch = data.batch_for_step(questions, step, sft.prompts, sft.seed)
        taught = train.demonstrations(policy, batch, sft)
        rewards.grade_all(taught, sft)
        assert {rollout.reward for rollout in taught} == {1}
        update(policy, optimizer, taught, sft, step)
    found = earned()
    assert found.count(-1) < len(found) / 2 and {0, 1} <= set(found)


# ---------------------------------------------------------------------------------------- the whole
def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    code += "import data, rewards, policy, grpo, train, eval"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_test_and_longer_courses_are_looked_at_before_and_after(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--steps", "1")
    result = read(out / "eval.json")
    assert list(result) == ["before", "after"]
    told = {"accuracy", "ci95", "n", "sampled_accuracy", "think_words", "faithful"}
    for found in (result["before"], result["before"]["ood"], result["after"]["ood"]):
        assert told <= set(found) and found["n"] == 12
    assert "ood" not in result["after"]["ood"]


ALGORITHMS = [
    pytest.param("grpo", marks=pytest.mark.slow),
    *(pytest.param(algo, marks=pytest.mark.study) for algo in ("dapo", "rloo")),
]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_reasoning_emerges(algo, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--algo", algo, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    emerged(read(tmp_path / "run" / "eval.json"), longer=0.7)
    assert done.stdout.count("\n") == 1 and str(tmp_path / "run") in done.stdout
