"""VRFT-Aug whole: knowledge files and their faults, the recipes, boxes before classes, and the demo's three tasks."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import data
import demo as demos
import eval as evaluation
import runs
import train
from data import Item, UsageError
from support import image_sets

ITEM = Item("i", "classify", "What is it?", ("nevus", "melanoma"), "nevus", image=np.zeros((28, 28), np.uint8))
GOOD = "<!-- a note -->\n# task\nA skin lesion.\n\n## nevus\nEven and\nbrown.\n## melanoma\nUneven.\n"


# ------------------------------------------------------------------------------------------- knowledge
@pytest.mark.parametrize("name", [*image_sets.MEDMNIST, "retinamnist-28", "bccd", "bccd-rbc", "demo-images classify", "demo-images grade", "demo-images localize"])
def test_every_class_is_described(name):
    dataset, _, task = name.partition(" ")
    if dataset.startswith("bccd"):
        items = [replace(ITEM, options=tuple(image_sets.BLOOD_CELLS.values()))]
    elif dataset == "demo-images":
        items = data.load("demo-images", "dev", limit=1, task=task)
    else:
        one = image_sets.MEDMNIST[dataset.partition("-")[0]]
        items = [replace(ITEM, task=one.task, options=tuple(one.labels.split("|")))]
    (item,) = data.with_knowledge(items, dataset, "class")
    named = {text.partition(": ")[0] for text in item.knowledge[1:]}
    assert named >= set(item.options)
    assert min(len(text.split()) for text in item.knowledge) > 20
    assert len(set(item.knowledge)) == len(item.knowledge)
    (task_only,) = data.with_knowledge(items, dataset, "task")
    assert task_only.knowledge == item.knowledge[:1]
    assert data.with_knowledge(items, dataset, "none") == items


def test_every_file_says_that_no_clinician_has_checked_it():
    files = list((Path(data.__file__).parent / "knowledge").glob("*.md"))
    assert len(files) == 15 and all("no clinician has checked" in path.read_text(encoding="utf-8").splitlines()[0] for path in files)


def test_knowledge_stands_in_the_prompt_at_the_level_asked_for(tmp_path):
    (tmp_path / "k.md").write_text(GOOD)
    prompts = {level: data.messages(data.with_knowledge([ITEM], "mine.jsonl", level, str(tmp_path / "k.md"))[0])[1]["content"] for level in ("none", "task", "class")}
    assert "A skin lesion." not in prompts["none"] and "A skin lesion." in prompts["task"] and "brown" not in prompts["task"]
    assert "nevus: Even and brown.\nmelanoma: Uneven." in prompts["class"]


@pytest.mark.parametrize("content, words", [(GOOD.replace("## melanoma\nUneven.\n", ""), "melanoma"), (GOOD + "## naevus\nx\n", "naevus"), (GOOD.encode("utf-16"), "UTF-8"), (GOOD + "## nevus\nagain\n", "line 10"),
                                            (GOOD.replace("Uneven.", ""), "melanoma"), (GOOD.replace("# task\nA skin lesion.", ""), "task"), (None, "cannot be read")])
def test_a_faulty_file_is_named_with_the_class(content, words, tmp_path):
    path = tmp_path / "k.md"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        data.with_knowledge([ITEM], "mine.jsonl", "class", str(path))
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_no_knowledge_for_ones_own_data_says_what_to_write():
    with pytest.raises(UsageError, match="mine.jsonl.*## NAME.*--knowledge-file"):
        data.with_knowledge([ITEM], "mine.jsonl", "class")


# --------------------------------------------------------------------------------------------- recipes
def test_recipes():
    plain, aug = train.make_config({"recipe": "v-rft"}), train.make_config({"recipe": "vrft-aug"})
    assert plain.dataset == aug.dataset == "retinamnist" and "VL-3B" in plain.model and (plain.samples, plain.kl_coef, plain.reward, plain.knowledge, plain.recite) == (8, .04, "acc-format", "none", 0)
    assert (aug.reward, aug.knowledge, aug.recite) == ("fuzzy", "class", -.5) and train.make_config({"recipe": "vrft-aug", "fuzzy": "sixteenth"}).fuzzy == "sixteenth"
    demo = train.make_config({"recipe": "vrft-aug", "dataset": "demo-images", "task": "grade"})
    assert demo.model == "" and demo.full and demo.recite == -.5             # the recipe's rewards with the demo's sizes


def of_row(config, algo):
    """The settings of a configuration that the algorithm's row names."""
    return {name: getattr(config, name) for name in train.ALGOS[algo]}


