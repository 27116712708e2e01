"""VRFT-Aug whole: its recipe on a file of the real schema, and boxes before grades."""

import numpy as np
import pytest
import torch
from helpers import refused
from safetensors.torch import load_file
from training import read, rows, weights_of

import data
import eval as evaluation
import train
from support.demo_model import tiny_vl_policy

SMALL = [
    *"--steps 2 --prompts 2 --samples 2 --max-new 8".split(),
    *"--eval-limit 2 --eval-samples 0 --eval-every 0".split(),
]


@pytest.fixture(scope="module")
def retina(tmp_path_factory):
    """A folder with a file of RetinaMNIST's schema, with other pixels."""
    folder, rng = tmp_path_factory.mktemp("medmnist"), np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (10, 28, 28, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 5, (10, 1))
    np.savez(folder / "retinamnist.npz", **arrays)
    return str(folder)


def evaluated(tmp_path, *arguments: str) -> dict:
    written = tmp_path / "e.json"
    evaluation.main([*arguments, "--samples", "0", "--json", str(written)])
    return read(written)


def test_the_recipe_runs_on_a_file_of_the_real_schema_and_logs_each_part(retina, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--recipe", "vrft-aug", "--data-dir", retina, "--model", "tiny-vl"]
    train.main([*flags, *SMALL, "--out", str(out)])
    assert "used, though its MD5 sum" in capsys.readouterr().err
    metrics = rows(out / "metrics.jsonl")
    assert len(metrics) == 2
    parts = {"part_fuzzy", "part_recite", "part_format"}
    assert parts | {"think_words", "length", "kl"} <= set(metrics[0])
    result = evaluated(tmp_path, str(out), "--limit", "3", "--data-dir", retina)
    assert {"kappa", "mae", "off_by_one", "balanced_accuracy", "macro_f1"} <= set(result)
    assert result["n"] == 3


def test_boxes_first_then_grades(tmp_path):
    """--init carries the policy, and the classifier after boxes alone can be evaluated."""
    texts = []
    for task in ("localize", "grade"):
        for item in data.load("demo-images", "train", limit=100, task=task):
            texts.append(data.messages(item)[1]["content"] + data.completion(item))
    base, boxes, grades = (tmp_path / name for name in ("base", "boxes", "grades"))
    tiny_vl_policy(0, texts).save_folder(base)
    common = ["--dataset", "demo-images", "--model", str(base), *SMALL]
    common += "--lr 0.01 --algo sft --samples 1".split()
    train.main([*common, "--task", "localize", "--out", str(boxes)])
    assert "kappa" in evaluated(tmp_path, str(boxes), "--limit", "2", "--task", "grade")
    after_boxes = ["--task", "grade", "--init", str(boxes)]
    train.main([*common, *after_boxes, "--out", str(grades)])
    came, started = weights_of(boxes), load_file(grades / "init.safetensors")
    assert came.keys() == started.keys()
    assert all(torch.equal(came[name], started[name]) for name in came)
    ended = weights_of(grades)
    assert any(not torch.equal(ended[name], started[name]) for name in started)
    other = [*common, *after_boxes, "--model", "tiny-vl", "--out", str(tmp_path / "other")]
    refused(lambda: train.main(other), str(base), "tiny-vl")


LEAST = [
    pytest.param("localize", "mean_iou", 0.62, marks=pytest.mark.slow),
    pytest.param("classify", "accuracy", 0.85, marks=pytest.mark.study),
    pytest.param("grade", "accuracy", 0.60, marks=pytest.mark.study),
]


@pytest.mark.parametrize("task, metric, least", LEAST)
def test_the_image_demo_learns(task, metric, least, tmp_path):
    train.main(["--dataset", "demo-images", "--task", task, "--out", str(tmp_path / "run")])
    before, after = (read(tmp_path / "run" / "eval.json")[when] for when in ("before", "after"))
    assert before["sampled_accuracy"] < 0.8 * after["sampled_accuracy"]
    assert after[metric] >= least and after["n"] == 300
