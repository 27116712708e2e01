"""Templates, and where a completion ends: at an EOS, or where it has closed its answer."""

from tiny_models import character_tokenizer, completions, family, llama

from policy import Policy, collate
from support.decoding import Draft

TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
NO_SYSTEM_TURN = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m.content }}>"
    "{% endfor %}"
    "{% if add_generation_prompt %}@{% endif %}"
)


def test_eos_is_trained_and_nothing_behind_it(items, demo):
    demo.tokens.eos_ids = [1, 20, 21]  # several, as a generation config may list
    rollouts = demo.sample(items, 6, 30, 1.0, seed=2)
    batch = collate(rollouts)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    assert {ids[-1] for ids in completions(rollouts)} & {20, 21}
    for rollout, mask in zip(rollouts, batch.mask.flatten(0, 1)):
        ids = rollout.completion_ids
        assert int(mask.sum()) == len(ids) == len(rollout.sample_logps)
        assert not set(ids[:-1]) & {1, 20, 21}
        assert rollout.finished == (ids[-1] in (1, 20, 21))
        assert rollout.finished or len(ids) == 30


def test_stop_at_the_first_answer(items, monkeypatch):
    """Without a chat template a row ends with the token that completes </answer>."""
    policy = family("llama", lora=0)
    tokens = policy.tokens
    assert tokens.stop_answer and not tokens.chat
    ids = tokens.of_completion("<answer>B</answer> more</answer>")
    assert tokens.tokenizer.decode(ids[: tokens.answer_end(ids)]) == " <answer>B</answer>"
    assert tokens.end(ids) == tokens.answer_end(ids) == 19
    assert tokens.answer_end(ids[:18]) is None
    script = policy.tokenizer("<answer>B</answer>" + "x" * 23).input_ids
    said = []

    def scripted(draft, logits, greedy):
        """The sampler says the script, whatever the model thinks."""
        said.append(script[len(said)])
        draft.tokens[draft.rows, draft.t] = said[-1]

    monkeypatch.setattr(Draft, "pick", scripted)
    rollout = policy.sample(items[:1], 1, 40, 1.0, seed=0)[0]
    assert rollout.text == "<answer>B</answer>" and rollout.finished
    assert len(rollout.completion_ids) == len(rollout.sample_logps) == 18
    assert len(said) == 24  # noticed at the next look, eight tokens on at most


def test_the_chat_templates_own_turn_end_stops_a_row():
    tokenizer = character_tokenizer(additional_special_tokens=["<|im_end|>"])
    tokenizer.chat_template = TURNS
    model = llama(vocab_size=98)
    model.generation_config.eos_token_id = [1, 5]
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = Policy(model, tokenizer, lora=0).tokens
    assert tokens.eos_ids == [1, 5, closing] and tokens.end_id == closing


def test_bos_stands_once_and_a_template_without_system_turn_works(items):
    policy = family("llama", lora=0)
    policy.tokens.chat = True
    policy.tokenizer.chat_template = NO_SYSTEM_TURN
    text = policy.tokenizer.decode(policy.prompt(items[0]))
    assert text.startswith("<") and text.endswith("@")
    assert text.count("Answer the medical question") == 1 and items[0].question in text
