"""The verifiable reward: from the text of one completion to a number, and to the stage of training it belongs to.

Read it with Med-RLVR (arXiv 2502.19655), section 3 (malformed -1, wrong 0, right +1) and section 4.2.1 (six stages of training),
and for images with VRFT-Aug (arXiv 2602.10619): boxes before classes, credit for a grade nearly right, reciting the knowledge given.
It is the only grader: training, evaluation and the baselines all call `grade`, which sees the completion and never the prompt.
Whatever a policy can write it will some day write, so an answer is matched whole, never by substring, and in time linear in its length.
"""
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from config import Config
from data import to_image
from support.text import LETTERS, TAGS, folded, is_answer, normal, says_something



# ------------------------------------------------------------------------------------------------ text -> parts
@dataclass(frozen=True)
class Parsed:
    before: str             # text in front of <think>
    think: str              # inside the first think block
    answer: str | None      # inside the last complete answer block; None where there is none
    after: str              # text behind that block
    # One non-empty think block, then one non-empty answer block; text around them is tolerated.
    well_formed: bool


def parse(text: str) -> Parsed:
    """Split a completion at its tags.

    `well_formed` is a search, not a full match: the paper's stage 5 (reasoning moved in front of <think>) earned reward, so its
    validator must have let such text pass. `is_strict` is the other reading. That both blocks
    must be non-empty is our choice: thinking needs a letter or a digit, an answer one of these or
    one of SIGNS.

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
                   and says_something(think) and is_answer(answer))
    return Parsed(before, think, answer, after, well_formed)


def is_strict(text: str) -> bool:
    """Well formed, and nothing but white space outside the two blocks."""
    text = text.strip()
    between = text[text.find("</think>") + len("</think>"):text.find("<answer>")]
    return parse(text).well_formed and text.startswith("<think>") and text.endswith("</answer>") and not between.strip()


# ------------------------------------------------------------------------------------------- answer -> option
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\]][.:,]?|[.:,]|\s[-–—]\s)\s*(.+)")


def hopeless(answer: str | None, options: tuple[str, ...]) -> bool:
    """Empty, or far longer than every option: it names none of them, whatever it holds."""
    return not answer or len(answer) > 200 + 2 * max(map(len, options), default=0)


def match_option(answer: str | None, options: tuple[str, ...]) -> str:
    """The letters that an answer names: one, more where options are alike (either is right then), "" where it names none.

    In this order: a lone letter that is an option's, since the prompt asks for one; the exact text
    of an option; a letter, a separator and exactly that option's text.

    >>> options = ("Pneumonia", "D cells", "Small region")
    >>> [match_option(a, options) for a in ("d cells", "(C)", "B.", "A: pneumonia", r"\\boxed{B}")]
    ['B', 'C', 'B', 'A', 'B']
    >>> [match_option(a, options) for a in ("a small region", "A: D cells", "D", "A B C", "pneumonia or not", "")]
    ['', '', '', '', '', '']
    >>> [match_option(a, ("O", "A", "B", "AB")) for a in ("A", "B", "O")]
    ['A', 'B', 'A']
    """
    if hopeless(answer, options):
        return ""
    answer, texts = normal(answer), [normal(option) for option in options]
    letters = LETTERS[:len(options)]
    lone = _LETTER.fullmatch(answer)
    if lone and lone[1].upper() in letters:
        return lone[1].upper()
    for fold in (str, str.casefold):                            # "AA" and "Aa" are two genotypes: exact case first
        alike = [letter for letter, text in zip(LETTERS, texts) if fold(text) == fold(answer)]
        if alike:                                               # several only where they read the same: "aa" is neither "AA" nor "Aa"
            return "".join(alike) if len({texts[LETTERS.index(letter)] for letter in alike}) == 1 else ""
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both and both[1].upper() in letters:
        named = texts[letters.index(both[1].upper())]
        if normal(both[2]).casefold() == named.casefold():
            return both[1].upper()
    return ""


def named(item, answer: str | None) -> tuple[str, ...]:
    """What an answer names, in the words of `item.answer`: letters for "choice", else one class or grade; () where it names none. Boxes have no names.

    A class is named by its whole name only, never by a part of it (Visual-RFT's substring test pays "a" and a list of all classes).

    >>> from types import SimpleNamespace as Item
    >>> item = Item(task="classify", options=("melanoma", "nevus"))
    >>> [named(item, a) for a in ("Melanoma.", "nevus", "no nevus", "melanoma, nevus", "n")]
    [('melanoma',), ('nevus',), (), (), ()]
    >>> named(Item(task="grade", options=("0", "1", "2")), "Grade 2")
    ('2',)
    """
    if item.task == "choice":
        return tuple(match_option(answer, item.options))
    if item.task == "localize" or hopeless(answer, item.options):
        return ()
    key = lambda text: folded(text).removeprefix("grade ") if item.task == "grade" else folded(text)
    names = tuple(name for name in item.options if key(name) == key(answer))
    return names if len(names) == 1 else ()


# ------------------------------------------------------------------------------------------------------- grades
FUZZY = {"tenth": "1,0.5,0.1",                      # two grades off: VRFT-Aug gives 1/10 in one place and 0.0625 in another, as a public review says;
         "sixteenth": "1,0.25,0.0625",              # one grade off: not public, both values are our choice (the second row is 4^-d)
         "asymmetric": "1,0.25,0/1,0.5,0.1"}        # under/over: to miss a disease costs more than to overcall it; our choice


def fuzzy_tables(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The credits by distance for a grade (below, above) the gold one. text: a name of FUZZY, "1,0.5,0.1", or "under/over"; "1" is the plain reward.

    >>> fuzzy_tables("1"), fuzzy_tables("1,0.25/1,0.5,0.1")
    (((1.0,), (1.0,)), ((1.0, 0.25), (1.0, 0.5, 0.1)))
    """
    try:
        tables = [tuple(float(value) for value in side.split(",")) for side in FUZZY.get(text, text).split("/")]
    except ValueError:
        tables = []
    sound = all(table[0] == 1 and all(0 <= farther <= nearer for nearer, farther in zip(table, table[1:])) for table in tables)
    if len(tables) not in (1, 2) or not sound:
        raise ValueError(f"fuzzy {text!r}: expected {', '.join(FUZZY)}, or the credits at distance 0, 1, 2, ... such as 1,0.5,0.1 "
                         "(first 1, never rising, none below 0), or two such lists, under/over")
    return tables[0], tables[-1]


def fuzzy(predicted: int, gold: int, table) -> float:
    """R_fuzzy = table[|predicted - gold|], 0 beyond it: VRFT-Aug's multi-grade fuzzy reward. With the table (1,) it is the plain one.

    >>> fuzzy(3, 1, (1, .5, .1)), fuzzy(4, 1, (1, .5, .1))
    (0.1, 0.0)
    """
    distance = abs(predicted - gold)
    return float(table[distance]) if distance < len(table) else 0.0


# -------------------------------------------------------------------------------------------------------- boxes
MAX_BOXES = 10_000
_NUMBER = r"\s{0,9}(-?[0-9]{1,7}(?:\.[0-9]{1,9})?)\s{0,9}"     # every repeat is bounded: linear in time on any text. No exponents, no NaN
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")


def boxes(text: str | None, limit: int = MAX_BOXES) -> list[tuple[float, float, float, float]]:
    """The boxes [x1, y1, x2, y2] of a text in order, the first `limit` of them: [[...], [...]] and Qwen's [{"bbox_2d": [...], "label": "..."}] alike.

    >>> boxes('{"bbox_2d": [ 3 , 4 , 5.5 , 6 ]} [1, 2, 3] [1, 2, 3, 4, 5] [1e3, 2, 3, NaN] [0, 0, -1, 9]')
    [(3.0, 4.0, 5.5, 6.0), (0.0, 0.0, -1.0, 9.0)]
    """
    return [tuple(map(float, found.groups())) for found in islice(_BOX.finditer(text or ""), limit)]


def overlap(a, b) -> tuple[float, float, float]:
    """Areas of (intersection, union, smallest box around both); (0, 0, 0) where one is no box: reversed, empty, NaN, or too large to multiply."""
    for x1, y1, x2, y2 in (a, b):
        if not (-1e150 < x1 < x2 < 1e150 and -1e150 < y1 < y2 < 1e150):        # false for NaN too
            return 0.0, 0.0, 0.0
    area = lambda x1, y1, x2, y2: max(0, x2 - x1) * max(0, y2 - y1)
    inside = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    around = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return inside, area(*a) + area(*b) - inside, around


def iou(box_a, box_b) -> float:
    """Intersection over union of two half-open boxes, as continuous areas; 0 where one of them is no box.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2)), iou((0, 0, 2, 2), (2, 0, 0, 2))            # 2 / (4 + 4 - 2)
    (0.3333333333333333, 0.0)
    """
    inside, union, _ = overlap(box_a, box_b)
    return inside / union if union else 0.0


def giou(box_a, box_b) -> float:
    """GIoU = IoU - (C - union) / C, C the smallest box around both (arXiv 1902.09630): in (-1, 1], and -1 where one of them is no box.

    >>> giou((0, 0, 1, 1), (3, 0, 4, 1)), giou((0, 0, 1, 1), (1, 1, 0, 0))          # 0 - (4 - 2) / 4
    (-0.5, -1.0)
    """
    inside, union, around = overlap(box_a, box_b)
    return inside / union - (around - union) / around if union else -1.0


def match_boxes(predicted, gold, similarity=iou) -> list[tuple[int, int, float]]:
    """The one-to-one matching with the greatest sum: triples (i, j, similarity of predicted[i] and gold[j]) in order of i, as many as the shorter list.

    The Hungarian method as shortest augmenting paths, O(n^2 m): greedy matching would let the order of the boxes decide.

    >>> match_boxes([(0, 0, 3, 1), (0, 0, 2, 1)], [(0, 0, 2, 1), (2, 0, 4, 1)])     # greedy by predicted box gives .67 + 0
    [(0, 1, 0.25), (1, 0, 1.0)]
    """
    value = [[similarity(p, g) for p in predicted] for g in gold]                   # [rows][columns], no more rows than columns
    if swap := len(gold) > len(predicted):
        value = list(zip(*value))
    n, m = len(value), max(len(gold), len(predicted))
    price_row, price, row_of = [0.0] * (n + 1), [0.0] * (m + 1), [0] * (m + 1)      # counted from 1; row_of[j] = 0: column j is free
    for row in range(1, n + 1):
        slack, came_from, done, left, j = [math.inf] * (m + 1), [0] * (m + 1), [], set(range(m + 1)), 0
        row_of[0] = row
        while row_of[j]:                                                            # grow the cheapest path until it ends at a free column
            done.append(j)
            left.remove(j)
            for k in left:
                if (cost := -value[row_of[j] - 1][k - 1] - price_row[row_of[j]] - price[k]) < slack[k]:
                    slack[k], came_from[k] = cost, j
            j = min(left, key=lambda k: (slack[k], k))
            step = slack[j]
            for k in done:
                price_row[row_of[k]] += step
                price[k] -= step
            for k in left:
                slack[k] -= step
        while j:                                                                    # hand each row of the path the next column
            row_of[j], j = row_of[came_from[j]], came_from[j]
    pairs = [(row_of[j] - 1, j - 1) if swap else (j - 1, row_of[j] - 1) for j in range(1, m + 1) if row_of[j]]
    return [(i, j, value[i][j] if swap else value[j][i]) for i, j in sorted(pairs)]


def box_score(predicted, gold, similarity=iou) -> float:
    """sum of matched IoU / max(n_gold, n_predicted), Visual-RFT's form: the mean IoU in which each missed and each superfluous box counts 0.

    Only the first 2 n_gold + 10 predicted boxes can be matched, for bounded time; the others are superfluous. Without gold boxes nothing can be earned.

    >>> box_score([(0, 0, 2, 2), (0, 0, 2, 2)], [(0, 0, 2, 2)]), box_score([], [(0, 0, 2, 2)])      # said twice, and not said
    (0.5, 0.0)
    """
    matched = match_boxes(predicted[:2 * len(gold) + 10], gold, similarity)
    return sum(value for _, _, value in matched) / max(len(gold), len(predicted), 1)


def box_credit(score: float, predicted, gold, config) -> float:
    """What boxes of this mean IoU earn: "iou", the mean IoU; "threshold", 1 if it reaches tau (MedLoc-R1, arXiv 2603.28120); "giou", the mean of (1 + GIoU) / 2.

    "tighten" is a threshold that train.py raises as the policy improves. GIoU tells near from far where IoU is 0. But any box earns something then,
    the whole image more than 1/2: so it is not the default.
    """
    if config.box_reward == "giou":
        return box_score(predicted, gold, lambda a, b: (1 + giou(a, b)) / 2)
    if config.box_reward not in ("iou", "threshold", "tighten"):
        raise ValueError(f"no box reward named {config.box_reward!r}: iou, giou, threshold, tighten")
    return score if config.box_reward == "iou" else float(0 < score >= config.tau)


# --------------------------------------------------------------------------------------------------- recitation
_WORD = re.compile(r"[^\W_]+")
MAX_WORDS = 4_000           # of a hypothesis: the rest is not read


def bleu(hypothesis: str, references: Sequence[str], n: int = 4) -> float:
    """BLEU = min(1, e^(1 - r/c)) (p_1 ... p_K)^(1/K), the likeness of a text to any of several.

    c: words in the hypothesis. r: words in the reference whose length is closest to c, the shorter
    of two as close. p_k: the share of the hypothesis' k-grams found in the references, each counted
    at most as often as in the one that has it most. K = min(n, c).

    The p_k without a hit count as 1/2, 1/4, ... of one hit ("exp" smoothing); with no word in
    common, or no reference, BLEU is 0. So it is sacrebleu's sentence_bleu(hypothesis, references),
    effective order on, of lower-case words. Of VRFT-Aug no more than "BLEU" is public: order,
    smoothing, words and what is a reference are our choice.

    >>> bleu("The lens is RED.", ["x", "the lens is red"]), bleu("x", ["y"])  # all; none
    (1.0, 0.0)
    >>> round(bleu("a b", ["a b c d"]), 4)  # e^(1 - 4/2)
    0.3679
    """
    words = words_of(hypothesis, MAX_WORDS)
    targets = [words_of(reference) for reference in references]
    if not words or not targets:
        return 0.0
    log_precisions, halved = [], 1.0
    for k in range(1, min(n, len(words)) + 1):
        known: Counter = Counter()
        for target in targets:
            known |= ngrams(target, k)  # the maximum of the counts
        hits = (ngrams(words, k) & known).total()
        if k == 1 and not hits:
            return 0.0
        if not hits:
            halved /= 2
        log_precisions.append(math.log((hits or halved) / (len(words) - k + 1)))
    lengths = [len(target) for target in targets]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    brevity = min(1.0, math.exp(1 - closest / len(words)))
    return brevity * math.exp(sum(log_precisions) / len(log_precisions))


def words_of(text: str, limit: int | None = None) -> list[str]:
    return [found[0] for found in islice(_WORD.finditer(text.lower()), limit)]


def ngrams(words: list[str], k: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(k))))


