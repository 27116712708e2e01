"""Adapters beside a frozen layer: y = W x + (alpha / rank) B A x, cast once while sampling."""

import pytest
import torch
from tiny_models import family, moved
from torch import nn

from support.decoding import quick_products
from support.lora import LoRALinear


@pytest.fixture
def layer() -> LoRALinear:
    """In bf16, with a bias, its B drawn too."""
    torch.manual_seed(0)
    switch = {"adapters": "policy"}
    made = LoRALinear(nn.Linear(24, 40).bfloat16(), 4, switch, ["policy", "critic"], None)
    made.device = torch.device("cpu")
    for B in made.B.values():
        nn.init.normal_(B)
    return made


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
@pytest.mark.parametrize("name", ["policy", "critic", None])
def test_the_formula_in_float64_and_its_gradient(layer, shape, name):
    layer.double()
    layer.switch["adapters"] = name
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, b = layer.base.weight, layer.base.bias
    change = 2 * layer.B[name] @ layer.A[name] if name else 0
    expected = x @ (W + change).T + b
    found = layer(x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, dtype=torch.float64)
    leaves = [x, W, layer.B["policy"]] if name == "policy" else [x, W]
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_casting_once_changes_no_bit_and_leaves_nothing(layer):
    x = torch.randn(2, 3, 24).bfloat16()
    expected = layer(x)
    with pytest.raises(KeyError), quick_products(layer):
        assert layer.cast[0].dtype == torch.bfloat16
        assert torch.equal(layer(x), expected)
        raise KeyError
    assert layer.cast is None


def test_under_autocast_a_layer_in_fp32_multiplies_in_bf16(layer):
    """y's own type decides, not the weight's; cast once or not."""
    layer.float()
    x = torch.randn(2, 3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        with quick_products(layer):
            assert torch.equal(layer(x), found)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=0.1)


def test_after_an_update_sampling_casts_anew(items):
    policy = family("llama", lora=4)
    before = policy.sample(items[:1], 1, 4, 0.0, seed=0)[0].sample_logps
    moved(policy, by=0.3)
    assert policy.sample(items[:1], 1, 4, 0.0, seed=0)[0].sample_logps != before
