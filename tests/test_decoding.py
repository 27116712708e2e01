"""One step of sampling: products with few rows, and a model that is left as it was."""

import warnings

import pytest
import torch
from tiny_models import family
from torch import nn

from support.decoding import FEW_ROWS, drop_finished, pick, thin_products


@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (FEW_ROWS, 1), (FEW_ROWS + 1, 1), (5, FEW_ROWS)])
@pytest.mark.parametrize("bias", [False, True])
def test_thin_products_equal_plain_ones(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=bias)
    model = nn.Sequential(layer)
    model.device = torch.device("cpu")
    x = torch.randn(*rows, 40)
    expected = layer(x).detach()
    with thin_products(model), torch.no_grad():
        found = model(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_are_as_they_were_after_sampling(items):
    """An exception on the way included: scoring never takes the products of decoding."""
    policy = family("llama", lora=4)
    before = [(type(layer), dict(vars(layer))) for layer in policy.model.modules()]
    policy.sample(items[:2], 2, 4, 1.0, seed=0)
    with pytest.raises(KeyError), thin_products(policy.model):
        raise KeyError
    for layer, (kind, attributes) in zip(policy.model.modules(), before):
        assert type(layer) is kind
        assert vars(layer).keys() == attributes.keys() and "forward" not in vars(layer)


def test_within_it_linear_layers_multiply_so():
    """The context is at work: as many layers have another forward as there are linear ones."""
    model = family("llama", lora=4).model
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    with thin_products(model):
        assert all("forward" in vars(layer) for layer in linear)
    assert len(linear) == 2 * 7 + 1  # those of two blocks, under their adapters, and the head


def test_a_token_of_probability_0_is_never_picked():
    """Also where u is as near to 1 as it can be, and the rounded sum of probabilities below 1."""
    probabilities = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0])
    logits = probabilities.log().view(1, 1, 5)
    below_1 = 1 - 2**-53
    uniform = torch.tensor([[0.0, 0.2, 0.25, 0.7, 0.75, below_1]], dtype=torch.float64)
    tokens, logps = pick(logits, uniform, greedy=False)
    assert tokens.tolist() == [[1, 1, 2, 2, 3, 3]]
    torch.testing.assert_close(logps[0].exp(), probabilities[tokens[0]])
    tokens, logps = pick(logits, uniform, greedy=True)
    assert tokens.tolist() == [[2] * 6] and logps.exp().unique().tolist() == [0.5]


class Kept:
    """Stands in for the cache: what is it told to keep?"""

    def keep(self, prompts, slots):
        self.prompts, self.slots = prompts.tolist(), slots.tolist()


def test_ranks_close_where_it_saves_a_tenth():
    rows, starts = torch.arange(6).view(3, 2), torch.tensor([10, 11, 12])
    done = torch.tensor([False, True, True, True, True, False])
    cache = Kept()
    left, begun = drop_finished(rows, starts, done, cache)
    assert left.tolist() == [[0], [5]] and begun.tolist() == [10, 12]
    assert cache.prompts == [0, 2] and cache.slots == [[0], [1]]
    untouched = Kept()
    left, begun = drop_finished(rows.view(1, 6), starts[:1], torch.zeros(6).bool(), untouched)
    assert left.tolist() == [[0, 1, 2, 3, 4, 5]] and vars(untouched) == {}


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "mistral"])
def test_sampling_warns_of_nothing(name, items, demo):
    """transformers renames arguments and warns of the old name, which a user would see."""
    policy = demo if name == "qwen2" else family(name, lora=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy.sample(items[:2], 2, 4, 1.0, seed=0)
    assert [str(warning.message) for warning in caught] == []
