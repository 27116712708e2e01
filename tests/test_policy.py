"""The policy: sampler = scorer = the model's own replicated forward, one row a prompt, masks from lengths."""
import types
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

import demo as demos
import policy as policies
import runs
from data import UsageError
from policy import Policy, Rollout, collate

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.2, bos_token_id=None,
             eos_token_id=1, pad_token_id=1)


def character_tokenizer(**kwargs):
    """One token a character: </answer> is nine of them, as it may be in a real tokenizer."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | {chr(c): c - 30 for c in range(32, 127)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers import decoders
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", **kwargs)


def family(name: str, **kwargs) -> Policy:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
                     "mistral": (MistralConfig, MistralForCausalLM)}[name]
    extra = {"sliding_window": None} if name == "mistral" else {"head_dim": 16} if name == "qwen3" else {}
    return Policy(model(config(vocab_size=97, **SIZES, **extra, attn_implementation="prompt_once")), character_tokenizer(), **kwargs)


def made_up(policy, items, lengths, seed=0) -> list[Rollout]:
    """Rollouts with random completions of the given lengths, [items][samples], pad and EOS ids among them."""
    g = torch.Generator().manual_seed(seed)
    return [Rollout(item, p, policy.prompt(item), torch.randint(0, 97, (n,), generator=g).tolist(), [0.0] * n, True)
            for p, (item, row) in enumerate(zip(items, lengths)) for n in row]


def replicated(policy, rollouts, temperature=1.0) -> list[torch.Tensor]:
    """Brute force: the plain sdpa model on every prompt + completion by itself, log_softmax and gather."""
    plain = policy.model
    out = []
    for r in rollouts:
        ids = torch.tensor([list(r.prompt_ids) + list(r.completion_ids)])
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() / temperature
        logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        out.append(logps[len(r.prompt_ids) - 1:])
    return out


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("lengths", [[[3, 7, 1]], [[4], [1], [6]], [[5, 2], [7, 7], [1, 3], [2, 6]]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompt_once_equals_replicated(name, lengths, checkpointing, items):
    kwargs = dict(lora=0, checkpointing=checkpointing)
    policy = demos.demo_policy(0, checkpointing=checkpointing) if name == "qwen2" else family(name, **kwargs)
    rollouts = made_up(policy, items[:len(lengths)], lengths)
    batch = collate(rollouts)
    scores = policy.score(batch, temperature=.7)
    coefficients = torch.rand(scores.logps.shape, generator=torch.Generator().manual_seed(5)) * batch.mask
    (scores.logps * coefficients).sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    policy.model.zero_grad()
    policy.model.eval()
    theirs = replicated(policy, rollouts, temperature=.7)
    G = len(lengths[0])
    sum((x * coefficients[i // G, i % G, :len(x)]).sum() for i, x in enumerate(theirs)).backward()
    for i, x in enumerate(theirs):
        torch.testing.assert_close(scores.logps[i // G, i % G, :len(x)], x, rtol=0, atol=1e-4)
    assert (scores.logps[~batch.mask] == 0).all()
    mine, other = (torch.cat([g[n].flatten() for n in sorted(ours)]) for g in (ours, {n: p.grad for n, p in policy.trainable().items()}))
    assert (mine - other).norm() / other.norm() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, .7])
@pytest.mark.parametrize("lora", [0, 4])
def test_sampler_logps_equal_scorer_logps(temperature, lora, items):
    policy = family("llama", lora=lora)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * .05)          # B is no longer 0
    rollouts = policy.sample(items, 4, 20, temperature, seed=3)
    scores = policy.score(collate(rollouts), temperature).logps.flatten(0, 1)
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    for r, row in zip(rollouts, scores):
        torch.testing.assert_close(torch.tensor(r.sample_logps), row[:len(r.sample_logps)].detach(), rtol=0, atol=1e-4)


def test_entropy_is_the_distributions(items):
    policy = family("llama", lora=0)
    batch = collate(made_up(policy, items[:1], [[3]]))
    ids = torch.cat([batch.prompt_ids, batch.completion_ids[:, 0]], 1)
    expected = torch.distributions.Categorical(logits=policy.model(input_ids=ids).logits[0, -4:-1] / .7).entropy()
    torch.testing.assert_close(policy.score(batch, .7).entropy[0, 0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_greedy_equals_generate(name, items, demo):
    policy = demo if name == "qwen2" else family(name, lora=0)
    for r in policy.sample(items, 1, 24, 0.0, seed=0):
        ids = torch.tensor([r.prompt_ids])
        theirs = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)[0, ids.shape[1]:]
        assert r.completion_ids == theirs[:len(r.completion_ids)].tolist() and len(r.completion_ids) >= len(theirs.tolist())


def test_rows_do_not_depend_on_their_company(items, demo):
    """Alone, in a padded batch, with finished rows dropped or not: the same tokens."""
    demo.eos_ids = [1, *range(20, 30)]                                        # some rows end soon, some late
    together = demo.sample(items, 3, 30, 1.0, seed=9)
    lengths = [len(r.completion_ids) for r in together]
    assert min(lengths) < 8 < max(lengths)                                    # so ranks were closed on the way
    for p, item in enumerate(items):
        alone = demo.sample([item], 3, 30, 1.0, seed=9, first_row=3 * p)
        assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[3 * p:3 * p + 3]]
    keep, policies.drop_finished = policies.drop_finished, lambda rows, lengths, done, cache: (rows, lengths)
    try:
        assert [r.completion_ids for r in demo.sample(items, 3, 30, 1.0, seed=9)] == [r.completion_ids for r in together]
    finally:
        policies.drop_finished = keep


def test_sampling_follows_the_distribution(items, demo):
    """First tokens of 4,000 samples against the model's own probabilities; and no two rows share their random numbers."""
    rollouts = demo.sample(items[:1], 4000, 1, 1.0, seed=1)
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=demo.model.config.vocab_size)
    p = demo.model(input_ids=torch.tensor([rollouts[0].prompt_ids])).logits[0, -1].softmax(-1)
    assert (counts / 4000 - p).abs().max() < 5 * .5 / 4000**.5
    with torch.no_grad():
        demo.model.lm_head.weight.zero_()                                     # uniform logits
    assert len({r.completion_ids[0] for r in demo.sample(items[:1], 50, 1, 1.0, seed=1)}) > 25