@pytest.mark.parametrize("recipe", ["v-rft", "vrft-aug", "med-rlvr"])
@pytest.mark.parametrize("algo", list(train.ALGOS))
def test_a_recipe_with_another_algorithm_keeps_that_algorithms_settings(recipe, algo):
    own = train.make_config({"recipe": recipe})
    config = train.make_config({"recipe": recipe, "algo": algo})
    train.validate(config)
    if algo == own.algo:
        assert config == own
        return
    assert of_row(config, algo) == train.ALGOS[algo]
    stays = ("dataset", "model", "reward", "w_format", "fuzzy", "recite", "knowledge", "template",
             "max_new", "max_prompt")
    assert [getattr(config, name) for name in stays] == [getattr(own, name) for name in stays]


def test_the_papers_baselines_and_other_algorithms_by_hand():
    gspo = train.make_config({"recipe": "v-rft", "algo": "gspo"})
    assert (gspo.clip_low, gspo.clip_high, gspo.kl_coef) == (3e-4, 4e-4, 0)
    dapo = train.make_config({"recipe": "v-rft", "algo": "dapo"})
    assert (dapo.clip_low, dapo.clip_high, dapo.kl_coef, dapo.reward) == (.2, .28, 0, "acc-format")
    sft = train.make_config({"recipe": "med-rlvr", "algo": "sft"})
    assert (sft.dataset, sft.samples, sft.prompts, sft.steps) == ("medqa", 1, 16, 300)
    assert (sft.max_new, sft.kl, sft.advantage) == (1024, "k3", "group")
    assert train.make_config({"recipe": "v-rft", "algo": "sft"}).samples == 1
    beaten = train.make_config({"recipe": "v-rft", "algo": "gspo", "clip_high": .1})
    assert beaten.clip_high == .1                                             # a flag beats all


@pytest.fixture(scope="module")
def retina(tmp_path_factory):
    """A file of RetinaMNIST's schema, with other pixels."""
    folder, rng = tmp_path_factory.mktemp("medmnist"), np.random.default_rng(0)
    np.savez(folder / "retinamnist.npz", **{f"{part}_images": rng.integers(0, 256, (10, 28, 28, 3), dtype=np.uint8) for part in ("train", "val", "test")},
             **{f"{part}_labels": rng.integers(0, 5, (10, 1)) for part in ("train", "val", "test")})
    return str(folder)


FAST = ["--steps", "2", "--prompts", "2", "--samples", "2", "--max-new", "8", "--eval-limit", "2", "--eval-samples", "0", "--eval-every", "0"]


def test_the_recipe_runs_on_a_file_of_the_real_schema_and_logs_each_part(retina, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--recipe", "vrft-aug", "--dataset", "retinamnist", "--data-dir", retina, "--model", "tiny-vl", "--out", str(out), *FAST])
    assert "used, though its MD5 sum" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {"part_fuzzy", "part_recite", "part_format", "think_words", "length", "kl"} <= set(rows[0])
    result, _ = evaluation.evaluate_model(str(out), evaluation.parser().parse_args([str(out), "--limit", "3", "--data-dir", retina]))[0]
    assert {"kappa", "mae", "off_by_one", "balanced_accuracy", "macro_f1"} <= set(result) and result["n"] == 3


def test_boxes_first_then_grades(tmp_path):
    """--init carries the policy, and the classifier after boxes alone can be evaluated."""
    items = [item for task in ("localize", "grade") for item in data.load("demo-images", "train", limit=100, task=task)]
    base = tmp_path / "base"
    demos.tiny_vl_policy(0, [data.messages(i)[1]["content"] + data.completion(i) for i in items]).save_folder(base)
    boxes, grades, common = tmp_path / "boxes", tmp_path / "grades", ["--dataset", "demo-images", "--model", str(base), *FAST, "--lr", "0.01", "--algo", "sft", "--samples", "1"]
    train.main([*common, "--task", "localize", "--out", str(boxes)])
    result, _ = evaluation.evaluate_model(str(boxes), evaluation.parser().parse_args([str(boxes), "--limit", "2", "--task", "grade"]))[0]
    assert "kappa" in result
    train.main([*common, "--task", "grade", "--init", str(boxes), "--out", str(grades)])
    came, started = load_file(runs.newest_checkpoint(boxes) / "policy.safetensors"), load_file(grades / "init.safetensors")
    assert set(came) == set(started) and all((came[name] == started[name]).all() for name in came)
    assert any((load_file(runs.newest_checkpoint(grades) / "policy.safetensors")[name] != started[name]).any() for name in started)
    with pytest.raises(UsageError, match=f"{base}.*tiny-vl"):
        train.main([*common, "--model", "tiny-vl", "--task", "grade", "--init", str(boxes), "--out", str(tmp_path / "other")])


@pytest.mark.slow
@pytest.mark.parametrize("task, metric, least", [("localize", "mean_iou", .62), ("classify", "accuracy", .85), ("grade", "accuracy", .60)])
def test_the_image_demo_learns(task, metric, least, tmp_path):
    train.main(["--dataset", "demo-images", "--task", task, "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["before"]["sampled_accuracy"] < .8 * found["after"]["sampled_accuracy"] and found["after"][metric] >= least and found["after"]["n"] == 300
