"""What is sampled, what an accuracy counts, and two models side by side."""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

import data
import eval as evaluation
import rewards
import train
from data import Item
from policy import Rollout
from rewards import Parsed
from support import cli, distributed, eval_cli, runs
from support import demo_model as demos
from support.errors import UsageError

CONFIG = train.Config(max_new=6)


def rollout(id, gold, predicted):
    item = Item(id, "choice", "Q" + id, ("a", "b", "c"), gold)
    parsed = Parsed("", "x", predicted, "", True)
    found = Rollout(item, 0, [1], [2, 3], [0, 0], True, parsed=parsed)
    return replace(found, correct=gold == predicted, predicted=predicted)


def parsed(*argv):
    return eval_cli.parser().parse(list(argv))


# -------------------------------------------------------------------------------------- sampling
def contents(rollouts):
    return [(r.group, r.item.id, r.completion_ids) for r in rollouts]


def test_sampling_in_parts_changes_nothing(demo, items, monkeypatch):
    config = replace(CONFIG, samples=3, temperature=1.0)
    whole = evaluation.sample(demo, items, config, seed=5)
    answers = evaluation.answer(demo, items, CONFIG, n=3, temperature=1.0, seed=5, rows=6)
    assert contents(whole) == contents(answers)
    for rows in (6, 1):
        monkeypatch.setattr(demo, "sample_rows", rows)
        assert contents(whole) == contents(evaluation.sample(demo, items, config, seed=5))
    assert [r.group for r in whole] == [p for p in range(5) for _ in range(3)]
    assert [r.item.id for r in whole[::3]] == [item.id for item in items]
    assert len({tuple(r.completion_ids) for r in whole}) > 5


def lesion():
    item = data.load("demo-images", "test", task="localize")[0]
    policy = demos.tiny_vl_policy(0, [data.messages(item)[1]["content"] + data.completion(item)])
    return policy, item


def test_what_another_process_sampled_gets_its_pictures(monkeypatch):
    """They come without pixels, and training needs them; one opening serves a group."""
    policy, item = lesion()
    items, opened = [item, item], []
    config = replace(CONFIG, samples=2)
    alone = evaluation.sample(policy, items, config, seed=0)
    # The second process of two: its own half as it is, the first's as it arrives.
    theirs = [replace(r, pictures=None) for r in alone[:2]]
    monkeypatch.setattr(distributed, "rank", 1)
    monkeypatch.setattr(distributed, "world", 2)
    monkeypatch.setattr(distributed, "gathered", lambda mine: theirs + mine)
    look = policy.vision.look

    def counted(item, ids):
        opened.append(item.id)
        return look(item, ids)

    monkeypatch.setattr(policy.vision, "look", counted)
    found = evaluation.sample(policy, items, config, seed=0)
    assert contents(found) == contents(alone) and len(opened) == 2  # theirs, and ours to sample
    for one, other in zip(found, alone):
        assert (one.pictures.pixels == other.pictures.pixels).all()
    assert found[0].pictures is found[1].pictures


def test_an_answer_is_graded_and_keeps_no_pixels():
    policy, item = lesion()
    [found] = evaluation.answer(policy, [item], CONFIG)
    assert found.pictures is None and found.parsed is not None and "iou" in found.parts


def test_prompts_that_do_not_fit_are_dropped_and_said(demo, items, capsys):
    lengths = [len(ids) for ids in demo.encode(items)]
    config = replace(CONFIG, max_prompt=sorted(lengths)[1])
    kept = evaluation.fitting(demo, items, config, "dev: ")
    expected = [item for item, n in zip(items, lengths) if n <= config.max_prompt]
    assert kept == expected and 0 < len(kept) < 5
    assert f"dev: {5 - len(kept)} of 5 prompts are longer than" in capsys.readouterr().err
    with pytest.raises(UsageError, match="^dev: no prompt is within --max-prompt 1 tokens: raise"):
        evaluation.fitting(demo, items, replace(config, max_prompt=1), "dev: ")


# -------------------------------------------------------------------------------------- accuracy
def test_a_summary_by_hand():
    rows = [rollout("1", "A", "A"), rollout("2", "A", "B"), rollout("3", "B", "")]
    rows += [replace(rollout("4", "C", "C"), finished=False, completion_ids=[1] * 6)]
    found = evaluation.summary(rows)
    assert (found["accuracy"], found["n"], found["parsed"]) == (0.5, 4, 0.75)
    assert (found["truncated"], found["length"], found["well_formed"]) == (0.25, 3, 1)
    assert sum(found["stages"].values()) == 1 and found["stages"]["concise structurer"] > 0


