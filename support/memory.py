"""Before the first step: what a run will download and write, and whether it fits into memory.

`check_hub` looks before anything is fetched. `preflight` prints the memory table, chooses sizes and
runs the longest batch once. `halved` is the way on where memory runs out all the same. Sizes only
say how much is computed at once: beyond rounding, no result depends on them.
"""

import gc
import math
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from transformers import AutoConfig

from data import Item
from policy import Policy, collate
from support import checkpoints, hub, image_sets, loading, parquet_sets, pictures
from support.config import Config
from support.distributed import say
from support.errors import UsageError, ran_out
from support.footprint import Model, Sizes, fit, memory, peak
from support.progress import Progress


def model_of(policy: Policy) -> Model:
    trained = policy.trainable().values()
    # The critic's adapters may stand on the frozen copy.
    weights = {*policy.model.parameters(), *trained}
    shape = policy.model.config.get_text_config(decoder=True)
    fp32 = loading.product_dtype(policy.device) == torch.float32
    return Model(shape, sum(p.numel() for p in weights), sum(p.numel() for p in trained), fp32)


def weights_of(config: Config) -> tuple[int, int]:
    """How many weights the model has, and how many of it and of the critic are trained."""
    total, of_rank_1 = loading.model_size(config.model, config.fp32_head and not config.full)
    adapters = config.lora * of_rank_1
    trained = total if config.full else adapters
    if config.advantage == "gae" and config.critic == "lora":
        trained += adapters
    return total, trained


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
    total, trained = weights_of(config)
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
    shape = AutoConfig.from_pretrained(config.model).get_text_config(decoder=True)
    model = Model(shape, total, trained, loading.product_dtype(device) == torch.float32)
    prompt = min(350, config.max_prompt)  # MedQA's longest
    if missing:  # otherwise the table, which comes at once, says it better
        parts = memory(config, model, prompt, fit(config, model, prompt, math.inf))
        say(f"memory, estimated: {peak(parts) / 1e9:.1f} GB")
    if device != "cpu":
        refuse_small_card(config, model, prompt, available(torch.device(device), held=0))


def refuse_small_card(config: Config, model: Model, prompt: int, free: float) -> None:
    """UsageError where not even the smallest sizes fit: what is missing, and what would fit."""

    def needed(config: Config) -> int:
        smaller = model._replace(trained=weights_of(config)[1])
        return peak(memory(config, smaller, prompt, fit(config, smaller, prompt, free)))

    if 0.9 * (need := needed(config)) <= free:  # the table is right within a tenth
        return
    way_on = "a smaller --model would fit"
    for full, part in product((config.full, False), (1, 2, 4, 8)):
        samples = max(min(config.samples, 2), config.samples // part)
        less = replace(config, full=full, samples=samples, max_new=max(1, config.max_new // part))
        if needed(less) <= free:
            kind = "--full" if full else "adapters"
            way_on = f"{kind} with --samples {samples} --max-new {less.max_new} would fit"
            break
    raise UsageError(
        f"{config.model} needs about {need / 1e9:.1f} GB at the smallest sizes, and "
        f"{free / 1e9:.1f} GB are free: {(need - free) / 1e9:.1f} GB are missing. {way_on}"
    )


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


def sizes_of(policy: Policy, config: Config) -> dict[str, int]:
    """The sizes in force, as run.json has them."""
    return Sizes(config.micro_batch, policy.sample_rows, policy.head_chunk)._asdict()


def set_sizes(policy: Policy, config: Config, sizes: dict[str, int]) -> Config:
    """Put them in force: those of the policy are set, the config is returned with its own."""
    policy.sample_rows, policy.head_chunk = sizes["sample_rows"], sizes["head_chunk"]
    return replace(config, micro_batch=sizes["micro_batch"])


def preflight(policy: Policy, items: list[Item], config: Config) -> Config:
    """Print what the run will use, put sizes in force that fit, and run the longest batch."""
    model = model_of(policy)
    prompt = len(policy.prompt(longest(policy, items, config, 1)[0], config.style))
    free = available(policy.device, held=sum(p.nbytes for p in policy.model.parameters()))
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
    """Whether there is memory for a forward and backward pass over completions of full length.

    Beside it lies what every step but the first holds: the gradient of an earlier micro-batch, and
    as much as Adam's two moments.
    """
    text, rollouts = [policy.tokens.end_id] * config.max_new, []
    for group, item in enumerate(items):
        started = policy.start(item, group, config.style)
        row = replace(started, completion_ids=text, sample_logps=[0.0] * len(text))
        rollouts += [row] * config.samples
    trained = policy.trainable().values()
    try:
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        for p in trained:
            p.grad = torch.zeros_like(p)
        scores = policy.score(collate(rollouts, policy.device), config.temperature)
        values = 0 if scores.values is None else scores.values.sum()
        (scores.logps.sum() + values).backward()
        del moments
        return True
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False
    finally:
        for p in trained:
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


def fewer_items(policy: Policy, items: int, G: int) -> None:
    """After so many items, G completions each, were too many to sample at once: half of them.

    This process's later calls begin with as few. UsageError where it was one item.
    """
    if items == 1:
        raise UsageError(
            f"sampling: out of memory with the completions of one prompt ({G} at once); fewer "
            "samples or a smaller --max-new would help"
        )
    policy.sample_rows = items // 2 * G
    say(f"sampling: out of memory; from here on {policy.sample_rows} rows at once", everyone=True)
    give_back()


def give_back() -> None:
    """What is no longer used, to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU


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
    give_back()
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
