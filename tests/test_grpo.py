"""The mathematics against paper, brute force, and TRL's GRPOTrainer."""

import doctest
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import grpo


def test_doctests():
    failed, tried = doctest.testmod(grpo)
    assert tried >= 15 and not failed


# ---------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("r", [0.01, 0.1, 0.3, 1 / 3, -1.0])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_give_exactly_zero(r, scale, leave_one_out):
    advantages = grpo.group_advantages(torch.full((4, 7), r), scale, leave_one_out)
    assert (advantages == 0).all()


def test_each_group_is_as_if_it_were_alone():
    torch.manual_seed(0)
    rewards = torch.randn(4, 6)
    rewards[2] = rewards[0]  # equal prompts stay apart
    expected = grpo.group_advantages(rewards)
    for g in range(4):
        alone = grpo.group_advantages(rewards[g : g + 1])
        torch.testing.assert_close(alone[0], expected[g])
    order = torch.randperm(6)
    torch.testing.assert_close(grpo.group_advantages(rewards[:, order]), expected[:, order])


def test_a_group_of_one_gives_zero():
    assert grpo.group_advantages(torch.tensor([[3.0]])).tolist() == [[0.0]]
    assert grpo.group_advantages(torch.tensor([[3.0]]), leave_one_out=True).tolist() == [[0.0]]


def test_binary_rewards_by_hand():
    def double(*values):
        return torch.tensor([values], dtype=torch.float64)

    rewards = double(1, 1, 0, 0, 0)
    deviations = double(0.6, 0.6, -0.4, -0.4, -0.4)
    std = (2 * 0.6**2 + 3 * 0.4**2) ** 0.5 / 4**0.5  # mean 0.4, Bessel's 4
    torch.testing.assert_close(grpo.group_advantages(rewards), deviations / (std + 1e-4))
    torch.testing.assert_close(grpo.group_advantages(rewards, "none"), deviations)
    torch.testing.assert_close(  # 1 - 1/4, 0 - 2/4
        grpo.group_advantages(rewards, "none", leave_one_out=True),
        double(0.75, 0.75, -0.5, -0.5, -0.5),
    )


