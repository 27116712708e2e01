"""PPO's signal by brute force, the critic, supervised fine-tuning, starting from a run; the six stages, the guards and the alarm."""
import json
from dataclasses import replace

import pytest
import torch

import data
import demo as demos
import policy as policies
import rewards
import train
from data import Item, UsageError
from policy import Batch, collate
from rewards import grade, parse, stage
from test_policy import family, made_up

ITEM = Item("1", "choice", "What is it?", ("asthma", "gout", "acute gout"), "B")
WORDS = " ".join(["red"] * 40)


@pytest.mark.parametrize("text, n, name", [
    ("gout", 1, 0), ("<think>x</think>", 5, 0),
    (f"<think> {WORDS} </think><answer>B</answer>", 300, 1), (f"<think> {WORDS} gout </think><answer>B</answer>", 300, 1),
    ("<think> a red toe and high urate </think><answer>B</answer>", 20, 2), ("<think> not asthma </think><answer>B</answer>", 20, 2),
    ("<think> it is gout </think><answer>B</answer>", 20, 3), ("<think> The answer is (B) </think><answer>B</answer>", 20, 3), ("<think>b</think><answer>gout</answer>", 20, 3),
    (f"{WORDS} <think> so </think><answer>B</answer>", 60, 4), (f"{WORDS} <think> gout </think><answer>B</answer>", 60, 4),
    (f"<think> {WORDS} </think><answer>B</answer>", 60, 5), (f"Well: <think> {WORDS} gout </think><answer>B</answer>", 60, 5)])
def test_stages(text, n, name):
    assert stage(parse(text), ITEM, n) == rewards.STAGES[name]


def test_stage_names_in_the_papers_order():
    assert rewards.STAGES == ("format failure", "verbose formatter", "concise structurer", "direct answer hacker", "step-by-step exploit", "reintegrated reasoning")


def test_guards_by_hand_and_off_by_default():
    leaky, outside = "<think> it is gout </think><answer>B</answer>", f"{WORDS} <think> {WORDS} </think><answer>B</answer>"
    config = train.Config()
    assert grade(ITEM, leaky, config).total == grade(ITEM, outside, config).total == 1
    assert grade(ITEM, leaky, replace(config, w_leak=.5)).total == .5 and grade(ITEM, outside, replace(config, w_leak=.5)).total == 1
    assert grade(ITEM, outside, replace(config, w_before=1.0)).total == 0 and grade(ITEM, leaky, replace(config, w_before=1.0)).total == 1
    assert grade(ITEM, leaky, replace(config, w_short=1.0, min_think=30)).total == pytest.approx(1 - 27 / 30)
    assert grade(ITEM, leaky, replace(config, w_leak=.5, w_short=1.0)).parts["leak"] == 1


def history(n, **series):
    stages = {name: 0.0 for name in rewards.STAGES}
    return [{"reward": 0.0, "think_words": 40.0, "stages": stages | {"step-by-step exploit": series.get("exploit", lambda i: 0.0)(i)}}
            | {name: f(i) for name, f in series.items() if name != "exploit" and f(i) is not None} for i in range(n)]


def test_alarm_when_reward_rises_while_what_it_stands_for_falls():
    rises = lambda i: i / 20
    assert train.alarms(history(20, reward=rises)) == []
    assert "thinking shrank" in train.alarms(history(20, reward=rises, think_words=lambda i: 40 - 2 * i))[0]
    assert "held-out" in train.alarms(history(20, reward=rises, dev_accuracy=lambda i: {5: .6, 19: .4}.get(i)))[0]
    assert "--w-before" in train.alarms(history(20, reward=rises, exploit=rises))[0]
    assert train.alarms(history(20, think_words=lambda i: 40 - 2 * i)) == []                      # reward does not rise: no hack
    assert train.alarms(history(12, reward=rises, think_words=lambda i: 40 - 2 * i)) == []        # too early to say


