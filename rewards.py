"""The verifiable reward: from the text of one completion to a number, and to the stage of training it belongs to.

Read it with Med-RLVR (arXiv 2502.19655), section 3 (malformed -1, wrong 0, right +1) and section 4.2.1 (six stages of training).
It is the only grader: training, evaluation and the baselines all call `grade`, which sees the completion and never the prompt.
Whatever a policy can write it will some day write, so an answer is matched whole, never by substring, and in time linear in its length.
"""
import re
import unicodedata
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


# ------------------------------------------------------------------------------------------------ text -> parts
@dataclass(frozen=True)
class Parsed:
    before: str             # text in front of <think>
    think: str              # inside the first think block
    answer: str | None      # inside the last complete answer block; None where there is none
    after: str              # text behind that block
    well_formed: bool       # one non-empty think block, then one non-empty answer block; text around them is tolerated


def parse(text: str) -> Parsed:
    """Split a completion at its tags.

    `well_formed` is a search, not a full match: the paper's stage 5 (reasoning moved in front of <think>) earned reward, so its
    validator must have let such text pass. `is_strict` is the other reading. That both blocks must be non-empty is our choice.

    >>> parse("Hm. <think> red eye </think> <answer> B </answer>")
    Parsed(before='Hm.', think='red eye', answer='B', after='', well_formed=True)
    >>> parse("<answer>A</answer> no: <answer>B</answer>").answer, parse("<answer>A").answer      # the last complete one
    ('B', None)
    """
    think_open = text.find("<think>")
    think_close = text.find("</think>", max(think_open, 0))
    last_close = text.rfind("</answer>")
    answer_open = text.rfind("<answer>", 0, last_close) if last_close >= 0 else -1
    answer_close = text.find("</answer>", answer_open) if answer_open >= 0 else -1

    think = text[think_open + len("<think>"):think_close].strip() if 0 <= think_open < think_close else ""
    answer = text[answer_open + len("<answer>"):answer_close].strip() if answer_open >= 0 else None
    first_block = think_open if think_open >= 0 else answer_open
    before = text[:first_block].strip() if first_block >= 0 else text.strip()
    after = text[answer_close + len("</answer>"):].strip() if answer_open >= 0 else ""
    well_formed = (all(text.count(tag) == 1 for tag in TAGS) and think_open < think_close < answer_open < answer_close
                   and bool(think) and bool(answer))
    return Parsed(before, think, answer, after, well_formed)


def is_strict(text: str) -> bool:
    """Well formed, and nothing but white space outside the two blocks."""
    text = text.strip()
    between = text[text.find("</think>") + len("</think>"):text.find("<answer>")]
    return parse(text).well_formed and text.startswith("<think>") and text.endswith("</answer>") and not between.strip()


# ------------------------------------------------------------------------------------------- answer -> option
_WRAPPERS = [("**", "**"), ("*", "*"), ("__", "__"), ("_", "_"), ("`", "`"), ("$", "$"), ('"', '"'), ("'", "'"), ("“", "”"),
             (r"\boxed{", "}"), (r"\text{", "}"), (r"\textbf{", "}"), (r"\mathrm{", "}"), (r"\mathbf{", "}"), (r"\(", r"\)")]
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\]][.:,]?|[.:,]|\s[-–—]\s)\s*(.+)")


def normal(text: str) -> str:
    """White space folded, markdown and LaTeX wrappers and a final full stop removed; digits, signs, %, < and > stay.

    >>> normal(r" $\\boxed{\\text{B}}$ "), normal("**Heparin,  low dose.**"), normal("-5 %"), normal("<5")
    ('B', 'Heparin, low dose', '-5 %', '<5')
    """
    text = unicodedata.normalize("NFC", " ".join(text.split())).replace("**", "")
    while True:
        peeled = text.strip().removesuffix(".")
        for left, right in _WRAPPERS:
            if len(peeled) > len(left) + len(right) and peeled.startswith(left) and peeled.endswith(right):
                peeled = peeled[len(left):-len(right)]
        if peeled == text:
            return text
        text = peeled


