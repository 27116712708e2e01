"""Classes, grades, boxes and recitation: against published packages, brute force and hostile text."""
import math
import random
import re
import time
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import rewards
import train
from data import Item
from data import to_frame, to_image
from rewards import bleu, box_score, boxes, fuzzy, fuzzy_tables, giou, grade, iou, match_boxes, named, parse, stage

CLASSES = Item("c", "classify", "Which lesion?", ("melanoma", "basal cell carcinoma", "nevus", "non-melanoma"), "basal cell carcinoma")
GRADES = Item("g", "grade", "Which grade?", ("0", "1", "2", "3", "4"), "3")
WORDED = Item("w", "grade", "Which grade?", ("no retinopathy", "mild", "moderate", "severe", "proliferative"), "severe")
BOXES = Item("b", "localize", "Where?", (), ((10, 10, 30, 20), (50, 50, 60, 70)))
CONFIG = train.Config()
BOTH = "[[10, 10, 30, 20], [50, 50, 60, 70]]"


def think(answer: str, before: str = "because") -> str:
    return f"<think> {before} </think> <answer>{answer}</answer>"


def total(item, answer: str, **changes) -> float:
    return grade(item, think(answer), replace(CONFIG, **changes)).total


# ------------------------------------------------------------------------- what SFT teaches
CHOICE = Item("q", "choice", "Which?", ("asthma", "gout"), "B")
SIGNED = Item("s", "grade", "How much protein?", ("-", "+", "++"), "++")


@pytest.mark.parametrize("rationale", ["", "...", "pearly border"])
@pytest.mark.parametrize("item", [CHOICE, CLASSES, GRADES, WORDED, SIGNED, BOXES],
                         ids=["choice", "classify", "grade", "worded", "signed", "localize"])
@pytest.mark.parametrize("style", ["think", "direct", "cot"])
@pytest.mark.parametrize("reward, full", [("med-rlvr", 1), ("acc-format", 2), ("fuzzy", 2)])
def test_what_sft_teaches_earns_the_full_reward(reward, full, style, item, rationale):
    item = replace(item, rationale=rationale)
    for strict in (False, True):
        config = replace(CONFIG, reward=reward, style=style, strict=strict, w_leak=.5, w_before=.5)
        result = grade(item, data.completion(item, style), config)
        assert result.total == full and result.correct


# ------------------------------------------------------------------------------------------------ classes and grades
@pytest.mark.parametrize("answer", ["basal cell carcinoma", "Basal Cell Carcinoma.", "**basal-cell carcinoma**", "basal_cell_carcinoma", "basal\ncell\u2011carcinoma", r"\boxed{\text{basal cell carcinoma}}"])
def test_a_class_is_named(answer):
    result = grade(CLASSES, think(answer), CONFIG)
    assert result.total == 1 and result.correct and result.predicted == "basal cell carcinoma"


@pytest.mark.parametrize("answer", ["carcinoma", "basal", "a", "", " ", "B", "(B)", "melanoma, basal cell carcinoma, nevus, non-melanoma", "basal cell carcinoma or nevus", "no basal cell carcinoma",
                                    "melanoma", "basal cell carcinomas", "basalcellcarcinoma", "it is basal cell carcinoma", "basal cell carcinoma basal cell carcinoma", "classify"])
def test_nothing_less_and_nothing_more(answer):
    result = grade(CLASSES, think(answer), CONFIG)
    assert result.total <= 0 and not result.correct and result.parts["accuracy"] == 0 and result.predicted == ("melanoma" if answer == "melanoma" else "")


def test_a_class_inside_another_and_a_sign():
    assert named(CLASSES, "melanoma") == ("melanoma",) and named(CLASSES, "non melanoma") == ("non-melanoma",)
    signs = replace(CLASSES, options=("-1", "1", "a-b", "a_b"), answer="-1")
    assert named(signs, "-1") == ("-1",) and named(signs, "1") == ("1",) and named(signs, "a b") == ()     # two names read alike: neither is meant


