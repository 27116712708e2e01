"""Before the first step: what a run will download and write, and whether it fits into memory.

`check_hub` looks before anything is fetched. `preflight` prints the memory table, chooses sizes and
runs the longest batch once. `halved` is the way on where memory runs out all the same. Sizes only
say how much is computed at once: beyond rounding, no result depends on them.
"""

import gc
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig

from data import Item
from policy import Policy, collate
from support import checkpoints, hub, image_sets, loading, parquet_sets, pictures
from support.config import Config
from support.distributed import say
from support.errors import UsageError
from support.progress import Progress


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


def check_hub(config: Config) -> None:
    """Say what a run will download and what a checkpoint takes; nothing large is fetched for that.

    UsageError where something is neither here nor within reach, or a large model has no GPU.
    """
    missing = not_here(config)
    if missing and not hub.online():
        raise UsageError(
            f"not on this machine, and the hub cannot be reached: {' and '.join(missing)}. "
            f"Connect to the network, or give {' and '.join(missing.values())}"
        )
    total, trained = loading.model_size(config.model, 0 if config.full else config.lora)
    device = loading.pick_device(config.device)
    if device == "cpu" and config.device != "cpu" and total > 1e9:
        raise UsageError(
            f"{config.model} has {total / 1e9:.1f} billion weights and there is no GPU: a step "
            "would take hours. Give --device cpu if that is meant, or --model DIR with a smaller "
            "model"
        )
    download = ", ".join(missing) or "nothing"
    if config.model in missing:
        download += f" (model about {2 * total / 1e9:.1f} GB)"
    weights = f"{total / 1e6:,.0f} million weights, {trained / 1e6:,.1f} million trained"
    checkpoint = f"A checkpoint takes {12 * trained / 1e9:.2f} GB, {checkpoints.KEEP} are kept"
    say(f"{config.model}: {weights}. To download: {download}. {checkpoint}")
    if missing:  # otherwise the table, which comes at once, says it better
        shape = AutoConfig.from_pretrained(config.model).get_text_config(decoder=True)
        model = Model(shape, total, trained, loading.product_dtype(device) == torch.float32)
        parts = memory(config, model, 350, fit(config, model, 350, math.inf))  # MedQA's longest
        say(f"memory, estimated: {peak(parts) / 1e9:.1f} GB")


def not_here(config: Config) -> dict[str, str]:
    """What would have to be downloaded -> the flag that names a copy of it on this machine."""
    found = {}
    if not Path(config.model).is_dir():
        if hub.is_path(config.model):
            raise UsageError(f"--model {config.model}: there is no such folder")
        if not hub.cached(config.model, "config.json", "model"):
            found[config.model] = "--model DIR with a model folder"
    dataset = "" if config.data_dir else config.dataset
    if dataset in ("medqa", "medqa-4"):
        if not hub.cached("bigbio/med_qa", "data_clean.zip", "dataset"):
            found["MedQA (132 MB)"] = "--data-dir DIR with bigbio/med_qa's data_clean.zip unpacked"
    elif dataset in parquet_sets.HUB and not parquet_sets.cached(dataset):
        repo, files = parquet_sets.HUB[dataset]
        names = " and ".join(sorted(set(files.values())))
        found[f"{dataset}'s files"] = f"--data-dir DIR with {repo}'s {names}"
    elif dataset in image_sets.NAMES and not image_sets.medmnist_cached(dataset):
        found[f"{dataset}'s file"] = f"--data-dir DIR with the .npz of {dataset}"
    return found