def test_hostile_generation_config_changes_nothing(items, demo):
    before = [r.completion_ids for r in demo.sample(items, 4, 10, 1.0, seed=1)]
    for name, value in (("temperature", .01), ("top_k", 1), ("top_p", .01), ("repetition_penalty", 9.0), ("do_sample", False)):
        setattr(demo.model.generation_config, name, value)
    assert [r.completion_ids for r in demo.sample(items, 4, 10, 1.0, seed=1)] == before


def test_eos_is_trained_and_nothing_behind_it(items, demo):
    demo.eos_ids = [1, 20, 21]                                                # several EOS ids, as a generation config may list
    rollouts = demo.sample(items, 6, 30, 1.0, seed=2)
    batch = collate(rollouts)
    assert {True, False} == {r.finished for r in rollouts} or {r.completion_ids[-1] for r in rollouts} & {20, 21}
    for r, mask in zip(rollouts, batch.mask.flatten(0, 1)):
        assert int(mask.sum()) == len(r.completion_ids) == len(r.sample_logps)
        assert not set(r.completion_ids[:-1]) & set(demo.eos_ids)
        assert r.finished == (r.completion_ids[-1] in demo.eos_ids) and len(r.completion_ids) <= 30
        assert r.finished or len(r.completion_ids) == 30


def test_no_mask_comes_from_token_values(items):
    """Pad = EOS = 1 in prompts and completions alike: the mask is that of the lengths."""
    policy = family("llama", lora=0)
    rollouts = [Rollout(items[0], 0, [1, 5, 1, 6], [1, 1, 7, 1], [0.0] * 4, True), Rollout(items[1], 1, [1], [9, 1], [0.0] * 2, True)]
    batch = collate(rollouts)
    assert batch.prompt_mask.tolist() == [[True] * 4, [False] * 3 + [True]] and batch.mask.tolist() == [[[True] * 4], [[True, True, False, False]]]
    for mine, theirs in zip(policy.score(batch).logps.flatten(0, 1), replicated(policy, rollouts)):
        torch.testing.assert_close(mine[:len(theirs)], theirs, rtol=0, atol=1e-4)


