"""Runs on a simulated CUDA device, and the memory table beside what it holds: see benchmarks/."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import card, memory_table
from support.demo_model import demo_policy

SIMULATOR = Path(os.environ.get("FAKECUDA", "no simulator"))
ROOT = Path(card.__file__).parent.parent
# Of the host for the device: each stalls the queue of kernels. Rows of a few tokens, as here, have
# more of them a token than long ones (benchmarks/decoding.py: 0.125).
WAITS_PER_TOKEN = 1.25
WAITS_PER_UPDATE = 80

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SIMULATOR.is_file(), reason="FAKECUDA names no simulated device"),
]


def simulated(
    script: str, *flags: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SIMULATOR), *before, script, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def table_of(script: str, file: Path, *flags: str) -> dict:
    done = simulated(script, "--json", str(file), *flags)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # shown by -s
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    return table_of("benchmarks/card.py", tmp_path_factory.mktemp("card") / "table.json")


@pytest.mark.parametrize("name", card.RUNS)
def test_a_run_on_the_card(table, name):
    found = table[name]
    assert found["result"] == "ok"
    assert found["refused"] == []
    assert found["waits_per_token"] <= WAITS_PER_TOKEN
    assert found["waits_per_update"] <= WAITS_PER_UPDATE


def test_every_kind_of_update_was_counted(table):
    """An update without a wait is none: the gradient's norm is read."""
    for name in card.TRAINED:
        assert table[name]["waits_per_update"] > 0, name


def test_the_memory_table_is_right_within_a_tenth(tmp_path):
    """With four of 36 layers; benchmarks/results/memory_table.json has them all."""
    names = [name for name, case in memory_table.CASES.items() if case.card == math.inf]
    flags = ["--layers", "4", "--cases", *names]
    cases = table_of("benchmarks/memory_table.py", tmp_path / "table.json", *flags)["cases"]
    assert len(cases) >= 8
    for name in names:
        for phase in memory_table.CASES[name].phases:
            assert abs(cases[name][phase]["off"]) < 0.1, (name, phase, cases[name][phase])


def test_a_card_too_small_ends_in_a_line(tmp_path):
    """Before anything is trained; 3 MB hold the demo's weights, not an update of them."""
    demo_policy(0).save_folder(tmp_path / "model")
    flags = f"--model {tmp_path}/model --device cuda --out {tmp_path}/run".split()
    done = simulated("train.py", *flags, before=("--memory", "0.001"))
    assert done.returncode == 2
    lines = done.stderr.partition("--- fakecuda")[0].splitlines()
    assert lines[-1].startswith("train.py: ") and "are missing" in lines[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
