"""Every kind of run on a simulated CUDA device, by benchmarks/card.py: see there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import card

SIMULATOR = Path(os.environ.get("FAKECUDA", "no simulator"))
ROOT = Path(card.__file__).parent.parent
WAITS_PER_TOKEN = 1.0  # of the host for the device; each stalls the queue of kernels
WAITS_PER_UPDATE = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SIMULATOR.is_file(), reason="FAKECUDA names no simulated device"),
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("card") / "table.json"
    command = [sys.executable, str(SIMULATOR), "benchmarks/card.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # shown by -s
    return json.loads(file.read_text())


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
