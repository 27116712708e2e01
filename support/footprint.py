"""How much memory a run takes, by arithmetic, and the sizes that fit into what there is.

Sizes only say how much is computed at once: beyond rounding, no result depends on them.
"""

import math
from typing import NamedTuple

from transformers import PretrainedConfig

from policy import Policy
from support.config import Config

PHASES = ("sampling", "evaluation", "update")


class Sizes(NamedTuple):
    """What is chosen to fit into memory."""

    micro_batch: int  # prompts a forward pass
    sample_rows: int = Policy.sample_rows  # completions sampled at once
    head_chunk: int = 512  # tokens whose logits are held at once


class Model(NamedTuple):
    """What the arithmetic needs to know of a model."""

    shape: PretrainedConfig  # the text model's: layers, widths, heads, vocabulary
    total: int  # weights
    trained: int
    fp32: bool  # the products are not in bf16


def memory(config: Config, model: Model, prompt: int, sizes: Sizes) -> dict[str, int]:
    """Bytes by kind, with a longest prompt of `prompt` tokens. See `peak` for what adds up.

    The factors of `sampling` and `update` are those of benchmarks/memory_table.py, which counts
    every tensor of a simulated device: within a tenth at 3 billion weights.
    """
    shape, number = model.shape, 4 if model.fp32 else 2  # bytes of a number in a forward pass
    weights = number * model.total + 4 * model.trained  # a frozen base, and fp32 adapters
    embedding = shape.vocab_size * shape.hidden_size
    if config.full:
        weights = 4 * model.total
    elif config.fp32_head and not model.fp32:
        weights += 2 * embedding  # the head's numbers are in `total`, at two bytes each
    adapted = config.advantage == "gae" and config.critic == "lora"  # the critic, on the reference
    if config.full and (config.kl_coef or adapted):  # a copy; with LoRA the base is the reference
        weights += number * (model.total - embedding) + 4 * embedding  # that stays fp32
    rows, eval_rows = (min(sizes.sample_rows, n) for n in (config.prompts * config.samples, 128))
    groups = math.ceil(rows / config.samples)
    return {
        "weights": weights,
        "optimiser": 8 * model.trained,  # Adam's two moments, in fp32
        "sampling": sampling(config, model, prompt, rows, groups),
        "evaluation": sampling(config, model, prompt, eval_rows, eval_rows),
        "update": update(config, model, prompt, sizes),
    }


def sampling(config: Config, model: Model, prompt: int, rows: int, prompts: int) -> int:
    """Bytes for `rows` completions of so many prompts."""
    shape, number = model.shape, 4 if model.fp32 else 2
    token = shape.num_hidden_layers * 2 * shape.num_key_value_heads * head_dim(shape) * number
    keys_and_values = token * (prompts * prompt + rows * config.max_new)
    at_once = min(prompts, max(1, Policy.prefill_tokens // prompt)) * prompt  # tokens of prompts
    reading = 4 * shape.intermediate_size * number * at_once
    picking = 4 * 4 * shape.vocab_size * rows  # fp32 logits and what is made of them
    return casts(model) + keys_and_values + max(reading, picking)


def update(config: Config, model: Model, prompt: int, sizes: Sizes) -> int:
    """Bytes for the gradient, and a forward and backward pass over a micro-batch."""
    shape, number = model.shape, 4 if model.fp32 else 2
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    prompts = min(sizes.micro_batch, math.ceil(config.prompts / config.minibatches))
    tokens = prompts * (prompt + config.samples * config.max_new)
    seen = prompts * config.samples * (prompt + config.max_new)  # K/V repeated for every head
    saved = number * (6 * inner * tokens + 2 * shape.num_attention_heads * head_dim(shape) * seen)
    backward = number * tokens * (4 * inner + 2 * hidden)  # through one layer, beside what it saved
    head = 3 * 4 * shape.vocab_size * sizes.head_chunk
    if config.full:  # the head's own cast and gradient, in bf16 and fp32
        head += 8 * shape.vocab_size * hidden
    states = layers * tokens * hidden * (4 if config.full else number)
    if config.checkpointing:  # one layer at a time is held in full
        backward += saved
    else:
        states = layers * saved
    if config.advantage == "gae" and config.critic == "lora":
        states *= 2  # the critic's pass too
    return 4 * model.trained + states + max(casts(model), backward, head)


def casts(model: Model) -> int:
    """Autocast keeps bf16 copies of the fp32 weights, which are the trained ones."""
    return 0 if model.fp32 else 2 * model.trained


def head_dim(shape: PretrainedConfig) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def peak(parts: dict[str, int]) -> int:
    """Bytes at the largest moment: the last three are not held at the same time."""
    return parts["weights"] + parts["optimiser"] + max(parts[name] for name in PHASES)


def fit(config: Config, model: Model, prompt: int, free: float) -> Sizes:
    """Halve what makes the peak until nine tenths of `free` bytes hold it, or it is smallest."""
    sizes = Sizes(config.micro_batch or math.ceil(config.prompts / config.minibatches))
    while peak(parts := memory(config, model, prompt, sizes)) > 0.9 * free:
        updating = parts["update"] >= max(parts["sampling"], parts["evaluation"])
        rows = min(sizes.sample_rows, max(128, config.prompts * config.samples))
        if not updating and rows > config.samples:  # a group is sampled together
            sizes = sizes._replace(sample_rows=max(config.samples, rows // 2))
        elif updating and sizes.micro_batch > 1:
            sizes = sizes._replace(micro_batch=(sizes.micro_batch + 1) // 2)
        elif updating and sizes.head_chunk > 64:
            sizes = sizes._replace(head_chunk=sizes.head_chunk // 2)
        else:
            break
    return sizes
