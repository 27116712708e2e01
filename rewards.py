"""The verifiable reward: from the text of a completion to a number, and to its stage of training.

Read it with Med-RLVR (arXiv 2502.19655), sections 3 and 4.2.1, and VRFT-Aug (arXiv 2602.10619).
`grade` is the only grader, for training, evaluation and baselines alike. It never sees the prompt.
Whatever a policy can write it will some day write. So an answer is matched as a whole, never by
substring, and in time linear in its length.
"""

import doctest
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from data import Item, to_image
from support.bleu import bleu
from support.boxes import box_score, iou, read_boxes  # noqa: F401 (iou is for others)
from support.config import Config
from support.errors import UsageError
from support.text import ANSWER, LETTERS, TAGS, WORDS, folded, normal


# ------------------------------------------------------------------------------ text -> parts
@dataclass(frozen=True)
class Parsed:
    before: str  # text in front of the first block
    think: str  # inside the first think block
    answer: str | None  # inside the last complete answer block; None if there is none
    after: str  # text behind that block
    well_formed: bool  # one non-empty think block, then one non-empty answer block


TAG = re.compile("|".join(TAGS))


def parse(text: str) -> Parsed:
    """Split a completion at its tags.

    Text around the blocks is well formed too: in the paper's stage 5, reasoning in front of <think>
    earned reward, so its validator let such text pass. That the blocks must not be empty is our
    choice.

    >>> parse("Hm. <think> red eye </think> <answer> B </answer>")
    Parsed(before='Hm.', think='red eye', answer='B', after='', well_formed=True)
    >>> parse("<answer>A</answer> no: <answer>B</answer>").answer, parse("<answer>A").answer
    ('B', None)
    """
    before, think_opened, rest = text.partition("<think>")
    think, think_closed, _ = rest.partition("</think>")
    think = think.strip() if think_closed else ""

    ahead, answer_opened, _ = text.rpartition("</answer>")[0].rpartition("<answer>")
    answer, after = None, ""
    if answer_opened:
        answer, _, after = text[len(ahead) + len(answer_opened) :].partition("</answer>")
        answer = answer.strip()
        if not think_opened:
            before = ahead

    in_order = TAG.findall(text) == list(TAGS)  # each tag once
    well_formed = in_order and WORDS.search(think) and ANSWER.search(answer)
    return Parsed(before.strip(), think, answer, after.strip(), bool(well_formed))


def has_form(text: str, parsed: Parsed, config: Config) -> bool:
    """Whether a completion has the form that its prompt asks for.

    With `strict`, nothing may stand outside the two blocks. The direct and the chain-of-thought
    prompt ask for no think block: there, one answer block is the form.
    """
    if config.style != "think":
        blocks = [tag for tag in TAG.findall(text) if tag in ("<answer>", "</answer>")]
        return len(blocks) == 2 and bool(ANSWER.search(parsed.answer or ""))
    if config.strict:
        outside = TAG.split(text)[::2]  # before, between and after the two blocks
        return parsed.well_formed and not "".join(outside).strip()
    return parsed.well_formed


# ------------------------------------------------------------------- answer -> what it names
LONE_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\]][.:,]?|[.:,]|\s[-–—]\s)\s*(.+)")


def match_option(answer: str, options: tuple[str, ...]) -> str:
    """The letter that an answer names, or "": several if options are alike, any of them is right.

    In this order: a lone letter that is an option's, since the prompt asks for one; the exact text
    of an option; a letter, a separator and exactly that option's text.

    >>> options = ("Pneumonia", "D cells", "Small region")
    >>> [match_option(a, options) for a in ("d cells", "(C)", "B.", "A: pneumonia", r"\\boxed{B}")]
    ['B', 'C', 'B', 'A', 'B']
    >>> [match_option(a, options) for a in ("a small region", "A: D cells", "D", "A B C", "")]
    ['', '', '', '', '']
    >>> [match_option(a, ("O", "A", "B", "AB")) for a in ("A", "B", "O")]
    ['A', 'B', 'A']
    """
    answer = normal(answer)
    texts = {letter: normal(option) for letter, option in zip(LETTERS, options)}

    lone = LONE_LETTER.fullmatch(answer)
    if lone and lone[1].upper() in texts:
        return lone[1].upper()

    for fold in (str, str.casefold):  # "AA" and "Aa" are two genotypes: exact case first
        alike = [letter for letter, text in texts.items() if fold(text) == fold(answer)]
        if alike:  # "aa" names neither "AA" nor "Aa"
            same_text = len({texts[letter] for letter in alike}) == 1
            return "".join(alike) if same_text else ""

    both = LETTER_AND_TEXT.fullmatch(answer)
    letter = both[1].upper() if both else ""
    if letter in texts and normal(both[2]).casefold() == texts[letter].casefold():
        return letter
    return ""