# ------------------------------------------------------------------------------------------------------- PPO
def test_ppo_signal_by_brute_force():
    """r_t = -beta (log pi - log ref), plus the grade on the last counted token; A by the double sum; whitened over counted tokens."""
    torch.manual_seed(0)
    lengths, T = [[3, 1], [4, 2]], 4
    mask = torch.arange(T) < torch.tensor(lengths)[..., None]
    old, ref, values = (torch.randn(2, 2, T) * mask for _ in range(3))
    config = replace(train.Config(), advantage="gae", kl="k1", kl_coef=.1, gamma=.9, lam=.8)
    fixed = train.Fixed(torch.zeros(2, 2, T), torch.zeros(2, 2, T), old, ref, values)
    grades = [1.0, -1.0, 0.0, 1.0]
    logged = train.gae_advantages(fixed, Batch(None, None, None, mask), grades, config)
    raw, returns = [], []
    for i in range(4):
        p, g, n = i // 2, i % 2, lengths[i // 2][i % 2]
        r = [-.1 * float(old[p, g, t] - ref[p, g, t]) + (grades[i] if t == n - 1 else 0) for t in range(n)]
        delta = [r[t] + (.9 * float(values[p, g, t + 1]) if t + 1 < n else 0) - float(values[p, g, t]) for t in range(n)]
        advantage = [sum((.9 * .8) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        raw += advantage
        returns += [a + float(values[p, g, t]) for t, a in enumerate(advantage)]
    raw = torch.tensor(raw, dtype=torch.float64)
    expected = (raw - raw.mean()) / raw.std(unbiased=False)
    torch.testing.assert_close(fixed.advantages[mask].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed.returns[mask], torch.tensor(returns), rtol=0, atol=1e-6)
    assert logged["kl"] == pytest.approx(float(((old - ref) * mask).sum() / mask.sum()), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_critic_adapters_get_their_own_gradient(checkpointing, items):
    """With checkpointing the layers run again in the backward pass, after the switch has gone back: the critic's gradient must be the same without it."""
    policy = family("llama", lora=4, critic="lora", checkpointing=checkpointing)
    with torch.no_grad():
        for i, p in enumerate(policy.trainable().values()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * .1)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    scores = policy.score(batch)
    (scores.values.square().sum() + scores.logps.sum()).backward()
    of_value = {name: p.grad.clone() for name, p in policy.trainable().items()}
    assert all(of_value[name].norm() > 0 for name in policy.trainable("critic")) and set(policy.trainable("critic")) | set(policy.trainable("policy")) == set(of_value)
    with policy._adapters("critic"):                                          # by hand: the same without any switching in between
        for p in policy.trainable().values():
            p.grad = None
        expected = policy.score(batch).values
        expected.square().sum().backward()
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-5)
    for name, p in policy.trainable("critic").items():
        torch.testing.assert_close(of_value[name], p.grad, rtol=1e-4, atol=1e-5)


def test_value_head_reads_the_policy_and_never_moves_it(items):
    policy = family("llama", lora=4, critic="head")
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    torch.nn.init.normal_(policy.value_head.weight)
    policy.score(batch).values.sum().backward()
    assert all(p.grad is None or p.grad.norm() == 0 for p in policy.trainable("policy").values())
    assert all(p.grad.norm() > 0 for p in policy.trainable("critic").values())
    batch.completion_ids[0, 0, 2] += 1                                        # V_t is the expectation before token t is seen
    changed = policy.score(batch).values != policy.score(collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))).values
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
    policy = family("llama", lora=4, critic=critic)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn(p.shape, generator=generator) * .1)
    settings = dict(algo="ppo", critic=critic, kl_coef=0.0, minibatches=1) | settings
    config = replace(train.Config(), **train.ALGOS["ppo"] | settings)
    items = data.load("demo", "train")[:2]
    rollouts = made_up(policy, items, [[4, 2], [3, 5]])
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 3) - 1
    return policy, rollouts, config


