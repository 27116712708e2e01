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


# ------------------------------------------------------------------------------------------------ advantages
@pytest.mark.parametrize("r", [0.01, 0.1, 0.3, 1 / 3, -1.0])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_exactly_zero(r, scale):
    groups = torch.arange(4).repeat_interleave(7)
    assert (grpo.group_advantages(torch.full((28,), r), groups, scale) == 0).all()
    assert (grpo.group_advantages(torch.full((28,), r), groups, scale, leave_one_out=True) == 0).all()


def test_order_of_rows_is_free_and_equal_prompts_stay_apart():
    torch.manual_seed(0)
    rewards, groups = torch.randn(24), torch.arange(4).repeat_interleave(6)
    expected, order = grpo.group_advantages(rewards, groups), torch.randperm(24)
    torch.testing.assert_close(grpo.group_advantages(rewards[order], groups[order]), expected[order])
    for g in range(4):                                                        # each group as if it were alone
        alone = grpo.group_advantages(rewards[groups == g], torch.zeros(6, dtype=torch.long))
        torch.testing.assert_close(alone, expected[groups == g])


def test_group_of_one_gives_zero():
    assert grpo.group_advantages(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]
    assert grpo.group_advantages(torch.tensor([3.0]), torch.tensor([0]), leave_one_out=True).tolist() == [0.0]


def test_binary_rewards_by_hand():
    rewards, groups = torch.tensor([1., 1., 0., 0., 0.], dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    std = (2 * .6**2 + 3 * .4**2) ** .5 / 4 ** .5                             # mean .4, Bessel's 4
    torch.testing.assert_close(grpo.group_advantages(rewards, groups), torch.tensor([.6, .6, -.4, -.4, -.4], dtype=torch.float64) / (std + 1e-4))
    torch.testing.assert_close(grpo.group_advantages(rewards, groups, "none"), torch.tensor([.6, .6, -.4, -.4, -.4], dtype=torch.float64))
    torch.testing.assert_close(grpo.group_advantages(rewards, groups, "none", leave_one_out=True),
                               torch.tensor([.75, .75, -.5, -.5, -.5], dtype=torch.float64))          # 1 - 1/4, 0 - 2/4


def test_gae_by_brute_force_and_blind_after_the_end():
    torch.manual_seed(1)
    gamma, lam, lengths, T = .9, .8, [5, 2, 1, 4], 5
    rewards, values = torch.randn(4, T), torch.randn(4, T)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    advantages, returns = grpo.gae(rewards, values.masked_fill(~mask, 100.), mask, gamma, lam)
    for i, n in enumerate(lengths):
        for t in range(n):
            deltas = [rewards[i, k] + (gamma * values[i, k + 1] if k + 1 < n else 0) - values[i, k] for k in range(t, n)]
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(deltas))
            assert abs(advantages[i, t] - expected) < 1e-5 and abs(returns[i, t] - expected - values[i, t]) < 1e-5
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whiten_counts_only_counted_tokens():
    x, mask = torch.tensor([[1., 2., 1e6], [3., 9e9, 9e9]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert grpo.whiten(x, mask)[mask].tolist() == pytest.approx([-1.2247449, 0, 1.2247449])           # 1, 2, 3 over sqrt(2/3)
    assert (grpo.whiten(x, mask)[~mask] == 0).all()
    assert grpo.whiten(torch.tensor([[5.]]), torch.tensor([[True]])).tolist() == [[0.0]]


# ------------------------------------------------------------------------------------------------------ loss
def case(seed=0, N=6, T=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(N, T, generator=g, dtype=dtype)
    old = logps + .3 * torch.randn(N, T, generator=g, dtype=dtype)
    ref = logps + .5 * torch.randn(N, T, generator=g, dtype=dtype)
    lengths = torch.tensor([7, 1, 3, 5, 7, 2])[:N]
    return logps.requires_grad_(), old, ref, torch.randn(N, generator=g, dtype=dtype), torch.arange(T) < lengths[:, None], lengths


def trl_loss(logps, old, ref, advantages, mask, loss_type, level, beta, high, max_new):
    """TRL's own method, called with a stand-in for the trainer."""
    GRPOTrainer = pytest.importorskip("trl").GRPOTrainer
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None), aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, loss_type=loss_type, epsilon_low=.2, epsilon_high=high, use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), model=SimpleNamespace(training=True), accelerator=accelerator,
        current_gradient_accumulation_steps=1, max_completion_length=max_new, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)))
    zeros = torch.zeros(len(logps), 2, dtype=torch.long)
    inputs = {"prompt_ids": zeros, "prompt_mask": zeros, "completion_ids": torch.zeros_like(logps, dtype=torch.long), "completion_mask": mask.to(logps.dtype),
              "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("loss_type, mode", [("grpo", "sequence"), ("dr_grpo", "constant"), ("dapo", "token")])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, high", [(0.0, .2), (0.04, .28)])
def test_loss_and_gradient_equal_trls(loss_type, mode, level, beta, high):
    logps, old, ref, advantages, mask, lengths = case()
    theirs = trl_loss(logps, old, ref, advantages, mask, loss_type, level, beta, high, max_new=9)
    their_gradient, = torch.autograd.grad(theirs, logps)
    weights = grpo.token_weights(lengths, mode, max_new=9, dtype=torch.float64)
    ours, _ = grpo.policy_loss(logps, old, advantages, mask, weights, clip_high=high, ratio=level)
    ours = ours + beta * (weights[:, None] * mask * grpo.kl_term(logps, ref, "k3")).sum()
    our_gradient, = torch.autograd.grad(ours, logps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-9)


