"""More than one process: N ranks do what one does, and a rank that dies leaves a way on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import refused
from ranks_job import SETTINGS
from safetensors.torch import load_file
from training import rows

from support import distributed
from support.demo_model import demo_policy

ROOT = Path(__file__).resolve().parent.parent


def torchrun(n: int, *command) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launch, "--nproc-per-node", str(n), *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(distributed.start, "4 processes and 2 GPUs", "--nproc-per-node 2")


def test_alone_nothing_is_shared_out():
    thing = [object()]
    assert distributed.world == 1 and distributed.share(5) == range(5)
    assert distributed.gathered(thing) is thing


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 3, 5, 16])
def test_shares_are_parts_in_order(monkeypatch, world, n):
    monkeypatch.setattr(distributed, "world", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", rank)
        parts.append(distributed.share(n))
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ------------------------------------------------------------------------------- ranks together
@pytest.fixture(scope="module")
def by_world(tmp_path_factory):
    """The settings of ranks_job.py on 1, 2 and 4 processes -> {world: folder}"""
    folders = {}
    for n in (1, 2, 4):
        folders[n] = tmp_path_factory.mktemp(f"world{n}")
        process = torchrun(n, "tests/ranks_job.py", folders[n])
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-4000:]
    return folders


def assert_close(one: dict, many: dict, within: float) -> None:
    assert one.keys() == many.keys()
    assert max(x.abs().max() for x in one.values()) > 1e-3
    for key in one:
        torch.testing.assert_close(many[key], one[key], rtol=within, atol=within)


def figures(metrics: dict) -> dict:
    return {name: x for name, x in metrics.items() if isinstance(x, float)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_together_are_one(by_world, world, name):
    one, many = (json.loads((by_world[n] / f"{name}.json").read_text()) for n in (1, world))
    assert many["tokens"] == one["tokens"] and sum(map(len, one["tokens"])) > 0
    assert many["logged"] == one["logged"] > 0
    for kind in ("gradients", "weights"):
        a, b = (load_file(by_world[n] / f"{name}.{kind}") for n in (1, world))
        assert_close(a, b, within=1e-6 if name == "ppo-fp32" else 1e-10)
    for a, b in zip(one["metrics"], many["metrics"]):
        assert a.keys() == b.keys()
        assert figures(a) == pytest.approx(figures(b), rel=1e-5, abs=1e-6)
        assert (a["stages"], a.get("dev_accuracy")) == (b["stages"], b.get("dev_accuracy"))
    if "--weights token" in SETTINGS[name]:  # a metric of one's own
        for completions, metrics in zip(many["tokens"], many["metrics"]):
            tokens = [token for ids in completions for token in ids]
            assert metrics["mean_token"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
            assert metrics["token"] == max(tokens)


# --------------------------------------------------------------------------------- a rank that dies
def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_steps(run: Path, n: int, process: subprocess.Popen) -> None:
    deadline, metrics = time.time() + 120, run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < n:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.time() < deadline, "no step was made"
        time.sleep(0.2)


SMALL = [
    *"--prompts 4 --samples 4 --max-new 8 --limit 40 --save-every 1 --template plain".split(),
    *"--eval-limit 4 --eval-samples 0 --eval-every 0 --steps 100000".split(),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_rank_that_dies_ends_the_run_and_fewer_go_on(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    demo_policy(0).save_folder(model)
    process = torchrun(2, "train.py", "--model", model, *SMALL, "--out", run)
    wait_for_steps(run, 3, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "another process has ended" in output and "--resume" in output
    done = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*[0-9]"))
    again = torchrun(1, "train.py", "--resume", run, "--steps", done + 2)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output[-3000:]
    assert "no longer bit for bit" in output
    assert [line["step"] for line in rows(run / "metrics.jsonl")] == list(range(1, done + 3))
    assert len(re.findall(r"^run folder", output, re.M)) == 1
