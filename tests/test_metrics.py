"""How logged numbers merge: by parts as in one, and nothing that does not say how."""

import doctest
import math
import pickle
from itertools import permutations

import pytest
import torch

import grpo
from support import metrics
from support.metrics import Stats, over_steps


def test_doctests():
    failed, tried = doctest.testmod(metrics)
    assert tried >= 5 and not failed


def part(values, weights) -> Stats:
    stats = Stats()
    stats.mean("mean", torch.tensor(values), torch.tensor(weights))
    stats.max("max", torch.tensor(values))
    stats.sum("sum", torch.tensor(values).sum())
    return stats


def test_parts_merge_into_what_all_rows_would_have_given():
    merged = Stats()
    for values, weights in (([1.0, 2.0], [0.5, 0.25]), ([-6.0], [0.125])):
        sent = pickle.dumps(part(values, weights))  # as by another process
        merged.merge(pickle.loads(sent))
    # (1/2 + 2/4 - 6/8) / (1/2 + 1/4 + 1/8) = .25 / .875
    assert merged.figures() == {"mean": pytest.approx(2 / 7), "max": 2.0, "sum": -3.0}


def test_a_maximum_below_zero_is_not_lost():
    assert part([-3.0, -2.0], [1.0, 1.0])["max"] == -2


def test_nan_is_not_lost_in_a_maximum_wherever_it_comes():
    for order in permutations([1.0, math.nan, 2.0]):
        merged = Stats()
        for value in order:
            merged.merge(part([value], [1.0]))
        assert math.isnan(merged["max"])
    assert math.isnan(over_steps([part([math.nan], [1.0]), part([1.0], [1.0])])["max"])


def test_what_has_no_weight_does_not_count_and_a_mean_of_nothing_is_left_out():
    assert part([3.0, math.nan], [1.0, 0.0])["mean"] == 3
    stats = Stats()
    stats.mean("none", torch.tensor([1.0]), torch.tensor([0.0]))
    stats.max("none too", torch.tensor([]))
    assert stats.figures() == {}


def test_weights_of_rows_spread_over_tokens_and_no_gradient_is_kept():
    stats, values = Stats(), torch.tensor([[1.0, 2.0], [3.0, 9.0]], requires_grad=True)
    stats.mean("token", values, torch.tensor([[0.5, 0.5], [0.25, 0.0]]))
    stats.mean("row", values[:, :1], torch.tensor([[0.5, 0.5], [0.25, 0.0]]))  # [N, 1]: GSPO
    assert stats["token"] == (0.5 + 1 + 0.75) / 1.25
    assert stats["row"] == (1 * 1.0 + 3 * 0.25) / 1.25


def test_optimiser_steps_count_the_same_whatever_their_weights():
    steps = [part([1.0], [1.0]), part([4.0], [100.0])]
    assert over_steps(steps) == {"mean": 2.5, "max": 4.0, "sum": 2.5}


def test_a_number_that_does_not_say_how_it_merges_is_refused():
    zero, one = torch.zeros(1, 1), torch.ones(1)
    _, stats = grpo.policy_loss(zero, zero, one, torch.ones(1, 1).bool(), one)
    for value in (torch.tensor(1.0), 1.0):
        with pytest.raises(TypeError, match="stats.mean.'mean_logp', values, weights"):
            stats["mean_logp"] = value
        with pytest.raises(TypeError):
            stats |= {"mean_logp": value}
        with pytest.raises(TypeError, match="not as dict"):
            stats.merge({"mean_logp": value})
    stats.sum("here", 1.0)
    with pytest.raises(TypeError, match="'here' is a sum here and a max there"):
        stats.max("here", 1.0)


def test_the_largest_ratio_is_one_of_a_counted_token():
    """Padding has the ratio 1: with it, the maximum would depend on how rows are batched."""
    old, mask = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    logps = torch.log(torch.tensor([[0.5, 1.0], [0.25, 0.25]]))
    for ratio in ("token", "sequence"):
        _, stats = grpo.policy_loss(logps, old, torch.ones(2), mask, torch.ones(2), ratio=ratio)
        assert stats["max_ratio"] == pytest.approx(0.5)


def test_shares_of_clipped_tokens_whatever_the_weights_add_up_to():
    """Ratio 2 and A > 0 is stopped above, ratio 1/2 and A < 0 below; three of four tokens count."""
    logps = torch.log(torch.tensor([[2.0, 1.0], [0.5, 0.5]]))
    mask = torch.tensor([[True, True], [True, False]])
    weights = grpo.token_weights(mask.sum(1), "constant", max_new=10)
    advantages = torch.tensor([1.0, -1.0])
    _, stats = grpo.policy_loss(logps, torch.zeros(2, 2), advantages, mask, weights)
    shares = [stats["clipped_high"], stats["clipped_low"]]
    assert shares == pytest.approx([1 / 3, 1 / 3])