# ----------------------------------------------------------------------------------------------------- stages
STAGES = ("format failure", "verbose formatter", "concise structurer", "direct answer hacker", "step-by-step exploit", "reintegrated reasoning")
BEFORE_WORDS = 15           # more words than this in front of <think> is reasoning moved out (threshold of arXiv 2509.15557's notebook)
SHORT_WORDS = 30            # a think block below this is "drastically short"; our choice, the paper gives no numbers
VERBOSE_TOKENS = 256        # a completion above this is "needlessly long"; our choice


def gives_away(parsed: Parsed, item) -> bool:
    """The think block is short and already names the answer that follows: its option's text, its class, or "answer is B" / a lone letter or grade at the end."""
    words = parsed.think.split()
    if len(words) >= SHORT_WORDS or len(parsed.think) > 100 * SHORT_WORDS or not parsed.answer:
        return False
    think = folded(" ".join(words))
    for name in named(item, parsed.answer):
        text = folded(item.options[LETTERS.index(name)] if item.task == "choice" else name)
        short = re.escape(folded(name))                         # a letter or a number may stand anywhere: only where it ends the block it is an answer
        spelled = f" {text} " in f" {think} " and not (item.task == "grade" and text.isdecimal())
        if spelled or re.search(rf"(?:^|\b(?:answer|option|choice|grade|is)\s*:?\s*)\(?{short}\)?$", think):
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
    >>> item = Item(task="choice", options=("asthma", "gout"))
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
    correct: bool           # the gold option, class or grade is named, or mean IoU >= 0.5, whatever the form around it: what accuracy counts
    predicted: str | tuple  # the letter, class or grade named, "" where none is; boxes in pixels of the original image, () where none is


