"""Flags, recipes and what cannot work: one line each, before anything is loaded."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import refused

import train
from grpo import ALGOS
from support import cli
from support.cli import make_config, read_flags, validate
from support.config import RECIPES, Config

ROOT = Path(train.__file__).parent


# ------------------------------------------------------------------------------------ mistakes
MISTAKES = [
    ("--setps 3", "--steps"),
    ("--steps x", "invalid int"),
    ("--lr nan", "--lr"),
    ("--micro-batch -1", "--micro-batch"),
    ("--shots -1", "--shots"),
    ("--lora 0 --no-full", "--full"),
    # the algorithm
    ("--algo gpro", "choose from"),
    ("--samples 1", "group of 1"),
    ("--algo sft --samples 4", "one completion"),
    ("--temperature 0", "above 0"),
    ("--kl k1", "no gradient"),
    ("--algo ppo --kl k3", "k1"),
    ("--algo ppo --dynamic", "critic"),
    ("--algo ppo --full --critic lora --lora 0", "--critic head"),
    # data and model
    ("--dataset nothing", "demo-images, medqa"),
    ("--dataset nope.jsonl", "no data set named 'nope.jsonl'"),
    ("--dataset retinamnist-99", "retinamnist-28"),
    ("--dataset chestmnist", "multi-label"),
    ("--task grade", "only for choice"),
    ("--hackable --dataset medqa", "--hackable"),
    ("--hackable --recipe v-rft", "--hackable"),
    ("--hackable --model MODEL", "--hackable"),
    ("--recipe med-rlrv", "choose from"),
    ("--device gpu", "--device gpu"),
    ("--model ./no/such", "no such folder"),
    ("--model MODEL --init nowhere", "--init nowhere"),
    ("--model MODEL --max-prompt 5", "--max-prompt 5"),
    # the reward
    ("--w-format 1.5", "--w-format"),
    ("--fuzzy 0.5,1", "fuzzy"),
    ("--recite -0.5", "knowledge"),
    ("--knowledge class --recite 2", "--recite"),
]


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_mistakes_get_one_line_and_leave_nothing(flags, words, tmp_path, model_dir):
    argv = flags.replace("MODEL", model_dir).split()
    refused(lambda: train.main([*argv, "--out", str(tmp_path / "run")]), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    refused(lambda: train.main(["--device", "cuda", "--out", str(tmp_path / "run")]), "cuda")


# What to say instead, for each flag that an old command line may still have.
WAYS_ON = {
    "--updates": "--epochs",
    "--lam": "--gae-lambda",
    "--leave-one-out": "--advantage others",
    "--target": "--dataset bccd-rbc or bccd-platelets",
    "--knowledge-file": "--knowledge takes the file",
    "--lora-alpha": "twice the rank",
    "--lora-targets": "all linear layers",
    "--sample-rows": "chosen to fit into memory",
    "--refills": "is 3",
    "--overlong-share": "is 0.2",
    "--beta2": "is 0.95",
    "--weight-decay": "is 0",
    "--keep": "is 2",
    "--report-every": "python -m support.report RUN",
    "--balanced": "not offered",
    "--dual-clip": "not offered",
    "--box-reward": "mean IoU",
    "--tau": "mean IoU",
    "--tau-end": "mean IoU",
    "--top-p": "not for training",
    "--top-k": "not for training",
}


@pytest.mark.parametrize("flag", WAYS_ON)
def test_a_flag_that_is_gone_says_what_to_do(flag):
    for form in ([flag, "1"], [f"{flag}=1"], [flag.replace("--", "--no-", 1)]):
        message = refused(lambda argv=form: read_flags(argv), WAYS_ON[flag])
        assert message.startswith(form[0].partition("=")[0])


def test_every_flag_that_is_gone_is_known_here_and_is_gone():
    assert set(WAYS_ON) == set(cli.GONE)
    there = {"--" + f.name.replace("_", "-") for f in fields(Config)}
    assert not there & set(WAYS_ON)


def test_exit_code_2_and_no_traceback(tmp_path):
    asked = {"train.py": ["--samples", "1"], "eval.py": [str(tmp_path), "--dataset", "demo"]}
    for script, flags in asked.items():
        command = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- flags
def test_every_field_is_a_flag_of_its_own_type():
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            for argv, value in (([flag], True), ([flag.replace("--", "--no-", 1)], False)):
                assert read_flags(argv)[0] == {f.name: value}
            continue
        choices = ("gspo",) if f.name == "algo" else f.metadata["choices"] or ("x",)
        some = {int: "3", float: "0.5", str: choices[-1]}[f.type]
        found = read_flags([flag, some])[0]
        assert found == {f.name: f.type(some)} and type(found[f.name]) is f.type
        assert type(f.default) is f.type


def test_flags_beat_defaults_and_defaults_beat_the_algorithm():
    config = make_config({"dataset": "medqa", "algo": "dapo", "clip_high": 0.3})
    assert (config.clip_high, config.dynamic, config.weights) == (0.3, True, "token")
    assert config.template == "plain"
    assert make_config({"algo": "grpo", "dataset": "demo"}).kl_coef == 0
    assert make_config({"algo": "grpo", "dataset": "medqa"}).kl_coef == 0.04
    assert make_config({"algo": "dapo", "dataset": "medqa"}).minibatches == 4
    assert make_config({"algo": "dapo", "dataset": "demo"}).minibatches == 1
    assert Config().reward == "med-rlvr"


def test_hackable_names_a_data_set():
    assert read_flags(["--hackable"])[0] == {"hackable": "referral"}
    referral = make_config(read_flags(["--hackable"])[0])
    assert (referral.dataset, referral.w_overlong) == ("demo-referral", 1)
    outside = make_config({"hackable": "outside", "algo": "ppo"})
    assert (outside.dataset, outside.critic, outside.w_overlong) == ("demo-outside", "lora", 0)


def test_a_path_does_not_take_a_data_sets_settings_by_its_name():
    assert not make_config({"dataset": "demo-mine/train.jsonl"}).full
    assert make_config({"dataset": "bccd-mine.jsonl"}).model == ""
    small, large = (make_config({"dataset": name}) for name in ("retinamnist-28", "retinamnist"))
    assert small.model == large.model != ""


# ------------------------------------------------------------------------------------- recipes
def test_med_rlvr_holds_the_published_settings_and_flags_beat_it():
    config = make_config({"recipe": "med-rlvr", "prompts": 4})
    assert (config.dataset, config.algo, config.reward) == ("medqa", "ppo", "med-rlvr")
    assert (config.gamma, config.gae_lambda, config.clip_low) == (1.0, 0.95, 0.2)
    assert (config.kl, config.kl_coef, config.critic) == ("k1", 0.01, "lora")
    assert (config.samples, config.prompts, config.temperature) == (1, 4, 1.0)
    validate(config)


def test_vrft_aug_is_v_rft_with_its_augmentations():
    plain, augmented = (make_config({"recipe": name}) for name in ("v-rft", "vrft-aug"))
    assert plain.dataset == augmented.dataset == "retinamnist" and "VL-3B" in plain.model
    assert (plain.samples, plain.kl_coef, plain.reward) == (8, 0.04, "acc-format")
    assert (plain.knowledge, plain.recite) == ("none", 0)
    assert (augmented.reward, augmented.knowledge, augmented.recite) == ("fuzzy", "class", -0.5)
    assert make_config({"recipe": "vrft-aug", "fuzzy": "sixteenth"}).fuzzy == "sixteenth"
    # The recipe's rewards with the demo's sizes.
    demo = make_config({"recipe": "vrft-aug", "dataset": "demo-images", "task": "grade"})
    assert demo.model == "" and demo.full and demo.recite == -0.5


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("algo", list(ALGOS))
def test_a_recipe_with_another_algorithm_keeps_that_algorithms_settings(recipe, algo):
    own = make_config({"recipe": recipe})
    config = make_config({"recipe": recipe, "algo": algo})
    validate(config)
    if algo == own.algo:
        assert config == own
        return
    assert {name: getattr(config, name) for name in ALGOS[algo]} == ALGOS[algo]
    stays = "dataset model reward w_format fuzzy recite knowledge template max_new max_prompt"
    for name in stays.split():
        assert getattr(config, name) == getattr(own, name)


def test_the_papers_baselines_and_other_algorithms_by_hand():
    gspo = make_config({"recipe": "v-rft", "algo": "gspo"})
    assert (gspo.clip_low, gspo.clip_high, gspo.kl_coef) == (3e-4, 4e-4, 0)
    dapo = make_config({"recipe": "v-rft", "algo": "dapo"})
    assert (dapo.clip_low, dapo.clip_high, dapo.kl_coef) == (0.2, 0.28, 0)
    assert dapo.reward == "acc-format"
    sft = make_config({"recipe": "med-rlvr", "algo": "sft"})
    assert (sft.dataset, sft.samples, sft.prompts, sft.steps) == ("medqa", 1, 16, 300)
    assert (sft.max_new, sft.kl, sft.advantage) == (1024, "k3", "group")
    assert make_config({"recipe": "v-rft", "algo": "sft"}).samples == 1
    beaten = make_config({"recipe": "v-rft", "algo": "gspo", "clip_high": 0.1})
    assert beaten.clip_high == 0.1  # a flag beats all