def memory(config: Config, model: Model, prompt: int, sizes: Sizes) -> dict[str, int]:
    """Bytes by kind, with a longest prompt of `prompt` tokens. See `peak` for what adds up."""
    shape, number = model.shape, 4 if model.fp32 else 2  # bytes of a number in a forward pass
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    weights = number * model.total + 4 * model.trained  # a frozen base, and fp32 adapters
    if config.full:
        weights = (4 if model.fp32 else 6) * model.total  # bf16: also a copy, for the products
    if config.full and config.kl_coef:  # the reference; with LoRA it is the base and costs nothing
        embedding = shape.vocab_size * hidden  # stays fp32
        weights += number * (model.total - embedding) + 4 * embedding
    rows = min(sizes.sample_rows, config.prompts * config.samples)
    cached = rows * config.max_new + math.ceil(rows / config.samples) * prompt  # tokens
    head_dim = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    # Tokens of one forward pass. With checkpointing one layer at a time is held in full.
    tokens = min(sizes.micro_batch, config.prompts) * (prompt + config.samples * config.max_new)
    states = tokens * hidden * number * (layers if config.checkpointing else 12 * layers)
    return {
        "weights": weights,
        "gradients": 4 * model.trained,
        "optimiser": 8 * model.trained,  # Adam's two moments, in fp32
        "K/V while sampling": layers * 2 * shape.num_key_value_heads * head_dim * number * cached,
        "activations": states + tokens * (8 * hidden + 6 * shape.intermediate_size) * number,
        "head chunk": sizes.head_chunk * shape.vocab_size * 4 * 4 + tokens * hidden * 4,
    }


def peak(parts: dict[str, int]) -> int:
    """Bytes at the largest moment: sampling and the update do not hold theirs at the same time."""
    sampling, updating = parts["K/V while sampling"], parts["activations"] + parts["head chunk"]
    return sum(parts.values()) - min(sampling, updating)


