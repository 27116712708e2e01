"""More than one process: N ranks do what one does, and a rank that dies ends the run with a way on."""
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
from safetensors.torch import load_file

import demo
import ranks
from ranks_job import SETTINGS

ROOT = Path(__file__).resolve().parent.parent


def torchrun(n: int, *command, **kwargs) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, command)]
    return subprocess.Popen(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **kwargs)


def test_alone_nothing_is_shared_out():
    thing = [object()]
    assert ranks.world() == 1 and ranks.share(5) == range(5) and ranks.gathered(thing) is thing
    x = torch.ones(2)
    ranks.add_up(x)
    assert x.tolist() == [1, 1]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 3, 5, 16])
def test_shares_are_parts_in_order(monkeypatch, world, n):
    monkeypatch.setattr(ranks, "world", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        parts.append(ranks.share(n))
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


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


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_together_are_one(by_world, world, name):
    one, many = (json.loads((by_world[n] / f"{name}.json").read_text()) for n in (1, world))
    assert many["tokens"] == one["tokens"] and sum(map(len, one["tokens"])) > 0
    assert many["logged"] == one["logged"] > 0
    for kind in ("gradients", "weights"):
        a, b = (load_file(by_world[n] / f"{name}.{kind}") for n in (1, world))
        assert a.keys() == b.keys()
        assert max(x.abs().max() for x in a.values()) > 1e-3
        loose = 1e-6 if name == "ppo-fp32" else 1e-10
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=loose, atol=loose)
    for a, b in zip(one["metrics"], many["metrics"]):
        assert a.keys() == b.keys()
        figures = [{k: v for k, v in m.items() if isinstance(v, float)} for m in (a, b)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5, abs=1e-6)
        assert (a.get("stages"), a.get("dev_accuracy")) == (b.get("stages"), b.get("dev_accuracy"))
    if "--weights token" in SETTINGS[name]:                                # a metric of one's own
        for rows, metrics in zip(many["tokens"], many["metrics"]):
            tokens = [token for row in rows for token in row]
            assert metrics["mean_token"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
            assert metrics["token"] == max(tokens)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_rank_that_dies_ends_the_run_and_fewer_go_on(tmp_path):
    demo.demo_policy(0).save_folder(tmp_path / "model")
    flags = ["--dataset", "demo", "--model", tmp_path / "model", "--template", "plain", "--prompts", "4", "--samples", "4", "--max-new", "8", "--eval-limit", "4", "--eval-samples", "0",
             "--eval-every", "0", "--save-every", "1", "--limit", "40"]
    run = tmp_path / "run"
    process = torchrun(2, "train.py", *flags, "--steps", "100000", "--out", run)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0][-3000:] if process.poll() is not None else "no step was made"
        time.sleep(.2)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "another process has ended" in output and "--resume" in output
    done = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*[0-9]"))
    again = torchrun(1, "train.py", "--resume", run, "--steps", done + 2)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output[-3000:]
    assert "no longer bit for bit" in output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == list(range(1, done + 3))
    assert len(re.findall(r"^run folder", output, re.M)) == 1
