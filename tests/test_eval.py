"""Every statistic against a published package or a count by hand; the table of two models side by side."""
import argparse
import doctest
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import data
import demo as demos
import eval as evaluation
import policy as policies
import runs
import train
from data import UsageError
from policy import Rollout
from rewards import Parsed


def test_doctests():
    failed, tried = doctest.testmod(evaluation)
    assert tried >= 3 and not failed


@pytest.mark.parametrize("successes, n", [(0, 10), (10, 10), (3, 7), (150, 300), (1, 1273)])
def test_wilson_is_statsmodels(successes, n):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    assert evaluation.wilson(successes, n) == pytest.approx(proportion.proportion_confint(successes, n, method="wilson"), abs=1e-9)


@pytest.mark.parametrize("b, c", [(0, 0), (1, 5), (10, 10), (3, 30), (40, 22)])
def test_mcnemar_is_statsmodels(b, c):
    table = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = 1.0 if b + c == 0 else table.mcnemar([[50, b], [c, 50]], exact=True).pvalue
    assert evaluation.mcnemar(b, c) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).random(200)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)).confidence_interval
    assert evaluation.bootstrap(values) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_pass_at_k_by_enumeration():
    from itertools import combinations
    for n, right in ((5, 0), (5, 2), (6, 6), (4, 1)):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            draws = list(combinations(samples, k))
            assert evaluation.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority():
    assert evaluation.majority(["A", "B", "B", ""]) == "B" and evaluation.majority(["", "", "C"]) == "C"
    assert evaluation.majority(["B", "A", "A", "B"]) == "B" and evaluation.majority(["", ""]) == ""


def rollout(id, gold, predicted, options=("a", "b", "c")):
    item = data.Item(id, "choice", "Q" + id, options, gold)
    return Rollout(item, 0, [1], [2, 3], [0, 0], True, parsed=Parsed("", "x", predicted, "", True), correct=gold == predicted, predicted=predicted)


def test_letters_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = list("AABBBCCA"), list("AABACCBA")
    rows = [rollout(str(i), g, p) for i, (g, p) in enumerate(zip(gold, predicted))]
    report = evaluation.letters(rows)
    recall = dict(zip("ABC", metrics.recall_score(gold, predicted, average=None, labels=list("ABC"))))
    assert report["accuracy"] == pytest.approx(recall) and report["predicted"] == {"A": 4, "B": 2, "C": 2}
    assert evaluation.summary(rows)["accuracy"] == metrics.accuracy_score(gold, predicted)


def test_comparison_pairs_by_item():
    a = [rollout("1", "A", "A"), rollout("2", "A", "B"), rollout("3", "B", "B"), rollout("4", "C", "")]
    b = [rollout("3", "B", "B"), rollout("4", "C", "C"), rollout("2", "A", "A"), rollout("9", "A", "A")]
    facts = {"n": 4, "style": "think", "dataset": "d"}
    found = evaluation.compare((facts | {"model": "x"}, a), (facts | {"model": "y"}, b))
    assert (found["n"], found["only_a"], found["only_b"]) == (3, 0, 2) and found["difference"] == pytest.approx(2 / 3) and found["mcnemar_p"] == .5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        policy = demos.demo_policy(seed)
        if seed:
            for _ in demos.warm_start(policy, data.load("demo", "train")[:300], replace(train.Config(), **train.DEFAULTS["demo"]), clean_steps=60, diluted_steps=0):
                pass
        policy.model.save_pretrained(path / f"m{seed}")
        policy.tokenizer.save_pretrained(path / f"m{seed}")
    return path


