"""Models of Qwen2.5-3B's and Qwen2.5-VL-3B's shapes, made from configs: nothing is downloaded."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

import data
from policy import Policy
from support.demo_model import demo_policy, tiny_vl_policy
from support.vision import ImageProcessor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROPE = {"rope_type": "default", "rope_theta": 1e6}

# `length`: tokens of a prompt. New tokens a completion: max_new in sampling and update, the others
# in the part of their name; peer_new: HF `generate` at two lengths.
FULL = SimpleNamespace(
    prompts=16,
    samples=8,
    length=300,
    max_new=512,
    peer_new=(8, 64),
    gap_new=128,
    vision_new=256,
    matrix=8192,
    copy_bytes=4 * 10**9,
)
FULL.text = dict(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)
FULL.mrope = [16, 24, 24]  # how many of a head's frequencies follow time, height, width
FULL.vision = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    fullatt_block_indexes=[7, 15, 23, 31],
    out_hidden_size=2048,
)
TINY = SimpleNamespace(
    prompts=4,
    samples=2,
    length=20,
    max_new=16,
    peer_new=(2, 8),
    gap_new=8,
    vision_new=8,
    matrix=128,
    copy_bytes=10**6,
)
TINY.text = dict(
    vocab_size=2000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINY.mrope = [2, 3, 3]
TINY.vision = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    fullatt_block_indexes=[1],
    out_hidden_size=64,
)


def items_of(size) -> list:
    return data.load("demo", "train", limit=size.prompts)


def text_policy(size, lora: int, dtype: torch.dtype = torch.bfloat16, **kwargs) -> Policy:
    config = Qwen2Config(
        **size.text,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="prompt_once",
    )
    # Made where it stays: a CPU draws 3 billion random numbers in minutes.
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return forced(Policy(model, demo_policy(0).tokenizer, lora=lora, **kwargs), size)


def forced(policy: Policy, size) -> Policy:
    """Prompts of random ids, all of one length, and completions that nothing stops."""
    ids = {}
    for i, item in enumerate(items_of(size)):
        generator = torch.Generator().manual_seed(i)
        drawn = torch.randint(size.text["vocab_size"], (size.length,), generator=generator)
        ids[item.id] = drawn.tolist()
    policy.prompt = lambda item, style="think": ids[item.id]
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


def vision_policy(size, texts: list[str], **kwargs) -> Policy:
    """The demo's tokenizer, made from `texts`, and its ids for images.

    Words are tokens, so that prompts are about as long as with Qwen's.
    """
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **size.text,
            tie_word_embeddings=True,
            rope_parameters=ROPE | {"mrope_section": size.mrope},
            bos_token_id=None,
            eos_token_id=None,
        ),
        vision_config=dict(
            **size.vision,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
        ),
        vision_start_token_id=2,
        image_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
        attn_implementation={"text_config": "prompt_once"},
    )
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    processor = ImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
    policy = Policy(model, tiny_vl_policy(0, texts).tokenizer, image_processor=processor, **kwargs)
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


def written(policy: Policy, items: list, G: int, T: int) -> list:
    """Rollouts of random ids, for an update that no sampling precedes. Rewards are 0 and 1."""
    generator, vocabulary = torch.Generator().manual_seed(0), policy.model.config.vocab_size

    def draw():
        return torch.randint(vocabulary, (T,), generator=generator).tolist()

    starts = [policy.start(item, p, "think") for p, item in enumerate(items)]
    return [
        replace(start, completion_ids=draw(), sample_logps=[0.0] * T, reward=g % 2)
        for start in starts
        for g in range(G)
    ]