@pytest.mark.parametrize("answer, right", [("3", 1), ("Grade 3", 1), ("grade-3.", 1), ("**3**", 1), ("(3)", 0), ("3/4", 0), ("4", 0), ("33", 0), ("3 4", 0), ("grade", 0), ("three", 0), ("٣", 0), ("grade grade 3", 0), ("-3", 0), ("5", 0)])
def test_a_grade_is_named(answer, right):
    assert total(GRADES, answer) == right == total(replace(GRADES, answer=3), answer)
    assert total(replace(GRADES, options=tuple(f"grade {i}" for i in range(5)), answer="grade 3"), answer) == right


def test_fuzzy_by_hand():
    gold = GRADES.options.index("3")
    for preset, credits in (("1", (0, 0, 0, 1, 0)), ("tenth", (0, .1, .5, 1, .5)), ("sixteenth", (0, .0625, .25, 1, .25)), ("asymmetric", (0, 0, .25, 1, .5)), ("1,0.7,0.6,0.2", (.2, .6, .7, 1, .7))):
        for i, credit in enumerate(credits):
            result = grade(GRADES, think(str(i)), replace(CONFIG, reward="fuzzy", fuzzy=preset))
            assert result.total == 1 + credit and result.parts["fuzzy"] == credit and result.parts["accuracy"] == result.correct == (i == 3) and result.predicted == str(i)
            assert total(WORDED, WORDED.options[i], reward="fuzzy", w_format=.5, fuzzy=preset) == .5 + credit
        assert total(GRADES, "mild", reward="fuzzy", fuzzy=preset) == 1 and grade(GRADES, "3", replace(CONFIG, reward="fuzzy", fuzzy=preset)).total == 0
    assert [fuzzy(0, gold, (1, .5, .25, .1)), fuzzy(3, 0, [1, .5])] == [.1, 0]
    under, over = fuzzy_tables("asymmetric")
    assert all(low <= high for low, high in zip(under, over)) and under != over                   # a missed disease is never paid better than an overcall
    assert fuzzy_tables("tenth")[0][2] == .1 and fuzzy_tables("sixteenth")[0][2] == .0625         # the paper's two values


@pytest.mark.parametrize("text", ["0.5,0.2", "1,0.5,0.6", "1,-0.1", "1,nan", "1,2", "nan", "1,,0", "tenths", "1/1/1", "1,0.5/0.9,0.1", "/", "1,0.5/", "", "inf", "1;0.5"])
def test_a_table_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="fuzzy .*tenth") as error:
        fuzzy_tables(text)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4))
def test_with_the_plain_table_fuzzy_is_the_plain_reward(i, j):
    item, text = replace(GRADES, answer=str(j)), think(str(i))
    plain = replace(CONFIG, reward="acc-format")
    assert grade(item, text, replace(CONFIG, reward="fuzzy", fuzzy="1,0,0")).total == grade(item, text, plain).total == grade(replace(item, task="classify"), text, plain).total


def test_giving_away_and_stages_for_every_task():
    away = lambda item, before, answer: rewards.gives_away(parse(think(answer, before)), item)
    assert away(CLASSES, "it is a basal-cell carcinoma", "basal cell carcinoma") and not away(CLASSES, "it is a nevus", "basal cell carcinoma")
    assert not away(CLASSES, "pearly border " * 30 + "basal cell carcinoma", "basal cell carcinoma")                            # reasoned before
    assert away(GRADES, "so the answer is 3", "3") and away(GRADES, "grade 3.", "grade 3") and away(WORDED, "a severe one", "severe")
    assert not away(GRADES, "3 spots in the lower half", "3") and not away(GRADES, "so grade 2", "3")                           # a count is no grade
    assert not away(BOXES, BOTH, BOTH)
    assert stage(parse(think("nevus", "nevus")), CLASSES, 9) == "direct answer hacker" and stage(parse(think(BOTH, BOTH)), BOXES, 9) == "concise structurer"
    assert grade(CLASSES, think("nevus", "nevus"), replace(CONFIG, w_leak=.5)).total == -.5