def match_option(answer: str | None, options: tuple[str, ...]) -> str:
    """The letters that an answer names: one, more where options are alike (either is right then), "" where it names none.

    In this order: the exact text of an option; a lone letter; a letter, a separator and exactly that option's text.

    >>> options = ("Pneumonia", "D cells", "Small region")
    >>> [match_option(a, options) for a in ("d cells", "(C)", "B.", "A: pneumonia", r"\\boxed{B}")]
    ['B', 'C', 'B', 'A', 'B']
    >>> [match_option(a, options) for a in ("a small region", "A: D cells", "D", "A B C", "pneumonia or not", "")]
    ['', '', '', '', '', '']
    """
    if not answer or len(answer) > 200 + 2 * max(map(len, options), default=0):
        return ""                                               # far longer than every option: none of them, whatever it holds
    answer, texts = normal(answer), [normal(option) for option in options]
    for fold in (str, str.casefold):                            # "AA" and "Aa" are two genotypes: exact case first
        alike = [letter for letter, text in zip(LETTERS, texts) if fold(text) == fold(answer)]
        if alike:                                               # several only where they read the same: "aa" is neither "AA" nor "Aa"
            return "".join(alike) if len({texts[LETTERS.index(letter)] for letter in alike}) == 1 else ""
    letters = LETTERS[:len(options)]
    lone = _LETTER.fullmatch(answer)
    if lone and lone[1].upper() in letters:
        return lone[1].upper()
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both and both[1].upper() in letters:
        named = texts[letters.index(both[1].upper())]
        if normal(both[2]).casefold() == named.casefold():
            return both[1].upper()
    return ""


# ----------------------------------------------------------------------------------------------------- stages
STAGES = ("format failure", "verbose formatter", "concise structurer", "direct answer hacker", "step-by-step exploit", "reintegrated reasoning")
BEFORE_WORDS = 15           # more words than this in front of <think> is reasoning moved out (threshold of arXiv 2509.15557's notebook)
SHORT_WORDS = 30            # a think block below this is "drastically short"; our choice, the paper gives no numbers
VERBOSE_TOKENS = 256        # a completion above this is "needlessly long"; our choice


def gives_away(parsed: Parsed, item) -> bool:
    """The think block is short and already names the answer that follows: its option's text, or "answer is B" / a lone letter at its end."""
    words = parsed.think.split()
    if len(words) >= SHORT_WORDS or len(parsed.think) > 100 * SHORT_WORDS or not parsed.answer:
        return False
    think = normal(" ".join(words)).casefold()
    for letter in match_option(parsed.answer, item.options):
        text = normal(item.options[LETTERS.index(letter)]).casefold()
        if f" {text} " in f" {think} " or re.search(rf"(?:^|\b(?:answer|option|choice|is)\s*:?\s*)\(?{letter.lower()}\)?$", think):
            return True
    return False


def stage(parsed: Parsed, item, n_tokens: int) -> str:
    """Which of Med-RLVR's six stages (section 4.2.1) a completion looks like. The paper names them in words only; rules and thresholds are our choice.

    format failure          not well formed: short outputs that miss the format
    step-by-step exploit    well formed, but the step-by-step text stands in front of <think>: that earned reward all the same
    direct answer hacker    a think block of under 30 words that gives the answer away: thinking has shrunk to the answer
    verbose formatter       well formed and longer than 256 tokens: the format is followed, needlessly long
    concise structurer      well formed, under 30 words of thinking that do not give the answer away: concise reasoning
    reintegrated reasoning  the rest: 30 words or more inside <think>, not verbose: reasoning is back where it belongs
    The rules are asked in this order. From one completion, stages 3 and 6 differ in length only; the paper tells them apart by what came before.

    >>> from types import SimpleNamespace as Item
    >>> item = Item(options=("asthma", "gout"))
    >>> stage(parse("<think> it is gout </think> <answer> B </answer>"), item, 9)
    'direct answer hacker'
    >>> stage(parse("<think> a swollen red toe and high urate </think> <answer> B </answer>"), item, 15)
    'concise structurer'
    """
    if not parsed.well_formed:
        return "format failure"
    if len(parsed.before.split()) > BEFORE_WORDS:
        return "step-by-step exploit"
    if gives_away(parsed, item):
        return "direct answer hacker"
    if n_tokens > VERBOSE_TOKENS:
        return "verbose formatter"
    return "concise structurer" if len(parsed.think.split()) < SHORT_WORDS else "reintegrated reasoning"


