"""Models small enough for a CPU, made in code, and the warm start that stands in for pre-training.

Reinforcement learning at this size brings out a skill, it does not create one. So the demo first
teaches a random model the task and then spoils it: see `warm_start`. Nothing is downloaded.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import data
from data import Item
from policy import Policy, Rollout, collate
from support import demo_task
from support.distributed import say
from support.seeds import fold
from support.text import LETTERS
from support.vision import ImageProcessor

# Only the user's turn is shown: models this small learn the form from their warm start, not from an
# instruction.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ m.content }}\n"
    "{% elif m.role == 'assistant' %}{{ m.content }} <eos>{% endif %}"
    "{% endfor %}"
)
TEXT_MODEL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
ROPE = {"rope_type": "default", "rope_theta": 100.0}


# -------------------------------------------------------------------------------------- models
def demo_policy(seed: int, **kwargs) -> Policy:
    """A random Qwen2 of 0.09 million weights and a tokenizer of the demo's words, all trained."""
    words = ["<pad>", "<eos>", "<unk>", *demo_task.demo_words()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = fast_tokenizer(core, unk_token="<unk>")
    config = Qwen2Config(
        vocab_size=len(words),
        **TEXT_MODEL,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
        attn_implementation="prompt_once",
    )
    return Policy(random_model(Qwen2ForCausalLM, config, seed), tokenizer, lora=0, **kwargs)


def tiny_vl_policy(seed: int, texts: list[str], **kwargs) -> Policy:
    """A random Qwen2.5-VL of 0.4 million weights, and a tokenizer made from `texts`.

    It looks at images in patches of 7 pixels.
    """
    tokenizer = byte_tokenizer(texts)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            **TEXT_MODEL,
            rope_parameters=ROPE | {"mrope_section": [2, 3, 3]},
            max_position_embeddings=4096,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            patch_size=7,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=56,
            fullatt_block_indexes=[1],
            out_hidden_size=64,
            initializer_range=0.15,
        ),
        vision_start_token_id=2,
        image_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
        attn_implementation={"text_config": "prompt_once"},
    )
    model = random_model(Qwen2_5_VLForConditionalGeneration, config, seed)
    model.generation_config.eos_token_id = 1
    processor = ImageProcessor(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
    )
    return Policy(model, tokenizer, processor, lora=0, **kwargs)


def random_model(kind, config, seed: int):
    with torch.random.fork_rng(devices=[]):  # made on the CPU: no GPU is touched
        torch.manual_seed(seed)
        return kind(config)


def byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """By bytes, so that any text can be written and comes back as it was."""
    special = ["<pad>", "<eos>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # Often, so that each number becomes one token.
    numbers = "".join(f"[[{i}, {i}, {i}, {i}]] " for i in range(100)) * 9
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([*texts, numbers], trainer)
    core.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])  # one token each, but text
    return fast_tokenizer(core, additional_special_tokens=special[2:])


def fast_tokenizer(core: Tokenizer, **special) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ---------------------------------------------------------------------------------- warm start
CLEAN_STEPS = {"choice": 1500, "classify": 250, "grade": 300, "localize": 400}
DILUTED_STEPS = {"choice": 60, "classify": 60, "grade": 60, "localize": 15}
# The share of right answers in the diluted part.
RIGHT = {"choice": 0.25, "classify": 0.25, "grade": 0.25, "localize": 0.5}


def first_policy(config, items: list[Item], warm: bool = True, when_clean=None) -> Policy:
    """The model of a run that names none: the demo's after its warm start, or tiny-vl as it is.

    when_clean(policy) is called when the model has learned the task and is not yet spoilt.
    """
    seed = fold(config.seed, "model")
    if items[0].image is None and config.model != "tiny-vl":
        policy = demo_policy(seed)
    else:
        texts = []
        for item in items[:200]:
            texts += [data.messages(item)[1]["content"], data.completion(item)]
        policy = tiny_vl_policy(seed, texts, train_vision=True)
    if config.model == "tiny-vl" or not warm:
        return policy
    say("a tiny model is made first, taught the task and then spoilt: one to two minutes on a CPU")
    for part in warm_start(policy, items, config):
        if part == "clean" and when_clean:
            when_clean(policy)
    return policy


def warm_start(
    policy: Policy, items: list[Item], config, clean_steps: int = 0, diluted_steps: int = 0
) -> Iterator[str]:
    """Make the demo's stand-in for a base model; yields "clean" after that part, then "diluted".

    Reinforcement learning brings out what a model can do now and then. So the random model is first
    taught the task, cleanly, and then spoilt (mostly random answers, broken form) until it samples
    badly: a skill is there, but not reliable.
    """
    clean_steps = clean_steps or CLEAN_STEPS[items[0].task]
    diluted_steps = diluted_steps or DILUTED_STEPS[items[0].task]
    of_task: dict[str, list[Item]] = {}
    for item in items:
        of_task.setdefault(item.task, []).append(item)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=2.5e-3)
    rng = random.Random(f"warm {config.seed}")
    starts = {item.id: policy.start(item, 0, "think") for item in items}
    bar = tqdm(
        range(clean_steps + diluted_steps),
        desc="warm start",
        unit="step",
        leave=False,
        disable=None,
    )
    for step in bar:
        if bar.disable and step % 250 == 0:  # no terminal: a line now and then
            say(f"warm start: step {step} of {bar.total}")
        if step == clean_steps:
            yield "clean"
        is_diluted = step >= clean_steps
        # Warm-up, constant, linear to 0 in the second half.
        schedule = min((step + 1) / 20, 1.0, 2 * (1 - step / clean_steps))
        optimizer.param_groups[0]["lr"] = 1e-3 if is_diluted else 2.5e-3 * schedule
        rollouts = []
        for item in data.batch_for_step(items, step, 32, f"warm {config.seed}"):
            start = replace(starts[item.id], group=len(rollouts))
            outside = config.hackable and rng.random() < 0.4
            text = taught(start.item, of_task[item.task], is_diluted, outside, rng)
            rollouts.append(policy.written(start, text, end=True))
        learn(policy, optimizer, rollouts)
    yield "diluted"


def taught(item: Item, others: list[Item], diluted: bool, outside: bool, rng) -> str:
    """What a step teaches to write; diluted: mostly with a random answer, often without <think>.

    outside: the reasoning stands in front of <think>. That form stays whole, and so it pays.
    """
    spoil = diluted and not outside
    if spoil and rng.random() > RIGHT[item.task]:
        if item.task == "choice":
            answer = rng.choice(LETTERS[: len(item.options)])
        else:
            answer = rng.choice(others).answer
        item = replace(item, answer=answer)
    words = data.completion(item).split()
    if spoil and rng.random() > 0.6:
        words.pop(0)  # no <think>
    if outside:
        words = [*f"{item.rationale} . ".split() * 4, *words]
    return " ".join(words)


def learn(policy: Policy, optimizer, rollouts: list[Rollout]) -> None:
    """One step of supervised fine-tuning, each token the same."""
    batch = collate(rollouts, policy.device)
    (-policy.score(batch).logps.sum() / batch.mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