def weights(config, task: str = "choice") -> dict[str, float]:
    """Which parts the reward of a task is the weighted sum of. `config` is a train.Config."""
    goal = "box" if task == "localize" else "fuzzy" if task == "grade" and config.reward == "fuzzy" else "accuracy"
    if config.reward == "med-rlvr":                             # Med-RLVR, section 3
        chosen = {goal: 1.0, "malformed": -1.0}
    elif config.reward in ("acc-format", "fuzzy"):              # Visual-RFT and kin: accuracy + format; VRFT-Aug on grades: credit by distance + format
        chosen = {goal: 1.0, "format": config.w_format}
    else:
        raise ValueError(f"no reward named {config.reward!r}: med-rlvr, acc-format, fuzzy")
    others = {"leak": -config.w_leak, "before": -config.w_before, "short": -config.w_short, "overlong": -config.w_overlong, "recite": config.recite}
    return chosen | {name: weight for name, weight in others.items() if weight}


def judge(item, answer: str | None, config) -> tuple[dict, str | tuple]:
    """How right an answer is, whatever the form around it: {"accuracy", "fuzzy", "iou", "box"}, 0 where the task has none, and what it predicts."""
    if item.task == "localize":
        found = [to_image(box, item.frame) for box in boxes(answer)]
        score = box_score(found, item.answer)
        said = tuple(tuple(round(value, 1) for value in box) for box in found)
        return {"accuracy": float(score >= .5), "fuzzy": 0.0, "iou": score, "box": box_credit(score, found, item.answer, config)}, said
    names, gold, credit = named(item, answer), str(item.answer), 0.0
    said = gold if gold in names else "".join(names[:1])
    if item.task == "grade" and said and gold in item.options:
        i, j = item.options.index(said), item.options.index(gold)
        credit = fuzzy(i, j, fuzzy_tables(config.fuzzy)[i > j])
    return {"accuracy": float(gold in names), "fuzzy": credit, "iou": 0.0, "box": 0.0}, said


