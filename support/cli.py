"""Flags <-> Config, and what cannot work: told in one line, before anything is loaded."""

import argparse
from dataclasses import fields
from pathlib import Path

import data
import rewards
from grpo import ALGOS
from support import eval_cli
from support.config import DEMO_ALGOS, RECIPES, Config
from support.errors import UsageError
from support.parser import Parser

# What an old command line may still say, and what to do instead.
NOT_FOR_TRAINING = (
    "is not for training: tokens that the sampler never draws would still have "
    "probability in the loss"
)
BOXES = "is not offered any more: boxes are paid their mean IoU"
GONE = eval_cli.GONE | {
    "--updates": "is called --epochs now",
    "--lam": "is called --gae-lambda now",
    "--leave-one-out": "is --advantage others now",
    "--lora-alpha": "is twice the rank now, always",
    "--lora-targets": "is gone: all linear layers get adapters",
    "--sample-rows": "is chosen to fit into memory now",
    "--refills": "is 3 now, always",
    "--overlong-share": "is 0.2 now, always",
    "--beta2": "is 0.95 now, always",
    "--weight-decay": "is 0 now, always",
    "--keep": "is 2 now, always",
    "--report-every": "is gone: python -m support.report RUN writes a report at any time",
    "--balanced": "is not offered any more",
    "--dual-clip": "is not offered any more",
    "--box-reward": BOXES,
    "--tau": BOXES,
    "--tau-end": BOXES,
    "--top-p": NOT_FOR_TRAINING,
    "--top-k": NOT_FOR_TRAINING,
}


