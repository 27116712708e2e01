"""Models from folders: families that are refused, types of weights, folders with parts missing."""

import types
from functools import partial

import pytest
import torch
from helpers import refused
from tiny_models import SIZES, VOCABULARY, character_tokenizer, completions, family, llama
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from policy import Policy
from support import loading, runs
from support.demo_model import demo_policy, tiny_vl_policy
from support.errors import UsageError

LONG = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=1024)


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}


@pytest.mark.parametrize(
    "config, model, extra, word",
    [
        (MistralConfig, MistralForCausalLM, {"sliding_window": 8}, "sliding"),
        (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}, "softcapping"),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, "logits_scaling"),
        (LlamaConfig, LlamaForCausalLM, rope("dynamic", factor=2.0), "rope type dynamic"),
        (LlamaConfig, LlamaForCausalLM, rope("longrope", factor=2.0, **LONG), "type longrope"),
    ],
)
def test_unserved_families_are_refused_by_name(config, model, extra, word, tmp_path):
    made = model(config(vocab_size=VOCABULARY, **SIZES, **extra))
    made.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    refused(lambda: Policy.load(str(tmp_path)), word, config.model_type)


def test_rope_scaled_by_constants_is_served(tmp_path):
    made = llama(**rope("linear", factor=2.0))
    made.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert Policy.load(str(tmp_path)).model.config.rope_parameters["rope_type"] == "linear"


def norms(model) -> list:
    return [layer for layer in model.modules() if isinstance(vars(layer).get("forward"), partial)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_are_transformers_own(dtype):
    """Each against its class's forward, weights drawn; in bf16 they differ by one rounding."""
    models = [family(name, lora=0).model for name in ("llama", "qwen3")]
    models += [demo_policy(0).model, tiny_vl_policy(0, ["a text"]).model]
    for model in models:
        blocks = model.config.get_text_config(decoder=True).num_hidden_layers
        assert len(norms(model)) == 2 * blocks + 1
        for layer in norms(model):
            assert type(layer).__name__.endswith("RMSNorm")
            torch.nn.init.normal_(layer.to(dtype).weight)
            x = torch.randn(3, 5, len(layer.weight)).to(dtype)
            mine, theirs = layer(x), type(layer).forward(layer, x)
            rounding = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(mine, theirs, rtol=rounding, atol=1e-6)


def test_the_kept_references_norms_are_its_own():
    """A fused norm holds its weight: the copy's must be the copy's."""
    policy = family("llama", lora=0, keep_reference=True)
    for mine, kept in zip(norms(policy.model), norms(policy.frozen)):
        x = torch.randn(3, len(mine.weight))
        before = kept(x)
        torch.nn.init.normal_(mine.weight)
        assert torch.equal(kept(x), before) and not torch.equal(mine(x), before)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    refused(lambda: loading.pick_device("cuda:7"), "--device cuda:7", "--device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(lambda: loading.pick_device("cuda:7"), "--device cuda:7", "cuda:1")
    assert loading.pick_device("cuda:1") == "cuda:1" and loading.pick_device("auto") == "cuda"


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


def test_cudnn_attention_is_off():
    """It is on in torch, and first in the order of kernels."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