def test_completions_do_not_see_their_siblings_and_causality(items):
    policy = family("llama", lora=0)
    rollouts = made_up(policy, items[:2], [[6, 6, 6], [6, 6, 6]])
    before = policy.score(collate(rollouts)).logps
    rollouts[1].completion_ids = rollouts[1].completion_ids[:2] + [(rollouts[1].completion_ids[2] + 1) % 97] + rollouts[1].completion_ids[3:]
    changed = policy.score(collate(rollouts)).logps != before
    assert changed[0, 1].tolist() == [False, False, True, True, True, True]
    changed[0, 1] = False
    assert not changed.any()                                                  # bit for bit


def test_padding_and_scoring_leave_everything_else_alone(items):
    policy = family("llama", lora=0)
    rollouts = made_up(policy, items[:2], [[3, 5], [2, 4]])
    batch = collate(rollouts)
    wide = policies.Batch(torch.nn.functional.pad(batch.prompt_ids, (7, 0), value=33), torch.nn.functional.pad(batch.prompt_mask, (7, 0)),
                          torch.nn.functional.pad(batch.completion_ids, (0, 7), value=1), torch.nn.functional.pad(batch.mask, (0, 7)))
    before = [x.clone() for x in vars(wide).values() if isinstance(x, torch.Tensor)]
    torch.testing.assert_close(policy.score(wide).logps[..., :5], policy.score(batch).logps, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, vars(wide).values()))
    part = policy.score(batch.prompts(torch.tensor([1]))).logps               # a slice with less padding
    torch.testing.assert_close(part[0], policy.score(batch).logps[1, :, :part.shape[2]], rtol=0, atol=1e-5)


def test_collate_checks_its_groups(items, demo):
    rows = made_up(demo, items[:2], [[2, 2], [3, 3]])
    with pytest.raises(ValueError, match="different sizes"):
        collate(rows[:3])
    rows[1].prompt_ids = [5]
    with pytest.raises(ValueError, match="two prompts"):
        collate(rows)
    twins = made_up(demo, [items[0], items[0]], [[2, 2], [2, 2]])             # the same prompt twice stays two groups
    assert collate(twins).prompt_ids.shape[0] == 2


def test_train_mode_is_deterministic_and_sampling_uses_the_cache(items):
    policy = family("llama", lora=4, checkpointing=True)
    policy.model.train()
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    assert torch.equal(policy.score(batch).logps, policy.score(batch).logps)
    fed = []
    hidden, policy._hidden = policy._hidden, lambda ids, *rest: fed.append(ids.shape) or hidden(ids, *rest)
    policy.model.train()
    policy.sample(items[:2], 2, 6, 1.0, seed=0)
    assert fed[1:] == [(2, 2)] * 5                                            # one token a completion after the prompt