# ------------------------------------------------------------------------------------------------------------ boxes
@pytest.mark.parametrize("text, found", [
    ("[1, 2, 3, 4]", [(1, 2, 3, 4)]), ("[[1,2,3,4],[5,6,7,8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]), ("[ [ 1 , 2 , 3 , 4 ] , [ 5 , 6 , 7 , 8 ] ]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
    ('```json\n[\n\t{"bbox_2d": [1, 2, 3.5, 4], "label": "polyp"},\n\t{"bbox_2d": [5, 6, 7, 8]}\n]\n```', [(1, 2, 3.5, 4), (5, 6, 7, 8)]), ("[-1, 0, 3, 4]", [(-1, 0, 3, 4)]),
    ("[1, 2, 3]", []), ("[1, 2, 3, 4, 5]", []), ("(1, 2, 3, 4)", []), ("1, 2, 3, 4", []), ("[1 2 3 4]", []), ("[NaN, 2, 3, 4]", []), ("[inf, 2, 3, 4]", []), ("[1e3, 2, 3, 4]", []), ("[1., 2, 3, 4]", []),
    ("[.5, 2, 3, 4]", []), ("[+1, 2, 3, 4]", []), ("[" + "9" * 400 + ", 2, 3, 4]", []), ("[١, ٢, ٣, ٤]", []), ("[1, 2, 3, 4", []), ("", []), (None, []), ("[0x1, 2, 3, 4]", [])])
def test_boxes_are_read(text, found):
    assert boxes(text) == found


coordinate = st.integers(-50, 50) | st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, 1e-300, 0, 5e-324])
any_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
small_box = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 8)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=500, deadline=None)
@given(small_box, small_box)
def test_iou_and_giou_by_counting_pixels(a, b):
    pixels = lambda box: {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    inside, union = len(pixels(a) & pixels(b)), len(pixels(a) | pixels(b))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    assert iou(a, b) == pytest.approx(inside / union) and giou(a, b) == pytest.approx(inside / union - (hull - union) / hull)


@settings(max_examples=1000, deadline=None)
@given(any_box, any_box)
def test_iou_of_anything(a, b):
    sound = [all(-math.inf < v < math.inf for v in box) and box[0] < box[2] and box[1] < box[3] for box in (a, b)]
    assert 0 <= iou(a, b) <= 1 and iou(a, b) == iou(b, a) and -1 <= giou(a, b) <= 1 and giou(a, b) <= iou(a, b) + 1e-12
    if not all(sound):
        assert iou(a, b) == 0 and giou(a, b) == -1
    if sound[0] and all(abs(v) < 1e9 for v in a) and (a[2] - a[0]) * (a[3] - a[1]) > 1e-300:
        assert iou(a, a) == giou(a, a) == 1


def test_boxes_that_are_none_never_score():
    gold = (10, 10, 30, 20)
    for bad in ((30, 20, 10, 10), (30, 10, 10, 20), (10, 10, 10, 20), (10, 20, 30, 10), (math.nan, 10, 30, 20), (-math.inf, -math.inf, math.inf, math.inf), (-1e308, -1e308, 1e308, 1e308), (0, 0, 10**400, 10**400)):
        assert iou(bad, gold) == iou(gold, bad) == iou(bad, bad) == 0 and giou(bad, gold) == giou(gold, bad) == -1
    assert iou((-5, -5, 5, 5), (0, 0, 5, 5)) == .25 and iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0              # outside the image; half-open boxes that touch


@settings(max_examples=300, deadline=None)
@given(st.lists(small_box, max_size=7), st.lists(small_box, max_size=7), st.sampled_from([iou, giou]))
def test_matching_is_scipys(predicted, gold, similarity):
    optimize = pytest.importorskip("scipy.optimize")
    found = match_boxes(predicted, gold, similarity)
    value = np.array([[similarity(p, g) for g in gold] for p in predicted]).reshape(len(predicted), len(gold))
    rows, columns = optimize.linear_sum_assignment(value, maximize=True)
    assert sum(v for *_, v in found) == pytest.approx(value[rows, columns].sum()) and len(found) == min(len(predicted), len(gold))
    assert len({i for i, _, _ in found}) == len({j for _, j, _ in found}) == len(found) and all(v == value[i, j] for i, j, v in found)
    assert found == sorted(found)


def test_matching_of_many_random_values_is_scipys():
    optimize, rng = pytest.importorskip("scipy.optimize"), random.Random(0)
    for _ in range(150):
        n, m = rng.randint(1, 25), rng.randint(1, 40)
        value = [[rng.choice([rng.random(), -1.0, 0.5]) for _ in range(m)] for _ in range(n)]
        found = match_boxes(range(n), range(m), lambda i, j: value[i][j])
        rows, columns = optimize.linear_sum_assignment(np.array(value), maximize=True)
        assert sum(v for *_, v in found) == pytest.approx(np.array(value)[rows, columns].sum())


def by_hand(predicted, gold):
    """The mean over all ways to pair them, by enumeration."""
    short, long = sorted((predicted, gold), key=len)
    return max(sum(iou(a, b) for a, b in zip(short, chosen)) for chosen in permutations(long, len(short))) / max(len(gold), len(predicted))


@settings(max_examples=200, deadline=None)
@given(st.lists(small_box, min_size=1, max_size=5), st.lists(small_box, min_size=1, max_size=5))
def test_score_by_enumeration_does_not_depend_on_the_order(predicted, gold):
    assert box_score(predicted, gold) == pytest.approx(by_hand(predicted, gold))
    assert box_score(predicted[::-1], gold) == pytest.approx(box_score(predicted, gold[::-1]))


@pytest.mark.parametrize("answer, score", [
    (BOTH, 1), ("[[50,50,60,70],[10,10,30,20]]", 1), ("[10, 10, 30, 20]", .5), ("[[10, 10, 30, 20], [10, 10, 30, 20]]", .5), (f"{BOTH} {BOTH}", .5), ("[[10, 10, 20, 20], [50, 50, 60, 70]]", .75),
    ("[[30, 20, 10, 10], [50, 50, 60, 70]]", .5), ("[0, 0, 100, 100]", 200 / 10_000 / 2), ("no boxes", 0), ("[]", 0), ("", 0), ("[[nan, nan, nan, nan], [inf, 0, 0, 1]]", 0), (BOTH + "[1,2,3,4]" * 9998, 2 / 10_000)])
def test_score_of_an_answer_by_hand(answer, score):
    result = grade(BOXES, think(answer), CONFIG)
    assert result.parts["iou"] == pytest.approx(score) and result.correct == (score >= .5) and result.parts["accuracy"] == (score >= .5)
    if answer:
        assert result.total == result.parts["box"] == pytest.approx(score)
        assert grade(BOXES, f"<answer>{answer}</answer>", CONFIG).total == -1 and grade(BOXES, f"<answer>{answer}</answer>", CONFIG).parts["box"] == 0     # right boxes, malformed
        assert grade(BOXES, f"<answer>{answer}</answer>", CONFIG).parts["iou"] == pytest.approx(score)                                                  # is still logged


def test_box_rewards():
    one = replace(BOXES, answer=((0, 0, 10, 10),))
    near, far, none = "[0, 0, 10, 5]", "[20, 0, 30, 10]", "nowhere"
    assert [total(one, a, box_reward="iou") for a in (near, far, none)] == [.5, 0, 0]
    assert [total(one, a, box_reward="giou") for a in (near, far, none)] == pytest.approx([.75, (1 - 1 / 3) / 2, 0])
    assert total(one, "[10, 10, 0, 0]", box_reward="giou") == 0
    assert [total(one, near, box_reward="threshold", tau=tau) for tau in (0, .3, .5, .51)] == [1, 1, 1, 0]
    assert total(one, far, box_reward="threshold", tau=0) == 0                                     # nothing hit: no threshold is reached
    assert total(one, near, reward="acc-format", w_format=.5) == 1 and total(one, none, reward="acc-format", w_format=.5) == .5
    with pytest.raises(ValueError, match="iou, giou, threshold"):
        total(one, near, box_reward="diou")
    assert total(replace(one, answer=()), "[]") == total(replace(one, answer=()), near) == 0       # no gold box: nothing to earn


def test_boxes_refer_to_the_frame():
    frame = (100, 50, 400, 300)                                                                    # the model sees 100 x 50, the image is 400 x 300: x 4, y 6
    item = replace(BOXES, answer=((40, 60, 80, 120),), frame=frame)
    result = grade(item, think("[10, 10, 20, 20]"), CONFIG)
    assert result.total == 1 and result.predicted == ((40.0, 60.0, 80.0, 120.0),)
    assert total(item, "[40, 60, 80, 120]") == 0 and to_frame((40, 60, 80, 120), frame) == (10, 10, 20, 20)
    assert to_frame((1.4, 2.6, 3, 4), None) == (1, 3, 3, 4) and to_image((1, 2, 3, 4), None) == (1, 2, 3, 4)
    assert grade(BOXES, think("[0.06, 0, 3, 4.04]"), CONFIG).predicted == ((.1, 0, 3, 4),) and grade(BOXES, think("none"), CONFIG).predicted == ()


@settings(max_examples=300, deadline=None)
@given(small_box, st.tuples(*[st.integers(1, 2000)] * 4))
def test_frame_and_back_is_off_by_half_a_frame_pixel(box, frame):
    x, y = frame[2] / frame[0], frame[3] / frame[1]
    inside = to_frame(box, frame)
    most = [.5, .5, *(1.5 if (high - low) / scale <= 1 else .5 for low, high, scale in zip(box, box[2:], (x, y)))]       # what is thinner than a pixel becomes one
    assert all(abs(a - b) <= part * scale + 1e-9 for a, b, part, scale in zip(to_image(inside, frame), box, most, (x, y, x, y)))
    assert inside[0] < inside[2] and inside[1] < inside[3]


# ------------------------------------------------------------------------------------------------------- recitation
words = st.lists(st.sampled_from("the lens is red a swollen".split()), max_size=12).map(" ".join)


@settings(max_examples=500, deadline=None)
@given(words | st.text(max_size=30), st.lists(words | st.text(max_size=30), min_size=1, max_size=4))
@example("", ["the lens"])
@example("the lens", [""])
@example("a b c d e", ["a x c d e"])
@example("A_b-c", ["a B c"])
@example("a a b", ["a b", "a a x x"])  # clipped at the most of one reference; 2 and 4 are as near
@example("the lens is red", ["a swollen", "the lens is", "lens is red a a a"])
def test_bleu_is_sacrebleus(hypothesis, references):
    sacrebleu = pytest.importorskip("sacrebleu")

    def as_words(text):
        return " ".join(re.findall(r"[^\W_]+", text.lower()))

    ours, theirs = as_words(hypothesis), [as_words(text) for text in references]
    for n in (4, 2):
        metric = sacrebleu.BLEU(smooth_method="exp", tokenize="none", effective_order=True,
                                max_ngram_order=n)
        expected = metric.sentence_score(ours, theirs).score / 100
        assert bleu(hypothesis, references, n) == pytest.approx(expected, abs=1e-9)
        assert 0 <= bleu(hypothesis, references, n) <= 1 + 1e-12
    defaults = sacrebleu.sentence_bleu(ours, theirs, tokenize="none").score / 100
    assert bleu(ours, theirs) == pytest.approx(defaults, abs=1e-9)


def test_bleu_without_references_is_zero():
    assert bleu("the lens", []) == bleu("the lens", ()) == 0


def test_a_verbatim_copy_of_one_class_is_recited(tmp_path):
    """60 words of one class out of 300 words of knowledge: e^(1 - 61/60), since its name stands
    before them, and not the e^(1 - 300/60) = 0.02 of all knowledge as one reference."""
    texts = {k: " ".join(f"w{k}x{i}" for i in range(60)) for k in range(5)}
    sections = "".join(f"## {k}\n{text}\n" for k, text in texts.items())
    (tmp_path / "k.md").write_text(f"# task\nA grade.\n{sections}")
    (item,) = data.with_knowledge([GRADES], "mine.jsonl", "class", str(tmp_path / "k.md"))
    recited = grade(item, think("3", texts[3]), replace(CONFIG, recite=1.0)).parts["recite"]
    assert recited == pytest.approx(math.exp(1 - 61 / 60)) and recited > .98
    whole = sum((text.split() for text in texts.values()), [])
    assert len(whole) == 300 and bleu(texts[3], [" ".join(whole)]) == pytest.approx(math.exp(-4))


def test_bleu_reads_a_bounded_number_of_words():
    most = "a " * rewards.MAX_WORDS
    assert bleu(most + "b " * 999, ["a b"]) == bleu(most, ["a b"]) < bleu("a " * 99, ["a b"])


def test_recitation_in_the_reward():
    knows = replace(CLASSES, knowledge=("Basal cell carcinoma shows pearly borders and vessels",))
    copied, own = think("nevus", "basal cell carcinoma shows pearly borders and vessels"), think("nevus", "round and brown")
    for delta in (.5, -.5):
        config = replace(CONFIG, recite=delta)
        assert grade(knows, copied, config).total == pytest.approx(delta) and grade(knows, copied, config).parts["recite"] == pytest.approx(1)
        assert abs(grade(knows, own, config).total) < .1 and grade(CLASSES, copied, config).total == 0                    # nothing to recite
        assert grade(knows, copied.replace("</answer>", ""), config).total == -1                                           # malformed is malformed
    assert grade(knows, copied, CONFIG).total == grade(knows, copied, CONFIG).parts["recite"] == 0
    assert rewards.weights(replace(CONFIG, recite=-.5))["recite"] == -.5 and "recite" not in rewards.weights(CONFIG)


def test_weights_of_every_task():
    plain, on = CONFIG, replace(CONFIG, reward="fuzzy", w_format=.5)
    assert rewards.weights(plain) == rewards.weights(plain, "classify") == rewards.weights(plain, "grade") == {"accuracy": 1, "malformed": -1}
    assert rewards.weights(plain, "localize") == {"box": 1, "malformed": -1} and rewards.weights(on, "grade") == {"fuzzy": 1, "format": .5}
    assert rewards.weights(on) == rewards.weights(on, "classify") == {"accuracy": 1, "format": .5}
    keys = {tuple(sorted(grade(item, think("x"), CONFIG).parts)) for item in (CLASSES, GRADES, WORDED, BOXES, replace(CLASSES, task="choice", answer="B"))}
    assert len(keys) == 1                                                                          # the log averages every part over items of all tasks


# ------------------------------------------------------------------------------------------------------ hostile text
PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "[", "]", "[[", "{", '"bbox_2d":', "1", "10", "20", "30", ",", "-", ".", "e", "NaN", "Infinity", "-inf", "9" * 400, "٣", "Ⅲ", "３", "3", "grade ",
                          "severe", "basal cell", " carcinoma", "melanoma", "_", "**", "\\boxed{", "}", " ", "\n", "\x00", "\u202e", "[10, 10, 30, 20]", "[30, 20, 10, 10]", "[0,0,9999999,9999999]", "3/4", "or"])
