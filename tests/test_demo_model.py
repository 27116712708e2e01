"""The tiny models made in code."""

import pytest
import torch

from support.demo_model import demo_policy, tiny_vl_policy


def make(kind: str, seed: int):
    return demo_policy(seed) if kind == "text" else tiny_vl_policy(seed, ["some text"])


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_seed_makes_one_model(kind):
    first, again, other = (make(kind, seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.embed_tokens.weight" if kind == "text" else "lm_head.weight"
    assert not torch.equal(first[name], other[name])


def test_making_the_models_touches_no_gpu_and_no_random_state(monkeypatch):
    def touched(*args):
        raise AssertionError("a GPU's random state was asked for")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", touched)
    before = torch.get_rng_state()
    make("text", 0)
    make("images", 0)
    assert torch.equal(torch.get_rng_state(), before)
