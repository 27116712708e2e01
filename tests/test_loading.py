"""Models from folders: families that are refused, types of weights, folders with parts missing."""

import types

import pytest
import torch
from helpers import refused
from tiny_models import SIZES, VOCABULARY, character_tokenizer, completions, family, llama
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from policy import Policy
from support import loading, runs
from support.errors import UsageError


@pytest.mark.parametrize(
    "config, model, extra, word",
    [
        (MistralConfig, MistralForCausalLM, {"sliding_window": 8}, "sliding"),
        (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}, "softcapping"),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, "logits_scaling"),
    ],
)
def test_unserved_families_are_refused_by_name(config, model, extra, word, tmp_path):
    made = model(config(vocab_size=VOCABULARY, **SIZES, **extra))
    made.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    refused(lambda: Policy.load(str(tmp_path)), word, config.model_type)


def test_a_folder_without_a_tokenizer_or_a_model(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    for path in (tmp_path / "m", tmp_path):
        refused(lambda path=path: Policy.load(str(path)), f"cannot load {path}")


def test_saved_and_loaded_folder_is_the_same_policy(tmp_path, items, demo):
    demo.save_folder(tmp_path)
    loaded = Policy.load(str(tmp_path), lora=0)
    assert loaded.encode(items) == demo.encode(items)
    mine, theirs = (policy.sample(items, 2, 8, 1.0, 0) for policy in (demo, loaded))
    assert completions(mine) == completions(theirs)
    adapted = Policy.load(str(tmp_path)).trainable()  # adapters are the default
    assert adapted and all(".A." in name or ".B." in name for name in adapted)


def test_weights_of_another_rank_are_refused():
    weights = family("llama", lora=4).trainable()
    other = family("llama", lora=2)
    refused(lambda: other.load_trainable(weights), "another LoRA rank")
    refused(lambda: family("llama", lora=2, init=weights), "--init", "another LoRA rank")
    refused(lambda: family("llama", lora=0).load_trainable(weights), "another model")


def test_a_setting_that_is_none_is_a_programmers_mistake():
    with pytest.raises(TypeError, match="lora_rank"):
        family("llama", lora_rank=4)
    refused(lambda: family("llama", train_vision=True), "--train-vision", "no vision tower")


@pytest.mark.parametrize("major, dtype", [(7, torch.float32), (8, torch.bfloat16)])
def test_bf16_only_where_the_gpu_has_it(major, dtype, tmp_path, monkeypatch, capsys):
    """A T4 (7.5) emulates bf16: there fp32, and one line that says so."""
    family("llama", lora=0).save_folder(tmp_path)
    capsys.readouterr()
    card = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # emulated
    loaded, said = [], []

    def from_pretrained(path, dtype, **kwargs):
        loaded.append(dtype)
        raise OSError("there is no GPU to load it to")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for load, kwargs in ((Policy.load, {}), (Policy.load, {"lora": 0}), (runs.open_policy, {})):
        with pytest.raises(UsageError, match="no GPU to load it to"):
            load(str(tmp_path), "cuda", **kwargs)
        said.append(capsys.readouterr().err)
    assert loaded == [dtype, torch.float32, dtype]  # adapters, --full, a model to evaluate
    line = "Card has no bf16 of its own: this run computes in fp32\n"
    assert said == [line if major == 7 else ""] * 3