def grade(item, text: str, config, finished: bool = True, n_tokens: int | None = None) -> Grade:
    """The reward of one completion of one item.

    parts, each in [0, 1]:  accuracy   the gold option, class or grade is named, or mean IoU >= 0.5
                            fuzzy      "grade": credit by distance from the gold grade; it replaces accuracy in the reward "fuzzy"
                            box        "localize": what the boxes are paid; it replaces accuracy in the reward.  iou: their mean IoU, for the log
                            (accuracy, fuzzy, box and recite count under med-rlvr in a well-formed completion only)
                            recite     BLEU of the think block against the knowledge in the prompt,
                                       each class's text a reference; its weight may be negative
                                       (VRFT-Aug's delta)
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
        formed = is_answer(parsed.answer) and text.count("<answer>") == text.count("</answer>") == 1
    else:
        formed = is_strict(text) if config.strict else parsed.well_formed
    earned, predicted = judge(item, parsed.answer, config)
    correct = earned["accuracy"] == 1
    earned["recite"] = bleu(parsed.think, item.knowledge) if config.recite else 0.0
    if not formed and config.reward == "med-rlvr":
        earned = {name: value if name == "iou" else 0.0 for name, value in earned.items()}
    buffer = config.overlong_share * config.max_new                           # DAPO: the last 4,096 of 20,480 tokens
    parts = earned | {
        "format": float(formed), "malformed": float(not formed), "truncated": float(not finished),
        "leak": float(formed and gives_away(parsed, item)), "before": float(len(parsed.before.split()) > BEFORE_WORDS and bool(parsed.think)),
        "short": max(0.0, 1 - len(parsed.think.split()) / config.min_think) if config.min_think else 0.0,
        "overlong": min(max(((n_tokens or 0) - config.max_new + buffer) / buffer, 0.0), 1.0) if buffer else 0.0}
    total = sum(weight * parts[name] for name, weight in weights(config, item.task).items())
    return Grade(total, parts, parsed, correct, predicted)


def example() -> str:
    """One question and four completions, from text to parts, reward and stage, as a table."""
    from types import SimpleNamespace as Plain
    item = Plain(task="choice", options=("asthma", "gout"), answer="B", knowledge=(), frame=())
    config = Config(w_leak=.5, max_new=64)
    rows = [f"{'reward':>6}  {'parts that are not 0':<36} {'stage':<21} completion"]
    for text in ("<think> a swollen red toe, high urate </think> <answer> B </answer>", "<think> gout </think> <answer> B </answer>", "<think> a wheeze </think> <answer> A </answer>", "It is B."):
        found = grade(item, text, config, n_tokens=16)
        parts = ", ".join(f"{name} {value:.2g}" for name, value in found.parts.items() if value and name != "short")
        rows.append(f"{found.total:+6.1f}  {parts:<36} {stage(found.parsed, item, 16):<21} {text}")
    return "\n".join(rows)


if __name__ == "__main__":
    import doctest
    failed, tried = doctest.testmod()
    print(f"rewards.py: {tried - failed} of {tried} doctest lines hold\n\nOne question (gold B), reward med-rlvr with --w-leak 0.5:\n{example()}")
    raise SystemExit(bool(failed))