def label_form(text: str, task: str) -> str:
    """A class or a grade as it is compared: the answer "Grade 2" means the grade "2"."""
    text = folded(text)
    return text.removeprefix("grade ") if task == "grade" else text


def named(item, answer: str | None) -> tuple[str, ...]:
    """What an answer names: letters of a "choice", else one class or grade, or nothing at all.

    A class is named by its whole name only. (Visual-RFT's substring test pays the answer "a", and
    a list of all classes.) Boxes have no names.

    >>> item = Item("1", "classify", "Which is it?", ("melanoma", "nevus"), "nevus")
    >>> [named(item, a) for a in ("Melanoma.", "nevus", "no nevus", "melanoma, nevus", "n")]
    [('melanoma',), ('nevus',), (), (), ()]
    """
    # Empty, or far longer than every option: it names none of them, whatever it holds.
    longest = max(map(len, item.options), default=0)
    if item.task == "localize" or not answer or len(answer) > 200 + 2 * longest:
        return ()
    if item.task == "choice":
        return tuple(match_option(answer, item.options))
    said = label_form(answer, item.task)
    names = tuple(name for name in item.options if label_form(name, item.task) == said)
    return names if len(names) == 1 else ()


# ------------------------------------------------------------- credit for a grade nearly right
# By distance 0, 1, 2. Two grades off, VRFT-Aug gives 1/10 in one place and 0.0625 in another, as
# a public review says. One grade off is not public; both values, and 4^-d, are our choice.
# Under/over the gold grade, our choice too: to miss a disease costs more than to overcall it.
FUZZY = {"tenth": "1,0.5,0.1", "sixteenth": "1,0.25,0.0625", "asymmetric": "1,0.25,0/1,0.5,0.1"}