HOSTILE = st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join)


@settings(max_examples=1500, deadline=None)
@given(HOSTILE | HOSTILE.map(think), st.sampled_from([CLASSES, GRADES, WORDED, BOXES]), st.sampled_from(["iou", "threshold"]), st.sampled_from(["med-rlvr", "acc-format", "fuzzy"]))
@example(think("[" * 50 + "10, 10, 30, 20" + "]" * 50), BOXES, "iou", "med-rlvr")
@example("<think>[10, 10, 30, 20] severe 3</think><answer>x</answer>", BOXES, "iou", "acc-format")
def test_generated_hacks_earn_no_more_than_form(text, item, box_reward, reward):
    config = replace(CONFIG, box_reward=box_reward, reward=reward, fuzzy="tenth")
    result, form = grade(item, text, config), {"med-rlvr": 0, "acc-format": 1, "fuzzy": 1}[reward]
    assert math.isfinite(result.total) and -1 <= result.total <= form + 1 and all(0 <= part <= 1 for part in result.parts.values())
    if result.total > form:                                                                        # more than form alone earns: then it is there to see
        answer = text[text.rfind("<answer>", 0, text.rfind("</answer>")) + 8:].split("</answer>")[0]
        if item.task == "localize":
            assert result.parts["iou"] > 0 and re.search(r"\[\s*-?[0-9.]+\s*,\s*-?[0-9.]+\s*,\s*-?[0-9.]+\s*,\s*-?[0-9.]+\s*\]", answer)
        else:                                                                                      # nothing but one name was in the one place that counts
            left = "".join(re.findall(r"[^\W_]+", answer.casefold().replace("boxed", ""))).removeprefix("grade")
            assert left in {"".join(re.findall(r"[^\W_]+", name)) for name in item.options} and result.predicted in item.options


