"""A model from a folder or the hub, as the policy needs it: its family served, its types chosen."""

import copy
import inspect
import os
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from support.distributed import say
from support.errors import UsageError, first_line
from support.tokens import load_tokenizer
from support.vision import FRAMES, ImageProcessor


def quiet() -> None:
    """transformers' own bars and hints off: the command line has its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if name.startswith("cuda") and (torch.device(name).index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(f"--device {name}: the last CUDA device that torch sees is cuda:{last}")
    return name


def one_thread() -> None:
    """For the models made here, so small that threads wait for each other.

    One is as fast as two to within 20%, and 5 times as fast beside other work.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def product_dtype(device: str | torch.device) -> torch.dtype:
    """The type of matrix products: bf16 on a GPU that has it, fp32 elsewhere.

    A GPU before Ampere, such as a T4 or V100, can only emulate bf16, which is slower than fp32.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def load(name_or_path: str, device: str, dtype: torch.dtype) -> tuple:
    """(model, tokenizer, image processor or None). The vision tower keeps transformers' sdpa."""
    if device.startswith("cuda") and product_dtype(device) == torch.float32:
        card = torch.cuda.get_device_name(device)
        say(f"{card} has no bf16 of its own: this run computes in fp32")
    processor = None
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        refuse_unserved(config)
        tokenizer = load_tokenizer(name_or_path)
        kind, attention = AutoModelForCausalLM, "prompt_once"
        if config.model_type in FRAMES:
            processor = ImageProcessor.from_pretrained(name_or_path)
            kind, attention = AutoModelForImageTextToText, {"text_config": "prompt_once"}
        model = kind.from_pretrained(name_or_path, dtype=dtype, attn_implementation=attention)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"cannot load {name_or_path}: {first_line(error)}. A model folder holds config.json, "
            "*.safetensors and a tokenizer; a hub name needs a network"
        ) from None
    return model.to(device), tokenizer, processor


def refuse_unserved(config) -> None:
    """UsageError, by name, for a family whose attention or head does more than ours."""
    text = config.get_text_config(decoder=True)
    layer_types = getattr(text, "layer_types", None) or []
    faults = sorted(set(layer_types) - {"full_attention"})
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if windowed and not layer_types:
        faults.append("sliding_window")
    for name in (
        "attn_logit_softcapping",
        "attention_chunk_size",
        "alibi",
        "final_logit_softcapping",
    ):
        if getattr(text, name, None):
            faults.append(name)
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            faults.append(name)
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):  # a row would depend on its batch's longest position
        faults.append(f"rope type {rope}")
    if faults:
        raise UsageError(
            f"model type {config.model_type!r} is not served: it uses {', '.join(faults)}. "
            "Served are Llama, Qwen2, Qwen2.5, Qwen3, SmolLM and other families with plain full "
            "attention"
        )


def prepare(model: nn.Module, fp32_head: bool) -> None:
    """What we change of any model before it is used."""
    without_dropout(model)
    fuse_norms(model)
    if fp32_head:
        widen_head(model)


def without_dropout(model: nn.Module) -> None:
    """Dropout off for good: with it, two scoring passes of the same weights would differ."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def fuse_norms(model: nn.Module) -> None:
    """Each RMSNorm of the decoder's residual stream: one kernel of a GPU in place of eight.

    In fp32 it is the same arithmetic; in bf16 the result is rounded once, not before the weight
    too. Scorer and sampler both have it. Others, of heads, may get bf16 beside weights in fp32, and
    then it would not be one kernel. Gemma's adds 1 to its weight, and calls epsilon `eps`.
    """
    decoder = model.get_decoder()
    width = decoder.get_input_embeddings().embedding_dim
    for layer in decoder.modules():
        is_norm = type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon")
        if is_norm and layer.weight.shape == (width,):
            kwargs = dict(weight=layer.weight, eps=layer.variance_epsilon)
            layer.forward = partial(F.rms_norm, normalized_shape=(width,), **kwargs)


def widen_head(model: nn.Module) -> None:
    """The head's weights in fp32, apart from an embedding in bf16 that they are tied to."""
    weight = model.lm_head.weight
    if weight.dtype != torch.float32:
        model.lm_head.weight = nn.Parameter(weight.float(), requires_grad=weight.requires_grad)


def halve_linear_layers(model: nn.Module, keep_head: bool) -> None:
    """Round the weights of a frozen fp32 model's linear layers to bf16, in place.

    Autocast rounds these weights for every product anyway, so its outputs do not change by a bit.
    What is added up between the products stays fp32: the embedding, and a head that is tied to it.
    keep_head: any head does, since its product is in fp32 too.
    """
    kept = [model.get_input_embeddings().weight]
    if keep_head:
        kept.append(model.lm_head.weight)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not any(layer.weight is weight for weight in kept):
            layer.to(torch.bfloat16)


def frozen_copy(model: nn.Module, half: bool, fp32_head: bool, shares_tower: bool) -> nn.Module:
    """The reference of a policy all of whose weights are trained, and the base of its critic.

    half: its linear layers in bf16, where products are in bf16 anyway; fp32_head: but for the head.
    shares_tower: the vision tower is never trained, so one is enough.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)
    if half:
        halve_linear_layers(frozen, fp32_head)  # before it shares any with the policy
    if shares_tower:
        frozen.model.visual = model.model.visual
    return frozen


@torch.no_grad()
def begin_at(weights: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Copy another run's trained weights into a policy's parameters (not into its critic's).

    Adapters named "reference" get the policy's weights of that run, and are frozen.
    """
    for name, p in parameters.items():
        kept = name.endswith(".reference")
        theirs = weights.get(name.removesuffix("reference") + "policy" if kept else name)
        if theirs is None or theirs.shape != p.shape:
            raise UsageError(
                "--init: those weights belong to another model, or to another LoRA rank"
            )
        p.copy_(theirs)
        if kept:
            p.requires_grad_(False)


def cache_argument(model) -> str:
    """transformers 5.17 knows `past_key_values` alone; newer versions warn of it: `cache`."""
    known = inspect.signature(model.get_decoder().forward).parameters
    return "past_key_values" if "past_key_values" in known else "cache"


def enable_checkpointing(models, context_fn) -> None:
    """Recompute activations in the backward pass, under what `context_fn` returns."""
    for model in filter(None, models):
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": context_fn})


def model_size(name_or_path: str, widened: bool = False) -> tuple[int, int]:
    """(weights, those of adapters of rank 1) of a model, from its config alone.

    widened: with a head of its own in fp32, beside an embedding in bf16.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        kind = AutoModelForCausalLM
        if config.model_type in FRAMES:
            kind = AutoModelForImageTextToText
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.bfloat16)
            if widened:
                widen_head(model)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read the config of {name_or_path}: {first_line(error)}") from None
    total = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return total, sum(layer.in_features + layer.out_features for layer in linear)
