"""Classes, grades, boxes and recitation: against published packages, by hand and hostile text."""

import math
import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import rewards
import train
from data import Item, to_frame, to_image
from rewards import fuzzy, fuzzy_tables, grade, leak, named, parse, stage
from support.bleu import MAX_WORDS, bleu
from support.boxes import MAX_BOXES, read_boxes

LESIONS = ("melanoma", "basal cell carcinoma", "nevus", "non-melanoma")
RETINAS = ("no retinopathy", "mild", "moderate", "severe", "proliferative")
CLASSES = Item("c", "classify", "Which lesion?", LESIONS, "basal cell carcinoma")
GRADES = Item("g", "grade", "Which grade?", ("0", "1", "2", "3", "4"), "3")
WORDED = Item("w", "grade", "Which grade?", RETINAS, "severe")
SIGNED = Item("s", "grade", "How much protein?", ("-", "+", "++"), "++")
BOXES = Item("b", "localize", "Where?", (), ((10, 10, 30, 20), (50, 50, 60, 70)))
BOTH = "[[10, 10, 30, 20], [50, 50, 60, 70]]"
CHOICE = Item("q", "choice", "Which?", ("asthma", "gout"), "B")
ALL = {item.id: item for item in (CHOICE, CLASSES, GRADES, WORDED, SIGNED, BOXES)}
CONFIG = train.Config()


def think(answer: str, reasoning: str = "because") -> str:
    return f"<think> {reasoning} </think> <answer>{answer}</answer>"


def reward_of(item: Item, answer: str, **changes) -> float:
    return grade(item, think(answer), replace(CONFIG, **changes)).total


# --------------------------------------------------------------------------- what SFT teaches
@pytest.mark.parametrize("rationale", ["", "...", "pearly border"])
@pytest.mark.parametrize("item", ALL.values(), ids=ALL)
@pytest.mark.parametrize("style", ["think", "direct", "cot"])
@pytest.mark.parametrize("reward, full", [("med-rlvr", 1), ("acc-format", 2), ("fuzzy", 2)])
def test_what_sft_teaches_earns_the_full_reward(reward, full, style, item, rationale):
    item = replace(item, rationale=rationale)
    for strict in (False, True):
        on = dict(reward=reward, style=style, strict=strict, w_leak=0.5, w_before=0.5)
        result = grade(item, data.completion(item, style), replace(CONFIG, **on))
        assert result.total == full and result.correct


# -------------------------------------------------------------------------- classes and grades
NAMES = [
    *("basal cell carcinoma", "Basal Cell Carcinoma.", "**basal-cell carcinoma**"),
    *("basal_cell_carcinoma", "basal\ncell\u2011carcinoma", r"\boxed{\text{basal cell carcinoma}}"),
]
NO_NAMES = [
    *("", " ", "a", "B", "(B)", "carcinoma", "basal", "classify", "no basal cell carcinoma"),
    *("melanoma, basal cell carcinoma, nevus, non-melanoma", "basal cell carcinoma or nevus"),
    *("basal cell carcinomas", "basalcellcarcinoma", "it is basal cell carcinoma"),
    "basal cell carcinoma basal cell carcinoma",
]


@pytest.mark.parametrize("answer", NAMES)
def test_a_class_is_named(answer):
    result = grade(CLASSES, think(answer), CONFIG)
    assert result.total == 1 and result.correct and result.predicted == "basal cell carcinoma"


@pytest.mark.parametrize("answer", [*NO_NAMES, "melanoma"])
def test_nothing_less_and_nothing_more(answer):
    result = grade(CLASSES, think(answer), CONFIG)
    assert result.total <= 0 and not result.correct and result.parts["accuracy"] == 0
    assert result.predicted == ("melanoma" if answer == "melanoma" else "")


def test_a_class_inside_another_and_a_sign():
    assert named(CLASSES, "melanoma") == ("melanoma",)
    assert named(CLASSES, "non melanoma") == ("non-melanoma",)
    signs = replace(CLASSES, options=("-1", "1", "a-b", "a_b"), answer="-1")
    assert named(signs, "-1") == ("-1",) and named(signs, "1") == ("1",)
    assert named(signs, "a b") == ()  # two names read alike: neither is meant