def test_gae_by_brute_force_and_blind_after_the_end():
    torch.manual_seed(1)
    gamma, lam, lengths, T = 0.9, 0.8, [5, 2, 1, 4], 5
    rewards, values = torch.randn(4, T), torch.randn(4, T)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    blind = values.masked_fill(~mask, 100.0)
    advantages, returns = grpo.gae(rewards, blind, mask, gamma, lam)
    for i, n in enumerate(lengths):
        following = [*values[i, 1:n].tolist(), 0.0]
        for t in range(n):
            expected = 0.0
            for k in range(t, n):
                delta = rewards[i, k] + gamma * following[k] - values[i, k]
                expected += (gamma * lam) ** (k - t) * float(delta)
            assert abs(advantages[i, t] - expected) < 1e-5
            assert abs(returns[i, t] - expected - values[i, t]) < 1e-5
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whiten_counts_only_counted_tokens():
    x = torch.tensor([[1.0, 2.0, 1e6], [3.0, 9e9, 9e9]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    white = grpo.whiten(x, mask)
    assert white[mask].tolist() == pytest.approx([-1.2247449, 0, 1.2247449])  # over sqrt(2/3)
    assert (white[~mask] == 0).all()
    assert grpo.whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


# ---------------------------------------------------------------------------------------- loss
def case(seed=0, N=6, T=7, dtype=torch.float64):
    """logps, old_logps, ref_logps, advantages, mask, lengths of N made-up completions."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(N, T, generator=g, dtype=dtype)
    old = logps + 0.3 * torch.randn(N, T, generator=g, dtype=dtype)
    ref = logps + 0.5 * torch.randn(N, T, generator=g, dtype=dtype)
    lengths = torch.tensor([7, 1, 3, 5, 7, 2])[:N]
    advantages = torch.randn(N, generator=g, dtype=dtype)
    mask = torch.arange(T) < lengths[:, None]
    return logps.requires_grad_(), old, ref, advantages, mask, lengths


def trl_loss(logps, old, ref, advantages, mask, **settings):
    """TRL's own method, called with a stand-in for the trainer."""
    GRPOTrainer = pytest.importorskip("trl").GRPOTrainer
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        epsilon_low=0.2,
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **settings,
    )
    zeros = torch.zeros(len(logps), 2, dtype=torch.long)
    inputs = {
        "prompt_ids": zeros,
        "prompt_mask": zeros,
        "completion_ids": torch.zeros_like(logps, dtype=torch.long),
        "completion_mask": mask.to(logps.dtype),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def assert_same_loss_and_gradient(ours, theirs, logps):
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    (our_gradient,) = torch.autograd.grad(ours, logps)
    assert their_gradient.norm() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-9)


MODES = [("grpo", "sequence"), ("dr_grpo", "constant"), ("dapo", "token")]


@pytest.mark.parametrize("loss_type, mode", MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, high", [(0.0, 0.2), (0.04, 0.28)])
def test_loss_and_gradient_equal_trls(loss_type, mode, level, beta, high):
    logps, old, ref, advantages, mask, lengths = case()
    theirs = trl_loss(
        *(logps, old, ref, advantages, mask),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_high=high,
    )
    weights = grpo.token_weights(lengths, mode, max_new=9, dtype=torch.float64)
    ours, _ = grpo.policy_loss(logps, old, advantages, mask, weights, clip_high=high, ratio=level)
    ours = ours + beta * (weights[:, None] * mask * grpo.kl_term(logps, ref, "k3")).sum()
    assert_same_loss_and_gradient(ours, theirs, logps)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("clip_high", [0.1, 4.0])
def test_cispo_equals_trls(beta, clip_high):
    """TRL's epsilon_high is the largest ratio itself; ours is counted from 1, as for the others."""
    logps, old, ref, advantages, mask, lengths = case()
    theirs = trl_loss(
        *(logps, old, ref, advantages, mask),
        loss_type="cispo",
        importance_sampling_level="token",
        beta=beta,
        epsilon_high=1 + clip_high,
    )
    ratios = (logps - old).exp()[mask]
    assert (ratios > 1.1).any() and (ratios < 5).all()  # 0.1 clips some, 4.0 none
    weights = grpo.token_weights(lengths, "token", dtype=torch.float64)
    ours, _ = grpo.policy_loss(
        logps, old, advantages, mask, weights, clip_high=clip_high, ratio="cispo"
    )
    ours = ours + beta * (weights[:, None] * mask * grpo.kl_term(logps, ref, "k3")).sum()
    assert_same_loss_and_gradient(ours, theirs, logps)


@pytest.mark.parametrize("ratio, A", [(0.5, 1.0), (1.5, 1.0), (7.0, 1.0), (7.0, -1.0), (0.1, -1.0)])
def test_cispo_by_hand(ratio, A):
    """- min(rho, 5) A log pi: its gradient is - min(rho, 5) A, in the clip too and for both signs.

    The two-sided clip of PPO has none where rho = 7 and A > 0, or rho = 0.1 and A < 0.
    """
    old = torch.tensor([[0.1]], dtype=torch.float64).log()
    logps = (old + torch.tensor(ratio).log()).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = grpo.policy_loss(
        logps, old, A * one, one[:, None].bool(), one, clip_high=4.0, ratio="cispo"
    )
    assert float(loss.detach()) == pytest.approx(-min(ratio, 5) * A * float(logps.detach()))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert float(gradient) == pytest.approx(-min(ratio, 5) * A)


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_at_ratio_one_all_ratios_have_one_gradient(mode):
    """GSPO's only where the advantage is the row's and rows count the same: its ratio is a mean."""
    logps, _, _, advantages, mask, lengths = case()
    weights = grpo.token_weights(lengths, mode, dtype=torch.float64)
    gradients = []
    for ratio in ("token", "sequence", "cispo"):
        loss, _ = grpo.policy_loss(
            logps, logps.detach(), advantages, mask, weights, clip_high=4.0, ratio=ratio
        )
        gradients += torch.autograd.grad(loss, logps)
    assert gradients[0].norm() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-12)


def test_advantages_equal_trls():
    """With TRL's own nanstd in its formula, (r - mean) / (std + 1e-4) over view(-1, G)."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd  # ddof 1
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0.5, 0]], dtype=torch.float64)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    theirs = centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    # Their Bessel factor is a float32.
    torch.testing.assert_close(grpo.group_advantages(rewards), theirs, rtol=0, atol=1e-7)


CLIP = [
    *((1.0, 1.3, False), (1.0, 0.7, True), (-1.0, 0.7, False), (-1.0, 1.3, True)),
    *((1.0, 1.1, True), (-1.0, 0.9, True)),
]


@pytest.mark.parametrize("advantage, ratio, flows", CLIP)
def test_where_the_clip_stops_the_gradient(advantage, ratio, flows):
    logps = torch.log(torch.tensor([[0.5 * ratio]])).requires_grad_()
    old, one = torch.log(torch.tensor([[0.5]])), torch.ones(1)
    loss, _ = grpo.policy_loss(logps, old, advantage * one, one[:, None].bool(), one)
    assert bool(torch.autograd.grad(loss, logps)[0] != 0) is flows


def test_an_asymmetric_clip_by_hand():
    one, old = torch.ones(1), torch.log(torch.tensor([[0.4]]))

    def loss(ratio: float, A: float, **clip) -> float:
        logps = old + torch.log(torch.tensor(ratio))
        return float(grpo.policy_loss(logps, old, A * one, one[:, None].bool(), one, **clip)[0])

    assert loss(1.25, 1.0, clip_high=0.28) == pytest.approx(-1.25)
    assert loss(1.5, 1.0, clip_high=0.28) == pytest.approx(-1.28)
    assert loss(0.5, -1.0, clip_low=0.4) == pytest.approx(0.6)
    assert loss(10.0, -1.0) == pytest.approx(10.0)


def test_first_update_has_value_minus_mean_advantage_and_reinforces_gradient():
    logps, _, _, advantages, mask, lengths = case()
    weights = grpo.token_weights(lengths, "sequence", dtype=torch.float64)
    loss, _ = grpo.policy_loss(logps, logps.detach(), advantages, mask, weights)
    assert float(loss.detach()) == pytest.approx(-float(advantages.mean()))
    (gradient,) = torch.autograd.grad(loss, logps)
    reinforce = -(weights[:, None] * mask * logps * advantages[:, None]).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, logps)[0])
    assert gradient.norm() > 0


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_padding_may_hold_anything(ratio):
    logps, old, _, advantages, mask, lengths = case()
    weights = grpo.token_weights(lengths, "token", dtype=torch.float64)
    clean, _ = grpo.policy_loss(logps, old, advantages, mask, weights, ratio=ratio)
    dirty = logps.detach().masked_fill(~mask, float("nan")).requires_grad_()
    dirty_old = old.masked_fill(~mask, 1e30)
    loss, _ = grpo.policy_loss(dirty, dirty_old, advantages, mask, weights, ratio=ratio)
    assert float(loss.detach()) == pytest.approx(float(clean.detach()))
    assert torch.autograd.grad(loss, dirty)[0].isfinite().all()


# ---------------------------------------------------------------------- weights, KL, the critic
def test_weight_modes_differ_on_unequal_lengths_and_agree_on_full_ones():
    def of(*lengths):
        modes = ("sequence", "token", "constant")
        return [grpo.token_weights(torch.tensor(lengths), mode, 4).tolist() for mode in modes]

    assert of(1, 4) == [[0.5, 0.125], pytest.approx([0.2, 0.2]), [0.125, 0.125]]
    assert of(4, 4) == [[0.125, 0.125]] * 3
    assert torch.tensor(of(0, 0)).isfinite().all()  # no counted token: loss 0, not NaN


def test_kl_gradients_against_the_exact_categorical_kl():
    """k2 in the loss has the gradient of KL(pi || ref) in expectation, and k1 has none.

    k3 is off in length and direction.
    """
    torch.manual_seed(0)
    ref = torch.randn(8, dtype=torch.float64).log_softmax(0)
    theta = torch.randn(8, dtype=torch.float64, requires_grad=True)
    log_pi = theta.log_softmax(0)
    pi = log_pi.detach().exp()

    def gradient(of):
        return torch.autograd.grad(of.sum(), theta, retain_graph=True)[0]

    exact = gradient(log_pi.exp() * (log_pi - ref))
    k1, k2, k3 = (
        gradient(pi * grpo.kl_term(log_pi[None], ref[None], kind)[0]) for kind in ("k1", "k2", "k3")
    )
    torch.testing.assert_close(k2, exact)
    assert k1.norm() < 1e-12
    assert not torch.allclose(k3, exact, rtol=0.01)
    assert torch.cosine_similarity(k3, exact, dim=0) > 0.5
    assert (grpo.kl_term(log_pi[None], ref[None], "k3") >= 0).all()
    assert float(grpo.kl_term(ref[None], ref[None], "k3").abs().max()) == 0


def test_value_loss_without_movement():
    values, returns = torch.tensor([[0.2, 0.4]]), torch.tensor([[1.0, 0.0]])
    mask, weights = torch.ones(1, 2).bool(), torch.tensor([0.5])
    found = float(grpo.value_loss(values, values, returns, mask, weights))
    assert found == pytest.approx(0.5 * 0.5 * (0.64 + 0.16))


def test_explained_variance():
    values, returns = torch.tensor([[0.2, 0.4]]), torch.tensor([[1.0, 0.0]])
    mask = torch.ones(1, 2).bool()
    assert float(grpo.explained_variance(returns, returns, mask)) == 1
    assert float(grpo.explained_variance(torch.zeros(1, 2), returns, mask)) == 0
    # Nothing to explain: no NaN.
    assert float(grpo.explained_variance(values, torch.ones(1, 2), mask)) == 0
