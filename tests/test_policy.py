"""The policy: sampler = scorer = the model's own forward pass, masks from lengths alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    assert_scores_and_gradients,
    character_tokenizer,
    completions,
    family,
    llama,
    made_up,
    moved,
)

from policy import Policy, Rollout, collate
from support.decoding import Draft
from support.demo_model import demo_policy


def replicated(policy, rollouts, temperature=1.0):
    """Brute force: the plain sdpa model on every prompt + completion by itself."""
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        logps = (logits.float() / temperature).log_softmax(-1)[:-1]
        yield logps.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0]


# ------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "lengths", [[[3, 7, 1]], [[4], [1], [6]], [[5, 2], [7, 7], [1, 3], [2, 6]], [[1, 1], [1, 1]]]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompt_once_equals_replicated(name, lengths, checkpointing, items):
    if name == "qwen2":
        policy = demo_policy(0, checkpointing=checkpointing)
    else:
        policy = family(name, lora=0, checkpointing=checkpointing)
    rollouts = made_up(policy, items[: len(lengths)], lengths)
    assert_scores_and_gradients(policy, rollouts, collate(rollouts), replicated)


def test_completions_do_not_see_their_siblings_nor_what_follows(items):
    policy = family("llama", lora=0)
    rollouts = made_up(policy, items[:2], [[6, 6, 6], [6, 6, 6]])
    before = policy.score(collate(rollouts)).logps
    rollouts[1].completion_ids[2] = (rollouts[1].completion_ids[2] + 1) % 97
    changed = policy.score(collate(rollouts)).logps != before
    assert changed[0, 1].tolist() == [False, False, True, True, True, True]
    changed[0, 1] = False
    assert not changed.any()  # bit for bit


# ---------------------------------------------------------------------------------------- batch
def test_no_mask_comes_from_token_values(items):
    """Pad = EOS = 1 in prompts and completions alike: the mask is that of the lengths."""
    policy = family("llama", lora=0)
    rollouts = [
        Rollout(items[0], 0, [1, 5, 1, 6], [1, 1, 7, 1], [0.0] * 4, True),
        Rollout(items[1], 1, [1], [9, 1], [0.0] * 2, True),
    ]
    batch = collate(rollouts)
    assert batch.prompt_mask.tolist() == [[True] * 4, [False] * 3 + [True]]
    assert batch.mask.tolist() == [[[True] * 4], [[True, True, False, False]]]
    assert batch.mask.sum(2).tolist() == [[4], [2]]
    for mine, theirs in zip(policy.score(batch).logps[:, 0], replicated(policy, rollouts)):
        torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=0, atol=1e-4)


def test_padding_and_scoring_leave_everything_else_alone(items):
    policy = family("llama", lora=0)
    batch = collate(made_up(policy, items[:2], [[3, 5], [2, 4]]))
    wide = replace(
        batch,
        prompt_ids=F.pad(batch.prompt_ids, (7, 0), value=33),
        prompt_mask=F.pad(batch.prompt_mask, (7, 0)),
        completion_ids=F.pad(batch.completion_ids, (0, 7), value=1),
        mask=F.pad(batch.mask, (0, 7)),
    )
    tensors = [x for x in vars(wide).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    expected = policy.score(batch).logps
    torch.testing.assert_close(policy.score(wide).logps[..., :5], expected, rtol=0, atol=1e-5)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors))


def test_collate_checks_its_groups(items, demo):
    rows = made_up(demo, items[:2], [[2, 2], [3, 3]])
    with pytest.raises(ValueError, match="different sizes"):
        collate(rows[:3])
    rows[1].prompt_ids = [5]
    with pytest.raises(ValueError, match="two prompts"):
        collate(rows)
    twins = made_up(demo, [items[0], items[0]], [[2, 2], [2, 2]])
    assert len(collate(twins).mask) == 2  # the same prompt twice stays two groups


def test_rollouts_come_to_their_group_in_any_order(items, demo):
    rollouts = made_up(demo, items[:2], [[2, 3], [4, 1]])
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i)
    batch = collate([rollouts[i] for i in (3, 0, 2, 1)])
    assert batch.rewards.tolist() == [[3.0, 2.0], [0.0, 1.0]]
    assert batch.mask.sum(2).tolist() == [[1, 4], [2, 3]]


def test_a_part_of_a_batch_has_no_more_padding_than_it_needs(items, demo):
    rollouts = made_up(demo, items[:3], [[2, 3], [4, 1], [2, 2]])
    batch = collate(rollouts)
    batch.old_logps = torch.rand(batch.mask.shape)
    batch.token_weights = torch.rand(3, 2)
    part = batch.take(torch.tensor([2, 0]))
    longest = max(len(rollouts[p].prompt_ids) for p in (4, 0))
    assert part.prompt_ids.shape == (2, longest) and part.completion_ids.shape == (2, 2, 3)
    assert torch.equal(part.old_logps, batch.old_logps[[2, 0], :, :3])
    assert torch.equal(part.token_weights, batch.token_weights[[2, 0]])
    assert part.pictures == [None, None] and part.values is None
    scores = demo.score(batch).logps[[2, 0], :, :3]
    torch.testing.assert_close(demo.score(part).logps, scores, rtol=0, atol=1e-5)


def test_minibatches_and_micro_batches_hold_every_prompt_once(items, demo):
    rollouts = made_up(demo, items, [[2], [3], [4], [5], [6]])
    batch = collate(rollouts)
    for n, sizes in ((1, [5]), (2, [3, 2]), (5, [1] * 5), (9, [1] * 5)):
        parts = batch.minibatches(n)
        assert [len(part.mask) for part in parts] == sizes
        lengths = torch.cat([part.mask.sum(2) for part in parts]).flatten()
        assert lengths.tolist() == [2, 3, 4, 5, 6]
    for size, sizes in ((0, [5]), (2, [2, 2, 1]), (9, [5])):
        parts = batch.split(size)
        assert [len(part.mask) for part in parts] == sizes
        in_order = torch.cat([part.mask.sum(2) for part in parts]).flatten()
        assert in_order.tolist() == [2, 3, 4, 5, 6]
    mine = torch.cat([part.mask.sum(2) for part in batch.split(2, range(1, 4))]).flatten()
    assert mine.tolist() == [3, 4, 5]  # a process's share


# ------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora", [0, 4])
def test_sampler_logps_equal_scorer_logps(temperature, lora, items):
    policy = family("llama", lora=lora)
    moved(policy, by=0.05)
    rollouts = policy.sample(items, 4, 20, temperature, seed=3)
    scores = policy.score(collate(rollouts), temperature).logps.flatten(0, 1).detach()
    assert len({len(ids) for ids in completions(rollouts)}) > 1
    for rollout, row in zip(rollouts, scores):
        recorded = torch.tensor(rollout.sample_logps)
        torch.testing.assert_close(recorded, row[: len(recorded)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_greedy_equals_generate(name, items, demo):
    policy = demo if name == "qwen2" else family(name, lora=0)
    for rollout in policy.sample(items, 1, 24, 0.0, seed=0):
        ids = torch.tensor([rollout.prompt_ids])
        whole = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert rollout.completion_ids == whole[0, ids.shape[1] :].tolist()


def test_rows_do_not_depend_on_their_company(items, demo, monkeypatch):
    """Alone, in a padded batch, with finished rows dropped or not: the same tokens."""
    demo.tokens.eos_ids = [1, *range(20, 30)]  # some rows end soon, some late
    together = completions(demo.sample(items, 3, 30, 1.0, seed=9))
    lengths = [len(ids) for ids in together]
    assert min(lengths) < 8 < max(lengths)  # so ranks were closed on the way
    for p, item in enumerate(items):
        alone = demo.sample([item], 3, 30, 1.0, seed=9, first_row=3 * p)
        assert completions(alone) == together[3 * p : 3 * p + 3]
    monkeypatch.setattr(Draft, "close_ranks", lambda draft, *_: None)
    assert completions(demo.sample(items, 3, 30, 1.0, seed=9)) == together


def test_sampling_follows_the_distribution(items, demo):
    """First tokens of 4,000 samples against the model's own probabilities."""
    rollouts = demo.sample(items[:1], 4000, 1, 1.0, seed=1)
    firsts = torch.tensor(completions(rollouts))[:, 0]
    shares = torch.bincount(firsts, minlength=demo.model.config.vocab_size) / 4000
    logits = demo.model(input_ids=torch.tensor([rollouts[0].prompt_ids])).logits[0, -1]
    largest_error = 0.5 / 4000**0.5  # of a share: the deviation at a probability of 1/2
    assert (shares - logits.softmax(-1)).abs().max() < 5 * largest_error


