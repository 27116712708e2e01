"""Before the first step: what is missing, what the run will take, and whether it fits; answered before an hour has been spent on finding out.

A file of its own because the loop in train.py reads better without it. `check_hub` looks before anything is fetched; `preflight` prints the memory
table, chooses how many prompts a pass takes, and runs the longest batch once. None of it changes a result beyond rounding: only sizes are chosen.
The arithmetic is in bytes: LoRA keeps a frozen base (bf16 on a GPU) and trains fp32 adapters, --full trains fp32 weights; Adam keeps two fp32 moments.
"""
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

import policy as policies
from data import UsageError
from policy import Policy, collate
from ranks import say
from support import hub, image_sets, pictures


def check_hub(config) -> None:
    """Before anything large is fetched: is everything here or within reach, and can this machine hold it? Says what will be downloaded and written."""
    missing = []
    if not Path(config.model).is_dir() and hub.is_path(config.model):
        raise UsageError(f"--model {config.model}: there is no such folder")
    if not Path(config.model).is_dir() and not hub.cached(config.model, "config.json", "model"):
        missing.append((config.model, "--model DIR with a model folder"))
    if config.dataset in ("medqa", "medqa-4") and not config.data_dir and not hub.cached("bigbio/med_qa", "data_clean.zip", "dataset"):
        missing.append(("MedQA (132 MB)", "--data-dir DIR with the unpacked data_clean.zip of bigbio/med_qa"))
    if config.dataset in image_sets.NAMES and not config.data_dir and not image_sets.medmnist_cached(config.dataset):
        missing.append((f"{config.dataset}'s file", f"--data-dir DIR with the .npz of {config.dataset}"))
    if missing and not hub.online():
        raise UsageError(f"not on this machine, and the hub cannot be reached: {' and '.join(what for what, _ in missing)}. "
                         f"Connect to the network, or give {' and '.join(way for _, way in missing)}")
    total, trained = policies.model_size(config.model, 0 if config.full else config.lora)
    device = policies.pick_device(config.device)
    if device == "cpu" and config.device != "cpu" and total > 1e9:
        raise UsageError(f"{config.model} has {total / 1e9:.1f} billion weights and there is no GPU: a step would take hours. "
                         "Give --device cpu if that is meant, or --model DIR with a smaller model")
    seconds = forecast(config, total, device)
    say(f"{config.model}: {total / 1e6:,.0f} million weights, {trained / 1e6:,.1f} million trained. "
        f"To download: {', '.join(what for what, _ in missing) or 'nothing'}{f' (model about {2 * total / 1e9:.1f} GB)' if any(config.model == w for w, _ in missing) else ''}. "
        f"A checkpoint takes {12 * trained / 1e9:.2f} GB, {config.keep} are kept. Estimated {config.steps * seconds / 3600:.1f} h for {config.steps} steps, evaluation not counted")
    if missing:                                                               # else the table below says it better
        fp32 = policies.product_dtype(device) == torch.float32
        parts = memory(config, policies.model_shape(config.model), total, trained, 350, fp32)
        say(f"memory, estimated: {peak(parts) / 1e9:.1f} GB")


def memory(config, shape, total: int, trained: int, prompt: int, fp32: bool,
           head_chunk: int = 512) -> dict[str, int]:
    """Bytes by kind, by arithmetic. prompt: tokens of the longest; fp32: products are not in bf16.

    Sampling (K/V) and the update (activations, head) do not hold theirs at the same time.
    """
    layers, hidden, rows = shape.num_hidden_layers, shape.hidden_size, min(config.sample_rows, config.prompts * config.samples)
    width = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    half = 4 if fp32 else 2  # bytes of a number in the passes
    tokens = min(config.micro_batch or config.prompts, config.prompts) * (prompt + config.samples * config.max_new)      # of one forward pass
    inside = tokens * (8 * hidden + 6 * shape.intermediate_size) * half                                           # one layer, recomputed
    reference = 0  # adapters off cost nothing, a copy does
    if config.full and config.kl_coef:
        embedding = shape.vocab_size * shape.hidden_size  # stays fp32 in the copy
        reference = half * (total - embedding) + 4 * embedding
    if config.full:
        weights = (4 if fp32 else 6) * total  # bf16: also a copy, cast for the products
    else:
        weights = half * total + 4 * trained
    return {"weights": weights + reference, "gradients": 4 * trained, "optimiser": 8 * trained,
            "K/V while sampling": layers * 2 * shape.num_key_value_heads * width * half * (rows * config.max_new + math.ceil(rows / config.samples) * prompt),
            "activations": tokens * hidden * half * (layers if config.checkpointing else 12 * layers) + inside,
            "head chunk": head_chunk * shape.vocab_size * 4 * 4 + tokens * hidden * 4}


def peak(parts: dict[str, int]) -> int:
    return sum(parts.values()) - min(parts["K/V while sampling"], parts["activations"] + parts["head chunk"])