def test_a_lenient_reader_takes_a_letter_alone_and_the_grader_does_not():
    texts = ["B", " b. ", "(B)", "**B**", "A", "B C", "The answer is B", "", "<answer> B </answer>"]
    rows = [replace(rollout(str(i), "B", ""), text=text) for i, text in enumerate(texts)]
    rewards.grade_all(rows, CONFIG)
    assert [row.correct for row in rows] == [False] * 8 + [True]
    assert evaluation.lenient(rows) == {"lenient_accuracy": 5 / 9}
    classes = replace(rows[0].item, task="classify", answer="b")
    assert evaluation.lenient([replace(rows[0], item=classes)]) == {}


def test_several_samples_by_hand():
    """maj@3: right, wrong. Two of three and one of three are right: pass@1 is 1/2, pass@3 is 1."""
    said = [("A", "B", "A"), ("B", "C", "B")]
    rows = [rollout(str(i), "ACx"[i], p) for i, of_item in enumerate(said) for p in of_item]
    found = evaluation.of_samples(rows, 3)
    assert found["sampled_accuracy"] == 0.5 and found["maj_at_k"] == 0.5
    assert found["pass_at_k"] == {1: pytest.approx(0.5), 3: 1.0}
    assert found["sampled_ci95"] == pytest.approx([1 / 3, 2 / 3])  # of two items: 1/3 and 2/3


def test_boxes_have_no_majority_and_a_column_of_their_own():
    policy, item = lesion()
    result, _ = evaluation.evaluate(policy, [item], CONFIG, samples=2)
    assert "maj_at_k" not in result and "mean_iou" in result
    asked = {"model": "m", "dataset": "d", "split": "test", "style": "think"}
    asked |= {"template": "plain", "stop_answer": True, "max_new": 6}
    head, _, row = eval_cli.table([result | asked]).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | ")))
    assert cells["maj@2"] == "-" and cells["mean IoU"] == f"{result['mean_iou']:.3f}"


def test_what_training_changed_in_a_line():
    before = {"accuracy": 0.1, "ci95": [0.05, 0.2], "n": 40}
    after = before | {"accuracy": 0.9, "sampled_accuracy": 0.85}
    assert evaluation.change({"before": before, "after": after}) == (
        "accuracy 0.100 [0.050, 0.200] -> 0.900 [0.050, 0.200] (sampled 0.850), n 40"
    )


def test_blank_and_swapped_images_are_asked_of_items_with_images(monkeypatch):
    policy, item = lesion()
    other = replace(data.load("demo-images", "test", task="localize")[1], id="other")
    assert other.answer != item.answer
    items = [replace(item, image=None), item, other]
    monkeypatch.setattr(evaluation, "sample", lambda policy, items, *how: unread(items))
    found = evaluation.looking(policy, items, CONFIG)
    assert found["blank_image_n"] == found["swapped_image_n"] == 2
    assert found["blank_image_mean_iou"] == found["swapped_image_accuracy"] == 0


def unread(items):
    return [Rollout(item, 0, [], [], [], True, text="?") for item in items]


# ---------------------------------------------------------------------------- models side by side
FACTS = {"n": 4, "style": "think", "dataset": "d"}


def test_comparison_pairs_by_item():
    a = [rollout("1", "A", "A"), rollout("2", "A", "B"), rollout("3", "B", "B")]
    a += [rollout("4", "C", "")]
    b = [rollout("3", "B", "B"), rollout("4", "C", "C"), rollout("2", "A", "A")]
    b += [rollout("9", "A", "A")]
    found = evaluation.compare((FACTS | {"model": "x"}, a), (FACTS | {"model": "y"}, b))
    assert (found["n"], found["only_a"], found["only_b"]) == (3, 0, 2)
    assert found["difference"] == pytest.approx(2 / 3) and found["mcnemar_p"] == 0.5


