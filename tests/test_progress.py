"""Lines where there is no terminal: what they say, that they come, and that they stop."""

import doctest
import threading

from training import run

from support import distributed, progress
from support.progress import Progress


def test_docstring_examples():
    assert doctest.testmod(progress).failed == 0


def test_a_line_says_what_is_done_what_it_gave_and_the_time_left():
    bar = Progress("dev greedy", 300)
    assert bar.line(30) == "dev greedy: 0 of 300 items, 30 s so far"
    bar.update(40, "12 right")
    # 40 items in 60 s, so 260 take 390 s.
    said = "dev greedy: 40 of 300 items, 12 right, 60 s so far, about 6 min left"
    assert bar.line(60) == said
    bar.update(260, "90 right")
    assert bar.line(450) == "dev greedy: 300 of 300 items, 90 right, 8 min so far, about 0 s left"


def test_what_was_done_before_does_not_count_for_the_speed():
    bar = Progress("train", 20, "step", done=10)
    bar.update(2)
    # 2 steps in 100 s, so 8 take 400 s.
    assert bar.line(100) == "train: 12 of 20 steps, 100 s so far, about 7 min left"


def test_work_of_unknown_length_says_that_it_goes_on():
    assert Progress("the longest batch").line(240) == "the longest batch: 4 min so far"


def test_lines_come_without_an_update_and_stop_at_the_end(monkeypatch):
    lines, three = [], threading.Event()

    def say(line):
        lines.append(line)
        if len(lines) == 3:
            three.set()

    monkeypatch.setattr(distributed, "say", say)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    before = threading.active_count()
    with Progress("the longest batch"):
        assert threading.active_count() == before + 1
        assert three.wait(60)
        [thread] = [t for t in threading.enumerate() if t.name.endswith("(talk)")]
    thread.join(60)
    assert not thread.is_alive()
    assert set(lines) == {"the longest batch: 0 s so far"}


def test_nothing_is_said_without_a_label_or_by_another_process(monkeypatch):
    before = threading.active_count()
    with Progress("", 3):
        assert threading.active_count() == before
    monkeypatch.setattr(distributed, "rank", 1)
    with Progress("dev", 3):
        assert threading.active_count() == before


def test_on_a_terminal_there_is_a_bar_and_no_thread(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("dev", 3) as bar:
        bar.update(1, "1 right")
        bar.bar.refresh()
        assert not [t for t in threading.enumerate() if t.name.endswith("(talk)")]
    shown = capsys.readouterr().err
    assert "dev" in shown and "1/3" in shown and "1 right" in shown


def test_every_phase_of_a_run_says_lines(model_dir, tmp_path, monkeypatch):
    """Rehearsal, evaluation and steps: what each has done, and what it gave."""
    lines = set()

    def spoken(self, n=1, gave="", update=Progress.update):
        lines.add(self.line(1.0))  # what the thread would say before this update, and after it
        update(self, n, gave)
        lines.add(self.line(1.0))

    entered = []
    monkeypatch.setattr(Progress, "update", spoken)
    monkeypatch.setattr(Progress, "__enter__", lambda self: entered.append(self.label) or self)
    run(model_dir, tmp_path / "run", *"--steps 2 --eval-every 2 --eval-limit 3".split())
    phases = ["the longest batch", "before test greedy", "train", "dev greedy", "after test greedy"]
    assert [label for label in dict.fromkeys(entered) if label in phases] == phases
    found = "\n".join(sorted(lines))
    assert "train: 0 of 2 steps, step 1 sampled, reward " in found
    assert "train: 1 of 2 steps, reward " in found and "about 1 s left" in found
    assert "before test greedy: 3 of 3 items, " in found and " of 3 right, 1 s so far" in found