WRITTEN = ["3", "Grade 3", "grade-3.", "**3**"]
NOT_WRITTEN = ["(3)", "3/4", "4", "33", "3 4", "grade", "three", "٣", "grade grade 3", "-3", "5"]
NUMBERS = [*((answer, 1) for answer in WRITTEN), *((answer, 0) for answer in NOT_WRITTEN)]


@pytest.mark.parametrize("answer, right", NUMBERS)
def test_a_grade_is_named(answer, right):
    as_int = replace(GRADES, answer=3)
    spelled = tuple(f"grade {i}" for i in range(5))
    for item in (GRADES, as_int, replace(GRADES, options=spelled, answer="grade 3")):
        assert reward_of(item, answer) == right


CREDITS = {  # of the answers 0 to 4, where 3 is right
    "1": (0, 0, 0, 1, 0),
    "tenth": (0, 0.1, 0.5, 1, 0.5),
    "sixteenth": (0, 0.0625, 0.25, 1, 0.25),
    "asymmetric": (0, 0, 0.25, 1, 0.5),
    "1,0.7,0.6,0.2": (0.2, 0.6, 0.7, 1, 0.7),
}


@pytest.mark.parametrize("table", CREDITS)
def test_fuzzy_by_hand(table):
    config = replace(CONFIG, reward="fuzzy", fuzzy=table)
    for i, credit in enumerate(CREDITS[table]):
        result = grade(GRADES, think(str(i)), config)
        assert result.total == 1 + credit and result.parts["fuzzy"] == credit
        assert result.parts["accuracy"] == result.correct == (i == 3)
        assert result.predicted == str(i)
        half = replace(config, w_format=0.5)
        assert grade(WORDED, think(RETINAS[i]), half).total == 0.5 + credit
    assert grade(GRADES, think("mild"), config).total == 1  # the form alone
    assert grade(GRADES, "3", config).total == 0


def test_fuzzy_tables():
    assert fuzzy(0, 3, (1, 0.5, 0.25, 0.1)) == 0.1 and fuzzy(3, 0, [1, 0.5]) == 0
    # The paper's two values.
    assert fuzzy_tables("tenth")[0][2] == 0.1 and fuzzy_tables("sixteenth")[0][2] == 0.0625
    # A missed disease is never paid better than an overcall.
    under, over = fuzzy_tables("asymmetric")
    assert all(low <= high for low, high in zip(under, over)) and under != over


SENSELESS = [
    *("0.5,0.2", "1,0.5,0.6", "1,-0.1", "1,nan", "1,nan,0", "1,2", "nan", "inf", "1,,0"),
    *("tenths", "1/1/1", "1,0.5/0.9,0.1", "/", "1,0.5/", "", "1;0.5"),
]


@pytest.mark.parametrize("text", SENSELESS)
def test_a_table_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="fuzzy .*tenth") as error:
        fuzzy_tables(text)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4))
def test_with_the_plain_table_fuzzy_is_the_plain_reward(said, gold):
    item, text = replace(GRADES, answer=str(gold)), think(str(said))
    plain = grade(item, text, replace(CONFIG, reward="acc-format")).total
    assert grade(item, text, replace(CONFIG, reward="fuzzy", fuzzy="1,0,0")).total == plain
    as_class = replace(item, task="classify")
    assert grade(as_class, text, replace(CONFIG, reward="fuzzy")).total == plain


# ------------------------------------------------------------------------- giving away, stages
PEARLY = "pearly border " * 30
GIVEN_AWAY = [
    (CLASSES, "it is a basal-cell carcinoma", "basal cell carcinoma", True),
    (CLASSES, "it is a nevus", "basal cell carcinoma", False),
    (CLASSES, f"{PEARLY} basal cell carcinoma", "basal cell carcinoma", False),  # reasoned before
    (GRADES, "so the answer is 3", "3", True),
    (GRADES, "grade 3.", "grade 3", True),
    (WORDED, "a severe one", "severe", True),
    (GRADES, "3 spots in the lower half", "3", False),  # a count is no grade
    (GRADES, "so grade 2", "3", False),
    (BOXES, BOTH, BOTH, False),
]


@pytest.mark.parametrize("item, reasoning, answer, away", GIVEN_AWAY)
def test_giving_away_for_every_task(item, reasoning, answer, away):
    assert leak(parse(think(answer, reasoning)), item) == away