def available(device: torch.device, held: int) -> float:
    """Bytes that this process may hold, with the `held` ones of the model; inf if none can say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux
        return math.inf
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    if "MemAvailable" not in lines:
        return math.inf
    return int(lines["MemAvailable"].split()[0]) * 1024 + held


def fit(config: Config, model: Model, prompt: int, free: float) -> Sizes:
    """Halve what makes the peak until nine tenths of `free` bytes hold it, or it is smallest."""
    sizes = Sizes(config.micro_batch or math.ceil(config.prompts / config.minibatches))
    while peak(parts := memory(config, model, prompt, sizes)) > 0.9 * free:
        sampling = parts["K/V while sampling"] > parts["activations"] + parts["head chunk"]
        if sampling and sizes.sample_rows > config.samples:  # a group is sampled together
            rows = min(sizes.sample_rows, config.prompts * config.samples)
            sizes = sizes._replace(sample_rows=max(config.samples, rows // 2))
        elif not sampling and sizes.micro_batch > 1:
            sizes = sizes._replace(micro_batch=(sizes.micro_batch + 1) // 2)
        elif not sampling and sizes.head_chunk > 64:
            sizes = sizes._replace(head_chunk=sizes.head_chunk // 2)
        else:
            break
    return sizes


def sizes_of(policy: Policy, config: Config) -> dict[str, int]:
    """The sizes in force, as run.json has them."""
    return Sizes(config.micro_batch, policy.sample_rows, policy.head_chunk)._asdict()


def set_sizes(policy: Policy, config: Config, sizes: dict[str, int]) -> Config:
    """Put them in force: those of the policy are set, the config is returned with its own."""
    policy.sample_rows, policy.head_chunk = sizes["sample_rows"], sizes["head_chunk"]
    return replace(config, micro_batch=sizes["micro_batch"])


def preflight(policy: Policy, items: list[Item], config: Config) -> Config:
    """Print what the run will use, put sizes in force that fit, and run the longest batch."""
    weights, trained = list(policy.model.parameters()), policy.trainable().values()
    shape = policy.model.config.get_text_config(decoder=True)
    fp32 = loading.product_dtype(policy.device) == torch.float32
    model = Model(shape, sum(p.numel() for p in weights), sum(p.numel() for p in trained), fp32)
    prompt = len(policy.prompt(longest(policy, items, config, 1)[0], config.style))
    free = available(policy.device, held=sum(p.nbytes for p in weights))
    sizes = fit(config, model, prompt, free)
    config = set_sizes(policy, config, sizes._asdict())
    parts = memory(config, model, prompt, sizes)
    say(f"memory in GB, estimated for {prompt} + {config.samples} x {config.max_new} tokens a row:")
    for name, size in [*parts.items(), ("at the largest moment", peak(parts)), ("there is", free)]:
        say(f"  {name:<22}{size / 1e9:10.3f}")
    rows = f"{sizes.sample_rows} rows sampled at once"
    say(f"  {sizes.micro_batch} prompts a pass, {rows}, {sizes.head_chunk} tokens a head chunk")
    if peak(parts) > free:
        say("  that may not fit: fewer --samples, a smaller --max-new or --lora would help")
    return rehearsal(policy, items, config)


def rehearsal(policy: Policy, items: list[Item], config: Config) -> Config:
    """The longest batch once: memory runs out now, not in an hour. -> with the size that fits"""
    start = time.perf_counter()
    with Progress("the longest batch"):
        while not goes_through(policy, longest(policy, items, config, config.micro_batch), config):
            config = halved(config, "the longest batch")
    held = ""
    if policy.device.type == "cuda":
        held = f", with {torch.cuda.max_memory_allocated(policy.device) / 1e9:.1f} GB at most"
    say(f"the longest batch went through in {time.perf_counter() - start:.1f} s{held}")
    return config


def goes_through(policy: Policy, items: list[Item], config: Config) -> bool:
    """Whether there is memory for a forward and backward pass over completions of full length."""
    text, rollouts = [policy.tokens.end_id] * config.max_new, []
    for group, item in enumerate(items):
        started = policy.start(item, group, config.style)
        row = replace(started, completion_ids=text, sample_logps=[0.0] * len(text))
        rollouts += [row] * config.samples
    try:
        scores = policy.score(collate(rollouts, policy.device), config.temperature)
        values = 0 if scores.values is None else scores.values.sum()
        (scores.logps.sum() + values).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for p in policy.trainable().values():
            p.grad = None


def chosen_sizes(policy: Policy, items: list[Item], config: Config, facts: dict) -> Config:
    """The sizes that run.json has already, or those that `preflight` finds, now in force.

    facts: what run.json says; its "sizes" are set.
    """
    if "sizes" in facts:
        return set_sizes(policy, config, facts["sizes"])
    config = preflight(policy, items, config)
    facts["sizes"] = sizes_of(policy, config)
    return config


def smaller(config: Config, sizes: dict[str, int], where: str) -> Config:
    """After memory ran out: half the micro-batch, and where that is one prompt half the rows.

    In this order, since only the rows sampled at once can change a sampled log-prob's rounding.
    sizes: those of run.json, which are set. UsageError where neither can be halved.
    """
    rows = min(sizes["sample_rows"], config.prompts * config.samples)
    if config.micro_batch > 1 or rows <= config.samples:  # a group is sampled together
        config = halved(config, where)
        sizes["micro_batch"] = config.micro_batch
    else:
        sizes["sample_rows"] = max(config.samples, rows // 2)
        say(f"{where}: out of memory; from here on {sizes['sample_rows']} rows are sampled at once")
    return config


def halved(config: Config, where: str) -> Config:
    """After memory ran out, `where`: half the micro-batch. UsageError where that is one prompt.

    To be called after the `except` block, not in it: the exception holds what the step had made.
    """
    if config.micro_batch <= 1:
        raise UsageError(
            f"{where}: out of memory with one prompt at a time; fewer --samples, a smaller "
            "--max-new, adapters instead of --full, or --checkpointing would help"
        )
    config = replace(config, micro_batch=config.micro_batch // 2)
    size = f"--micro-batch {config.micro_batch}, which changes nothing but rounding"
    say(f"{where}: out of memory; from here on {size}", everyone=True)
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU
    return config


def longest(policy: Policy, items: list[Item], config: Config, n: int) -> list[Item]:
    """About the n longest prompts, the longest first.

    Only those with the longest texts or the largest images are measured: all would take minutes.
    """

    def letters(item: Item) -> int:
        return sum(map(len, (item.question, *item.options, *item.knowledge)))

    def area(item: Item) -> int:
        return sum(math.prod(pictures.size_of(source)) for source in pictures.sources(item.image))

    by_text = sorted(items, key=letters, reverse=True)[: 4 * n]
    by_area = sorted(items, key=area, reverse=True)[:n]
    some = {id(item): item for item in by_text + by_area}
    return sorted(some.values(), key=lambda item: -len(policy.prompt(item, config.style)))[:n]
