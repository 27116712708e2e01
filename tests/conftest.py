"""Tiny random models, made in code: no network, no GPU, seconds."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from support import loading
from support.config import Config
from support.demo_model import demo_policy
from support.warm_start import ProtocolLessons

# A folder with MedQA, MMLU-Pro and BCCD in their published layouts.
SHARED = Path(os.environ.get("SAMPLE_DATA", "no sample of the real data"))


@pytest.fixture(autouse=True)
def one_thread():
    """More wait for each other on a busy machine: two cost minutes."""
    torch.set_num_threads(1)


@pytest.fixture
def demo():
    """A random policy on the demo's words.

    Its logits are widened: at initialisation every token would be about equally likely.
    """
    policy = demo_policy(0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    return policy


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A model folder: a demo policy that has been taught a little, so that its rewards differ."""
    path = tmp_path_factory.mktemp("model")
    policy = demo_policy(0)
    lessons = ProtocolLessons(policy, Config())
    lessons.study("mixture", lambda step: lessons.mixture(), limit=60)
    policy.save_folder(path)
    return str(path)


@pytest.fixture
def bf16_products(monkeypatch):
    """A policy made here computes as on a GPU: fp32 weights, bf16 products by autocast."""
    monkeypatch.setattr(loading, "product_dtype", lambda device: torch.bfloat16)


@pytest.fixture
def items():
    """Five demo items with prompts of different lengths."""
    found = data.load("demo", "train")[:40]
    assert len({len(item.question.split()) for item in found}) > 1
    return [found[i] for i in (0, 3, 5, 8, 12)]


@pytest.fixture(scope="session")
def medqa_dir():
    if not SHARED.is_dir():
        pytest.skip("the sample of real data is not here")
    return str(SHARED)