def test_no_two_rows_share_their_random_numbers(items, demo):
    with torch.no_grad():
        demo.model.lm_head.weight.zero_()  # every token is as likely
    rollouts = demo.sample(items[:1], 50, 1, 1.0, seed=1)
    assert len({ids[0] for ids in completions(rollouts)}) > 25


def test_hostile_generation_config_changes_nothing(items, demo):
    before = completions(demo.sample(items, 4, 10, 1.0, seed=1))
    hostile = dict(temperature=0.01, top_k=1, top_p=0.01, repetition_penalty=9.0, do_sample=False)
    for name, value in hostile.items():
        setattr(demo.model.generation_config, name, value)
    assert completions(demo.sample(items, 4, 10, 1.0, seed=1)) == before


def test_sampling_uses_the_cache_in_train_mode_too(items):
    policy = family("llama", lora=4, checkpointing=True)
    fed, hidden = [], policy.hidden

    def watched(ids, *rest):
        fed.append(ids.shape)
        return hidden(ids, *rest)

    policy.hidden = watched
    policy.model.train()
    policy.sample(items[:2], 2, 6, 1.0, seed=0)
    assert fed[1:] == [(2, 2)] * 5  # one token a completion after the prompt


def test_after_an_update_the_next_rollout_uses_the_new_weights(items, demo):
    """Taught to say token 7 and nothing else."""
    optimizer = torch.optim.SGD(demo.trainable().values(), lr=1.0)
    prompt = demo.prompt(items[0])
    for _ in range(60):
        batch = collate([Rollout(items[0], 0, prompt, [7, 7, 7], [0.0] * 3, True)])
        (-demo.score(batch).logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(list(demo.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert completions(demo.sample(items[:1], 1, 3, 0.0, seed=0)) == [[7, 7, 7]]


# -------------------------------------------------------------------------------------- scoring
def test_entropy_is_the_distributions(items):
    policy = family("llama", lora=0)
    batch = collate(made_up(policy, items[:1], [[3]]))
    ids = torch.cat([batch.prompt_ids, batch.completion_ids[:, 0]], 1)
    logits = policy.model(input_ids=ids).logits[0, -4:-1] / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(policy.score(batch, 0.7).entropy[0, 0], expected, rtol=0, atol=1e-4)


def test_two_passes_in_train_mode_are_the_same(items):
    policy = family("llama", lora=4, checkpointing=True)
    policy.model.train()
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    assert torch.equal(policy.score(batch).logps, policy.score(batch).logps)


def test_head_by_chunks_is_the_whole_head(items):
    policy = family("llama", lora=0)
    batch = collate(made_up(policy, items[:3], [[4, 2], [3, 5], [6, 6]]))
    gradients = []
    for size in (3, 1000):
        policy.head_chunk = size
        policy.model.zero_grad()
        policy.score(batch).logps.sum().backward()
        gradients.append(policy.model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_fp32_rounds_nothing_to_bf16(items, bf16_products, lora, tied):
    """With all weights trained in fp32 under autocast, with adapters on weights in bf16."""
    gaps = []
    for fp32_head in (False, True):
        model = llama(tie_word_embeddings=tied).to(torch.bfloat16 if lora else torch.float32)
        embedding = model.get_input_embeddings().weight
        settings = dict(lora=lora, keep_reference=True, fp32_head=fp32_head)
        policy = Policy(model, character_tokenizer(), **settings)
        batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
        with policy.reference():
            reference = policy.score(batch).logps
        assert torch.equal(policy.score(batch).logps, reference)
        assert embedding.dtype == (torch.bfloat16 if lora else torch.float32)
        assert policy.model.get_input_embeddings().weight is embedding
        with torch.no_grad(), policy.autocast():  # sampling stands within one such block
            hidden = policy.counted_states(batch)
            logits = policy.logits(hidden, 1.0)
        exact = hidden.double() @ policy.model.lm_head.weight.double().T
        gaps.append((logits - exact).abs().max().item())
    assert gaps[0] > 1e-4 and gaps[1] < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("critic", ["", "head", "lora"])
def test_under_autocast_only_products_are_in_bf16(items, demo, critic, checkpointing):
    """Log-probs, entropies and values against float64 arithmetic on what they are made of."""
    lora = 4 if critic == "lora" else 0
    policy = Policy(
        demo.model, demo.tokenizer, lora=lora, critic=critic, checkpointing=checkpointing
    )
    policy.head_chunk = 7
    policy.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    batch = collate(made_up(policy, items[:2], [[4, 9, 2], [3, 1, 6]]))
    chunks, states = [], []
    logits_of = policy.logits

    def recorded(*args):
        chunks.append(logits_of(*args))
        return chunks[-1]

    policy.logits = recorded
    if critic:
        torch.nn.init.normal_(policy.value_head.weight)
        policy.value_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    scores = policy.score(batch, 0.7)

    logits = torch.cat(chunks).detach().double()  # [tokens, V]
    assert logits.shape[0] == batch.mask.sum() and len(chunks) > 1
    logps = logits.log_softmax(-1)
    targets = batch.completion_ids[batch.mask][:, None]
    expected = {"logps": logps.gather(1, targets)[:, 0], "entropy": -(logps.exp() * logps).sum(-1)}
    if critic:
        expected["values"] = states[0].double() @ policy.value_head.weight[0].detach().double()
    for name, values in expected.items():
        mine = getattr(scores, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine[batch.mask].double(), values, rtol=1e-5, atol=1e-5)

    (scores.logps.sum() + (scores.values.sum() if critic else 0)).backward()
    gradients = [p.grad for p in policy.trainable().values()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_under_autocast_the_sampler_picks_in_fp32(items, demo, monkeypatch):
    """Recorded log-probs against float64 arithmetic on the logits that tokens were picked from."""
    demo.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    picks, pick = [], Draft.pick

    def recorded(draft, logits, greedy):
        pick(draft, logits, greedy)
        here = draft.rows, draft.t
        picks.append((logits, draft.tokens[here].clone(), draft.logps[here].clone()))

    monkeypatch.setattr(Draft, "pick", recorded)
    demo.sample(items[:2], 3, 9, 1.0, seed=0)
    assert len(picks) > 1
    for logits, tokens, logps in picks:
        assert logits.dtype == torch.float32
        every = logits.double().log_softmax(-1).expand(*tokens.shape, -1)
        exact = every.gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 40, 70])
def test_prompts_are_read_in_chunks(size, items, demo):
    """The same tokens; log-probs within rounding; the decoder sees no more tokens at once."""
    whole = demo.sample(items, 3, 12, 1.0, seed=4)
    fed, hidden = [], demo.hidden

    def watched(ids, *rest):
        fed.append(ids.numel())
        return hidden(ids, *rest)

    demo.hidden, demo.prefill_tokens = watched, size
    parts = demo.sample(items, 3, 12, 1.0, seed=4)
    assert completions(parts) == completions(whole)
    for part, rollout in zip(parts, whole):
        expected = torch.tensor(rollout.sample_logps)
        torch.testing.assert_close(torch.tensor(part.sample_logps), expected, rtol=0, atol=1e-5)
    longest = max(len(rollout.prompt_ids) for rollout in whole)
    assert max(fed) <= max(size, longest) < longest * len(items)


# ---------------------------------------------------------------------- adapters and the reference
def test_reference_is_the_base_and_comes_back_after_an_exception(items):
    policy = family("llama", lora=4)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    base = policy.score(batch).logps.detach()  # B is 0: the adapters do nothing yet
    moved(policy, by=0.1)
    after = policy.score(batch).logps.detach()
    with pytest.raises(RuntimeError), policy.reference():
        assert torch.equal(policy.score(batch).logps, base)
        raise RuntimeError
    assert torch.equal(policy.score(batch).logps, after) and not torch.equal(after, base)


def test_reference_of_a_whole_model_is_the_kept_copy(items):
    policy = family("llama", lora=0, keep_reference=True)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    before = policy.score(batch).logps.detach()
    with torch.no_grad():
        policy.model.lm_head.weight.add_(torch.randn_like(policy.model.lm_head.weight))
    with policy.reference():
        assert torch.equal(policy.score(batch).logps, before)
    assert not torch.equal(policy.score(batch).logps, before)
    with pytest.raises(ValueError, match="keep_reference"), family("llama", lora=0).reference():
        pass


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_half_the_memory_starts_as_the_policy(items, bf16_products, tied):
    """The KL is exactly 0 before any update, and linear layers, but for a tied one, are in bf16."""
    model = llama(tie_word_embeddings=tied)
    policy = Policy(model, character_tokenizer(), lora=0, keep_reference=True)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    with policy.reference():
        reference = policy.score(batch).logps
    assert torch.equal(policy.score(batch).logps.detach(), reference)
    # Tied, the head has no name of its own: it is the embedding.
    names = [name for name, _ in policy.model.named_parameters()]
    linear = {name for name in names if "proj" in name or "head" in name}
    half = {name for name, p in policy.frozen.named_parameters() if p.dtype == torch.bfloat16}
    assert half == linear
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_only_adapters_are_trained_and_small_steps_move_them():
    trained = family("llama", lora=4).trainable()
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all(name.endswith((".A.policy", ".B.policy")) for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    p = next(iter(trained.values()))
    before, optimizer = p.detach().clone(), torch.optim.AdamW([p], lr=1e-6)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (before - p.detach()).mean().item() == pytest.approx(20e-6, rel=0.05)