def test_models_that_share_no_item_are_not_compared():
    """Two runs on boxes and on classes of the same set once ended in a division by zero."""
    one, other = [(FACTS | {"model": "m"}, [rollout(id, "A", "A")]) for id in "12"]
    found = evaluation.compare(one, other)
    assert found["n"] == 0 and "share no item" in eval_cli.compared(found)
    assert evaluation.compare(one, one)["n"] == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        demos.demo_policy(seed).save_folder(path / f"m{seed}")
    return path


def letter_a(item):
    return "A"


def first_in_the_alphabet(item):
    return "ABCDE"[item.options.index(min(item.options))]


SAYS = {"m0": letter_a, "m1": first_in_the_alphabet}


def writing(policy, choose, items, n, *how):
    """Policy.sample of a model that has made up its mind."""
    rollouts = []
    for group, item in enumerate(items):
        text = f"<think> so </think> <answer> {choose(item)} </answer>"
        written = policy.written(policy.start(item, group, "think"), text)
        rollouts += [replace(written) for _ in range(n)]
    return rollouts


@pytest.fixture
def decided(monkeypatch):
    open_policy = runs.open_policy

    def opened(name, *how, **settings):
        policy, run = open_policy(name, *how, **settings)
        policy.sample = partial(writing, policy, SAYS[Path(name).name])
        return policy, run

    monkeypatch.setattr(runs, "open_policy", opened)


def test_two_models_two_styles_one_table(folders, tmp_path, capsys, decided):
    models = [str(folders / "m0"), str(folders / "m1")]
    flags = "--dataset demo --limit 25 --style think direct --samples 3 --rotate --likelihood"
    written = ["--json", str(tmp_path / "r.json"), "--answers", str(tmp_path / "a.jsonl")]
    evaluation.main([*models, *flags.split(), *written])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [Path(result["model"]).name for result in found["results"]] == ["m0", "m0", "m1", "m1"]
    assert [result["style"] for result in found["results"]] == ["think", "direct"] * 2

    items = data.load("demo", "test", limit=25)
    right = {m: [says(item) == item.answer for item in items] for m, says in SAYS.items()}
    assert 0 < sum(right["m0"]) and right["m0"] != right["m1"]
    for result in found["results"]:
        model = Path(result["model"]).name
        assert result["accuracy"] == result["sampled_accuracy"] == sum(right[model]) / 25
        assert set(result["pass_at_k"].values()) == {result["maj_at_k"]} == {result["accuracy"]}
        assert result["rotated_agreement"] == (1 if model == "m1" else 0)  # m0 reads no option
        assert (
            result["stages"]["direct answer hacker"] + result["stages"]["concise structurer"] == 1
        )
        assert len(result["likelihood_ci95"]) == 2
    assert found["results"][0]["letters"]["predicted"] == {"A": 25}

    pairs = list(zip(right["m0"], right["m1"]))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    numbers = [(pair["n"], pair["only_a"], pair["only_b"]) for pair in found["comparisons"]]
    assert numbers == [(25, only_a, only_b)] * 2 + [(25, 0, 0)] * 2  # models, then styles
    assert out.count("| m0 |") == 2 and out.count("McNemar") == 4

    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert len(rows) == 4 * (25 + 25 * 3) and [row["greedy"] for row in rows[24:26]] == [
        True,
        False,
    ]
    assert [row["correct"] for row in rows[:25]] == right["m0"]


def test_another_data_set_does_not_inherit_the_runs_task():
    args = parsed("RUN")
    run = {"dataset": "bccd", "task": "classify", "knowledge": "class", "data_dir": "D"}
    other = eval_cli.settings(args, run, "demo")
    assert (other.task, other.knowledge, other.data_dir) == ("", "none", "D")
    assert eval_cli.settings(args, run, "bccd").task == "classify"
    assert eval_cli.settings(args, run).task == "classify"


def test_a_flag_beats_the_run_and_its_help_says_the_default():
    run = {"max_new": 9, "template": "plain", "samples": 8, "limit": 5, "seed": 3}
    args = parsed("RUN", "--max-new", "7", "--samples", "2", "--limit", "1", "--seed", "4")
    found = eval_cli.settings(args, run)
    assert (found.max_new, found.template) == (7, "plain")
    assert (found.samples, found.limit, found.seed) == (8, 5, 3)  # these are the run's own
    text = " ".join(eval_cli.parser().format_help().split())
    assert "cut (default: the run's, else 2048)" in text