def test_stages_of_images():
    assert stage(parse(think("nevus", "nevus")), CLASSES, 9) == "direct answer hacker"
    assert stage(parse(think(BOTH, BOTH)), BOXES, 9) == "concise structurer"
    assert grade(CLASSES, think("nevus", "nevus"), replace(CONFIG, w_leak=0.5)).total == -0.5


# --------------------------------------------------------------------------------------- boxes
SCORES = [
    (BOTH, 1),
    ("[[50,50,60,70],[10,10,30,20]]", 1),
    ("[10, 10, 30, 20]", 0.5),
    ("[[10, 10, 30, 20], [10, 10, 30, 20]]", 0.5),
    (f"{BOTH} {BOTH}", 0.5),
    ("[[10, 10, 20, 20], [50, 50, 60, 70]]", 0.75),
    ("[[30, 20, 10, 10], [50, 50, 60, 70]]", 0.5),
    ("[0, 0, 100, 100]", 200 / 10_000 / 2),
    ("no boxes", 0),
    ("[]", 0),
    ("[[nan, nan, nan, nan], [inf, 0, 0, 1]]", 0),
    (BOTH + "[1,2,3,4]" * 9998, 2 / 10_000),
]


@pytest.mark.parametrize("answer, score", SCORES, ids=lambda value: str(value)[:20])
def test_boxes_earn_their_mean_iou(answer, score):
    result = grade(BOXES, think(answer), CONFIG)
    assert result.total == result.parts["iou"] == pytest.approx(score)
    assert result.correct == (score >= 0.5) and result.parts["accuracy"] == (score >= 0.5)
    for reward in ("acc-format", "fuzzy"):
        assert reward_of(BOXES, answer, reward=reward, w_format=0.5) == pytest.approx(score + 0.5)
    malformed = grade(BOXES, f"<answer>{answer}</answer>", CONFIG)
    assert malformed.total == -1 and malformed.parts["accuracy"] == 0
    assert malformed.parts["iou"] == pytest.approx(score)  # is still logged


def test_where_no_box_is_gold_there_is_nothing_to_earn():
    item = replace(BOXES, answer=())
    assert reward_of(item, "[]") == reward_of(item, "[0, 0, 10, 5]") == 0


def test_boxes_refer_to_the_frame():
    frame = (100, 50, 400, 300)  # the model sees 100 x 50, the image is 400 x 300: x 4, y 6
    item = replace(BOXES, answer=((40, 60, 80, 120),), frame=frame)
    result = grade(item, think("[10, 10, 20, 20]"), CONFIG)
    assert result.total == 1 and result.predicted == ((40.0, 60.0, 80.0, 120.0),)
    assert reward_of(item, "[40, 60, 80, 120]") == 0
    assert to_frame((40, 60, 80, 120), frame) == (10, 10, 20, 20)
    assert to_frame((1.4, 2.6, 3, 4), None) == (1, 3, 3, 4)
    assert to_image((1, 2, 3, 4), None) == (1, 2, 3, 4)
    assert grade(BOXES, think("[0.06, 0, 3, 4.04]"), CONFIG).predicted == ((0.1, 0, 3, 4),)
    assert grade(BOXES, think("none"), CONFIG).predicted == ()


corner, side = st.integers(0, 12), st.integers(1, 8)
length = st.integers(1, 2000)


@settings(max_examples=300, deadline=None)
@given(corner, corner, side, side, st.tuples(length, length, length, length))
def test_frame_and_back_is_off_by_half_a_frame_pixel(left, top, width, height, frame):
    box = (left, top, left + width, top + height)
    scale_x, scale_y = frame[2] / frame[0], frame[3] / frame[1]
    inside = to_frame(box, frame)
    # What is thinner than a pixel becomes one.
    most = [0.5, 0.5, 1.5 if width <= scale_x else 0.5, 1.5 if height <= scale_y else 0.5]
    back, scales = to_image(inside, frame), (scale_x, scale_y, scale_x, scale_y)
    for value, expected, part, scale in zip(back, box, most, scales):
        assert abs(value - expected) <= part * scale + 1e-9
    assert inside[0] < inside[2] and inside[1] < inside[3]


# ---------------------------------------------------------------------------------- recitation
words = st.lists(st.sampled_from("the lens is red a swollen".split()), max_size=12).map(" ".join)


