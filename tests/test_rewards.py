"""The grader: what counts, and what must never count."""
import doctest
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import rewards
import train
from data import Item
from rewards import grade, is_strict, match_option, parse

ITEM = Item("1", "choice", "Which cell makes antibodies?", ("T lymphocytes", "Plasma cells", "D cells", "<5% of cells", "A small region"), "B")
CONFIG = train.Config()


def think(answer: str) -> str:
    return f"<think> because </think> <answer>{answer}</answer>"


def test_doctests():
    failed, tried = doctest.testmod(rewards)
    assert tried >= 6 and not failed


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "**B**", "B.", "B)", "[B]", "\nB\n", r"\boxed{B}", r"\boxed{\text{B}}", r"$\boxed{B}$", "B: Plasma cells",
                                    "B. plasma   cells", "(B) Plasma cells.", "**B. Plasma cells**", "B - Plasma cells", "Plasma cells", "plasma\ncells", '"Plasma cells"'])
def test_right_answers(answer):
    result = grade(ITEM, think(answer), CONFIG)
    assert result.total == 1 and result.correct and result.predicted == "B"


@pytest.mark.parametrize("answer", ["", " ", "A B C D E", "A, B", "B or C", "BB", "plasma", "Plasma cells or T lymphocytes", "B: T lymphocytes", "A: Plasma cells",
                                    "a plasma cell", "I think B", "Answer seems B", "the answer is B", "F", "not B", "B B", "*", "ABCDE", "B: ", "A small", "1", "B7"])
def test_hacks_score_nothing(answer):
    result = grade(ITEM, think(answer), CONFIG)
    assert result.total <= 0 and not result.correct and result.parts["accuracy"] == 0


def test_options_that_look_like_letters():
    assert match_option("D cells", ITEM.options) == "C" and match_option("D", ITEM.options) == "D"
    assert match_option("a small region", ITEM.options) == "E" and match_option("A", ITEM.options) == "A"
    assert match_option("a fracture", ("fracture", "sprain")) == "" and match_option("A: fracture", ("fracture", "sprain")) == "A"
    assert match_option("Aa", ("AA", "Aa", "aa")) == "B" and match_option("I", ITEM.options) == ""


def test_a_lone_option_letter_goes_before_option_text():
    """The prompt asks for a letter: of blood groups, `B` is the third option's text and the second
    option's letter, and means the letter."""
    groups = ("O", "A", "B", "AB")
    for written in ("B", "b", "(B)", "B.", "**B**"):
        assert match_option(written, groups) == "B"
    assert match_option("A", groups) == "A" and match_option("C", groups) == "C"
    assert match_option("O", groups) == "A" and match_option("AB", groups) == "D"  # no option letters
    assert match_option("B: A", groups) == "B" and match_option("B: B", groups) == ""
    item = replace(ITEM, options=groups, answer="B")
    assert grade(item, think("B"), CONFIG).total == 1 and grade(item, think("A"), CONFIG).total == 0
    assert grade(item, data.completion(item), CONFIG).total == 1


@pytest.mark.parametrize("one, other", [("5", "-5"), ("<5", ">5"), ("5%", "5"), ("10", "10²"), ("+1", "1"), ("1.5", "15"), ("<5% of cells", "5% of cells")])
def test_normalisation_keeps_signs_and_digits(one, other):
    assert match_option(one, (one, other)) == "A" and match_option(other, (one, other)) == "B"
    assert match_option(f"A: {other}", (one, other)) == "" and match_option(f"B.{other}", (one, other)) == "B"


def test_dash_without_spaces_is_a_sign():
    assert match_option("A-5", ("5", "7")) == "" and match_option("A - 5", ("5", "7")) == "A"


def test_alike_options_are_both_right():
    item = replace(ITEM, options=("Heparin", "Warfarin", "Heparin"), answer="C")
    assert match_option("heparin.", item.options) == "AC" and match_option("aa", ("AA", "Aa", "BB")) == ""
    assert grade(item, think("HEPARIN"), CONFIG).correct
    assert not grade(item, think("A"), CONFIG).correct                        # the letter names one of them, and the wrong one


@pytest.mark.parametrize("text, well_formed, strict", [
    ("<think>x</think><answer>B</answer>", True, True), ("  <think>x</think>\n\n<answer>B</answer>\n", True, True),
    ("Let me see. <think>x</think><answer>B</answer>", True, False), ("<think>x</think><answer>B</answer> done", True, False),
    ("<think>x</think> so <answer>B</answer>", True, False), ("<think></think><answer>B</answer>", False, False), ("<think>x</think><answer> </answer>", False, False),
    ("<answer>B</answer><think>x</think>", False, False), ("<think>x</think><answer>B</answer><answer>B</answer>", False, False),
    ("<think>x</think><think>y</think><answer>B</answer>", False, False), ("<think>x<answer>B</answer></think>", False, False),
    ("<think>x</think><answer>B", False, False), ("B", False, False), ("", False, False)])
