"""Text brought to one form, so that two spellings of the same answer compare as equal.

Both sides of a comparison come here: the grader reads a model's answer in this form, and the check
of your own labels refuses names that the grader could not tell apart.
"""

import re
import unicodedata

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the options of a question
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Found in a text that says something: a letter or a digit of any script. Marks and characters
# without a width alone say nothing. An answer may also be no boxes, [], or the grade ++.
WORDS = re.compile(r"[^\W_]")
ANSWER = re.compile(r"[^\W_]|[\[\]+-]")

_WRAPPERS = [
    *[(mark, mark) for mark in ("**", "*", "__", "_", "`", "$", '"', "'")],
    ("“", "”"),
    (r"\boxed{", "}"),
    (r"\text{", "}"),
    (r"\textbf{", "}"),
    (r"\mathrm{", "}"),
    (r"\mathbf{", "}"),
    (r"\(", r"\)"),
]
_JOINER = re.compile(
    r"(?<=[^\W_])[-_\u2010\u2011]+(?=[^\W_])"
)  # inside a word: "-1" keeps its sign


def flat(text: str) -> str:
    """White space and case folded, nothing else: for texts that are compared as wholes.

    >>> flat(" Which  of these\\nis TRUE? ")
    'which of these is true?'
    """
    return " ".join(text.split()).casefold()


def normal(text: str) -> str:
    """White space folded, markdown and LaTeX wrappers and a final full stop removed.

    Digits, signs, %, < and > stay, since answers may differ in nothing else.

    >>> normal(r" $\\boxed{\\text{B}}$ "), normal("**Heparin,  low dose.**")
    ('B', 'Heparin, low dose')
    >>> normal("-5 %"), normal("<5")
    ('-5 %', '<5')
    """
    text = unicodedata.normalize("NFC", " ".join(text.split())).replace("**", "")
    while True:
        peeled = text.strip().removesuffix(".")
        for left, right in _WRAPPERS:
            wrapped = peeled.startswith(left) and peeled.endswith(right)
            if wrapped and len(peeled) > len(left) + len(right):
                peeled = peeled[len(left) : -len(right)]
        if peeled == text:
            return text
        text = peeled


def folded(text: str) -> str:
    """`normal`, case folded, with hyphens and underscores inside words as spaces.

    Models write the label "basal cell carcinoma" in such ways too.

    >>> folded("**Basal-cell_carcinoma.**"), folded("-1")
    ('basal cell carcinoma', '-1')
    """
    return _JOINER.sub(" ", normal(text)).casefold()