# ------------------------------------------------------------------------------------------------------ grade
@dataclass(frozen=True)
class Grade:
    total: float            # the reward: sum of weight * part over `weights(config)`, each part once
    parts: dict             # every part by name, those that carry no weight (`truncated`) too
    parsed: Parsed
    correct: bool           # names the gold option, whatever the form around it: what accuracy counts
    predicted: str          # the option letter named, "" where none is


def weights(config) -> dict[str, float]:
    """Which parts the reward is the weighted sum of. `config` is a train.Config."""
    if config.reward == "med-rlvr":                             # Med-RLVR, section 3
        chosen = {"accuracy": 1.0, "malformed": -1.0}
    elif config.reward == "acc-format":                         # Visual-RFT and kin: accuracy + format
        chosen = {"accuracy": 1.0, "format": config.w_format}
    else:
        raise ValueError(f"no reward named {config.reward!r}: med-rlvr, acc-format")
    guards = {"leak": -config.w_leak, "before": -config.w_before, "short": -config.w_short, "overlong": -config.w_overlong}
    return chosen | {name: weight for name, weight in guards.items() if weight}


def grade(item, text: str, config, finished: bool = True, n_tokens: int | None = None) -> Grade:
    """The reward of one completion of one item.

    parts, each in [0, 1]:  accuracy   the gold option is named (under med-rlvr: in a well-formed completion)
                            format     well formed (strict=True: and nothing outside the two blocks);  malformed = 1 - format
                            leak       the think block is very short and gives the answer away (stage 4; cf. arXiv 2509.15557's penalty on answer phrases)
                            before     more than 15 words stand in front of <think> (stage 5; the structural penalty of arXiv 2509.15557)
                            short      1 - words of reasoning / min_think: too little reasoning (an outlook of Med-RLVR)
                            truncated  cut at the token limit. No reward part: a complete right answer before the cut counts.
                            overlong   DAPO's soft penalty (arXiv 2503.14476, section 3.4): 0 until overlong_share of max_new is left, then rising to 1
    The direct and chain-of-thought prompts ask for no think block: there, one answer block is the form.
    """
    parsed = parse(text)
    if config.style != "think":
        formed = bool(parsed.answer) and text.count("<answer>") == text.count("</answer>") == 1
    else:
        formed = is_strict(text) if config.strict else parsed.well_formed
    named = match_option(parsed.answer, item.options)
    correct = bool(item.answer) and item.answer in named
    counts = correct and (formed or config.reward != "med-rlvr")
    buffer = config.overlong_share * config.max_new                           # DAPO: the last 4,096 of 20,480 tokens
    parts = {"accuracy": float(counts), "format": float(formed), "malformed": float(not formed), "truncated": float(not finished),
             "leak": float(formed and gives_away(parsed, item)), "before": float(len(parsed.before.split()) > BEFORE_WORDS and bool(parsed.think)),
             "short": max(0.0, 1 - len(parsed.think.split()) / config.min_think) if config.min_think else 0.0,
             "overlong": min(max(((n_tokens or 0) - config.max_new + buffer) / buffer, 0.0), 1.0) if buffer else 0.0}
    total = sum(weight * parts[name] for name, weight in weights(config).items())
    return Grade(total, parts, parsed, correct, item.answer if correct else named[:1])


if __name__ == "__main__":
    import doctest
    failed, tried = doctest.testmod()
    print(f"rewards.py: {tried - failed} of {tried} doctest lines hold")
    raise SystemExit(bool(failed))