def test_form(text, well_formed, strict):
    assert parse(text).well_formed is well_formed and is_strict(text) is strict
    assert grade(ITEM, text, CONFIG).total == (1 if well_formed else -1)
    assert grade(ITEM, text, replace(CONFIG, strict=True)).total == (1 if strict else -1)


@pytest.mark.parametrize("nothing", [".", "...", "\u200b", "\u2060 \ufeff", "-", "\n*\n", "<>"])
def test_a_think_block_without_a_letter_or_digit_is_empty(nothing):
    text = f"<think>{nothing}</think><answer>B</answer>"
    assert not parse(text).well_formed and grade(ITEM, text, CONFIG).total == -1


@pytest.mark.parametrize("something", ["x", "7", "é", "红", "²", ". x"])
def test_a_letter_or_digit_of_any_script_is_thinking(something):
    assert parse(f"<think>{something}</think><answer>B</answer>").well_formed


@pytest.mark.parametrize("nothing", [".", "...", "\u200b", "**", "\u2060"])
def test_an_answer_of_marks_is_empty_in_every_style(nothing):
    assert grade(ITEM, think(nothing), CONFIG).total == -1
    for style in ("direct", "cot"):
        config = replace(CONFIG, style=style)
        assert grade(ITEM, f"<answer>{nothing}</answer>", config).total == -1


@pytest.mark.parametrize("answer", ["-1", "<5", "[[1, 2, 3, 4]]", "[]", "++", "-", "五"])
def test_short_answers_that_are_none_of_the_options_keep_their_form(answer):
    assert parse(think(answer)).well_formed and grade(ITEM, think(answer), CONFIG).total == 0


def test_the_last_complete_answer_counts():
    assert parse("<answer>A</answer> <answer>B</answer> <answer>C").answer == "B"
    assert parse("<answer>A <answer>B</answer>").answer == "B" and parse("<answer>A</answer></answer>").answer == "A"
    assert parse("<answer>A</answer>").think == "" and parse("</answer><answer>").answer is None


def test_parts_sum_once_and_format_cannot_outrank_accuracy():
    config = replace(CONFIG, reward="acc-format", w_format=.5)
    for text, total in ((think("B"), 1.5), ("<answer>B</answer>", 1.0), (think("A"), .5), ("nothing", 0.0)):
        result = grade(ITEM, text, config)
        assert result.total == total == sum(w * result.parts[name] for name, w in rewards.weights(config).items())
    with pytest.raises(train.UsageError):
        train.validate(replace(CONFIG, w_format=1.5))


def test_a_cut_completion_is_marked_and_its_right_answer_counts():
    result = grade(ITEM, think("B"), CONFIG, finished=False)
    assert result.parts["truncated"] == 1 and result.total == 1
    assert grade(ITEM, "<think> because", CONFIG, finished=False).total == -1


def test_overlong_penalty_by_hand():
    config = replace(CONFIG, w_overlong=1.0, max_new=100, overlong_share=.2)                      # from 80 to 100 tokens
    assert [round(grade(ITEM, think("B"), config, n_tokens=n).total, 3) for n in (10, 80, 90, 100)] == [1, 1, .5, 0]


def test_direct_style_needs_one_answer_block():
    direct = replace(CONFIG, style="direct")
    assert grade(ITEM, "<answer>B</answer>", direct).total == 1 and grade(ITEM, "<answer>B</answer><answer>B</answer>", direct).total == -1


PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "A", "B", "(B)", "**", "\\boxed{", "}", "Plasma cells", "T lymphocytes", " ", "\n", ":", ".", "-",
                          "or", "not", "<", ">", "%", "5", "\u202e", "\x00", "𝐁", "Ｂ", "ß", "'", '"'])


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=25).map("".join))
@example("<think>x</think><answer>" + "**" * 40 + "</answer>")
@example("<think>x</think><answer>\\boxed{\\boxed{\\boxed{}}}</answer>")
def test_generated_hacks_never_score_without_the_answer(text):
    result = grade(ITEM, text, CONFIG)
    assert result.total in (-1.0, 0.0, 1.0)
    if result.total > 0 or result.correct:
        core = text[text.rfind("<answer>", 0, text.rfind("</answer>")) + 8:].split("</answer>")[0]
        left = "".join(c for c in core if c.isalnum()).lower()
        for word in ("text", "boxed", "mathrm", "textbf", "mathbf"):
            left = left.replace(word, "")
        assert left in ("b", "plasmacells", "bplasmacells")                    # nothing else was in the one place that counts


@pytest.mark.parametrize("text", ["<answer>" * 120_000, "<think>" * 70_000 + "</think>" * 70_000, "<answer>" + "*" * 1_000_000 + "</answer>", "</answer>" * 100_000,
                                  "<answer>" + "\\boxed{" * 140_000 + "</answer>", "<answer>" + "(" * 1_000_000 + "B</answer>", "<think>" + " " * 1_000_000])
def test_a_megabyte_is_graded_in_a_second(text):
    start = time.perf_counter()
    assert grade(ITEM, text, CONFIG).total == -1
    assert time.perf_counter() - start < 1
