"""Images in the policy: the model's own replicated forward, `generate`, how often the tower runs, whose pixels a slice carries, in which frame boxes are."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import data
import demo as demos
import train
from data import Item, UsageError
from eval import answer as real
from policy import Policy, collate

NAMES = ("round", "irregular")


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def items():
    """One image, two images of other sizes, none."""
    return [Item("one", "classify", "What is it?", NAMES, "round", image=picture(0, 56, 56)),
            Item("two", "classify", "Which of the two is the larger one?", NAMES, "irregular", image=(picture(1, 90, 40), picture(2, 30, 30))),
            Item("none", "classify", "And now without a picture?", NAMES, "round")]


def tiny(items, family="qwen2_5_vl", **kwargs):
    policy = demos.tiny_vl_policy(0, [data.messages(item)[1]["content"] + data.completion(item) for item in items], **({} if family == "qwen2_vl" else kwargs))
    if family == "qwen2_vl":
        text = policy.model.config.text_config.to_dict() | {"model_type": "qwen2_vl_text"}
        config = Qwen2VLConfig(text_config=text, vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=7),
                               image_token_id=3, vision_start_token_id=2, vision_end_token_id=4, tie_word_embeddings=False,
                               attn_implementation={"text_config": "prompt_once"})
        torch.manual_seed(0)
        policy = Policy(Qwen2VLForConditionalGeneration(config), policy.tokenizer, image_processor=policy.image_processor, **({"lora": 0} | kwargs))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    return policy


def inputs(policy, r):
    """What the model's own forward pass asks for, one row."""
    ids = torch.tensor([r.prompt_ids + r.completion_ids])
    pixels = {} if r.pictures is None else dict(pixel_values=r.pictures.pixels, image_grid_thw=r.pictures.grids, mm_token_type_ids=(ids == policy.image_token).int())
    policy.model.model.rope_deltas = None                                     # left behind by the call before
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)


def replicated(policy, rollouts, temperature):
    for r in rollouts:
        logits = policy.model(**inputs(policy, r)).logits[0].float() / temperature
        logits = logits.index_fill(-1, policy.forbidden, -1e9)
        yield logits.log_softmax(-1)[len(r.prompt_ids) - 1:-1].gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family, train_vision", [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen2_vl", True)])
