"""Models small enough for a CPU, made in code: nothing is downloaded."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import data
from policy import Policy
from support import demo_task
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
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
ROPE = {"rope_type": "default", "rope_theta": 100.0}


# -------------------------------------------------------------------------------------- models
def demo_policy(seed: int, **kwargs) -> Policy:
    """A random Qwen2 of 0.09 million weights and a tokenizer of the demo's words, all trained.

    An option is one token, and the embeddings are tied: otherwise the look-up of a dose's letter
    did not come within 1,200 steps of the warm start.
    """
    words = ["<pad>", "<eos>", "<unk>", *demo_task.protocol_words(), *data.NO_RATIONALE.split()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    word = Regex(r"[A-E]\. \S+|\S+")  # an option with its letter, or what no space divides
    core.pre_tokenizer = pre_tokenizers.Split(word, "removed", invert=True)
    tokenizer = fast_tokenizer(core, unk_token="<unk>")
    config = Qwen2Config(
        vocab_size=len(words),
        **TEXT_MODEL,
        num_key_value_heads=4,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
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
            num_key_value_heads=2,
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
