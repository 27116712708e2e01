"""PPO's signal by brute force, and the critic: what it reads, what moves it, that it learns."""

from dataclasses import replace

import pytest
import torch
from training import (
    CONFIG,
    QUICK,
    adapted,
    emerged,
    made_up,
    read,
    rows,
    run,
    shaken,
    weights_of,
)

import data
import rewards
import train
from benchmarks.one_step import OneStep, update
from policy import Batch, Policy, collate
from support import runs
from support.config import Config
from support.demo_model import demo_policy


def by_the_double_sum(rewards: list, values: list, gamma: float, lam: float) -> list[float]:
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, of one completion."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [r + gamma * later - v for r, v, later in zip(rewards, values, following)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("has_reference", [True, False])
def test_ppo_signal_by_brute_force(has_reference):
    """r_t = -beta (log pi - log ref), plus the grade on the last counted token; whitened."""
    torch.manual_seed(0)
    lengths, T = torch.tensor([[3, 1], [4, 2]]), 4
    mask = torch.arange(T) < lengths[..., None]
    old, ref, values = (torch.randn(2, 2, T) * mask for _ in range(3))
    grades = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    batch = Batch(None, None, None, mask, grades, None, [])
    batch.old_logps, batch.values = old, values
    batch.ref_logps = ref if has_reference else None
    kl = (old - ref) if has_reference else torch.zeros_like(old)
    config = Config(advantage="gae", kl="k1", kl_coef=0.1, gamma=0.9, gae_lambda=0.8)
    log = OneStep(0)
    advantages, returns = train.ppo_advantages(batch, config, log)
    raw, expected_returns = [], []
    for p in range(2):
        for g in range(2):
            n = int(lengths[p, g])
            rewards = [-0.1 * float(kl[p, g, t]) for t in range(n)]
            rewards[-1] += float(grades[p, g])
            mine = values[p, g, :n].tolist()
            found = by_the_double_sum(rewards, mine, 0.9, 0.8)
            raw += found
            expected_returns += [a + v for a, v in zip(found, mine)]
    raw = torch.tensor(raw, dtype=torch.float64)
    whitened = (raw - raw.mean()) / raw.std(unbiased=False)
    torch.testing.assert_close(advantages[mask].double(), whitened, rtol=0, atol=1e-5)
    torch.testing.assert_close(returns[mask], torch.tensor(expected_returns), rtol=0, atol=1e-6)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    assert log.metrics["kl"] == pytest.approx(float(kl[mask].mean()), abs=1e-6)
    assert log.metrics["value"] == pytest.approx(float(values[mask].mean()), abs=1e-6)


# ------------------------------------------------------------------------------------ the critic
def critic_on_the_copy(**kwargs) -> Policy:
    """All weights of the demo's random model are trained; the critic adapts the frozen copy."""
    made = demo_policy(0)
    return Policy(made.model, made.tokenizer, lora=0, critic="lora", critic_rank=4, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_critic_adapters_get_their_own_gradient(full, checkpointing, items):
    """With checkpointing the layers run again in the backward pass, after the switch has gone back.

    The critic's gradient must be the same as without it.
    """
    if full:
        policy = shaken(critic_on_the_copy(checkpointing=checkpointing))
    else:
        policy = shaken(adapted(critic="lora", checkpointing=checkpointing))
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    passes = []
    inside = (policy.frozen or policy.model).get_decoder().layers[0].mlp
    hook = inside.register_forward_pre_hook(lambda *_: passes.append(policy.switch["adapters"]))
    scores = policy.score(batch)
    (scores.values.square().sum() + scores.logps.sum()).backward()
    hook.remove()
    assert passes.count("critic") == 1 + checkpointing
    of_value = {name: p.grad.clone() for name, p in policy.trainable().items()}
    of_critic = policy.trainable("critic")
    assert all(of_value[name].norm() > 0 for name in of_critic)
    assert set(of_critic) | set(policy.trainable("policy")) == set(of_value)
    # By hand: the same without any switching in between.
    with policy.adapters("critic", policy.frozen):
        for p in policy.trainable().values():
            p.grad = None
        expected = policy.score(batch).values
        expected.square().sum().backward()
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-5)
    for name, p in of_critic.items():
        torch.testing.assert_close(of_value[name], p.grad, rtol=1e-4, atol=1e-5)


