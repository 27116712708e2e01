"""Texts in one form."""

import doctest

from support import text


def test_doctests():
    failed, tried = doctest.testmod(text)
    assert tried >= 4 and failed == 0


def test_what_may_be_the_whole_difference_between_two_answers_stays():
    for answer in ("-1", "+1", "5 %", "<5", ">5", "10", "1.5", "A", "α"):
        assert (
            text.normal(f" **{answer}**. ") == answer and text.folded(answer) == answer.casefold()
        )


def test_wrappers_are_peeled_off_layer_by_layer_and_never_to_nothing():
    assert text.normal(r"**$\boxed{\text{B}}$**.") == "B"
    assert text.normal("_") == "_" and text.normal("``") == "``" and text.normal("") == ""


def test_hyphens_inside_words_only():
    assert text.folded("CIN-1") == text.folded("cin_1") == text.folded("CIN 1") == "cin 1"
    assert text.folded("basal\u2010cell") == text.folded("basal\u2011cell") == "basal cell"
    assert text.folded("-1") == "-1" and text.folded("a - b") == "a - b"