def test_after_an_update_the_next_rollout_uses_the_new_weights(items, demo):
    optimizer = torch.optim.SGD(demo.trainable().values(), lr=1.0)
    for _ in range(60):                                                       # teach it to say token 7 and nothing else
        batch = collate([Rollout(items[0], 0, demo.prompt(items[0]), [7, 7, 7], [], True)])
        (-demo.score(batch).logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(list(demo.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert demo.sample(items[:1], 1, 3, 0.0, seed=0)[0].completion_ids == [7, 7, 7]


def test_reference_is_the_base_and_comes_back_after_an_exception(items):
    policy = family("llama", lora=4)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    base = policy.score(batch).logps.detach()                                 # B is 0: the adapters do nothing yet
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.add_(.1)
    moved = policy.score(batch).logps.detach()
    with pytest.raises(RuntimeError), policy.reference():
        assert torch.equal(policy.score(batch).logps, base)
        raise RuntimeError
    assert torch.equal(policy.score(batch).logps, moved) and not torch.equal(moved, base)
    full = family("llama", lora=0, keep_reference=True)
    before = full.score(batch).logps.detach()
    with torch.no_grad():
        full.model.lm_head.weight.add_(torch.randn_like(full.model.lm_head.weight))
    with full.reference():
        assert torch.equal(full.score(batch).logps, before)
    assert not torch.equal(full.score(batch).logps, before)
    with pytest.raises(ValueError, match="keep_reference"), family("llama", lora=0).reference():
        pass


def test_only_adapters_are_trained_and_small_steps_move_them():
    policy = family("llama", lora=4)
    assert all(name.endswith((".A.policy", ".B.policy")) and p.dtype == torch.float32 for name, p in policy.trainable().items()) and len(policy.trainable()) == 2 * 7 * 2
    p = next(iter(policy.trainable().values()))
    before, optimizer = p.detach().clone(), torch.optim.AdamW([p], lr=1e-6)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (before - p.detach()).mean().item() == pytest.approx(20e-6, rel=.05)


def test_stop_at_the_first_answer(tmp_path, items):
    """Without a chat template a row ends with the token that completes </answer>, whoever else is alive."""
    policy = family("llama", lora=0)
    assert policy.stop_answer and not policy.chat
    ids = policy.tokenizer("<answer>B</answer> more</answer>", add_special_tokens=False).input_ids
    assert policy.tokenizer.decode(ids[:policy._answer_end(ids)]) == "<answer>B</answer>"
    script = policy.tokenizer("<answer>B</answer>xxxxxxxxxxxxxxxxxxxxxxx", add_special_tokens=False).input_ids

    def scripted(logits, uniform, greedy):                                    # the sampler says the script, whatever the model thinks
        token = torch.full(uniform.shape, script[scripted.t], dtype=torch.long)
        scripted.t += 1
        return token, torch.zeros(uniform.shape)
    scripted.t, original, policies.pick = 0, policies.pick, scripted
    try:
        rollout = policy.sample(items[:1], 1, 40, 1.0, seed=0)[0]
    finally:
        policies.pick = original
    assert rollout.text == "<answer>B</answer>" and rollout.finished and len(rollout.sample_logps) == 18
    assert scripted.t == 24                                                   # noticed at the next look, eight tokens on at most


def test_the_chat_templates_own_turn_end_stops_a_row():
    tokenizer = character_tokenizer(additional_special_tokens=["<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=98, **SIZES, attn_implementation="prompt_once"))
    model.generation_config.eos_token_id = [1, 5]
    assert Policy(model, tokenizer, lora=0).eos_ids == [1, 5, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_bos_stands_once_and_a_template_without_system_turn_works(items):
    policy = family("llama", lora=0)
    policy.chat = True
    policy.tokenizer.chat_template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
                                      "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}@{% endif %}")
    text = policy.tokenizer.decode(policy.prompt(items[0]))
    assert text.endswith("@") and text.count("Answer the medical question") == 1 and items[0].question in text


@pytest.mark.parametrize("make, word", [
    (lambda: MistralForCausalLM(MistralConfig(vocab_size=97, **SIZES, sliding_window=8)), "sliding"),
    (lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=97, head_dim=8, **SIZES)), "softcapping"),
    (lambda: GraniteForCausalLM(GraniteConfig(vocab_size=97, logits_scaling=8.0, **SIZES)), "logits_scaling")])
def test_unserved_families_are_refused_by_name(make, word, tmp_path):
    make().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=word):
        Policy.load(str(tmp_path))


def test_a_folder_without_a_tokenizer_or_a_model(tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **SIZES)).save_pretrained(tmp_path / "m")
    for path in (tmp_path / "m", tmp_path):
        with pytest.raises(UsageError) as error:
            Policy.load(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_saved_and_loaded_folder_is_the_same_policy(tmp_path, items, demo):
    demo.model.save_pretrained(tmp_path)
    demo.tokenizer.save_pretrained(tmp_path)
    loaded = Policy.load(str(tmp_path), lora=0)
    assert loaded.encode(items) == demo.encode(items)
    assert [r.completion_ids for r in loaded.sample(items, 2, 8, 1.0, 0)] == [r.completion_ids for r in demo.sample(items, 2, 8, 1.0, 0)]
    assert Policy.load(str(tmp_path)).trainable().keys() != loaded.trainable().keys()             # adapters are the default


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


def test_each_name_of_lora_targets_must_be_there():
    policy = family("llama", lora=4, lora_targets="q_proj, v_proj")
    assert {name.split(".")[-3] for name in policy.trainable()} == {"q_proj", "v_proj"}
    with pytest.raises(UsageError, match="'v_prj'"):
        family("llama", lora=4, lora_targets="q_proj,v_prj")


# ------------------------------------------------------------------- numbers on a GPU, without one
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("critic", ["", "head", "lora"])
def test_under_autocast_only_products_are_in_bf16(items, demo, critic, checkpointing):
    """Log-probs, entropies and values against float64 arithmetic on what they are made of."""
    policy = Policy(demo.model, demo.tokenizer, lora=4 if critic == "lora" else 0, critic=critic,
                    checkpointing=checkpointing, head_chunk=7)
    policy._autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    batch = collate(made_up(policy, items[:2], [[4, 9, 2], [3, 1, 6]]))
    chunks, states = [], []
    logits_of = policy._logits

    def recorded(*args):
        chunks.append(logits_of(*args))
        return chunks[-1]
    policy._logits = recorded
    if critic:
        torch.nn.init.normal_(policy.value_head.weight)
        policy.value_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    scores = policy.score(batch, .7)

    logits = torch.cat(chunks).detach().double()                              # [tokens, V]
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
    demo._autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    picks, pick = [], policies.pick

    def recorded(logits, *args, **kwargs):
        picks.append((logits, *pick(logits, *args, **kwargs)))
        return picks[-1][1:]
    monkeypatch.setattr(policies, "pick", recorded)
    demo.sample(items[:2], 3, 9, 1.0, seed=0)
    for logits, tokens, logps in picks:
        assert logps.dtype == torch.float32
        every = logits.double().log_softmax(-1).expand(*tokens.shape, -1)
        exact = every.gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_half_the_memory_starts_as_the_policy(items, bf16_products, tied):
    """The KL is exactly 0 before any update, and linear layers, but for a tied one, are in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, **SIZES, tie_word_embeddings=tied,
                         attn_implementation="prompt_once")
    policy = Policy(LlamaForCausalLM(config), character_tokenizer(), lora=0, keep_reference=True)
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


@pytest.mark.parametrize("major, dtype", [(7, torch.float32), (8, torch.bfloat16)])
def test_bf16_only_where_the_gpu_has_it(major, dtype, tmp_path, monkeypatch, capsys):
    """A T4 (7.5) emulates bf16: there fp32, and one line that says so."""
    family("llama", lora=0).save_folder(tmp_path)
    capsys.readouterr()
    card = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # emulated
    loaded, said = [], []

    def from_pretrained(path, dtype, **kwargs):
        loaded.append(dtype)
        raise OSError("there is no GPU to load it to")
    monkeypatch.setattr(policies.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for load, kwargs in ((Policy.load, {}), (Policy.load, {"lora": 0}), (runs.open_policy, {})):
        with pytest.raises(UsageError, match="no GPU to load it to"):
            load(str(tmp_path), "cuda", **kwargs)
        said.append(capsys.readouterr().err)
    assert loaded == [dtype, torch.float32, dtype]  # adapters, --full, a model to evaluate
    line = "Card has no bf16 of its own: it computes in fp32, with twice the memory\n"
    assert said == [line if major == 7 else ""] * 3


def test_making_the_demos_models_touches_no_gpu(monkeypatch):
    def touched(*args):
        raise AssertionError("a GPU's random state was asked for")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", touched)
    before = torch.get_rng_state()
    demos.demo_policy(0)
    demos.tiny_vl_policy(0, ["some text"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "mistral"])
def test_sampling_warns_of_nothing(name, items, demo):
    """transformers renames arguments and warns of the old name, which a user would see."""
    policy = demo if name == "qwen2" else family(name, lora=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy.sample(items[:2], 2, 4, 1.0, seed=0)
    assert [str(warning.message) for warning in caught] == []