def test_on_the_frozen_copy_critic_and_reference_leave_each_other_alone(items):
    """Adapters on: the critic; off: the reference, bit for bit, whatever the two others learn."""
    first = shaken(critic_on_the_copy())
    begun = {name: p.detach().clone() for name, p in first.trainable().items()}
    policy = critic_on_the_copy(init=begun)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    expected = policy.score(batch).logps.detach()
    assert torch.equal(expected, first.score(batch).logps)  # it begins at the other run's policy
    assert policy.score(batch).values.count_nonzero() == 0  # and with a critic of its own
    shaken(policy)
    with policy.reference(), torch.no_grad():
        assert torch.equal(policy.score(batch, values_too=False).logps, expected)
    scores = policy.score(batch)
    assert not torch.equal(scores.logps, expected) and scores.values.all(-1).any()

    of_policy, of_critic = (policy.trainable(part).values() for part in ("policy", "critic"))
    scores.values.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in of_policy) and all(p.grad.norm() > 0 for p in of_critic)
    of_value = [p.grad.clone() for p in of_critic]
    scores.logps.sum().backward()
    assert all(p.grad is not None for p in of_policy)
    assert all(torch.equal(p.grad, before) for p, before in zip(of_critic, of_value))
    trained = [*of_policy, *of_critic]
    others = [p for p in policy.frozen.parameters() if not any(p is mine for mine in trained)]
    assert others and all(p.grad is None for p in others)


def test_value_head_reads_the_policy_and_never_moves_it(items):
    policy = shaken(adapted(critic="head"))
    rollouts = made_up(policy, items[:2], [[4, 2], [3, 5]])
    batch = collate(rollouts)
    policy.score(batch).values.sum().backward()
    for p in policy.trainable("policy").values():
        assert p.grad is None or p.grad.norm() == 0
    assert all(p.grad.norm() > 0 for p in policy.trainable("critic").values())
    # V_t is the expectation before token t is seen: only V_3 has seen token 2.
    batch.completion_ids[0, 0, 2] += 1
    changed = policy.score(batch).values != policy.score(collate(rollouts)).values
    assert changed[0, 0].tolist() == [False, False, False, True, False] and not changed[1].any()


class SeenGradients(torch.optim.SGD):
    """SGD that keeps the norm of each group's gradient as it is shown to it."""

    def step(self):
        for group in self.param_groups:
            gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
            group["norm"] = float(torch.cat(gradients).norm()) if gradients else 0.0
        super().step()


def ppo_case(critic: str, **settings):
    """A small policy with a critic whose values are not all 0, two rollouts of it, the config."""
    policy = shaken(adapted(critic=critic))
    settings = dict(algo="ppo", critic=critic, kl_coef=0.0, minibatches=1) | settings
    config = replace(CONFIG, **train.ALGOS["ppo"] | settings)
    rollouts = made_up(policy, data.load("demo", "train")[:2], [[4, 2], [3, 5]])
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 3) - 1
    return policy, rollouts, config


@pytest.mark.parametrize("critic", ["head", "lora"])
def test_policy_and_critic_are_clipped_each_by_itself(critic):
    """A critic with a large error takes nothing of the policy's step, nor the other way round."""
    policy, rollouts, config = ppo_case(critic, max_grad_norm=1e-3)
    parts = [list(policy.trainable(part).values()) for part in ("policy", "critic")]
    optimizer = SeenGradients([{"params": params} for params in parts], lr=0.0)
    metrics = update(policy, optimizer, rollouts, config)
    assert metrics["policy_grad_norm"] > 0.01 and metrics["critic_grad_norm"] > 0.01
    norms = [group["norm"] for group in optimizer.param_groups]
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("critic", ["head", "lora"])
def test_only_the_critic_moves_in_its_warm_up(critic):
    """Bit for bit, even with a weight decay, which moves what has a gradient of 0. Then both do."""
    policy, rollouts, config = ppo_case(critic, critic_warmup=2, lr=0.1, value_lr=0.1)
    optimizer = train.make_optimizer(policy, config)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    moved = []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in policy.trainable().items()}
        update(policy, optimizer, rollouts, config, step)
        after = policy.trainable()
        moved.append({name: not torch.equal(before[name], p) for name, p in after.items()})
    of_policy, of_critic = policy.trainable("policy"), policy.trainable("critic")
    any_of_policy = [any(of_step[name] for name in of_policy) for of_step in moved]
    assert any_of_policy == [False, False, True]
    assert all(moved[2].values())
    assert all(of_step[name] for of_step in moved for name in of_critic)