@settings(max_examples=300, deadline=None)
@given(HOSTILE)
def test_generated_boxes_are_four_finite_numbers(text):
    assert all(len(box) == 4 and all(isinstance(v, float) and abs(v) < 1e8 for v in box) for box in boxes(text))
    assert boxes(text, 1) == boxes(text)[:1]


MEGABYTE = 1_000_000
LONG = ["[" * MEGABYTE, "[[1,2,3," * (MEGABYTE // 8), "9" * MEGABYTE, "[" + "9" * MEGABYTE, "[1," * (MEGABYTE // 3), "[" + " " * MEGABYTE, "[ 1.5 , " * (MEGABYTE // 8), "[1,2,3,4]" * (MEGABYTE // 9),
        "[1234567.123456789,1234567.123456789,1234567.123456789,1234567" * (MEGABYTE // 60), ("[" + " " * 9) * (MEGABYTE // 10), "-" * MEGABYTE, "a-" * (MEGABYTE // 2), "grade " * (MEGABYTE // 6), "**" * (MEGABYTE // 2),
        "[" * (MEGABYTE // 2) + "]" * (MEGABYTE // 2), "_a" * (MEGABYTE // 2), "_" * MEGABYTE, "\\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8), '{"bbox_2d": [1, 2, 3, 4]}, ' * (MEGABYTE // 27)]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_a_megabyte_takes_less_than_a_second(text):
    item = replace(BOXES, answer=tuple((10 * i, 0, 10 * i + 9, 9) for i in range(10)))
    start = time.process_time()
    assert len(boxes(text)) <= rewards.MAX_BOXES
    assert time.process_time() - start < 1
    for one in (item, CLASSES, GRADES):
        start = time.process_time()
        assert grade(one, think(text), CONFIG).total < .01 and grade(one, text, CONFIG).total == -1
        assert time.process_time() - start < 2                                                     # two gradings
    start = time.process_time()
    told = replace(CLASSES, knowledge=("pearly border " * 200,))
    assert grade(told, think("x", text), replace(CONFIG, recite=1.0)).total <= 1
    assert time.process_time() - start < 1


def test_thousands_of_boxes_are_matched_in_bounded_time():
    rng = random.Random(1)
    some = lambda n: [(x, y, x + rng.randint(1, 30), y + rng.randint(1, 30)) for x, y in ((rng.randint(0, 100), rng.randint(0, 100)) for _ in range(n))]
    gold, said = some(30), some(10_000)
    start = time.process_time()
    assert 0 < box_score(said, gold) <= 30 / 10_000
    assert time.process_time() - start < 1
    assert box_score(gold + said, gold) == pytest.approx(30 / 10_030)                              # the first are matched, the others only count


# ----------------------------------------------------------------------------------------------------------- metrics
labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", "d", ""])), min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore:A single label")
@settings(max_examples=200, deadline=None)
@given(labels)
def test_class_metrics_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = map(list, zip(*rows))
    found = evaluation.class_metrics(gold, predicted, ["a", "b", "c", "d"])
    assert found["balanced_accuracy"] == pytest.approx(metrics.recall_score(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0))
    if set(predicted) <= set(gold):
        assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(gold, predicted))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4) | st.none()), min_size=1, max_size=30))