@pytest.mark.parametrize("critic", ["head", "lora"])
def test_policy_and_critic_are_clipped_each_by_itself(critic):
    """A critic with a large error takes nothing of the policy's step, nor the other way round."""
    policy, rollouts, config = ppo_case(critic, max_grad_norm=1e-3)
    parts = [list(policy.trainable(part).values()) for part in ("policy", "critic")]
    optimizer = SeenGradients([{"params": params} for params in parts], lr=0.0)
    metrics = train.update(policy, optimizer, rollouts, config, 0)
    assert metrics["policy_grad_norm"] > .01 and metrics["critic_grad_norm"] > .01
    norms = [group["norm"] for group in optimizer.param_groups]
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("critic", ["head", "lora"])
def test_only_the_critic_moves_in_its_warm_up(critic):
    """Bit for bit, even with a weight decay, which moves what has a gradient of 0. Then both do."""
    settings = dict(critic_warmup=2, weight_decay=.1, lr=.1, value_lr=.1)
    policy, rollouts, config = ppo_case(critic, **settings)
    optimizer = train.make_optimizer(policy, config)
    moved = []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in policy.trainable().items()}
        train.update(policy, optimizer, rollouts, config, step)
        after = policy.trainable()
        moved.append({name: not torch.equal(before[name], p) for name, p in after.items()})
    of_policy, of_critic = policy.trainable("policy"), policy.trainable("critic")
    assert [any(of_step[name] for name in of_policy) for of_step in moved] == [False, False, True]
    assert all(moved[2].values()) and all(of_step[name] for of_step in moved for name in of_critic)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model folder and a supervised run from it."""
    path = tmp_path_factory.mktemp("start")
    policy = demos.demo_policy(0)
    policy.model.save_pretrained(path / "model")
    policy.tokenizer.save_pretrained(path / "model")
    train.main(["--model", str(path / "model"), "--algo", "sft", "--full", "--steps", "60", "--lr", "3e-3", "--out", str(path / "sft"), *QUICK])
    return path


QUICK = ["--eval-limit", "8", "--eval-samples", "0", "--eval-every", "0"]


def test_sft_teaches_the_form_and_counts_completion_tokens_only(start):
    lines = [json.loads(line) for line in (start / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < .5 * lines[0]["loss"] and lines[0]["accuracy"] == 1
    policy = policies.Policy.load(str(start / "model"), lora=0)
    config = replace(train.Config(), **train.DEFAULTS["demo"] | train.ALGOS["sft"] | dict(algo="sft", prompts=3))
    rollouts, _ = train.demonstrations(policy, data.load("demo", "train"), config, 0)
    expected = -sum(float(policy.score(collate([replace_group(r)])).logps.sum()) for r in rollouts) / sum(len(r.completion_ids) for r in rollouts)
    assert train.update(policy, torch.optim.SGD(policy.trainable().values(), lr=0.0), rollouts, config, 0)["loss"] == pytest.approx(expected, abs=1e-5)


def replace_group(rollout):
    return replace(rollout, group=0)


def test_init_starts_at_the_other_runs_policy_and_keeps_it_as_reference(start, tmp_path):
    flags = ["--model", str(start / "model"), "--full", "--init", str(start / "sft"), "--steps", "2", "--prompts", "2", "--samples", "2", *QUICK]
    train.main([*flags, "--algo", "grpo", "--kl-coef", "0.1", "--out", str(tmp_path / "rl")])
    before, after = (json.loads((path / "eval.json").read_text()) for path in (start / "sft", tmp_path / "rl"))
    assert after["before"] == before["after"]
    first = json.loads((tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-6                                            # the reference is where it starts, not the base
    other = tmp_path / "other"
    demos.demo_policy(1).model.save_pretrained(other)
    with pytest.raises(UsageError) as error:
        train.main(["--model", str(other), *flags[2:], "--out", str(tmp_path / "no")])
    assert str(other) in str(error.value) and str(start / "model") in str(error.value)


def test_lora_init_keeps_a_frozen_copy_as_reference(items):
    first = family("llama", lora=4)
    with torch.no_grad():
        for p in first.trainable().values():
            p.add_(.05)
    tensors = {name: p.detach().clone() for name, p in first.trainable().items()}
    policy = family("llama", lora=4, critic="lora", init=tensors)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    expected = first.score(batch).logps
    assert torch.equal(policy.score(batch).logps, expected) and not any("reference" in name for name in policy.trainable())
    with torch.no_grad():
        for p in policy.trainable("policy").values():
            p.add_(.05)
    with policy.reference():
        assert torch.equal(policy.score(batch).logps, expected)
    assert not torch.equal(policy.score(batch).logps, expected)


def test_a_resumed_ppo_run_is_the_same_run(start, tmp_path):
    flags = ["--model", str(start / "model"), "--algo", "ppo", "--prompts", "4", "--samples", "2", "--critic-warmup", "1", "--save-every", "1", *QUICK]
    train.main([*flags, "--steps", "4", "--out", str(tmp_path / "whole")])
    train.main([*flags, "--steps", "2", "--out", str(tmp_path / "half")])
    train.main(["--resume", str(tmp_path / "half"), "--steps", "4"])
    for name in ("metrics.jsonl", "checkpoints/000004/policy.safetensors", "checkpoints/000004/optimizer.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(v)) for line in lines for v in line.values() if isinstance(v, float)) and {"value_loss", "explained_variance", "kl"} <= set(lines[0])


@pytest.mark.parametrize("flags, words", [
    (["--algo", "ppo", "--full", "--critic", "lora"], "--critic head"), (["--kl", "k1"], "no gradient"), (["--algo", "sft", "--samples", "4"], "one completion"),
    (["--init", "/nowhere", "--model", "x"], "--init"), (["--hackable", "--dataset", "medqa"], "--hackable"), (["--recipe", "med-rlrv"], "choose from")])
def test_combinations_that_cannot_work(flags, words, tmp_path, start):
    flags = [str(start / "model") if flag == "x" else flag for flag in flags]
    with pytest.raises(UsageError, match=words):
        train.main([*flags, "--out", str(tmp_path / "run")])


def test_the_recipe_holds_the_published_settings_and_flags_beat_it():
    config = train.make_config({"recipe": "med-rlvr", "prompts": 4})
    assert (config.dataset, config.algo, config.reward, config.gamma, config.lam, config.clip_low, config.kl, config.kl_coef) == \
        ("medqa", "ppo", "med-rlvr", 1.0, .95, .2, "k1", .01)
    assert (config.samples, config.prompts, config.temperature, config.critic) == (1, 4, 1.0, "lora")
    train.validate(config)


@pytest.mark.slow
@pytest.mark.parametrize("flags, share", [([], (.9, 1.0)), (["--w-before", "1"], (0.0, .1))])
def test_the_hackable_demo_drifts_into_stage_five_unless_guarded(flags, share, tmp_path):
    train.main(["--hackable", "--eval-samples", "0", "--eval-limit", "20", *flags, "--out", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = sum(line["stages"]["step-by-step exploit"] for line in lines[-5:]) / 5
    assert share[0] <= last <= share[1] and lines[0]["stages"]["step-by-step exploit"] > .2
    assert any("step-by-step exploit" in word for line in lines for word in line.get("alarms", [])) == (not flags)


@pytest.mark.slow
def test_the_demo_learns_by_ppo_and_its_critic_learns(tmp_path):
    train.main(["--algo", "ppo", "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    explained = [json.loads(line)["explained_variance"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["before"]["sampled_accuracy"] <= .35 and result["after"]["sampled_accuracy"] >= .80 and result["after"]["accuracy"] >= .90
    assert max(sum(explained[i:i + 5]) / 5 for i in range(len(explained) - 4)) > .5
