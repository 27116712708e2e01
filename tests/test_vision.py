"""Images in the policy: what the tower sees and how often, positions, frames of boxes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import refused
from tiny_models import assert_scores_and_gradients, completions, moved
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import data
import train
from benchmarks.one_step import sampled_and_graded, update
from data import Item
from policy import Policy, collate
from support.demo_model import tiny_vl_policy

NAMES = ("round", "irregular")
TOWER = dict(depth=2, hidden_size=64, num_heads=4, patch_size=7)
# The families beside the demo's Qwen2.5-VL: config, model, and what their towers and decoders add.
FAMILIES = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        TOWER | dict(embed_dim=64, mlp_ratio=2),
        {},
    ),
    "qwen3_vl": (  # what both layers of the tower see reaches the decoder's layers
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        TOWER
        | dict(intermediate_size=128, out_hidden_size=64, num_position_embeddings=16)
        | dict(deepstack_visual_indexes=[0, 1], initializer_range=0.15),
        dict(head_dim=16),
    ),
}
ALL_FAMILIES = ["qwen2_5_vl", *FAMILIES]


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def items() -> list[Item]:
    """One image, two images of other sizes, none."""
    two = (picture(1, 90, 40), picture(2, 30, 30))
    larger = "Which of the two is the larger one?"
    return [
        Item("one", "classify", "What is it?", NAMES, "round", image=picture(0, 56, 56)),
        Item("two", "classify", larger, NAMES, "irregular", image=two),
        Item("none", "classify", "And now without a picture?", NAMES, "round"),
    ]


def tiny(items: list[Item], family: str = "qwen2_5_vl", **settings) -> Policy:
    """A random model that has seen the texts of these items; its logits are widened."""
    texts = [data.messages(item)[1]["content"] + data.completion(item) for item in items]
    made = tiny_vl_policy(0, texts)
    model = made.model
    if family in FAMILIES:
        model = of_family(family, model.config.text_config.to_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return Policy(model, made.tokenizer, made.vision.processor, **({"lora": 0} | settings))


def of_family(family: str, text_config: dict):
    config, model, tower, more = FAMILIES[family]
    made = config(
        text_config=text_config | more | {"model_type": f"{family}_text"},
        vision_config=tower,
        image_token_id=3,
        vision_start_token_id=2,
        vision_end_token_id=4,
        tie_word_embeddings=False,
        attn_implementation={"text_config": "prompt_once"},
    )
    torch.manual_seed(0)
    return model(made)


def inputs(policy: Policy, rollout) -> dict:
    """What transformers' own forward pass takes for one prompt and its completion."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if rollout.pictures:
        is_image = (ids == policy.vision.image_token).int()
        found |= {"pixel_values": rollout.pictures.pixels, "mm_token_type_ids": is_image}
        found |= {"image_grid_thw": rollout.pictures.grids}
    return found


def replicated(policy: Policy, rollouts: list, temperature: float):
    """Brute force: the model's own forward pass on every prompt, image and completion alone."""
    for rollout in rollouts:
        logits = policy.model(**inputs(policy, rollout)).logits[0].float() / temperature
        logits = logits.index_fill(-1, policy.forbidden, -1e9)
        logps = logits.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        yield logps.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


# ----------------------------------------------------------------------------- scoring, sampling
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_prompt_once_equals_replicated(items, family, train_vision, checkpointing):
    policy = tiny(items, family, train_vision=train_vision, checkpointing=checkpointing)
    rollouts = policy.sample(items, 3, 9, 1.0, seed=4)
    assert_scores_and_gradients(policy, rollouts, collate(rollouts), replicated)
    trained = [name for name, p in policy.trainable().items() if p.grad is not None]
    assert any("visual" in name for name in trained) == train_vision


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_greedy_equals_generate(items, family):
    policy = tiny(items, family)
    for rollout in policy.sample(items, 1, 16, 0.0, seed=0):
        whole = policy.model.generate(
            **inputs(policy, replace(rollout, completion_ids=[])),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
            suppress_tokens=policy.forbidden.tolist(),
        )
        assert rollout.completion_ids == whole[0, len(rollout.prompt_ids) :].tolist()


