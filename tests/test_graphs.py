"""Replayed steps on a CPU, a tape in place of a CUDA graph: what plain ones say, or refused."""

import pytest
import torch
from tape import Tape
from test_vision import picture, tiny
from tiny_models import completions, family, moved

from data import Item
from policy import Cache, Policy
from support import graphs
from support.decoding import Draft
from support.demo_model import demo_policy


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Those recorded in place of graphs."""
    made = []

    def capture(step):
        made.append(Tape(step))
        return made[-1]

    monkeypatch.setattr(graphs, "capture", capture)
    return made


def both(policy: Policy, items: list, temperature: float, stops: bool) -> tuple[list, list]:
    """The same call by plain steps and by replayed ones; `stops`: finished rows are left out."""
    policy.tokens.eos_ids = [1, *range(20, 30)] if stops else []  # some rows end soon, some late
    policy.least_span = 8  # then 16, 32, and all 40
    plain = policy.sample(items, 3, 40, temperature, seed=9)
    policy.replay = True
    return plain, policy.sample(items, 3, 40, temperature, seed=9)


def assert_same(plain: list, replayed: list) -> None:
    assert completions(replayed) == completions(plain)
    for a, b in zip(plain, replayed):
        expected, found = torch.tensor(a.sample_logps), torch.tensor(b.sample_logps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def with_images() -> list[Item]:
    """One image, and none."""
    names = ("round", "irregular")
    one = Item("one", "classify", "What is it?", names, "round", image=picture(0, 56, 56))
    return [one, Item("none", "classify", "And now without a picture?", names, "round")]


def policy_of(name: str, lora: int, items: list) -> Policy:
    if name == "qwen2":
        made = demo_policy(0)
        policy = Policy(made.model, made.tokenizer, lora=lora)
    elif name == "qwen2_5_vl":
        policy = tiny(items, lora=lora)
    else:
        policy = family(name, lora=lora)
    moved(policy, by=0.05)  # adapters that do something
    return policy


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen2_5_vl"])
def test_replayed_steps_say_what_plain_ones_say(tapes, items, name, lora, temperature, stops):
    items = with_images() if name == "qwen2_5_vl" else items
    policy = policy_of(name, lora, items)
    assert_same(*both(policy, items, temperature, stops))
    assert policy.replay  # nothing fell back
    assert len(tapes) > 1  # shapes changed on the way


def test_adapters_switched_off_and_prompts_in_chunks(tapes, items):
    policy = policy_of("llama", 4, items)
    policy.prefill_tokens = 50
    with policy.reference():
        base = both(policy, items, 1.0, True)
    assert_same(*base)
    assert completions(policy.sample(items, 3, 40, 1.0, seed=9)) != completions(base[0])
    assert policy.replay


def test_after_an_update_a_replay_uses_the_new_weights(tapes, items):
    policy = policy_of("qwen2", 4, items)
    before = both(policy, items, 1.0, False)[1]
    moved(policy, by=0.05)
    after = policy.sample(items, 3, 40, 1.0, seed=9)
    policy.replay = False
    assert_same(policy.sample(items, 3, 40, 1.0, seed=9), after)
    assert completions(after) != completions(before)


def test_under_autocast(tapes, items, monkeypatch):
    """Its copies of the weights stay until the call ends: a replay reads them where they were."""
    policy = policy_of("qwen2", 0, items)
    monkeypatch.setattr(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same(*both(policy, items, 1.0, True))
    assert policy.replay and tapes


# ------------------------------------------------------------------------------ planted faults
def in_logits(change):
    """A fault in what the step computes last."""

    def plant(monkeypatch, policy):
        logits = policy.logits
        monkeypatch.setattr(policy, "logits", lambda h, temperature: change(logits(h, temperature)))

    return plant


def counted(monkeypatch, policy) -> dict:
    """The host's own count of steps: host["t"], from -1 while prompts are read."""
    host, hidden = {}, policy.hidden

    def counting(ids, positions, layout, *pictures):
        host["t"] = host["t"] + 1 if layout.span else -1
        return hidden(ids, positions, layout, *pictures)

    monkeypatch.setattr(policy, "hidden", counting)
    return host