def test_a_model_alone_is_evaluated_with_trainings_own_defaults():
    found = eval_cli.settings(parsed("MODEL"), {})
    assert isinstance(found, train.Config)
    changed = set(asdict(found).items()) - set(asdict(train.Config()).items())
    assert changed == {("dataset", "medqa"), ("max_prompt", 2048)}


def test_another_seed_draws_other_samples_of_the_same_options():
    config = cli.make_config({"shuffle_options": True, "seed": 3})
    orders = []
    for seed in (None, 7):
        found = eval_cli.settings(argparse.Namespace(seed=seed), asdict(config))
        orders.append(eval_cli.load_items(found, "dev", None))
    assert orders[0] == orders[1] == train.load_splits(config)["dev"]


def test_faithful_are_right_answers_behind_the_true_steps():
    """Of four right ones: as the rationale, under other days, a level wrong, none at all."""
    item = replace(data.load("demo", "test")[0], rationale="day-1 low 2 day-2 rash 4 so 40-mg")
    said = (
        "day-1 low 2 day-2 rash 4 so 40-mg",
        "day-3 low 2 day-4 rash 4 so 40-mg",
        "day-1 low 3 day-2 rash 4 so 40-mg",
        "likely 40-mg",
    )
    right = [f"<think> {think} </think> <answer> {item.answer} </answer>" for think in said]
    wrong = f"<think> {said[0]} </think> <answer> none </answer>"
    rollouts = [Rollout(item, 0, [], [0], [], True, text=text) for text in (*right, wrong)]
    rewards.grade_all(rollouts, train.Config())
    found = evaluation.faithfulness(rollouts, "demo")
    assert found == {"faithful": 2 / 4, "faithful_labels": 1 / 4}
    assert evaluation.faithfulness(rollouts[-1:], "demo") == {"faithful": 0, "faithful_labels": 0}
    assert evaluation.faithfulness(rollouts, "medqa") == {}  # a rationale there is one of many
    assert evaluation.summary(rollouts)["think_words"] == (8 + 8 + 8 + 2 + 8) / 5


def test_contamination_is_counted(tmp_path):
    rows = []
    for item in data.load("demo", "test")[:30]:
        row = {"question": item.question, "options": list(item.options), "answer": item.answer}
        rows.append(json.dumps(row))
    parts = {"train": rows[:20], "dev": rows[20:25], "test": rows[25:] + rows[:3]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    items, run = data.load("demo", "test")[:30], {"dataset": str(tmp_path)}
    # Training leaves out the three that stand in its own test set.
    assert eval_cli.seen_in_training(items, run) == 17
    assert eval_cli.seen_in_training(items, run | {"limit": 4}) == 4
    assert eval_cli.seen_in_training(items, run | {"dataset": "gone"}) is None


def test_ask_prints_one_answer(folders, capsys):
    question = "a man takes veridol level 4 ; day-1 low ; which dose now ?\nA. 80-mg\nB. 5-mg"
    evaluation.main([str(folders / "m1"), "--ask", question, "--max-new", "8"])
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset nothing", "demo-images, medqa"),
        ("--json /nowhere/f.json", "does not exist"),
        ("--max-new 0", "at least 1"),
        ("--limit 0", "at least 1"),
        ("--max-pixel 0", "at least 1"),  # argparse takes what is not ambiguous
        ("--save-images /dev/null/x", "--save-images /dev/null/x: Not a directory"),
        ("--dataste demo", "unknown flag --dataste: did you mean --dataset?"),
        ("--template no", "invalid choice: 'no'.*; see --help"),
    ],
)
def test_mistakes_are_answered_before_the_model_is_loaded(flags, words, folders, monkeypatch):
    monkeypatch.setattr(runs, "open_policy", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=words):
        evaluation.main([str(folders / "m0"), "--dataset", "demo", *flags.split()])


def test_a_folder_without_a_model_is_named(tmp_path):
    for name, words in ((tmp_path, "neither a run"), (tmp_path / "no" / "where", "no such folder")):
        with pytest.raises(UsageError, match=words):
            evaluation.main([str(name)])


# ------------------------------------------------------------------------------------------ data
def test_rotation_moves_the_gold_along():
    item = data.load("demo", "test")[0]
    gold = item.options["ABCDE".index(item.answer)]
    for by in range(6):
        turned = data.rotate_options(item, by)
        assert turned.options["ABCDE".index(turned.answer)] == gold
        assert turned.options[0] == item.options[by % 5]