def test_two_models_two_styles_one_table(folders, tmp_path, capsys):
    models = [str(folders / "m0"), str(folders / "m1")]
    evaluation.main([*models, "--dataset", "demo", "--limit", "25", "--max-new", "12", "--style", "think", "direct", "--samples", "3", "--rotate", "--likelihood",
                     "--json", str(tmp_path / "r.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert len(found["results"]) == 4 and len(found["comparisons"]) == 4 and out.count("| m0 |") == 2 and "McNemar" in out
    for result in found["results"]:
        assert result["n"] == 25 and sum(result["letters"]["predicted"].values()) == 25 and sum(result["stages"].values()) == pytest.approx(1)
        assert result["pass_at_k"]["1"] == pytest.approx(result["sampled_accuracy"]) and result["pass_at_k"]["3"] >= result["pass_at_k"]["1"]


def test_models_that_share_no_item_are_not_compared():
    """Two runs on boxes and on classes of the same set once ended, after hours, in a division by zero."""
    rollout = lambda name: Rollout(data.Item(name, "choice", name, ("x", "y"), "A"), 0, [], [], [], True, correct=True)
    result = {"model": "m", "style": "think", "dataset": "d", "n": 1}
    assert evaluation.compare((result, [rollout("a")]), (result, [rollout("b")]))["n"] == 0
    assert evaluation.compare((result, [rollout("a")]), (result, [rollout("a")]))["n"] == 1


def test_another_data_set_does_not_inherit_the_runs_task():
    args = evaluation.parser().parse_args(["RUN"])
    run = {"dataset": "bccd", "task": "classify", "knowledge": "class", "data_dir": "D"}
    assert evaluation.settings(args, run, "demo").task == "" and evaluation.settings(args, run, "demo").knowledge == "none"
    assert evaluation.settings(args, run, "bccd").task == evaluation.settings(args, run).task == "classify"


def test_a_model_alone_is_evaluated_with_trainings_own_defaults():
    found = evaluation.settings(evaluation.parser().parse_args(["MODEL"]), {})
    assert isinstance(found, train.Config)
    changed = set(asdict(found).items()) - set(asdict(train.Config()).items())
    assert changed == {("dataset", "medqa"), ("max_prompt", 2048)}


def test_another_seed_draws_other_samples_of_the_same_options():
    config = train.make_config({"shuffle_options": True, "seed": 3})
    orders = [evaluation.load_items(evaluation.settings(argparse.Namespace(seed=seed), asdict(config)), "dev", None) for seed in (None, 7)]
    assert orders[0] == orders[1] == train.load_splits(config)["dev"]


def test_likelihood_is_the_replicated_forward(folders):
    policy, items = policies.Policy.load(str(folders / "m1"), lora=0), data.load("demo", "test")[:6]
    expected = []
    for item in items:
        totals = []
        for letter in "ABCDE":
            prompt, ids = policy.prompt(item, "direct"), policy.tokenizer(f"<answer> {letter} </answer>").input_ids
            logps = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(logps.detach()[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)))
        expected.append("ABCDE"[int(np.argmax(totals))] == item.answer)
        assert evaluation.likelihoods(policy, item) == pytest.approx(totals, abs=1e-4)
    assert evaluation.by_likelihood(policy, items)["likelihood_accuracy"] == sum(expected) / len(expected)


def test_rotation_moves_the_gold_along():
    item = data.load("demo", "test")[0]
    for by in range(6):
        turned = data.rotate_options(item, by)
        assert turned.options["ABCDE".index(turned.answer)] == item.options["ABCDE".index(item.answer)] and turned.options[0] == item.options[by % 5]


def test_mmlu_pro_health(medqa_dir, monkeypatch):
    pytest.importorskip("pyarrow")
    items = data.load("mmlu-pro-health", "test", medqa_dir)
    assert len(items) == 100 and {3 <= len(i.options) <= 10 and i.answer in "ABCDEFGHIJ"[:len(i.options)] for i in items} == {True}
    with pytest.raises(UsageError, match="test"):
        data.load("mmlu-pro-health", "train", medqa_dir)
    with pytest.raises(UsageError, match="not there|is there"):
        data.load("mmlu-pro-health", "test", "/nowhere")


def test_parquet_without_pyarrow_and_a_damaged_file(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "MMLU-Pro/data/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="not the parquet"):
        data.load("mmlu-pro-health", "test", str(tmp_path))
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError()) if name.startswith("pyarrow") else real(name, *a, **k))
    with pytest.raises(UsageError, match="pip install pyarrow"):
        data.load("mmlu-pro-health", "test", str(tmp_path))


def test_contamination_is_counted(folders, tmp_path):
    items = data.load("demo", "test")[:30]
    rows = [json.dumps({"question": i.question, "options": list(i.options), "answer": i.answer}) for i in items]
    for name, part in (("train", rows[:20]), ("dev", rows[20:25]), ("test", rows[25:] + rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    run = {"dataset": str(tmp_path), "data_dir": "", "limit": 0, "task": ""}
    assert evaluation.seen_in_training(items, run) == 17                      # training leaves out the three that stand in its own test set
    assert evaluation.seen_in_training(items, run | {"dataset": "gone"}) is None


def test_ask_prints_one_answer(folders, capsys):
    evaluation.main([str(folders / "m1"), "--ask", "a man has crackles . which diagnosis ?\nA. gout\nB. pneumonia", "--max-new", "8"])
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("flags, words", [(["--dataset", "nothing"], "demo, demo-images, medqa"), (["--json", "/nowhere/f.json"], "does not exist"), (["--max-new", "0"], "at least 1"), (["--limit", "0"], "at least 1"), (["--target", "RBC"], "--dataset bccd-rbc")])
def test_mistakes_are_answered_before_the_model_is_loaded(flags, words, folders, monkeypatch):
    monkeypatch.setattr(runs, "open_policy", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=words):
        evaluation.main([str(folders / "m0"), "--dataset", "demo", *flags])