def slot_of_the_host(monkeypatch, policy):
    """Keys and values go into a slot that a number names, not a tensor."""
    host, update = counted(monkeypatch, policy), Cache.update

    def by_number(cache, key, value, layer, *_, **__):
        if cache.span == 0:
            return update(cache, key, value, layer)
        for own, new in zip(cache.own[layer], (key, value)):
            own[:, :, :, host["t"]] = new
        return key, value

    monkeypatch.setattr(Cache, "update", by_number)


def position_of_the_host(monkeypatch, policy):
    host = counted(monkeypatch, policy)
    hidden = policy.hidden

    def by_number(ids, positions, layout, *pictures):
        if layout.span:
            positions = positions - layout.t + (host["t"] + 1)
        return hidden(ids, positions, layout, *pictures)

    monkeypatch.setattr(policy, "hidden", by_number)


def row_of_the_host(monkeypatch, policy):
    """What is picked goes where a number says."""
    host, pick = counted(monkeypatch, policy), Draft.pick

    def by_number(draft, logits, greedy):
        pick(draft, logits, greedy)
        draft.tokens[draft.rows, host["t"] + 1] = draft.tokens[draft.rows, draft.t]

    monkeypatch.setattr(Draft, "pick", by_number)


def factor_of_the_host(monkeypatch, policy):
    host = counted(monkeypatch, policy)
    in_logits(lambda x: x * (1 + 0.1 * (host["t"] + 1)))(monkeypatch, policy)


def not_in_place(monkeypatch, policy):
    """The step makes t anew: a replay reads the old one for ever."""
    pick = Draft.pick

    def rebound(draft, logits, greedy):
        pick(draft, logits, greedy)
        policy.cache_of_the_call.t = draft.t = draft.t.clone()

    hidden = policy.hidden

    def watched(ids, positions, layout, *pictures):
        policy.cache_of_the_call = layout
        return hidden(ids, positions, layout, *pictures)

    monkeypatch.setattr(policy, "hidden", watched)
    monkeypatch.setattr(Draft, "pick", rebound)


DIFFERS = "a replayed step differs"
FAULTS = {
    "slot": (slot_of_the_host, DIFFERS),
    "position": (position_of_the_host, DIFFERS),
    "row": (row_of_the_host, DIFFERS),
    "factor": (factor_of_the_host, DIFFERS),
    "not in place": (not_in_place, DIFFERS),
    "item": (in_logits(lambda x: x + 0 * x.sum().item()), "the host would wait"),
    "constant": (in_logits(lambda x: x + 0 * torch.tensor(1.0)), "numbers of the host"),
    "mask": (in_logits(lambda x: x + 0 * len(x[x > 0])), "as many elements"),
    "nonzero": (in_logits(lambda x: x + 0 * len((x > 0).nonzero())), "its shape depends"),
    "random": (in_logits(lambda x: x + 0 * torch.rand_like(x)), "random numbers"),
    "index": (in_logits(lambda x: x + 0 * x[torch.zeros(()).long()]), "the host would wait"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(tapes, items, demo, monkeypatch, fault, capsys):
    """One line, and the call starts again plainly, with the tokens of plain steps."""
    plant, message = FAULTS[fault]
    demo.least_span = 8
    plant(monkeypatch, demo)
    plain = demo.sample(items, 2, 24, 1.0, seed=9)
    demo.replay = True
    assert_same(plain, demo.sample(items, 2, 24, 1.0, seed=9))
    lines = [line for line in capsys.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert len(lines) == 1 and message in lines[0] and not demo.replay


def test_memory_that_runs_out_in_a_recording_is_the_callers(items, demo, monkeypatch):
    """Fewer rows would help, plain steps would not. A capture's end covers what ended it."""

    def capture(step):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr(graphs, "capture", capture)
    demo.replay = True
    with pytest.raises(torch.OutOfMemoryError):
        demo.sample(items, 2, 24, 1.0, seed=9)
    assert demo.replay
