"""Sampling: picked tokens, random numbers, rows that are left out, products with few rows."""

import warnings

import pytest
import torch
from tiny_models import family
from torch import nn

from support.decoding import FEW_ROWS, Draft, quick_products


def draft_of(prompts: int, rows: int) -> Draft:
    starts = 10 + torch.arange(prompts)
    return Draft(0, range(rows), 4, starts, torch.zeros(1, dtype=torch.long))


def test_a_token_of_probability_0_is_never_picked():
    """Also where u is as near to 1 as it can be, and the rounded sum of probabilities below 1."""
    probabilities = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0])
    logits = probabilities.log().view(1, 1, 5)
    draft = draft_of(1, 6)
    below_1 = 1 - 2**-53
    draft.uniforms[:, 0] = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, below_1], dtype=torch.float64)
    draft.pick(logits, greedy=False)
    assert draft.tokens[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(draft.logps[:, 0].exp(), probabilities[draft.tokens[:, 0]])
    draft.t += 1
    draft.pick(logits, greedy=True)
    assert draft.tokens[:, 1].tolist() == [2] * 6
    assert draft.logps[:, 1].exp().tolist() == [0.5] * 6
    assert not draft.tokens[:, 2:].any()


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (FEW_ROWS, 1), (FEW_ROWS + 1, 1), (5, FEW_ROWS)])
@pytest.mark.parametrize("bias", [False, True])
def test_thin_products_equal_plain_ones(rows, bias, two_threads):
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=bias)
    model = nn.Sequential(layer)
    model.device = torch.device("cpu")
    x = torch.randn(*rows, 40)
    expected = layer(x).detach()
    with quick_products(model), torch.no_grad():
        assert "forward" in vars(layer)
        found = model(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_are_as_they_were_after_sampling(items, two_threads):
    """An exception on the way included: scoring never takes the products of decoding."""
    policy = family("llama", lora=4)
    before = [(type(layer), dict(vars(layer))) for layer in policy.model.modules()]
    policy.sample(items[:2], 2, 4, 1.0, seed=0)
    with pytest.raises(KeyError), quick_products(policy.model):
        linear = [layer for layer in policy.model.modules() if type(layer) is nn.Linear]
        assert len(linear) == 2 * 7 + 1  # those of two blocks, under their adapters, and the head
        assert all("forward" in vars(layer) for layer in linear)
        raise KeyError
    for layer, (kind, attributes) in zip(policy.model.modules(), before):
        assert type(layer) is kind
        assert vars(layer).keys() == attributes.keys()
        assert vars(layer).get("cast") is None


def test_on_one_thread_they_multiply_as_ever():
    model = family("llama", lora=4).model
    with quick_products(model):
        linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
        assert linear and not any("forward" in vars(layer) for layer in linear)


class Kept:
    """Stands in for the cache: what is it told to keep?"""

    def keep(self, prompts, slots):
        self.prompts, self.slots = prompts.tolist(), slots.tolist()


def left_of(prompts: int, said: list[list[int]]) -> tuple[Draft, Kept]:
    """Rows that said these tokens, of which 7 ends one."""
    draft, cache = draft_of(prompts, len(said)), Kept()
    draft.tokens[:, : len(said[0])] = torch.tensor(said)
    draft.close_ranks(len(said[0]), lambda ids: 1 if 7 in ids else None, cache)
    return draft, cache


def test_ranks_close_where_it_saves_a_tenth():
    draft, cache = left_of(3, [[1, 2], [7, 2], [1, 7], [7, 7], [7, 1], [2, 1]])
    assert draft.done.tolist() == [False, True, True, True, True, False]
    assert draft.rows.tolist() == draft.slots.tolist() == [[0], [5]]
    assert draft.starts.tolist() == [10, 12]
    assert cache.prompts == [0, 2] and cache.slots == [[0], [1]]
    # A finished row stays where its place saves nothing, and what it goes on to say ends nothing.
    draft, untouched = left_of(2, [[7], [1], [1], [1]])
    assert draft.rows.tolist() == [[0, 1], [2, 3]] and vars(untouched) == {}
    draft.tokens[0] = 1
    draft.close_ranks(2, lambda ids: None, untouched)
    assert draft.done.tolist() == [True, False, False, False]


def test_where_all_have_finished_nothing_is_left_to_close():
    draft, untouched = left_of(1, [[7], [7]])
    assert draft.done.all() and vars(untouched) == {}


def test_a_rows_random_numbers_are_its_own():
    together, alone = draft_of(3, 6).uniforms, Draft(0, range(4, 6), 4, torch.tensor([7]), None)
    assert torch.equal(together[4:], alone.uniforms)
    assert len(together.unique()) == 24 and 0 <= together.min() and together.max() < 1


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "mistral"])
def test_sampling_warns_of_nothing(name, items, demo):
    """transformers renames arguments and warns of the old name, which a user would see."""
    policy = demo if name == "qwen2" else family(name, lora=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy.sample(items[:2], 2, 4, 1.0, seed=0)
    assert [str(warning.message) for warning in caught] == []
