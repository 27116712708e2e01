"""The house: six modules to read, arrows that run one way, and how much a step walks through."""

import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import data
import train
from policy import Policy
from support.config import Config

ROOT = Path(train.__file__).parent
TOP = {"grpo", "rewards", "policy", "data", "train", "eval"}
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
MODULES |= {f"support.{path.stem}": path for path in (ROOT / "support").glob("*.py")}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


def test_exactly_six_modules_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_no_two_modules_import_each_other_even_round_a_corner():
    left = {name: imported(path) for name, path in MODULES.items()}
    assert left["train"] >= {"grpo", "rewards", "policy", "data"}  # or imports were not found
    while left:  # take away what imports nothing that is left
        leaves = {name for name, others in left.items() if not others & set(left)}
        assert leaves, f"a circle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in leaves}


def test_no_module_of_support_is_longer_than_350_lines():
    lengths = {}
    for name, path in MODULES.items():
        if name.startswith("support."):
            lengths[name] = len(path.read_text(encoding="utf-8").splitlines())
    assert len(lengths) > 10
    assert {name: n for name, n in lengths.items() if n > 350} == {}


def test_config_has_at_most_65_fields():
    assert len(fields(Config)) <= 65


class FirstStep(Exception):
    """The optimiser is about to move the weights."""


def functions_of_a_step(config: Config, run: Path, policy: Policy, splits: dict) -> list[str]:
    """Our named functions entered from `train.train` to the first `optimizer.step`."""
    entered, names = set(), []

    def watch(frame, event, argument):
        code = frame.f_code
        if event != "call" or code in entered:
            return
        entered.add(code)
        file = Path(code.co_filename)
        if file in ours and not code.co_name.startswith("<"):
            names.append(f"{ours[file]}: {code.co_qualname}")

    def stop(*args, **kwargs):
        raise FirstStep

    ours = {path: name for name, path in MODULES.items()}
    optimizer = train.make_optimizer(policy, config)
    log = train.Log(run, policy, optimizer, config)
    optimizer.step = stop
    sys.setprofile(watch)
    try:
        train.train(config, policy, optimizer, splits, log)
    except FirstStep:
        return names
    finally:
        sys.setprofile(None)
    raise AssertionError("the optimiser was not asked for a step")


@pytest.fixture(scope="module")
def names(model_dir, tmp_path_factory):
    """Those of a step of GRPO, all weights trained, a KL to the reference, on the demo's model."""
    settings = data.LOADERS["demo"].defaults | dict(kl_coef=0.04, prompts=4, samples=4)
    settings["max_new"] = 8  # too few for a finished row to be dropped
    policy = Policy.load(model_dir, lora=0, keep_reference=True)
    splits, run = {"train": data.load("demo", "train")}, tmp_path_factory.mktemp("run")
    return functions_of_a_step(Config(**settings), run, policy, splits)


def test_the_functions_of_a_step_are_found(names):
    print(f"{len(names)} functions", *sorted(names), sep="\n  ")
    assert len(set(names)) == len(names)
    parts = "policy: Policy.score, policy: Policy.reference, train: loss_of, rewards: grade"
    assert set(parts.split(", ")) <= set(names)


def test_one_step_of_grpo_enters_no_more_of_our_functions_than_it_did(names):
    """The aim is 50: a reader follows each of them. Lower this number, never raise it."""
    assert len(names) <= 68