def test_sampled_logps_are_the_scorers_and_rows_do_not_depend_on_their_company(items):
    policy = tiny(items)
    together = policy.sample(items, 4, 12, 0.7, seed=1)
    scores = policy.score(collate(together), 0.7).logps.flatten(0, 1).detach()
    for rollout, row in zip(together, scores):
        recorded = torch.tensor(rollout.sample_logps)
        torch.testing.assert_close(recorded, row[: len(recorded)], rtol=0, atol=1e-4)
        assert not set(rollout.completion_ids) & set(policy.forbidden.tolist())
    for p, item in enumerate(items):
        alone = policy.sample([item], 4, 12, 0.7, seed=1, first_row=4 * p)
        assert completions(alone) == completions(together[4 * p : 4 * p + 4])


def test_prompts_with_images_are_read_in_chunks(items):
    policy = tiny(items)
    whole = policy.sample(items, 2, 9, 1.0, seed=1)
    policy.prefill_tokens = 1  # a prompt at a time, each with its own images, or with none
    parts = policy.sample(items, 2, 9, 1.0, seed=1)
    assert completions(parts) == completions(whole)
    for part, rollout in zip(parts, whole):
        expected = torch.tensor(rollout.sample_logps)
        torch.testing.assert_close(torch.tensor(part.sample_logps), expected, rtol=0, atol=1e-5)