def available(device: torch.device, held: int) -> float:
    """Bytes that this process may hold, the `held` ones of the model among them; infinite where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + held
    except (OSError, KeyError, ValueError):
        return math.inf


def fit(config, shape, total: int, trained: int, prompt: int, fp32: bool, free: float) -> tuple:
    """(config, head chunk, memory): micro-batch, then rows sampled at once, then the head's chunk halved until nine tenths of `free` hold it, or nothing is left to halve."""
    config, chunk = replace(config, micro_batch=config.micro_batch or math.ceil(config.prompts / config.minibatches)), 512
    while peak(parts := memory(config, shape, total, trained, prompt, fp32, chunk)) > .9 * free:
        sampling = parts["K/V while sampling"] > parts["activations"] + parts["head chunk"]
        if sampling and config.sample_rows > config.samples:
            config = replace(config, sample_rows=max(config.samples, min(config.sample_rows, config.prompts * config.samples) // 2))
        elif not sampling and config.micro_batch > 1:
            config = replace(config, micro_batch=(config.micro_batch + 1) // 2)
        elif not sampling and chunk > 64:
            chunk //= 2
        else:
            break
    return config, chunk, parts


def longest(policy: Policy, items: list, config, n: int) -> list:
    """About the n longest prompts, the longest first: measured among those with the longest texts and those with the largest images, since measuring all takes minutes."""
    def letters(item) -> int:
        return sum(map(len, (item.question, *item.options, *item.knowledge)))

    texts = sorted(items, key=letters, reverse=True)[:4 * n]
    area = lambda item: sum(w * h for w, h in map(pictures.size_of, pictures.sources(item.image)))
    shown = [item for item in items if item.image is not None]
    some = {id(item): item for item in [*texts, *sorted(shown, key=area, reverse=True)[:n]]}
    return sorted(some.values(), key=lambda item: -len(policy.prompt(item, config.style)))[:n]


def preflight(policy: Policy, items: list, config):
    """Print what the run will use, choose sizes that fit, and run the longest batch. Returns the config with those sizes; sets policy.head_chunk."""
    fp32, model = policies.product_dtype(policy.device) == torch.float32, policy.model
    total, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in policy.trainable().values())
    shape, first = model.config.get_text_config(decoder=True), longest(policy, items, config, 1)[0]
    prompt = len(policy.prompt(first, config.style))
    free = available(policy.device, sum(p.numel() * p.element_size() for p in model.parameters()))
    config, policy.head_chunk, parts = fit(config, shape, total, trained, prompt, fp32, free)
    say(f"memory, estimated for a longest prompt of {prompt} tokens and {config.samples} x {config.max_new} new ones (GB):")
    for name, size in [*parts.items(), ("at the largest moment", peak(parts)), ("there is", free)]:
        say(f"  {name:<22}{size / 1e9:10.3f}")
    say(f"  {config.micro_batch} prompts a pass, {config.sample_rows} rows sampled at once, {policy.head_chunk} tokens a head chunk")
    if peak(parts) > free:
        say("  that may not fit: fewer --samples, a smaller --max-new or --lora would help")
    return rehearsal(policy, items, config)


def rehearsal(policy: Policy, items: list, config):
    """The longest batch once, forward and backward, its gradient thrown away: memory runs out now or not at all. Halves the micro-batch until it does not."""
    start = time.perf_counter()
    while True:
        rollouts = []
        for group, item in enumerate(longest(policy, items, config, config.micro_batch)):
            started = policy.start(item, group, config.style)
            text = [policy.end_id] * config.max_new
            rollouts += [replace(started, completion_ids=text, sample_logps=[0.0] * len(text)) for _ in range(config.samples)]
        try:
            scores = policy.score(collate(rollouts, policy.device), config.temperature)
            (scores.logps.sum() + (0 if scores.values is None else scores.values.sum())).backward()
            break
        except torch.OutOfMemoryError:
            config.micro_batch = smaller(config, "micro_batch", "the longest batch")
        finally:
            for p in policy.trainable().values():
                p.grad = None
    say(f"the longest batch went through in {time.perf_counter() - start:.1f} s" + (f", with {torch.cuda.max_memory_allocated(policy.device) / 1e9:.1f} GB at most" if policy.device.type == "cuda" else ""))
    return config


def smaller(config, name: str, where: str) -> int:
    """After memory ran out: half of config.micro_batch or config.sample_rows; a UsageError where it cannot be halved."""
    value, least = getattr(config, name), {"micro_batch": 1, "sample_rows": config.samples}[name]
    if value <= least:
        raise UsageError(f"{where}: out of memory with one prompt at a time; fewer --samples, a smaller --max-new, adapters instead of --full, or --checkpointing would help") from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"{where}: out of memory; going on with --{name.replace('_', '-')} {max(least, value // 2)}, which changes nothing but rounding", everyone=True)
    return max(least, value // 2)


def forecast(config, total: int, device: str, prompt: int = 350) -> float:
    """Seconds a step, roughly: matrix products at 40% of the rate measured now, decoding at 50% of the copy bandwidth, completions at their limit."""
    dtype, on_cpu = policies.product_dtype(device), device == "cpu"
    side = 1024 if on_cpu else 4096
    x = torch.ones(side, side, dtype=dtype, device=device)
    y = torch.ones(2**24 if on_cpu else 2**26, dtype=dtype, device=device)
    def seconds(work) -> float:
        work()
        start = time.perf_counter()
        for _ in range(3):
            out = work()
        float(out.flatten()[0])                                                               # waits for the GPU
        return (time.perf_counter() - start) / 3
    flops, bandwidth = 2 * side**3 / seconds(lambda: x @ x), 2 * y.nbytes / seconds(lambda: y.clone())
    tokens = config.prompts * (prompt + config.samples * config.max_new)
    passes = 4 * config.updates + (config.updates * config.minibatches > 1) + bool(config.kl_coef)      # forward, forward again, backward twice; old; reference
    update = passes * 2 * total * tokens / (.4 * flops)
    decode = config.max_new * max(total * dtype.itemsize / (.5 * bandwidth), 2 * total * config.prompts * config.samples / (.4 * flops))
    return update + decode