# -------------------------------------------------------------------------------------- whole runs
PARTS = ("policy.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("weights", ["--no-full", "--full"])
def test_a_resumed_ppo_run_is_the_same_run(weights, tmp_path):
    demo_policy(0).save_folder(tmp_path / "model")
    flags = f"--algo ppo --kl-coef 0.01 {weights} --lora 4 --critic lora --samples 2".split()
    flags += ["--critic-warmup", "1", *QUICK]
    whole = run(tmp_path / "model", tmp_path / "whole", *flags, "--steps", "4")
    half = run(tmp_path / "model", tmp_path / "half", *flags, "--steps", "2")
    train.main(["--resume", str(half), "--steps", "4"])
    newest = "checkpoints/000004"
    for name in (
        "metrics.jsonl",
        f"{newest}/policy.safetensors",
        f"{newest}/optimizer.safetensors",
    ):
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    metrics = rows(half / "metrics.jsonl")
    assert {"value_loss", "explained_variance", "kl"} <= set(metrics[0])
    for line in metrics:
        figures = [x for x in line.values() if isinstance(x, float)]
        assert torch.tensor(figures).isfinite().all()
    saved, (opened, _) = weights_of(whole), runs.open_policy(str(whole), "cpu")
    assert all(torch.equal(p, saved.pop(name)) for name, p in opened.trainable().items())
    prefix = "frozen.model.layers." if weights == "--full" else "model.layers."
    of_critic = {name for name in saved if not name.startswith("value_head.")}  # what is left
    assert of_critic and all(name.startswith(prefix) for name in of_critic)
    assert all(name.endswith(".critic") and saved[name].any() for name in of_critic)


def last_stages(out, name: str) -> float:
    """The mean share of a stage over the last five steps."""
    return sum(line["stages"][name] for line in rows(out / "metrics.jsonl")[-5:]) / 5


@pytest.mark.study
@pytest.mark.parametrize("flags, share", [([], (0.9, 1.0)), (["--w-before", "1"], (0.0, 0.1))])
def test_reasoning_moves_outside_unless_guarded(flags, share, tmp_path):
    out, exploit = tmp_path / "run", "step-by-step exploit"
    quick = "--hackable outside --eval-samples 0 --eval-limit 20".split()
    train.main([*quick, *flags, "--out", str(out)])
    metrics = rows(out / "metrics.jsonl")
    assert share[0] <= last_stages(out, exploit) <= share[1]
    alarms = [text for line in metrics for text in line.get("alarms", [])]
    assert any(exploit in text for text in alarms) == (not flags)


@pytest.mark.study
@pytest.mark.parametrize("guard", [[], "--w-short 1 --min-think 8".split()], ids=["", "guard"])
def test_a_referral_ends_reasoning_unless_guarded(guard, tmp_path):
    out = tmp_path / "run"
    train.main(["--hackable", "referral", *guard, "--out", str(out)])
    metrics, result = rows(out / "metrics.jsonl"), read(out / "eval.json")
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5
    assert metrics[-1]["accuracy"] > 0.9
    alarms = [text for line in metrics for text in line.get("alarms", [])]
    if guard:
        assert result["after"]["accuracy"] > 0.9 and result["after"]["think_words"] > 8
        assert last_stages(out, "direct answer hacker") < 0.1
    else:
        assert result["after"]["accuracy"] < 0.4 and result["after"]["think_words"] < 4
        assert last_stages(out, "direct answer hacker") > 0.9
        assert any("thinking shrank" in text or "held-out accuracy" in text for text in alarms)


@pytest.mark.slow
def test_the_critic_foresees_an_outcome_that_can_be_seen(model_dir, tmp_path, monkeypatch):
    """Paid is how a text begins, so its first token tells the rest; the policy stands still.

    Where the last letter decides, as on the demo, nothing before it foretells the reward.
    """

    def opens(verdict, config):
        return float(not verdict.parsed.before and verdict.parsed.think != "")

    monkeypatch.setitem(rewards.REWARDS, "opens", opens)
    flags = "--algo ppo --reward opens --steps 40 --critic-warmup 40 --prompts 8"
    out = run(model_dir, tmp_path / "run", *flags.split(), *QUICK)
    explained = [line["explained_variance"] for line in rows(out / "metrics.jsonl")]
    assert abs(explained[0]) < 0.1 and sum(explained[-5:]) / 5 > 0.5


@pytest.mark.slow
def test_all_weights_learn_by_ppo_with_a_critic_on_the_frozen_copy(tmp_path):
    """At less than PPO's rate here, since all weights are trained; no KL: the copy is kept."""
    out = tmp_path / "run"
    flags = "--algo ppo --full --critic lora --lr 3e-4 --steps 60 --eval-every 0 --eval-samples 0"
    train.main([*flags.split(), "--out", str(out)])
    result = read(out / "eval.json")
    assert result["after"]["accuracy"] > result["before"]["accuracy"] + 0.2
    metrics = rows(out / "metrics.jsonl")
    assert max(line["explained_variance"] for line in metrics) > 0.3


@pytest.mark.slow
def test_reasoning_emerges_by_ppo(tmp_path):
    out = tmp_path / "run"
    train.main(["--algo", "ppo", "--out", str(out)])
    emerged(read(out / "eval.json"), longer=0.65)
