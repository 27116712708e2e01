"""The grader: what counts, and what must never count."""

import doctest
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import rewards
from data import Item
from rewards import grade, match_option, parse, stage
from support import bleu, boxes, cli
from support.config import Config
from support.errors import UsageError

CELLS = ("T lymphocytes", "Plasma cells", "D cells", "<5% of cells", "A small region")
ITEM = Item("1", "choice", "Which cell makes antibodies?", CELLS, "B")
CONFIG = Config()


def think(answer: str, reasoning: str = "because") -> str:
    return f"<think> {reasoning} </think> <answer>{answer}</answer>"


def reward_of(item: Item, answer: str, **changes) -> float:
    return grade(item, think(answer), replace(CONFIG, **changes)).total


@pytest.mark.parametrize("module", [rewards, bleu, boxes])
def test_doctests(module):
    failed, tried = doctest.testmod(module)
    assert tried >= 2 and not failed


# ------------------------------------------------------------------------------ the right option
RIGHT = [
    *("B", "b", "(B)", "**B**", "B.", "B)", "[B]", "\nB\n"),
    *(r"\boxed{B}", r"\boxed{\text{B}}", r"$\boxed{B}$"),
    *("B: Plasma cells", "B. plasma   cells", "(B) Plasma cells.", "**B. Plasma cells**"),
    *("B - Plasma cells", "Plasma cells", "plasma\ncells", '"Plasma cells"'),
]
HACKS = [
    *("", " ", "A B C D E", "A, B", "B or C", "BB", "B B", "ABCDE", "B: ", "B7", "F", "1", "*"),
    *("plasma", "Plasma cells or T lymphocytes", "a plasma cell", "A small"),
    *("B: T lymphocytes", "A: Plasma cells"),
    *("I think B", "Answer seems B", "the answer is B", "not B"),
]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers(answer):
    result = grade(ITEM, think(answer), CONFIG)
    assert result.total == 1 and result.correct and result.predicted == "B"


@pytest.mark.parametrize("answer", HACKS)
def test_hacks_score_nothing(answer):
    result = grade(ITEM, think(answer), CONFIG)
    assert result.total <= 0 and not result.correct and result.parts["accuracy"] == 0


def test_options_that_look_like_letters():
    for answer, letter in {"D cells": "C", "D": "D", "a small region": "E", "A": "A"}.items():
        assert match_option(answer, ITEM.options) == letter
    assert match_option("I", ITEM.options) == ""
    assert match_option("a fracture", ("fracture", "sprain")) == ""
    assert match_option("A: fracture", ("fracture", "sprain")) == "A"
    assert match_option("Aa", ("AA", "Aa", "aa")) == "B"


def test_a_letter_that_is_no_options_names_nothing_whatever_follows():
    """Text that is nothing once its marks are gone must not equal the text of no option."""
    assert match_option('Z. "."', ("one", "two")) == match_option("C: **", ("one", "two")) == ""
    assert grade(ITEM, '<think> it is so </think> <answer> Z. "." </answer>', CONFIG).total == 0


def test_a_lone_option_letter_goes_before_option_text():
    """The prompt asks for a letter: of blood groups, `B` is the third option's text and the second
    option's letter, and means the letter."""
    groups = ("O", "A", "B", "AB")
    for written in ("B", "b", "(B)", "B.", "**B**"):
        assert match_option(written, groups) == "B"
    assert match_option("A", groups) == "A" and match_option("C", groups) == "C"
    # "O" and "AB" are no option letters.
    assert match_option("O", groups) == "A" and match_option("AB", groups) == "D"
    assert match_option("B: A", groups) == "B" and match_option("B: B", groups) == ""
    item = replace(ITEM, options=groups, answer="B")
    assert reward_of(item, "B") == 1 and reward_of(item, "A") == 0
    assert grade(item, data.completion(item), CONFIG).total == 1


SIGNED = [("5", "-5"), ("<5", ">5"), ("5%", "5"), ("10", "10²"), ("+1", "1"), ("1.5", "15")]


@pytest.mark.parametrize("one, other", [*SIGNED, ("<5% of cells", "5% of cells")])
def test_normalisation_keeps_signs_and_digits(one, other):
    options = (one, other)
    assert match_option(one, options) == "A" and match_option(other, options) == "B"
    assert match_option(f"A: {other}", options) == ""
    assert match_option(f"B.{other}", options) == "B"


def test_dash_without_spaces_is_a_sign():
    assert match_option("A-5", ("5", "7")) == "" and match_option("A - 5", ("5", "7")) == "A"


def test_alike_options_are_both_right():
    item = replace(ITEM, options=("Heparin", "Warfarin", "Heparin"), answer="C")
    assert match_option("heparin.", item.options) == "AC"
    assert match_option("aa", ("AA", "Aa", "BB")) == ""
    assert grade(item, think("HEPARIN"), CONFIG).correct
    # The letter names one of the two, and the wrong one.
    assert not grade(item, think("A"), CONFIG).correct


