"""Checkpoints: damaged ones, a full disk, a folder that vanishes, the best one."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file
from training import CONFIG, adapted, artefacts, read, rows, run, shaken

import train
from support import checkpoints, runs
from support.checkpoints import newest_checkpoint


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(model_dir, tmp_path, capsys):
    whole = run(model_dir, tmp_path / "run")
    expected = artefacts(whole)
    newest = whole / "checkpoints" / "000006" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    train.main(["--resume", str(whole)])
    assert "000006 is damaged" in capsys.readouterr().err
    assert artefacts(whole) == expected


def test_a_full_disk_leaves_what_was_there_and_says_how_much_was_missing(
    model_dir, tmp_path, monkeypatch
):
    whole, half = run(model_dir, tmp_path / "whole"), tmp_path / "half"

    def full(tensors, path, save=checkpoints.save_file):
        save(tensors, path)
        if (half / "checkpoints" / "000002").exists():
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full)
        message = refused(lambda: run(model_dir, half), "No space left on device", "--resume")
    assert " MB, and " in message and " MB are free" in message
    assert newest_checkpoint(half).name == "000002"
    assert not (half / "checkpoints" / ".tmp").exists()
    train.main(["--resume", str(half)])
    assert artefacts(half) == artefacts(whole)


def test_a_folder_that_vanishes_is_said(model_dir, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def gone(tensors, path, save=checkpoints.save_file):
        shutil.rmtree(out, ignore_errors=True)
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", gone)
    refused(lambda: run(model_dir, out), "the folder is gone")


def test_the_best_checkpoint_by_dev_is_kept_beside_the_two_newest(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run")
    metrics = rows(out / "metrics.jsonl")
    dev = {m["step"]: m["dev_accuracy"] for m in metrics if "dev_accuracy" in m}
    best = out / "checkpoints" / "best"
    assert read(best / "state.json")["step"] == min(dev, key=lambda step: (-dev[step], step))
    names = sorted(path.name for path in best.parent.iterdir())
    assert names == ["000005", "000006", "best"]
    policy, _ = runs.open_policy(str(best), "cpu")
    saved = load_file(best / "policy.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(policy.trainable()[name], saved[name])


@pytest.mark.parametrize("critic", ["head", "lora"])
def test_weights_and_moments_come_back_to_their_own_parameters(critic, tmp_path):
    """Policy and critic are two groups of the optimiser, each with a rate of its own."""
    policy = shaken(adapted(critic=critic))
    optimizer = train.make_optimizer(policy, CONFIG)
    for number, p in enumerate(policy.trainable().values()):
        p.grad = torch.full_like(p, number + 1.0)
    optimizer.step()
    checkpoints.save_checkpoint(tmp_path, policy, optimizer, 7)
    other = adapted(critic=critic)
    restored = train.make_optimizer(other, CONFIG)
    assert checkpoints.restore(tmp_path, other, restored) == 7
    assert [group["lr"] for group in restored.param_groups] == [CONFIG.lr, CONFIG.value_lr]
    assert other.trainable().keys() == policy.trainable().keys()
    for name, p in policy.trainable().items():
        mine = other.trainable()[name]
        assert torch.equal(mine, p)
        for key, value in optimizer.state[p].items():
            assert torch.equal(restored.state[mine][key], value)