def test_the_model_looks(items):
    """Another image of the same size: other log-probs, and only that prompt's."""
    policy = tiny(items)
    rollouts = policy.sample(items, 2, 8, 1.0, seed=1)
    before = policy.score(collate(rollouts)).logps
    other = policy.start(replace(items[0], image=picture(9, 56, 56)), 0, "think").pictures
    for rollout in rollouts[:2]:
        rollout.pictures = other
    after = policy.score(collate(rollouts)).logps
    assert (before[0] - after[0]).abs().max() > 1e-3
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("which", [[0], [1], [2], [2, 0], [1, 2]])
def test_a_slice_carries_its_own_pixels(items, which):
    policy = tiny(items)
    rollouts = policy.sample(items, 2, 8, 1.0, seed=1)
    whole = policy.score(collate(rollouts)).logps
    for rollout in rollouts:
        if rollout.pictures:
            rollout.pictures.features = None
    part = policy.score(collate(rollouts).take(torch.tensor(which))).logps
    torch.testing.assert_close(part, whole[which, :, : part.shape[2]], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ the vision tower
CONFIG = replace(
    train.Config(),
    full=True,
    prompts=3,
    samples=2,
    minibatches=3,
    epochs=2,
    max_new=8,
    kl_coef=0.1,
    checkpointing=True,
)
PPO = replace(CONFIG, algo="ppo", advantage="gae", kl="k1", critic="lora", full=False)


@pytest.mark.parametrize("config", [CONFIG, PPO], ids=["grpo", "ppo"])
def test_a_frozen_tower_runs_once_per_prompt_and_step(items, config):
    """For the samples, the log-probs before the update, the reference and every pass of it."""
    if config.full:
        policy = tiny(items, keep_reference=True, checkpointing=True)
    else:
        policy = tiny(items, lora=4, critic="lora", checkpointing=True)
    seen = []

    def watched(module, args, kwargs):
        seen.extend(kwargs["grid_thw"].tolist())

    policy.model.model.visual.register_forward_pre_hook(watched, with_kwargs=True)
    optimizer = train.make_optimizer(policy, config)
    for step in range(2):
        seen.clear()
        rollouts = sampled_and_graded(policy, items, config, step)
        update(policy, optimizer, rollouts, config, step)
        assert len(seen) == 3  # the images of this step: one, two and none


def test_a_trained_tower_runs_once_per_forward_pass(items):
    policy = tiny(items, train_vision=True)
    calls = []
    policy.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(policy.sample(items, 2, 8, 1.0, seed=1))
    assert len(calls) == 1
    policy.score(batch).logps.sum().backward()
    assert len(calls) == 2
    tower = [p for name, p in policy.trainable().items() if "visual" in name]
    assert tower and all(p.grad is not None for p in tower)


@pytest.mark.parametrize("lora", [4, 0])
def test_reference_is_the_untrained_model_its_tower_included(items, lora):
    policy = tiny(items, lora=lora, train_vision=True, keep_reference=True)
    batch = collate(policy.sample(items, 2, 8, 1.0, seed=1))
    before = policy.score(batch).logps.detach()
    moved(policy, by=0.05)
    assert any("visual" in name for name in policy.trainable())
    with policy.reference():
        assert torch.equal(policy.score(batch).logps.detach(), before)
    assert (policy.score(batch).logps - before).abs().max() > 1e-3


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_frozen_reference_leaves_the_tower_it_shares_alone(items, bf16_products, train_vision):
    """Rounded to bf16, the reference must not round the policy's tower, nor end its autocast."""
    policy = tiny(items, train_vision=train_vision, keep_reference=True)
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    shared = policy.frozen.model.visual is policy.model.model.visual
    assert shared == (not train_vision)
    started = [policy.start(item, p, "think") for p, item in enumerate(items)]
    answered = dict(completion_ids=[9, 8, 7], sample_logps=[0.0] * 3)
    batch = collate([replace(rollout, **answered) for rollout in started])
    with policy.reference():
        reference = policy.score(batch).logps
        assert policy.mixed and isinstance(policy.autocast(), torch.autocast)
    assert torch.equal(policy.score(batch).logps.detach(), reference)


# --------------------------------------------------------------------------- positions and frames
def test_completions_start_where_the_image_left_the_positions(items):
    """An image of h x w tokens takes max(h, w) positions, not h x w: positions on paper."""
    policy = tiny(items)
    started = [policy.start(item, p, "think") for p, item in enumerate(items)]
    batch = collate(started)
    _, starts = policy.positions(batch)
    tall = tuple((batch.pictures[1].grids[0, 1:] // 2).tolist())  # 90 x 40 pixels, shrunk
    assert tall[0] > tall[1]
    of_items = [[(4, 4)], [tall, (2, 2)], []]  # 56 x 56 and 28 x 28 pixels, 14 a token
    for p, sizes in enumerate(of_items):
        texts = len(started[p].prompt_ids) - sum(h * w for h, w in sizes)
        assert starts[p] == texts + sum(max(h, w) for h, w in sizes)


@pytest.mark.parametrize(
    "family, fixed",
    [("qwen2_5_vl", None), ("qwen2_vl", (1000, 1000)), ("qwen3_vl", (1000, 1000))],
)
def test_boxes_are_in_the_familys_frame(items, family, fixed):
    """Qwen2.5-VL: pixels of the resized image; the others: 0..1000. To the original and back."""
    box = (100, 60, 200, 120)
    find = Item("find", "localize", "Find it.", (), (box,), image=picture(0, 240, 400))
    policy = tiny(items, family)
    framed = policy.vision.framed(find)
    height, width = policy.start(find, 0, "think").pictures.grids[0, 1:].tolist()
    w, h = fixed or (7 * width, 7 * height)  # patches of 7 pixels
    assert framed.frame == (w, h, 400, 240)
    assert data.to_image((w / 4, h / 4, w / 2, h / 2), framed.frame) == pytest.approx(box)
    quarters = (round(w / 4), round(h / 4), round(w / 2), round(h / 2))
    assert data.to_frame(box, framed.frame) == quarters
    assert f"{w} x {h}" in data.messages(framed)[0]["content"]


# ------------------------------------------------------------------------------ what is refused
def test_what_cannot_be_seen_is_refused(items, demo):
    refused(lambda: demo.encode(items[:1]), "one has an image", "cannot see")
    narrow = replace(items[0], image=picture(0, 900, 3))
    refused(lambda: tiny(items).encode([narrow]), "3 x 900")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>"])
def test_text_that_holds_an_image_token_is_refused_by_the_items_name(items, token):
    """In a question it would ask for a neighbour's pixels; nobody can sample it in an answer."""
    policy = tiny(items)
    asked = replace(items[2], question=f"What is {token}?")
    refused(lambda: policy.encode([asked]), "none: its text holds", token)
    started = policy.start(items[0], 0, "think")
    text = f"<think> {token} </think>"
    refused(lambda: policy.written(started, text), "one: its text holds", token)


def test_an_image_token_beside_an_image_is_refused(items):
    policy = tiny(items)
    for question in ("<|image_pad|>", f"What is {policy.vision.mark}?"):
        asked = replace(items[0], question=question)
        refused(lambda asked=asked: policy.sample([asked], 1, 4, 1.0, 0), "one: its text holds")


# -------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_folder_and_back(items, tmp_path, family):
    """Saved as a Hugging Face folder and loaded again; max_pixels makes the image smaller."""
    policy = tiny(items, family)
    policy.save_folder(tmp_path)
    again = Policy.load(str(tmp_path), lora=0)
    mine, theirs = (one.sample(items, 2, 8, 1.0, 0) for one in (policy, again))
    assert completions(mine) == completions(theirs)
    small = Policy.load(str(tmp_path), lora=0, max_pixels=28 * 28)
    # 2 x 2 tokens in place of 4 x 4
    assert len(small.prompt(items[0])) == len(policy.prompt(items[0])) - 16 + 4
