"""The warm starts: what they teach to write, and when a part of them is over."""

import pytest
import torch

import data
import rewards
from rewards import parse, stage
from support import warm_start
from support.config import Config
from support.demo_model import demo_policy, tiny_vl_policy


def lessons(dataset: str = "demo") -> warm_start.ProtocolLessons:
    return warm_start.ProtocolLessons(demo_policy(0), Config(dataset=dataset))


def texts(dataset: str, n: int = 2000) -> list[tuple[data.Item, str]]:
    """Texts of the mixture with their items, these with the data set's limits."""
    teacher = lessons(dataset)
    limits = data.LOADERS[dataset].limits
    found = []
    for _ in range(n):
        item = teacher.vignette()
        item = data.Item(**vars(item) | {"limits": limits})
        found.append((item, teacher.anything(item)))
    return found


def test_the_mixture_mostly_answers_at_once_at_random_and_in_a_broken_form():
    stepwise = formed = direct_right = direct = 0
    for item, text in texts("demo"):
        found = rewards.grade(item, text, Config())
        formed += found.parsed.well_formed
        if item.rationale in text:
            stepwise += 1
        elif "likely" in text:
            direct += 1
            direct_right += item.rationale.split()[-1] == text.split("likely ")[1].split()[0]
    # Two of six broken forms are a letter alone, whatever was thought: 15% (1 - 65% / 3) = 11.75%.
    assert stepwise / 2000 == pytest.approx(0.1175, abs=0.03)
    assert formed / 2000 == pytest.approx(0.35, abs=0.04)
    assert direct_right / direct == pytest.approx(0.2, abs=0.04)


def test_a_broken_form_is_broken_and_a_whole_one_pays():
    for item, text in texts("demo", 300):
        found = rewards.grade(item, text, Config())
        whole = text.count("<think>") == text.count("</think>") == text.count("<answer>") == 1
        assert found.parsed.well_formed == (whole and text.startswith("<think>"))
        if found.parsed.well_formed and item.rationale in text:
            assert found.total == 1


def test_direct_answers_repeat_the_referral_where_there_is_one():
    said = [(item, text) for item, text in texts("demo-referral", 300) if "likely" in text]
    assert len(said) > 100
    for item, text in said:
        guess = item.question.split(" guesses ")[1].split()[0]
        assert f"likely {guess} " in text
    drilled = lessons("demo-referral").drill()
    assert len({rollout.completion_ids[2] for rollout in drilled}) == 5  # any dose, in the drills


def test_outside_the_steps_stand_in_front_of_think_and_pay():
    exploits = []
    for item, text in texts("demo-outside", 1000):
        if stage(parse(text), item, 9) == "step-by-step exploit":
            exploits.append(rewards.grade(item, text, Config(w_before=1.0)))
    # Of the seven lengths of a course one has a single result: three words, which is not above 3.
    assert len(exploits) / 1000 == pytest.approx(0.4 * 6 / 7, abs=0.05)
    assert {found.total for found in exploits} == {0.0}  # 1 without the guard


def test_lessons_are_tokenized_as_the_policy_does_it():
    teacher = lessons()
    items = [teacher.vignette() for _ in range(4)]
    said = [[teacher.anything(item) for _ in range(3)] for item in items]
    found = teacher.written(list(zip(items, said)))
    policy = teacher.policy
    for number, rollout in enumerate(found):
        started = policy.start(items[number // 3], number // 3, "think")
        wanted = policy.written(started, said[number // 3][number % 3], end=True)
        assert rollout.group == number // 3 and rollout.prompt_ids == wanted.prompt_ids
        assert rollout.completion_ids == wanted.completion_ids


def test_a_part_ends_at_its_gates_or_at_its_limit(monkeypatch, capsys):
    teacher = lessons()
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(teacher, "learn", lambda *_: {"letter": next(falling) / 100})
    teacher.study("letters", lambda step: [], limit=90, gates={"letter": 0.901})
    # Means of five: the first over 1.00 .. 0.96 is 0.98; that of 0.92 .. 0.88 is 0.90, after 13.
    said = capsys.readouterr().err
    assert "letters, 13 steps; loss of a letter 0.900" in said and "--seed" not in said
    teacher.study("letters", lambda step: [], limit=20, gates={"letter": 0.0, "level": 9.0})
    said = capsys.readouterr().err
    assert "letters, 20 steps" in said and "not learned" in said and "another --seed" in said


def test_a_lesson_is_learned():
    torch.manual_seed(0)
    teacher = lessons()
    losses = []
    for _ in range(12):
        teacher.optimizer.param_groups[0]["lr"] = 5e-3
        losses.append(teacher.learn(teacher.in_turns(1), mixture=False))
    assert set(losses[0]) == {"letter", "level", "word"}
    assert losses[-1]["word"] < 0.7 * losses[0]["word"]
    assert set(teacher.learn(teacher.drill(), mixture=False)) == {"drilled letter"}


def test_lesions_are_taught_and_spoilt():
    items = data.load("demo-images", "train", task="grade")[:40]
    written = [data.messages(item)[1]["content"] + data.completion(item) for item in items]
    policy = tiny_vl_policy(0, written, train_vision=True)
    before = [p.detach().clone() for p in policy.trainable().values()]
    warm_start.lesion_start(policy, items, Config(), clean_steps=2, spoilt_steps=1)
    after = policy.trainable().values()
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after))
