"""The items that a run trains on and is tested on."""

import data
from support.config import Config
from support.distributed import say
from support.errors import UsageError


def load_splits(config: Config) -> dict[str, list]:
    """train, dev, test and, where there is one, ood, no item in two of them.

    What was dropped from train or dev for that is said.
    """
    splits = {}
    source = data.source_of(config.dataset, config.data_dir, config.task)
    for name in dict.fromkeys((*data.SPLITS, *source.splits)):
        splits[name] = data.load(config.dataset, name, config.data_dir or None, task=config.task)
    tested = [name for name in splits if name not in ("train", "dev")]
    for name, others in (("dev", tested), ("train", ["dev", *tested])):
        held_out = [item for other in others for item in splits[other]]
        kept = data.without(splits[name], held_out)
        if dropped := len(splits[name]) - len(kept):
            say(
                f"{config.dataset}: {dropped} items of {name} stand in a held-out split too: "
                f"dropped from {name}"
            )
        if not kept:
            raise UsageError(f"{config.dataset}: no item of {name} is left that is not held out")
        splits[name] = kept
    if config.shots:
        splits["train"] = data.few_shot(splits["train"], config.shots, config.seed)
    for name, items in splits.items():
        limit = config.limit if name == "train" else config.eval_limit
        items = data.with_knowledge(items[: limit or None], config.dataset, config.knowledge)
        if config.shuffle_options:
            items = [data.shuffle_options(item, config.seed) for item in items]
        splits[name] = items
    return splits