def test_prompt_once_equals_replicated(items, family, train_vision, checkpointing):
    policy = tiny(items, family, train_vision=train_vision, checkpointing=checkpointing)
    rollouts = policy.sample(items, 3, 9, 1.0, seed=4)
    batch = collate(rollouts)
    scores = policy.score(batch, temperature=.7)
    coefficients = torch.rand(scores.logps.shape, generator=torch.Generator().manual_seed(5)) * batch.mask
    (scores.logps * coefficients).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}
    assert any("visual" in name for name in ours) == train_vision
    policy.model.zero_grad()
    policy.model.eval()
    theirs = list(replicated(policy, rollouts, .7))
    sum((x * coefficients[i // 3, i % 3, :len(x)]).sum() for i, x in enumerate(theirs)).backward()
    for i, x in enumerate(theirs):
        torch.testing.assert_close(scores.logps[i // 3, i % 3, :len(x)], x, rtol=0, atol=1e-4)
    mine, other = (torch.cat([g[name].flatten() for name in sorted(ours)]) for g in (ours, {n: p.grad for n, p in policy.trainable().items()}))
    assert (mine - other).norm() / other.norm() < 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_greedy_equals_generate(items, family):
    policy = tiny(items, family)
    for r in policy.sample(items, 1, 16, 0.0, seed=0):
        prompt = inputs(policy, replace(r, completion_ids=[]))
        theirs = policy.model.generate(**prompt, do_sample=False, max_new_tokens=16, pad_token_id=0, suppress_tokens=policy.forbidden.tolist())
        assert r.completion_ids == theirs[0, len(r.prompt_ids):].tolist()


def test_sampled_logps_are_the_scorers_and_rows_do_not_depend_on_their_company(items):
    policy = tiny(items)
    together = policy.sample(items, 4, 12, .7, seed=1)
    scores = policy.score(collate(together), .7).logps.flatten(0, 1)
    for r, row in zip(together, scores):
        torch.testing.assert_close(torch.tensor(r.sample_logps), row[:len(r.sample_logps)].detach(), rtol=0, atol=1e-4)
        assert not set(r.completion_ids) & set(policy.forbidden.tolist())
    for p, item in enumerate(items):
        alone = policy.sample([item], 4, 12, .7, seed=1, first_row=4 * p)
        assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[4 * p:4 * p + 4]]


def test_the_model_looks(items):
    """Another image of the same size: other log-probs, and only that prompt's."""
    policy = tiny(items)
    rollouts = policy.sample(items, 2, 8, 1.0, seed=1)
    other = policy.start(replace(items[0], image=picture(9, 56, 56)), 0, "think").pictures
    before = policy.score(collate(rollouts)).logps
    after = policy.score(collate([replace(r, pictures=other) if r.group == 0 else r for r in rollouts])).logps
    assert (before[0] - after[0]).abs().max() > 1e-3 and torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("which", [[0], [1], [2], [2, 0], [1, 2]])
def test_a_slice_carries_its_own_pixels(items, which):
    policy = tiny(items)
    rollouts = policy.sample(items, 2, 8, 1.0, seed=1)
    whole = policy.score(collate(rollouts)).logps
    for r in rollouts:
        r.pictures and setattr(r.pictures, "features", None)
    part = policy.score(collate(rollouts).prompts(torch.tensor(which))).logps
    torch.testing.assert_close(part, whole[which, :, :part.shape[2]], rtol=0, atol=1e-5)


CONFIG = replace(train.Config(), full=True, prompts=3, samples=2, minibatches=3, updates=2, max_new=8, kl_coef=.1, checkpointing=True, temperature=1.0)


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_frozen_tower_runs_once_per_prompt_and_step(items, algo):
    config = replace(CONFIG, **({"advantage": "gae", "kl": "k1", "critic": "lora", "full": False} if algo == "ppo" else {}))
    policy = tiny(items, **({"keep_reference": True} if config.full else {}))
    if not config.full:
        policy = Policy(policy.model, policy.tokenizer, lora=4, critic="lora", image_processor=policy.image_processor, checkpointing=True)
    seen = []
    policy.model.model.visual.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs["grid_thw"].tolist()), with_kwargs=True)
    optimizer = train.make_optimizer(policy, config)
    for step in range(2):
        seen.clear()
        rollouts, _ = train.collect(policy, items, config, step)
        if config.advantage == "group":
            train.set_advantages(rollouts, config)
        train.update(policy, optimizer, rollouts, config, step)
        assert len(seen) == 3                                                 # the images of this step: one, two and none


def test_a_trained_tower_runs_once_per_forward_pass(items):
    policy = tiny(items, train_vision=True)
    calls = []
    policy.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(policy.sample(items, 2, 8, 1.0, seed=1))
    assert len(calls) == 1
    policy.score(batch).logps.sum().backward()
    assert len(calls) == 2
    assert all(p.grad is not None for name, p in policy.trainable().items() if "visual" in name)


def test_reference_is_the_untrained_model_vision_adapters_included(items):
    policy = tiny(items)
    policy = Policy(policy.model, policy.tokenizer, lora=4, image_processor=policy.image_processor, train_vision=True)
    batch = collate(policy.sample(items, 2, 8, 1.0, seed=1))
    before = policy.score(batch).logps.detach()
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.add_(.05)
    assert any("visual" in name for name in policy.trainable())
    with policy.reference():
        assert torch.equal(policy.score(batch).logps.detach(), before)
    assert (policy.score(batch).logps - before).abs().max() > 1e-3


def test_completions_start_where_the_image_left_the_positions(items):
    """An image of h x w tokens takes max(h, w) positions, not h x w: positions on paper."""
    policy = tiny(items)
    started = [policy.start(item, p, "think") for p, item in enumerate(items)]
    batch = collate(started)
    _, starts = policy._positions(batch)
    sizes = [[(4, 4)], [(6, 2), (2, 2)], []]                                  # 56 x 56; 90 x 40 -> 84 x 42 (14 each) = 6 x 3
    sizes[1][0] = tuple((batch.pictures[1].grids[0, 1:] // 2).tolist())
    for p, of_images in enumerate(sizes):
        texts = len(started[p].prompt_ids) - sum(h * w for h, w in of_images)
        assert starts[p] == texts + sum(max(h, w) for h, w in of_images)


def test_boxes_are_in_the_familys_frame(items):
    """Qwen2.5-VL: pixels of the resized image; Qwen2-VL: 0..1000. To the original and back."""
    find = Item("find", "localize", "Find it.", (), ((100, 60, 200, 120),), image=picture(0, 240, 400))
    for family, size in (("qwen2_5_vl", None), ("qwen2_vl", (1000, 1000))):
        policy = tiny(items, family)
        frame = policy.framed(find).frame
        w, h = size or [14 * int(n) // 2 for n in policy.start(find, 0, "think").pictures.grids[0, [2, 1]]]
        assert frame == (w, h, 400, 240)
        assert data.to_image((w / 4, h / 4, w / 2, h / 2), frame) == pytest.approx((100, 60, 200, 120))
        assert data.to_frame((100, 60, 200, 120), frame) == (round(w / 4), round(h / 4), round(w / 2), round(h / 2))
        assert f"{w} x {h}" in data.messages(policy.framed(find))[0]["content"]


def test_what_cannot_be_seen_is_refused(items, demo):
    with pytest.raises(UsageError, match="cannot see"):
        demo.encode(items[:1])
    policy = tiny(items)
    with pytest.raises(UsageError, match="holds the token"):
        policy.sample([replace(items[0], question=f"What is {policy.image_mark}?")], 1, 4, 1.0, 0)
    with pytest.raises(UsageError, match="3 x 900"):
        policy.encode([replace(items[0], image=picture(0, 900, 3))])


def test_folder_and_back(items, tmp_path):
    """Saved as a Hugging Face folder and loaded again: the same tokens; max_pixels makes the image smaller."""
    policy = tiny(items)
    policy.save_folder(tmp_path)
    again = Policy.load(str(tmp_path), lora=0)
    assert [r.completion_ids for r in again.sample(items, 2, 8, 1.0, 0)] == [r.completion_ids for r in policy.sample(items, 2, 8, 1.0, 0)]
    small = Policy.load(str(tmp_path), lora=0, max_pixels=28 * 28)
    assert len(small.prompt(items[0])) == len(policy.prompt(items[0])) - 16 + 4


# ---------------------------------------------------------------------------------------- bugs that were found once
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>"])
def test_text_that_holds_an_image_token_is_refused_by_the_items_name(items, token):
    """In a text-only item's question it asked for pixels of the neighbour; in a rationale it was a target of probability 0."""
    policy = tiny(items)
    with pytest.raises(UsageError, match="none: its text holds"):
        policy.encode([replace(items[2], question=f"What is {token}?")])
    with pytest.raises(UsageError, match="one: its text holds"):
        policy.written(policy.start(items[0], 0, "think"), f"<think> {token} </think>")
    with pytest.raises(UsageError, match="one: its text holds"):
        policy.encode([replace(items[0], question="<|image_pad|>")])


def test_blank_and_swapped_images_go_only_where_images_were(items, monkeypatch):
    """Items without an image once received a neighbour's, and the neighbour lost its own."""
    import eval as evaluation
    policy, config, shown = tiny(items), train.Config(max_new=4), []
    mixed = [items[2], items[0], replace(items[0], id="other", image=picture(9, 28, 56), answer="irregular"), items[1]]
    monkeypatch.setattr(evaluation, "answer", lambda policy, changed, *a, **k: shown.append(changed) or real(policy, changed, *a, **k))
    found = evaluation.looking(policy, real(policy, mixed, config), config)
    blank, swapped = shown
    assert [item.id for item in blank] == ["one", "other", "two"] and [item.id for item in swapped] == ["one", "other"]
    assert np.array_equal(swapped[0].image, mixed[2].image) and np.array_equal(swapped[1].image, mixed[1].image)
    assert found["blank_image_n"] == 3 and found["swapped_image_n"] == 2 and 0 <= found["swapped_image_accuracy"] <= 1


def test_boxes_have_no_majority_and_no_likelihood_of_classes():
    import eval as evaluation
    box = replace(data.load("demo-images", "test", task="localize")[0], id="box")
    policy = tiny([box])
    shown = {"model": "m", "dataset": "d", "split": "test", "style": "think",
             "template": "plain", "stop_answer": True, "max_new": 4}
    result, _ = evaluation.evaluate(policy, [box], train.Config(max_new=4), samples=2)
    assert "maj_at_k" not in result and "mean_iou" in result
    assert "-" in evaluation.table([result | shown])


def test_a_patient_is_kept_together_in_text_too():
    one, other = Item("a", "choice", "Q1?", ("x", "y"), "A", patient="p"), Item("b", "choice", "Q2?", ("x", "y"), "A", patient="p")
    assert data.without([one], [other]) == [] and data.without([replace(one, patient="")], [other]) != []


def test_few_shots_of_boxes_and_a_limit_after_it():
    """Every set of boxes was a class of its own, so that `--shots 2` took them all; and a limit cut off the last classes."""
    boxes, shapes = (data.load("demo-images", "dev", task=task) for task in ("localize", "grade"))
    assert len(data.few_shot(boxes, 2, 0)) == 2
    few = data.few_shot(shapes, 8, 0)
    assert len(few) == 40 and len({item.answer for item in few[:20]}) > 3 and few == data.few_shot(shapes, 8, 0) != data.few_shot(shapes, 8, 1)


def test_a_box_never_rounds_to_nothing():
    assert data.to_frame((100, 100, 103, 102), (56, 56, 1000, 1000)) == (6, 6, 7, 7)


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_frozen_reference_leaves_the_tower_it_shares_alone(items, bf16_products, train_vision):
    """Rounding the reference to bf16 once rounded the policy's tower too, and ended autocast."""
    made = tiny(items)
    policy = Policy(made.model, made.tokenizer, lora=0, image_processor=made.image_processor,
                    train_vision=train_vision, keep_reference=True)
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    shared = policy.frozen.model.visual is policy.model.model.visual
    assert shared == (not train_vision)
    started = [policy.start(item, p, "think") for p, item in enumerate(items)]
    batch = collate([replace(r, completion_ids=[9, 8, 7], sample_logps=[0.0] * 3) for r in started])
    with policy.reference():
        reference = policy.score(batch).logps
        assert isinstance(policy._autocast(), torch.autocast)
    assert torch.equal(policy.score(batch).logps.detach(), reference)
