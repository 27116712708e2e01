"""The items that a run trains on and is tested on."""

import data
from support.config import Config
from support.distributed import say
from support.errors import UsageError


def load_splits(config: Config) -> dict[str, list]:
    """train, dev and test, no item in two of them; what was dropped is said."""
    splits = {}
    for name in data.SPLITS:
        splits[name] = data.load(config.dataset, name, config.data_dir or None, task=config.task)
    for name, others in (("dev", ("test",)), ("train", ("dev", "test"))):
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