def test_ordinal_metrics_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = map(list, zip(*rows))
    read = [(0 if g >= 2 else 4) if p is None else p for g, p in rows]                             # None: the grade farthest off
    found = evaluation.ordinal_metrics(gold, predicted, 5)
    if len(set(gold) | set(read)) > 1:
        assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(gold, read, weights="quadratic", labels=range(5)))
    else:
        assert found["kappa"] == 0
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(gold, read)) and found["off_by_one"] == pytest.approx(sum(abs(g - p) == 1 for g, p in zip(gold, read)) / len(gold))
    assert found["mae"] >= evaluation.ordinal_metrics(gold, gold, 5)["mae"] == 0


def test_refusing_to_answer_never_pays():
    gold = [0, 1, 2, 3, 4, 4, 3]
    wrong = evaluation.ordinal_metrics(gold, [1, 2, 3, 4, 3, 3, 2], 5)
    silent = evaluation.ordinal_metrics(gold, [None] * 7, 5)
    assert silent["mae"] > wrong["mae"] and silent["kappa"] < wrong["kappa"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=25))
def test_binary_auc_is_scikit_learns_and_counts_pairs(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, score = [g for g, _ in rows], [s / 8 for _, s in rows]                                    # eighths: 1 - s is exact, ties stay ties
    found = evaluation.auc([[1 - s, s] for s in score], gold)
    if len(set(gold)) == 1:
        assert found == .5
        return
    pairs = [(a > b) + .5 * (a == b) for a, g in zip(score, gold) if g for b, h in zip(score, gold) if not h]
    assert found == pytest.approx(metrics.roc_auc_score(gold, score)) == pytest.approx(sum(pairs) / len(pairs))


def test_macro_auc_is_scikit_learns():
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(0)
    for _ in range(20):
        gold, scores = [0, 1, 2, 3, *rng.integers(0, 4, 40).tolist()], rng.integers(1, 6, (44, 4)).astype(float)
        scores /= scores.sum(1, keepdims=True)
        assert evaluation.auc(scores.tolist(), gold) == pytest.approx(metrics.roc_auc_score(gold, scores, multi_class="ovr", average="macro"))
    without = [g if g < 3 else 0 for g in gold]                                                    # class 3 does not occur: the mean is over three
    assert evaluation.auc(scores.tolist(), without) == pytest.approx(np.mean([metrics.roc_auc_score(np.array(without) == k, scores[:, k]) for k in range(3)]))


def test_box_metrics_by_counting():
    scores = [k / 40 for k in range(41)]                                                           # 0, .025, ..., 1: thresholds fall on scores
    found = evaluation.box_metrics(scores)
    reach = [sum(40 * t <= 100 * k for k in range(41)) / 41 for t in range(50, 100, 5)]            # the same in whole numbers
    assert found == {"mean_iou": pytest.approx(.5), "accuracy_50": reach[0], "accuracy_80": reach[6], "accuracy_50_95": pytest.approx(sum(reach) / 10)}


def test_bootstrap_of_a_metric_is_scipys_and_keeps_columns_together():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(3)
    gold = rng.integers(0, 3, 120)
    predicted = np.where(rng.random(120) < .6, gold, rng.integers(0, 3, 120))
    metric = lambda g, p: float(np.mean(np.array(g) == np.array(p)) ** 2)
    theirs = stats.bootstrap((gold, predicted), metric, paired=True, vectorized=False, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)).confidence_interval
    both = lambda g, p: {"squared": metric(g, p), "share": float(np.mean(np.array(g) == 0))}
    found = evaluation.bootstrap_metrics(both, gold.tolist(), predicted.tolist(), draws=4000)
    assert found["squared"] == metric(gold, predicted) and found["ci95_of"]["squared"] == pytest.approx([theirs.low, theirs.high], abs=1.5e-2)
    assert found == evaluation.bootstrap_metrics(both, gold.tolist(), predicted.tolist(), draws=4000) and set(found) == {"squared", "share", "ci95_of"}
    perfect = evaluation.bootstrap_metrics(lambda g, p: evaluation.ordinal_metrics(g, p, 3), [0, 1, 2, 1, 0, 2], [0, 1, 2, 1, 0, 2], draws=200)
    assert perfect["kappa"] == 1 and perfect["ci95_of"]["mae"] == [0, 0] and perfect["ci95_of"]["kappa"][1] == 1     # kappa and mae of the same draws: columns together