def as_words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@settings(max_examples=500, deadline=None)
@given(words | st.text(max_size=30), st.lists(words | st.text(max_size=30), min_size=1, max_size=4))
@example("", ["the lens"])
@example("the lens", [""])
@example("a b c d e", ["a x c d e"])
@example("A_b-c", ["a B c"])
@example("a a b", ["a b", "a a x x"])  # clipped at the most of one reference; 2 and 4 are as near
@example("a a b", ["a a x x", "a b"])  # the shorter is the closest, wherever it stands
@example("the lens is red", ["a swollen", "the lens is", "lens is red a a a"])
def test_bleu_is_sacrebleus(hypothesis, references):
    sacrebleu = pytest.importorskip("sacrebleu")
    ours, theirs = as_words(hypothesis), [as_words(text) for text in references]
    how = dict(smooth_method="exp", tokenize="none", effective_order=True)
    for n in (4, 2):
        metric = sacrebleu.BLEU(max_ngram_order=n, **how)
        expected = metric.sentence_score(ours, theirs).score / 100
        assert bleu(hypothesis, references, n) == pytest.approx(expected, abs=1e-9)
        assert 0 <= bleu(hypothesis, references, n) <= 1 + 1e-12
    defaults = sacrebleu.sentence_bleu(ours, theirs, tokenize="none").score / 100
    assert bleu(ours, theirs) == pytest.approx(defaults, abs=1e-9)


def test_bleu_without_references_is_zero():
    assert rewards.bleu("the lens", []) == bleu("the lens", ()) == 0


def test_a_verbatim_copy_of_one_class_is_recited(tmp_path):
    """60 words of one class out of 300 words of knowledge: e^(1 - 61/60), since its name stands
    before them, and not the e^(1 - 300/60) = 0.02 of all knowledge as one reference."""
    texts = {k: " ".join(f"w{k}x{i}" for i in range(60)) for k in range(5)}
    sections = "".join(f"## {k}\n{text}\n" for k, text in texts.items())
    (tmp_path / "k.md").write_text(f"# task\nA grade.\n{sections}")
    (item,) = data.with_knowledge([GRADES], "mine.jsonl", str(tmp_path / "k.md"))
    recited = grade(item, think("3", texts[3]), replace(CONFIG, recite=1.0)).parts["recite"]
    assert recited == pytest.approx(math.exp(1 - 61 / 60)) and recited > 0.98
    whole = sum((text.split() for text in texts.values()), [])
    assert len(whole) == 300 and bleu(texts[3], [" ".join(whole)]) == pytest.approx(math.exp(-4))


def test_bleu_reads_a_bounded_number_of_words():
    most = "a " * MAX_WORDS
    assert bleu(most + "b " * 999, ["a b"]) == bleu(most, ["a b"]) < bleu("a " * 99, ["a b"])


@pytest.mark.parametrize("delta", [0.5, -0.5])
def test_recitation_in_the_reward(delta):
    sentence = "Basal cell carcinoma shows pearly borders and vessels"
    knows = replace(CLASSES, knowledge=(sentence,))
    copied, own = think("nevus", sentence.lower()), think("nevus", "round and brown")
    config = replace(CONFIG, recite=delta)
    assert grade(knows, copied, config).total == pytest.approx(delta)
    assert grade(knows, copied, config).parts["recite"] == pytest.approx(1)
    assert abs(grade(knows, own, config).total) < 0.1
    assert grade(CLASSES, copied, config).total == 0  # nothing to recite
    malformed = grade(knows, copied.replace("</answer>", ""), config)
    assert malformed.total == -1 and malformed.parts["recite"] == 0
    assert grade(knows, copied, CONFIG).total == grade(knows, copied, CONFIG).parts["recite"] == 0


NAMES_OF_PARTS = [
    *("accuracy", "fuzzy", "iou", "format", "malformed", "truncated"),
    *("leak", "before", "short", "overlong", "recite"),
]


@pytest.mark.parametrize("item", ALL.values(), ids=ALL)
def test_every_task_logs_the_same_parts(item):
    """The log averages every part over items of all tasks."""
    assert list(grade(item, think("x"), CONFIG).parts) == NAMES_OF_PARTS


@pytest.mark.parametrize("item", ALL.values(), ids=ALL)
def test_the_credit_of_a_grade_and_the_score_of_boxes_are_logged_where_they_belong(item):
    right = data.completion(item)
    parts = grade(item, right, CONFIG).parts
    assert parts["fuzzy"] == (item.task == "grade") and parts["iou"] == (item.task == "localize")
    malformed = right.replace("<think>", "")
    assert grade(item, malformed, CONFIG).parts["fuzzy"] == 0  # med-rlvr pays none
    parts = grade(item, malformed, replace(CONFIG, reward="fuzzy")).parts
    assert parts["fuzzy"] == (item.task == "grade")