# -------------------------------------------------------------------------------------- the form
FORMS = [  # text, well formed, well formed under --strict
    ("<think>x</think><answer>B</answer>", True, True),
    ("  <think>x</think>\n\n<answer>B</answer>\n", True, True),
    ("Let me see. <think>x</think><answer>B</answer>", True, False),
    ("<think>x</think><answer>B</answer> done", True, False),
    ("<think>x</think> so <answer>B</answer>", True, False),
    ("<think></think><answer>B</answer>", False, False),
    ("<think>x</think><answer> </answer>", False, False),
    ("<answer>B</answer><think>x</think>", False, False),
    ("<think>x</think><answer>B</answer><answer>B</answer>", False, False),
    ("<think>x</think><think>y</think><answer>B</answer>", False, False),
    ("<think>x<answer>B</answer></think>", False, False),
    ("<think>x</think><answer>B", False, False),
    ("B", False, False),
    ("", False, False),
]


@pytest.mark.parametrize("completion, well_formed, strict", FORMS)
def test_form(completion, well_formed, strict):
    assert parse(completion).well_formed is well_formed
    assert grade(ITEM, completion, CONFIG).total == (1 if well_formed else -1)
    assert grade(ITEM, completion, replace(CONFIG, strict=True)).total == (1 if strict else -1)


@pytest.mark.parametrize("nothing", [".", "...", "\u200b", "\u2060 \ufeff", "-", "\n*\n", "<>"])
def test_a_think_block_without_a_letter_or_digit_is_empty(nothing):
    completion = f"<think>{nothing}</think><answer>B</answer>"
    assert not parse(completion).well_formed and grade(ITEM, completion, CONFIG).total == -1


@pytest.mark.parametrize("something", ["x", "7", "é", "红", "²", ". x"])
def test_a_letter_or_digit_of_any_script_is_thinking(something):
    assert parse(f"<think>{something}</think><answer>B</answer>").well_formed


@pytest.mark.parametrize("nothing", [".", "...", "\u200b", "**", "\u2060"])
def test_an_answer_of_marks_is_empty_in_every_style(nothing):
    assert reward_of(ITEM, nothing) == -1
    for style in ("direct", "cot"):
        config = replace(CONFIG, style=style)
        assert grade(ITEM, f"<answer>{nothing}</answer>", config).total == -1


@pytest.mark.parametrize("answer", ["-1", "<5", "[[1, 2, 3, 4]]", "[]", "++", "-", "五"])
def test_short_answers_that_are_none_of_the_options_keep_their_form(answer):
    assert parse(think(answer)).well_formed and reward_of(ITEM, answer) == 0


def test_the_last_complete_answer_counts():
    assert parse("<answer>A</answer> <answer>B</answer> <answer>C").answer == "B"
    assert parse("<answer>A <answer>B</answer>").answer == "B"
    assert parse("<answer>A</answer></answer>").answer == "A"
    assert parse("<answer>A</answer>").think == "" and parse("</answer><answer>").answer is None


def test_direct_style_needs_one_answer_block():
    direct = replace(CONFIG, style="direct")
    assert grade(ITEM, "<answer>B</answer>", direct).total == 1
    assert grade(ITEM, "<answer>B</answer><answer>B</answer>", direct).total == -1


# ----------------------------------------------------------------------------------- the rewards
def judged(well_formed: bool, right: float, credit: float) -> rewards.Verdict:
    return rewards.Verdict(parse(""), well_formed, right, credit, "")


def test_the_papers_rewards_by_hand():
    config = replace(CONFIG, w_format=0.25)
    table = [  # well formed, right, credit by distance -> med-rlvr, acc-format, fuzzy
        ((True, 1.0, 1.0), (1.0, 1.25, 1.25)),
        ((True, 0.0, 0.5), (0.0, 0.25, 0.75)),
        ((True, 0.6, 0.6), (0.6, 0.85, 0.85)),  # boxes: their mean IoU
        ((False, 1.0, 1.0), (-1.0, 1.0, 1.0)),
        ((False, 0.0, 0.5), (-1.0, 0.0, 0.5)),
    ]
    names = ("med-rlvr", "acc-format", "fuzzy")
    for facts, expected in table:
        found = [rewards.REWARDS[name](judged(*facts), config) for name in names]
        assert found == pytest.approx(expected)


def test_one_function_and_one_row_are_a_new_reward(monkeypatch):
    def says_red(verdict, config):
        return rewards.med_rlvr(verdict, config) + 0.5 * ("red" in verdict.parsed.think)

    monkeypatch.setitem(rewards.REWARDS, "says-red", says_red)
    config = replace(CONFIG, reward="says-red")
    cli.validate(config)
    totals = [grade(ITEM, think("B", words), config).total for words in ("a red toe", "a toe")]
    assert totals == [1.5, 1.0]