def fuzzy_tables(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The credits by distance of a grade (below, above) the gold one.

    text: a name of FUZZY, one list such as "1,0.5,0.1", or "under/over"; "1" is the plain reward.
    Raises ValueError, in one line, if it is none of these.

    >>> fuzzy_tables("1"), fuzzy_tables("1,0.25/1,0.5,0.1")
    (((1.0,), (1.0,)), ((1.0, 0.25), (1.0, 0.5, 0.1)))
    """
    sides = FUZZY.get(text, text).split("/")
    try:
        tables = [tuple(map(float, side.split(","))) for side in sides]
    except ValueError:
        tables = []
    first_1 = all(table[0] == 1 for table in tables)
    falling = all(near >= far >= 0 for table in tables for near, far in pairwise(table))
    if len(tables) not in (1, 2) or not first_1 or not falling:
        raise ValueError(
            f"fuzzy {text!r}: expected {', '.join(FUZZY)}, or the credits at distance 0, 1, 2, ... "
            "such as 1,0.5,0.1 (first 1, never rising, none below 0), or two such lists, under/over"
        )
    return tables[0], tables[-1]


def fuzzy(predicted: int, gold: int, table: Sequence[float]) -> float:
    """table[|predicted - gold|], and 0 beyond it: VRFT-Aug's multi-grade fuzzy reward.

    >>> fuzzy(3, 1, (1, .5, .1)), fuzzy(4, 1, (1, .5, .1))
    (0.1, 0.0)
    """
    distance = abs(predicted - gold)
    return float(table[distance]) if distance < len(table) else 0.0


# ----------------------------------------------------------------------- the papers' rewards
@dataclass(frozen=True)
class Verdict:
    """A completion, judged: what a reward is made of."""

    parsed: Parsed
    well_formed: bool  # in the form that its prompt asks for
    right: float  # 1 or 0; of boxes, their mean IoU
    credit: float  # the same, but for a grade its credit by distance
    predicted: str | tuple  # as in Grade


def med_rlvr(verdict: Verdict, config: Config) -> float:
    """Med-RLVR, section 3: malformed -1, wrong 0, right +1."""
    if not verdict.well_formed:
        return -1.0
    return verdict.right


def accuracy_format(verdict: Verdict, config: Config) -> float:
    """Visual-RFT and kin: accuracy + w_format * format."""
    return verdict.right + config.w_format * verdict.well_formed


def fuzzy_grade(verdict: Verdict, config: Config) -> float:
    """VRFT-Aug: a grade earns credit by its distance from the gold one; + w_format * format."""
    return verdict.credit + config.w_format * verdict.well_formed


REWARDS = {"med-rlvr": med_rlvr, "acc-format": accuracy_format, "fuzzy": fuzzy_grade}
# Under these a malformed completion earns nothing else, however right its answer and reasoning.
FORM_FIRST = {"med-rlvr"}


def judge(item, text: str, config: Config) -> Verdict:
    """How right the answer of a completion is, whatever the form around it."""
    parsed = parse(text)
    well_formed = has_form(text, parsed, config)
    if item.task == "localize":
        found = [to_image(box, item.frame) for box in read_boxes(parsed.answer)]
        score = box_score(found, item.answer)
        rounded = tuple(tuple(round(value, 1) for value in box) for box in found)
        return Verdict(parsed, well_formed, score, score, rounded)

    names, gold = named(item, parsed.answer), str(item.answer)
    predicted = gold if gold in names else "".join(names[:1])
    right = credit = float(gold in names)
    if item.task == "grade" and predicted and gold in item.options:
        said, wanted = item.options.index(predicted), item.options.index(gold)
        below, above = fuzzy_tables(config.fuzzy)
        credit = fuzzy(said, wanted, above if said > wanted else below)
    return Verdict(parsed, well_formed, right, credit, predicted)


# ------------------------------------------------------- what is added: guards and recitation
ANNOUNCED = r"(?:^|\b(?:answer|option|choice|grade|is)\s*:?\s*)"  # as in "the answer is: B"
GUARDS = ("leak", "before", "short", "overlong")  # parts that cost config.w_leak, w_before, ...
OVERLONG_SHARE = 0.2  # of max_new. DAPO: the last 4,096 of 20,480 tokens


def leak(parsed: Parsed, item) -> bool:
    """The think block is under `item.limits.short` words and names the answer (stage 4).

    By the text of the option or class anywhere, or by a letter or number where the block ends:
    elsewhere these may mean something else. Cf. arXiv 2509.15557's penalty on answer phrases.
    """
    words, short = parsed.think.split(), item.limits.short
    if len(words) >= short or len(parsed.think) > 100 * short or not parsed.answer:
        return False
    think = folded(" ".join(words))
    for name in named(item, parsed.answer):
        text = folded(item.options[LETTERS.index(name)] if item.task == "choice" else name)
        is_number = item.task == "grade" and text.isdecimal()
        if f" {text} " in f" {think} " and not is_number:
            return True
        if re.search(rf"{ANNOUNCED}\(?{re.escape(folded(name))}\)?$", think):
            return True
    return False


def reasons_before(parsed: Parsed, item) -> bool:
    """More than `item.limits.before` words in front of <think> (stage 5).

    Cf. the structural penalty of arXiv 2509.15557.
    """
    return len(parsed.before.split()) > item.limits.before and parsed.think != ""


def too_short(parsed: Parsed, least: int) -> float:
    """1 - words of reasoning / least, not below 0: an outlook of Med-RLVR."""
    return max(0.0, 1 - len(parsed.think.split()) / least) if least else 0.0


def overlong(n_tokens: int, max_new: int) -> float:
    """DAPO's soft penalty (arXiv 2503.14476, section 3.4): 0, rising to 1 in the last fifth."""
    buffer = OVERLONG_SHARE * max_new
    return min(max((n_tokens - max_new + buffer) / buffer, 0.0), 1.0)


# ------------------------------------------------------------------------------------- grade
@dataclass(frozen=True)
class Grade:
    total: float  # the reward
    parts: dict  # what it is made of, and what is only logged: each in [0, 1]
    parsed: Parsed
    correct: bool  # what accuracy counts: the gold name, or mean IoU >= 0.5, in any form
    predicted: str | tuple  # the letter, class or grade, or ""; boxes in pixels of the original


def grade(
    item, text: str, config: Config, finished: bool = True, n_tokens: int | None = None
) -> Grade:
    """The reward of one completion: the paper's, less the GUARDS, plus recitation.

    A completion that was cut at the token limit (`truncated`) is graded like any other: a complete
    right answer before the cut counts. `recite`, the likeness of the reasoning to the knowledge in
    the prompt, may weigh less than 0 (VRFT-Aug's delta).
    """
    if config.reward not in REWARDS:
        raise UsageError(f"no reward named {config.reward!r}: {', '.join(REWARDS)}")
    verdict = judge(item, text, config)
    parsed, well_formed, correct = verdict.parsed, verdict.well_formed, verdict.right >= 0.5
    counts = well_formed or config.reward not in FORM_FIRST
    parts = {
        "accuracy": float(counts and correct),
        "fuzzy": verdict.credit if counts and item.task == "grade" else 0.0,
        "iou": verdict.right if item.task == "localize" else 0.0,
        "format": float(well_formed),
        "malformed": float(not well_formed),
        "truncated": float(not finished),
        "leak": float(well_formed and leak(parsed, item)),
        "before": float(reasons_before(parsed, item)),
        "short": too_short(parsed, config.min_think),
        "overlong": overlong(n_tokens or 0, config.max_new),
        "recite": bleu(parsed.think, item.knowledge) if config.recite and counts else 0.0,
    }
    total = REWARDS[config.reward](verdict, config)
    for name in GUARDS:
        total -= getattr(config, f"w_{name}") * parts[name]
    total += config.recite * parts["recite"]
    return Grade(total, parts, parsed, correct, verdict.predicted)


def grade_all(rollouts, config: Config) -> None:
    """Fill in what the grader says of each rollout."""
    for rollout in rollouts:
        n_tokens = len(rollout.completion_ids)
        found = grade(rollout.item, rollout.text, config, rollout.finished, n_tokens)
        rollout.parsed, rollout.reward, rollout.parts = found.parsed, found.total, found.parts
        rollout.correct, rollout.predicted = found.correct, found.predicted


# ------------------------------------------------------------------------------------ stages
STAGES = (
    "format failure",
    "verbose formatter",
    "concise structurer",
    "direct answer hacker",
    "step-by-step exploit",
    "reintegrated reasoning",
)


def stage(parsed: Parsed, item, n_tokens: int) -> str:
    """Which of Med-RLVR's six stages (section 4.2.1) a completion looks like.

    The paper names them in words only; rules and thresholds (`item.limits`, of its data set) are
    our choice, asked in this order. From one completion, "concise" and "reintegrated" differ in
    length only: the paper tells them apart by what came before.

    >>> item = Item("1", "choice", "What is it?", ("asthma", "gout"), "B")
    >>> stage(parse("<think> it is gout </think> <answer> B </answer>"), item, 9)
    'direct answer hacker'
    >>> stage(parse("<think> a swollen red toe </think> <answer> B </answer>"), item, 15)
    'concise structurer'
    """
    if not parsed.well_formed:
        return "format failure"  # short outputs that miss the form
    if reasons_before(parsed, item):
        return "step-by-step exploit"  # step-by-step text in front of <think> earns reward too
    if leak(parsed, item):
        return "direct answer hacker"  # thinking has shrunk to the answer
    if n_tokens > item.limits.verbose:
        return "verbose formatter"  # the form is followed, needlessly long
    if len(parsed.think.split()) < item.limits.short:
        return "concise structurer"  # concise reasoning
    return "reintegrated reasoning"  # reasoning is back where it belongs


# ----------------------------------------------------------------------------- worked example
EXAMPLES = (
    "<think> a swollen red toe, high urate </think> <answer> B </answer>",
    "<think> gout </think> <answer> B </answer>",
    "<think> a wheeze </think> <answer> A </answer>",
    "It is B.",
)


def example() -> str:
    """One question and four completions, from text to parts, reward and stage, as a table."""
    item = Item("1", "choice", "What is it?", ("asthma", "gout"), "B")
    config = Config(reward="med-rlvr", w_leak=0.5, max_new=64, min_think=0)
    rows = [f"{'reward':>6}  {'parts that are not 0':<36} {'stage':<21} completion"]
    for text in EXAMPLES:
        found = grade(item, text, config, n_tokens=16)
        parts = ", ".join(f"{name} {value:.2g}" for name, value in found.parts.items() if value)
        name = stage(found.parsed, item, 16)
        rows.append(f"{found.total:+6.1f}  {parts:<36} {name:<21} {text}")
    return "\n".join(rows)


if __name__ == "__main__":
    failed, tried = doctest.testmod()
    print(f"rewards.py: {tried - failed} of {tried} doctest lines hold\n")
    print(f"One question (gold B), reward med-rlvr with --w-leak 0.5:\n{example()}")
    raise SystemExit(bool(failed))