def read_flags(argv: list[str] | None = None) -> tuple[dict, Path | None]:
    """The flags that were given, by field name, and the folder of --resume."""
    p = Parser(
        prog="train.py",
        description="Reinforcement fine-tuning with verifiable rewards. Without flags: the demo. "
        "What an algorithm, a data set or a recipe sets stands before the defaults below.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument("--recipe", choices=tuple(RECIPES), help="a published setting; flags beat it")
    p.add_argument(
        "--hackable",
        nargs="?",
        const="referral",
        choices=("referral", "outside"),
        help="the demo with a way to its reward around reasoning, to watch a hack: a referral's "
        "guess (the default), or reasoning in front of <think>",
    )
    p.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run where its newest checkpoint stands; of the flags only --steps (with "
        "a constant learning rate), --device and --micro-batch may change",
    )
    p.add_argument(
        "--export",
        metavar="DIR",
        help="at the end, write the trained model as a plain Hugging Face folder; with --resume "
        "also of a run that is done",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the memory table, run the longest batch, and say what 32 "
        "groups of completions would teach; write nothing",
    )
    of_algorithm = {name for row in ALGOS.values() for name in row}
    for f in fields(Config):
        choices = tuple(ALGOS) if f.name == "algo" else f.metadata["choices"]
        kind = {"type": type(f.default), "choices": choices}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        default = "as --algo has it" if f.name in of_algorithm else repr(f.default)
        text = f"{f.metadata['help']} (default {default})".replace("%", "%%")
        p.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(p.parse(argv, GONE))
    resume = given.pop("resume", None)
    return given, Path(resume) if resume else None


def make_config(given: dict) -> Config:
    """The algorithm's row, then the data set's defaults, then the recipe, then the flags."""
    given = dict(given)
    recipe = RECIPES.get(given.pop("recipe", ""), {"task": {}, "algorithm": {}})
    if hackable := given.pop("hackable", ""):
        if given.keys() & {"dataset", "model"} or recipe["task"]:
            raise UsageError("--hackable is for the demo and its own model")
        given["dataset"] = f"demo-{hackable}"
    dataset = given.get("dataset", recipe["task"].get("dataset", Config.dataset))
    own_algo = recipe["algorithm"].get("algo", Config.algo)
    algo = given.get("algo", own_algo)
    published = recipe["task"] | (recipe["algorithm"] if algo == own_algo else {})
    defaults = dict(data.LOADERS[dataset].defaults) if dataset in data.LOADERS else {}
    if algo == "sft":
        defaults.pop("samples", None)
    if dataset in data.DEMOS:
        defaults |= DEMO_ALGOS.get(algo, {})
    return Config(**(ALGOS[algo] | defaults | published | given))


AT_LEAST = {
    1: ("prompts", "samples", "max_new", "max_prompt", "steps", "epochs", "minibatches"),
    0: (
        *("micro_batch", "eval_samples", "eval_every", "save_every", "log_groups", "limit"),
        *("eval_limit", "shots", "max_pixels", "warmup", "critic_warmup", "kl_coef", "min_think"),
        *("w_leak", "w_before", "w_short", "w_overlong", "value_clip"),
    ),
}


def validate(config: Config) -> None:
    """UsageError for what cannot work, before any model or data is touched."""
    for least, names in AT_LEAST.items():
        for name in names:
            if not getattr(config, name) >= least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    for check in (of_data, of_algorithm, of_numbers, of_reward):
        for impossible in check(config):
            raise UsageError(impossible)


def of_data(config: Config):
    """What cannot work of data and model."""
    data.source_of(config.dataset, config.data_dir, config.task)  # raises it itself
    if not config.model and config.dataset not in data.DEMOS:
        yield f"--dataset {config.dataset} needs --model: a Hugging Face folder or hub name"
    if config.lora < 1 and not config.full:
        yield "--lora 0 trains nothing: use --full to train all weights"


def of_algorithm(config: Config):
    """What cannot work of the algorithm."""
    gae = config.advantage == "gae"
    if config.samples < 2 and not gae and config.algo != "sft":
        yield (
            f"--samples {config.samples}: {config.algo} compares the samples of a group, and a "
            "group of 1 has nothing to compare; use at least 2"
        )
    if config.algo == "sft" and config.samples != 1:
        yield "--algo sft learns one completion an item: leave --samples at 1"
    if config.algo == "sft" and config.dynamic:
        yield "--dynamic drops groups of equal samples, and --algo sft has one sample an item"
    if config.kl == "k1" and not gae:
        yield ("--kl k1 in a loss has no gradient in expectation (see grpo.kl_term): use k2 or k3")
    if gae and config.kl != "k1":
        yield (
            "--advantage gae puts the KL into the reward, where it must be --kl k1, "
            f"not {config.kl}"
        )
    if gae and config.dynamic:
        yield (
            "--dynamic filters groups, and --advantage gae compares with a critic: leave one out"
        )
    if gae and config.critic == "lora" and config.lora < 1:
        yield "--critic lora has adapters: --lora is their rank, with --full too; or --critic head"


def of_numbers(config: Config):
    """What is outside its range."""
    if config.temperature <= 0:
        yield (
            "--temperature must be above 0 in training: greedy samples of a group are all the same"
        )
    if not 0 <= config.gamma <= 1 or not 0 <= config.gae_lambda <= 1:
        yield "--gamma and --gae-lambda must be in [0, 1]"
    if not 0 <= config.clip_low < 1 or config.clip_high < 0:
        yield "--clip-low must be in [0, 1) and --clip-high at least 0"
    if not config.max_grad_norm > 0:
        yield "--max-grad-norm must be above 0"
    if not 0 < config.lr < 1 or not 0 < config.value_lr < 1:
        yield "--lr and --value-lr must be above 0 and below 1"


def of_reward(config: Config):
    """What cannot work of the reward."""
    if config.reward not in rewards.REWARDS:
        yield f"--reward {config.reward}: choose from {', '.join(rewards.REWARDS)}"
    if not 0 <= config.w_format <= 1:
        yield (
            "--w-format must be between 0 and 1: a format reward above the 1 of a right answer "
            "would be the goal"
        )
    try:
        rewards.fuzzy_tables(config.fuzzy)
    except ValueError as error:
        yield f"--{error}"
    if not -1 <= config.recite <= 1:
        yield (
            "--recite must be between -1 and 1: beyond that reciting would weigh more than a "
            "right answer"
        )
    if config.recite and config.knowledge == "none":
        yield ("--recite compares with the knowledge in the prompt: give --knowledge task or class")