# -------------------------------------------------------------------------------- hostile text
PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "[", "]", "[[", "{", '"bbox_2d":', "}"),
    *("1", "10", "20", "30", ",", "-", ".", "e", "NaN", "Infinity", "-inf", "9" * 400, "3/4"),
    *("٣", "Ⅲ", "３", "3", "grade ", "severe", "basal cell", " carcinoma", "melanoma", "or"),
    *("_", "**", "\\boxed{", " ", "\n", "\x00", "\u202e"),
    *("[10, 10, 30, 20]", "[30, 20, 10, 10]", "[0,0,9999999,9999999]"),
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map("".join)
NUMBER = r"\s*-?[0-9.]+\s*"
FORM_EARNS = {"med-rlvr": 0, "acc-format": 1, "fuzzy": 1}


def letters_of(text: str) -> str:
    return "".join(re.findall(r"[^\W_]+", text.casefold()))


@settings(max_examples=1500, deadline=None)
@given(
    HOSTILE | HOSTILE.map(think),
    st.sampled_from([CLASSES, GRADES, WORDED, BOXES]),
    st.sampled_from(list(FORM_EARNS)),
)
@example(think("[" * 50 + "10, 10, 30, 20" + "]" * 50), BOXES, "med-rlvr")
@example("<think>[10, 10, 30, 20] severe 3</think><answer>x</answer>", BOXES, "acc-format")
def test_generated_hacks_earn_no_more_than_form(text, item, reward):
    result = grade(item, text, replace(CONFIG, reward=reward, fuzzy="tenth"))
    form = FORM_EARNS[reward]
    assert -1 <= result.total <= form + 1 and all(0 <= x <= 1 for x in result.parts.values())
    if result.total <= form:
        return
    # What earned more than form is there to see, and nothing else is in the one place that counts.
    opened = text.rfind("<answer>", 0, text.rfind("</answer>"))
    answer = text[opened + len("<answer>") :].split("</answer>")[0]
    if item.task == "localize":
        assert result.parts["iou"] > 0
        assert re.search(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]", answer)
    else:
        left = letters_of(answer.replace("boxed", "")).removeprefix("grade")
        assert left in map(letters_of, item.options) and result.predicted in item.options


@settings(max_examples=300, deadline=None)
@given(HOSTILE)
def test_generated_boxes_are_four_finite_numbers(text):
    found = read_boxes(text)
    assert all(len(box) == 4 for box in found)
    assert all(isinstance(value, float) and abs(value) < 1e8 for box in found for value in box)
    assert read_boxes(text, 1) == found[:1]


MEGABYTE = 1_000_000
REPEATED = [
    *("[", "9", "-", "_", "**", "_a", "a-", "grade ", "\\boxed{", "[1,", "[ 1.5 , ", "[[1,2,3,"),
    *("[1,2,3,4]", '{"bbox_2d": [1, 2, 3, 4]}, ', "[" + " " * 9),
    "[1234567.123456789,1234567.123456789,1234567.123456789,1234567",
]
LONG = [
    *(piece * (MEGABYTE // len(piece)) for piece in REPEATED),
    *("[" + "9" * MEGABYTE, "[" + " " * MEGABYTE),
    "[" * (MEGABYTE // 2) + "]" * (MEGABYTE // 2),
    "\\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_a_megabyte_takes_less_than_a_second(text):
    item = replace(BOXES, answer=tuple((10 * i, 0, 10 * i + 9, 9) for i in range(10)))
    start = time.process_time()
    assert len(read_boxes(text)) <= MAX_BOXES
    assert time.process_time() - start < 1
    for one in (item, CLASSES, GRADES):
        start = time.process_time()
        assert grade(one, think(text), CONFIG).total < 0.01
        assert grade(one, text, CONFIG).total == -1
        assert time.process_time() - start < 2  # two gradings
    start = time.process_time()
    told = replace(CLASSES, knowledge=("pearly border " * 200,))
    assert grade(told, think("x", text), replace(CONFIG, recite=1.0)).total <= 1
    assert time.process_time() - start < 1