def test_advantages_equal_trls():
    """With TRL's own nanstd in its formula, (r - mean) / (std + 1e-4) over view(-1, G)."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd                  # ddof 1
    rewards = torch.tensor([1., 0, 0, 1, 0, 0, 0, 0, 1, 1, .5, 0], dtype=torch.float64)
    grouped = rewards.view(-1, 4)
    theirs = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    ours = grpo.group_advantages(rewards, torch.arange(3).repeat_interleave(4))
    torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=1e-7)       # their Bessel factor is a float32


@pytest.mark.parametrize("advantage, ratio, flows", [(1., 1.3, False), (1., .7, True), (-1., .7, False), (-1., 1.3, True), (1., 1.1, True), (-1., .9, True)])
def test_where_the_clip_stops_the_gradient(advantage, ratio, flows):
    logps = torch.log(torch.tensor([[.5 * ratio]])).requires_grad_()
    one = torch.ones(1)
    loss, _ = grpo.policy_loss(logps, torch.log(torch.tensor([[.5]])), advantage * one, one[:, None].bool(), one)
    assert bool(torch.autograd.grad(loss, logps)[0] != 0) is flows


def test_asymmetric_clip_and_dual_clip():
    one, old = torch.ones(1), torch.log(torch.tensor([[.4]]))
    loss = lambda ratio, A, **k: float(grpo.policy_loss(old + torch.log(torch.tensor(ratio)), old, A * one, one[:, None].bool(), one, **k)[0])
    assert loss(1.25, 1., clip_high=.28) == pytest.approx(-1.25) and loss(1.5, 1., clip_high=.28) == pytest.approx(-1.28)
    assert loss(.5, -1., clip_low=.4) == pytest.approx(.6)
    assert loss(10., -1.) == pytest.approx(10.) and loss(10., -1., dual_clip=3.) == pytest.approx(3.)


def test_first_update_has_value_minus_mean_advantage_and_reinforces_gradient():
    logps, _, _, advantages, mask, lengths = case()
    weights = grpo.token_weights(lengths, "sequence", dtype=torch.float64)
    loss, _ = grpo.policy_loss(logps, logps.detach(), advantages, mask, weights)
    assert float(loss.detach()) == pytest.approx(-float(advantages.mean()))
    gradient, = torch.autograd.grad(loss, logps)
    reinforce, = torch.autograd.grad(-(weights[:, None] * mask * logps * advantages[:, None]).sum(), logps)
    torch.testing.assert_close(gradient, reinforce)
    assert gradient.norm() > 0


def test_padding_may_hold_anything():
    logps, old, _, advantages, mask, lengths = case()
    weights = grpo.token_weights(lengths, "token", dtype=torch.float64)
    clean, _ = grpo.policy_loss(logps, old, advantages, mask, weights)
    dirty = logps.detach().masked_fill(~mask, float("nan")).requires_grad_()
    loss, _ = grpo.policy_loss(dirty, old.masked_fill(~mask, 1e30), advantages, mask, weights)
    assert float(loss.detach()) == pytest.approx(float(clean.detach())) and torch.autograd.grad(loss, dirty)[0].isfinite().all()


def test_weight_modes_differ_on_unequal_lengths_and_agree_on_full_ones():
    modes = ("sequence", "token", "constant")
    unequal = [grpo.token_weights(torch.tensor([1, 4]), mode, 4).tolist() for mode in modes]
    assert unequal == [[.5, .125], pytest.approx([.2, .2]), [.125, .125]]
    full = [grpo.token_weights(torch.tensor([4, 4]), mode, 4).tolist() for mode in modes]
    assert full == [[.125, .125]] * 3
    assert torch.isfinite(grpo.token_weights(torch.tensor([0, 0]), "token")).all()                # no counted token: loss 0, not NaN


def test_kl_gradients_against_the_exact_categorical_kl():
    """k2 in the loss has the gradient of KL(pi || ref) in expectation; k1 has none; k3 is off in length and direction."""
    torch.manual_seed(0)
    ref, theta = torch.randn(8, dtype=torch.float64).log_softmax(0), torch.randn(8, dtype=torch.float64, requires_grad=True)
    log_pi = theta.log_softmax(0)
    exact, = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), theta, retain_graph=True)
    pi = log_pi.detach().exp()
    expected = {kind: torch.autograd.grad((pi * grpo.kl_term(log_pi[None], ref[None], kind)[0]).sum(), theta, retain_graph=True)[0] for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k2"], exact)
    assert expected["k1"].norm() < 1e-12
    assert not torch.allclose(expected["k3"], exact, rtol=.01) and torch.cosine_similarity(expected["k3"], exact, dim=0) > .5
    k3 = grpo.kl_term(log_pi[None], ref[None], "k3")
    assert (k3 >= 0).all() and float(grpo.kl_term(ref[None], ref[None], "k3").abs().max()) == 0


def test_value_loss_without_movement_and_explained_variance():
    values, returns, mask = torch.tensor([[.2, .4]]), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool()
    assert float(grpo.value_loss(values, values, returns, mask, torch.tensor([.5]))) == pytest.approx(.5 * .5 * (.64 + .16))
    assert float(grpo.explained_variance(returns, returns, mask)) == 1 and float(grpo.explained_variance(torch.zeros(1, 2), returns, mask)) == 0
    assert float(grpo.explained_variance(values, torch.ones(1, 2), mask)) == 0                    # nothing to explain: no NaN