def test_an_unknown_reward_is_one_line_that_names_the_others():
    config = replace(CONFIG, reward="med-rlrv")
    with pytest.raises(UsageError, match="^--reward med-rlrv: choose from med-rlvr, acc-format"):
        cli.validate(config)
    with pytest.raises(UsageError, match="'med-rlrv': med-rlvr, acc-format, fuzzy$"):
        grade(ITEM, think("B"), config)


@pytest.mark.parametrize(
    "completion, total",
    [(think("B"), 1.5), ("<answer>B</answer>", 1.0), (think("A"), 0.5), ("nothing", 0.0)],
)
def test_form_alone_cannot_outrank_a_right_answer(completion, total):
    assert (
        grade(ITEM, completion, replace(CONFIG, reward="acc-format", w_format=0.5)).total == total
    )
    with pytest.raises(UsageError, match="--w-format"):
        cli.validate(replace(CONFIG, w_format=1.5))


def test_a_cut_completion_is_marked_and_its_right_answer_counts():
    result = grade(ITEM, think("B"), CONFIG, finished=False)
    assert result.parts["truncated"] == 1 and result.total == 1
    assert grade(ITEM, "<think> because", CONFIG, finished=False).total == -1


def test_rollouts_are_graded_in_place_by_the_grader_of_the_moment(monkeypatch):
    rollouts = [
        SimpleNamespace(item=ITEM, text=think(answer), finished=True, completion_ids=[0] * 95)
        for answer in "BA"
    ]
    rewards.grade_all(rollouts, replace(CONFIG, max_new=100, w_overlong=1.0))
    assert [rollout.reward for rollout in rollouts] == pytest.approx([0.25, -0.75])
    assert [rollout.correct for rollout in rollouts] == [True, False]
    assert [rollout.predicted for rollout in rollouts] == ["B", "A"]
    assert rollouts[0].parsed.think == "because" and rollouts[0].parts["accuracy"] == 1
    fixed = rewards.Grade(7.0, {}, parse(""), False, "")
    monkeypatch.setattr(rewards, "grade", lambda *args: fixed)
    rewards.grade_all(rollouts, CONFIG)
    assert [rollout.reward for rollout in rollouts] == [7.0, 7.0]


# ---------------------------------------------------------------------------- guards and stages
GOUT = Item("1", "choice", "What is it?", ("asthma", "gout", "acute gout"), "B")
WORDS = " ".join(["red"] * 40)
LEAKY = think("B", "it is gout")
OUTSIDE = f"{WORDS} {think('B', WORDS)}"


def test_guards_are_off_by_default():
    assert grade(GOUT, LEAKY, CONFIG).total == grade(GOUT, OUTSIDE, CONFIG).total == 1
    assert not any(getattr(CONFIG, f"w_{name}") for name in rewards.GUARDS)


@pytest.mark.parametrize(
    "changes, leaky, outside",
    [
        (dict(w_leak=0.5), 0.5, 1),
        (dict(w_before=1.0), 1, 0),
        (dict(w_short=1.0, min_think=30), 1 - 27 / 30, 1),  # 3 words of 30
        (dict(w_leak=0.5, w_short=1.0, min_think=30), 0.5 - 27 / 30, 1),
    ],
)
def test_guards_by_hand(changes, leaky, outside):
    config = replace(CONFIG, **changes)
    found = grade(GOUT, LEAKY, config)
    assert found.total == pytest.approx(leaky) and found.parts["leak"] == 1
    assert grade(GOUT, OUTSIDE, config).total == outside


def test_words_before_an_answer_without_a_think_block_moved_out_of_none():
    for style in ("think", "direct"):
        found = grade(GOUT, f"{WORDS} <answer>B</answer>", replace(CONFIG, style=style))
        assert found.parts["before"] == 0


def test_overlong_penalty_by_hand():
    """DAPO, section 3.4, of 100 tokens: it rises from 0 at 80 to 1 at 100."""
    config = replace(CONFIG, w_overlong=1.0, max_new=100)
    totals = [grade(ITEM, think("B"), config, n_tokens=n).total for n in (10, 80, 90, 100)]
    assert totals == pytest.approx([1, 1, 0.5, 0])
    # Their own numbers: 20,480 tokens, of which the last 4,096 cost.
    assert rewards.overlong(20_480 - 4_096, 20_480) == 0
    assert rewards.overlong(20_480 - 1_024, 20_480) == pytest.approx(0.75)


