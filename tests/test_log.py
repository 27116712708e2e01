"""What a run writes while it goes, and how it ends: signals, steps that are never finite."""

import os
import signal

import pytest
from helpers import refused
from training import artefacts, rows, run

import rewards
import train
from support.checkpoints import newest_checkpoint
from support.log import Log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_as_if_nothing_had_been(
    number, model_dir, tmp_path, monkeypatch, capsys
):
    whole, handler = (
        run(model_dir, tmp_path / "whole", "--save-every", "4"),
        signal.getsignal(number),
    )
    half = tmp_path / "half"

    def interrupted(self, batch, write=Log.write, **in_use):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return write(self, batch, **in_use)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(model_dir, half, "--save-every", "4")
    assert stopped.value.code == 128 + number
    assert f"--resume {half}" in capsys.readouterr().err
    assert newest_checkpoint(half).name == "000003" and signal.getsignal(number) == handler
    train.main(["--resume", str(half)])
    assert artefacts(half) == artefacts(whole)


def test_steps_that_are_never_finite_end_the_run_with_a_checkpoint(
    model_dir, tmp_path, monkeypatch, capsys
):
    def broken(*args, loss_of=train.loss_of):
        loss, stats = loss_of(*args)
        stats.sum("loss", float("nan"))
        return loss * float("nan"), stats

    monkeypatch.setattr(train, "loss_of", broken)
    out = tmp_path / "run"
    refused(lambda: run(model_dir, out, "--save-every", "0"), "5 steps in a row", f"--init {out}")
    assert newest_checkpoint(out).name == "000005" and "step 1:" in capsys.readouterr().err


def test_equal_rewards_are_no_trouble_while_demonstrations_are_taught(model_dir, tmp_path, capsys):
    run(model_dir, tmp_path / "sft", *"--algo sft --samples 1 --steps 5".split())
    shown = capsys.readouterr().err
    assert "nothing is learned" not in shown and "can this learn?" not in shown


def test_a_logged_rollout_has_a_piece_and_a_log_prob_of_each_token(model_dir, tmp_path, capsys):
    out = run(model_dir, tmp_path / "run", *"--steps 2 --log-groups 3 --advantage others".split())
    # Said of the first step, and of no other.
    assert capsys.readouterr().err.count("can this learn? 4 questions of train, 4 completions") == 1
    lines = rows(out / "rollouts.jsonl")
    assert len(lines) == 2 * 3 * 4
    for line in lines:
        assert len(line["pieces"]) == len(line["logps"]) == line["tokens"]
        assert max(line["logps"]) <= 0 and line["stage"] in rewards.STAGES
    for first in range(0, len(lines), 4):  # each against the mean of the other three
        group = lines[first : first + 4]
        assert len({line["id"] for line in group}) == 1
        earned = [line["reward"] for line in group]
        deviations = [r - (sum(earned) - r) / 3 for r in earned]
        for deviation, line in zip(deviations, group):
            assert (deviation > 0) == (line["advantage"] > 0)
            assert (deviation < 0) == (line["advantage"] < 0)
    assert "Completions" in (out / "report.html").read_text(encoding="utf-8")


def test_a_demonstration_has_no_log_probs(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", *"--algo sft --samples 1 --steps 1".split())
    (line,) = rows(out / "rollouts.jsonl")
    assert "logps" not in line and len(line["pieces"]) == line["tokens"] > 0