STAGED = [  # completion, tokens, the stage's place in the paper's order
    ("gout", 1, 0),
    ("<think>x</think>", 5, 0),
    (think("B", WORDS), 300, 1),
    (think("B", f"{WORDS} gout"), 300, 1),
    (think("B", "a red toe and high urate"), 20, 2),
    (think("B", "not asthma"), 20, 2),
    (LEAKY, 20, 3),
    (think("B", "The answer is (B)"), 20, 3),
    (think("gout", "b"), 20, 3),
    (f"{WORDS} {think('B', 'so')}", 60, 4),
    (f"{WORDS} {think('B', 'gout')}", 60, 4),
    (think("B", WORDS), 60, 5),
    (f"Well: {think('B', f'{WORDS} gout')}", 60, 5),
]


@pytest.mark.parametrize("completion, n_tokens, number", STAGED)
def test_stages(completion, n_tokens, number):
    assert stage(parse(completion), GOUT, n_tokens) == rewards.STAGES[number]


def test_a_data_set_has_thresholds_of_its_own():
    """The demo's: short below 4 words, verbose above 26 tokens, outside above 3 words."""
    item = replace(data.load("demo", "test")[0], options=("5-mg", "10-mg"), answer="B")
    shown = (
        ("likely 10-mg", "", 10, 3),
        ("day-1 low 2", "", 10, 2),
        ("day-1 low 2 so 10-mg", "", 27, 1),
        ("day-1 low 2 so 10-mg", "", 26, 5),  # names the answer, after its steps
        ("day-1 low 2 so 10-mg", "one two three ", 26, 5),
        ("likely 10-mg", "day-1 low 2 so ", 20, 4),
    )
    for reasoning, before, n_tokens, number in shown:
        completion = before + think("B", reasoning)
        assert stage(parse(completion), item, n_tokens) == rewards.STAGES[number]
    # The guards see the same thresholds.
    assert grade(item, think("B", "likely 10-mg"), replace(CONFIG, w_leak=0.5)).total == 0.5
    assert grade(item, think("B", "day-1 low 2 so 10-mg"), replace(CONFIG, w_leak=0.5)).total == 1


def test_stage_names_in_the_papers_order():
    first = ("format failure", "verbose formatter", "concise structurer")
    last = ("direct answer hacker", "step-by-step exploit", "reintegrated reasoning")
    assert rewards.STAGES == first + last


# ---------------------------------------------------------------------------------- hostile text
PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "A", "B", "(B)", "**", "\\boxed{", "}"),
    *("Plasma cells", "T lymphocytes", " ", "\n", ":", ".", "-", "or", "not", "<", ">", "%"),
    *("5", "\u202e", "\x00", "𝐁", "Ｂ", "ß", "'", '"'),
]
COMPLETIONS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=25).map("".join)


@settings(max_examples=1500, deadline=None)
@given(COMPLETIONS)
@example("<think>x</think><answer>" + "**" * 40 + "</answer>")
@example("<think>x</think><answer>\\boxed{\\boxed{\\boxed{}}}</answer>")
def test_generated_hacks_never_score_without_the_answer(completion):
    result = grade(ITEM, completion, CONFIG)
    assert result.total in (-1.0, 0.0, 1.0)
    if result.total > 0 or result.correct:
        opened = completion.rfind("<answer>", 0, completion.rfind("</answer>"))
        core = completion[opened + len("<answer>") :].split("</answer>")[0]
        left = "".join(filter(str.isalnum, core)).lower()
        for word in ("text", "boxed", "mathrm", "textbf", "mathbf"):
            left = left.replace(word, "")
        # Nothing else was in the one place that counts.
        assert left in ("b", "plasmacells", "bplasmacells")


@settings(max_examples=500, deadline=None)
@given(COMPLETIONS)
def test_parts_are_shares_and_the_form_is_one_of_two(completion):
    on = dict(w_leak=0.5, w_before=0.5, w_short=0.5, w_overlong=0.5, recite=0.5)
    result = grade(ITEM, completion, replace(CONFIG, **on), n_tokens=500)
    assert math.isfinite(result.total)
    assert all(0 <= part <= 1 for part in result.parts.values())
    assert result.parts["format"] + result.parts["malformed"] == 1


MEGABYTES = [
    "<answer>" * 120_000,
    "</answer>" * 100_000,
    "<think>" * 70_000 + "</think>" * 70_000,
    "<answer>" + "*" * 1_000_000 + "</answer>",
    "<answer>" + "\\boxed{" * 140_000 + "</answer>",
    "<answer>" + "(" * 1_000_000 + "B</answer>",
    "<think>" + " " * 1_000_000,
]


@pytest.mark.parametrize("completion", MEGABYTES, ids=lambda completion: completion[:20])
@pytest.mark.parametrize("strict", [False, True])
def test_a_megabyte_is_graded_in_a_second(completion, strict):
    start = time.perf_counter()
    assert grade(ITEM, completion, replace(CONFIG, strict=strict)).total == -1
    assert time.perf_counter() - start < 1
