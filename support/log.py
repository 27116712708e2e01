"""What a run writes while it goes (metrics, completions, seconds, checkpoints), and its end."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewards import stage
from support import distributed
from support.alarms import alarms, describe, troubles
from support.checkpoints import restore, save_checkpoint, writing
from support.distributed import say
from support.errors import UsageError
from support.metrics import Stats, over_steps
from support.pass_rates import told
from support.progress import Progress

NON_FINITE = 5  # steps in a row without a finite update after which a run is stopped


class Log:
    """metrics.jsonl and rollouts.jsonl, functions of the run alone, timing.jsonl and checkpoints.

    After a resume no step stands twice.
    """

    def __init__(self, run: Path, policy, optimizer, config, stopping=()):
        self.run, self.policy, self.optimizer, self.config = run, policy, optimizer, config
        self.stopping = stopping
        self.first = restore(run, policy, optimizer)
        self.files = {}
        for name in ("metrics", "rollouts", "timing") if distributed.rank == 0 else ():
            self.files[name] = self.reopened(run / f"{name}.jsonl")
        distributed.gathered([])  # the others read metrics.jsonl next
        with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
            self.history = [json.loads(line) for line in lines]
        self.progress = Progress("train", config.steps, "step", done=self.first)

    def reopened(self, path: Path):
        """The file with the whole lines of the steps that are done, ready for the next."""
        lines = []
        if path.exists():
            with path.open(encoding="utf-8") as file:  # not splitlines: a text may hold U+2028
                lines = file.readlines()
        done = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.first]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(done), encoding="utf-8")
        beside.replace(path)
        return path.open("a", encoding="utf-8")

    def steps(self) -> Iterator[int]:
        """The steps that are still to be done."""
        for step in range(self.first, self.config.steps):
            self.step, self.began = step, time.perf_counter()
            self.rollouts, self.updates, self.metrics = [], [], {"step": step + 1}
            yield step
        for file in self.files.values():
            file.close()

    # -- what is told of a step, in this order
    def sampled(self, rollouts: list) -> None:
        self.rollouts = rollouts
        self.sample_s = time.perf_counter() - self.began
        if rollouts:
            reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
            self.progress.gave = f"step {self.step + 1} sampled, reward {reward:.3f}"

    def updated(self, stats: Stats) -> None:
        """One optimiser step."""
        self.updates.append(stats)

    def due(self, every: int) -> bool:
        return bool(every) and (self.step + 1) % every == 0

    def on_dev(self, result: dict) -> None:
        for name in ("accuracy", "ci95", "kappa", "mean_iou"):
            if name in result:
                self.metrics[f"dev_{name}"] = result[name]

    def write(self, batch, **in_use) -> None:
        """metrics.jsonl, rollouts.jsonl and timing.jsonl of this step; troubles and alarms."""
        config = self.config
        in_use |= {"kl_coef": config.kl_coef, "temperature": config.temperature}
        metrics = self.metrics | describe(self.rollouts) | over_steps(self.updates) | in_use
        self.history.append(metrics)
        if found := alarms(self.history):
            metrics["alarms"] = found
        trouble = []
        if config.algo != "sft":  # demonstrations are all right: equal rewards are no trouble there
            trouble += troubles(self.history)
            if self.rollouts and self.step == 0 and not config.dynamic:  # that keeps mixed groups
                trouble += told(self.rollouts, config)
        for message in (*trouble, *(f"ALARM: {text}" for text in found)):
            say(f"step {self.step + 1}: {message}")
        shown = self.rollouts[: config.log_groups * config.samples]
        advantages = batch.advantages[:, :, 0].flatten().tolist()  # of each row's first token
        seconds = time.perf_counter() - self.began
        timing = {
            "step": self.step + 1,
            "sample_s": self.sample_s,
            "step_s": seconds,
            "tokens": sum(len(r.completion_ids) for r in self.rollouts),
            "micro_batch": config.micro_batch,
        }
        self.append("rollouts", [self.row(r, A) for r, A in zip(shown, advantages)])
        self.append("timing", [timing])
        self.append("metrics", [metrics])
        self.show(metrics, seconds)

    def append(self, name: str, rows: list[dict]) -> None:
        if name not in self.files:  # only the first process writes
            return
        with writing(self.run, f"{name}.jsonl of step {self.step + 1}"):
            for row in rows:
                self.files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            self.files[name].flush()

    def row(self, rollout, advantage: float) -> dict:
        """A line of rollouts.jsonl: all that the report shows of a completion."""
        tokenizer, r = self.policy.tokenizer, rollout
        row = {
            "step": self.step + 1,
            "group": r.group,
            "id": r.item.id,
            "question": r.item.question,
            "options": r.item.options,
            "gold": r.item.answer,
            "frame": r.item.frame,
            "text": r.text,
            "reward": r.reward,
            "parts": r.parts,
            "advantage": advantage,
            "correct": r.correct,
            "predicted": r.predicted,
            "finished": r.finished,
            "stage": stage(r.parsed, r.item, len(r.completion_ids)),
            "tokens": len(r.completion_ids),
            "pieces": [tokenizer.decode([token]) for token in r.completion_ids],
        }
        if self.config.algo != "sft":  # nobody sampled those
            row["logps"] = [round(logp, 3) for logp in r.sample_logps]
        return row

    def show(self, metrics: dict, seconds: float) -> None:
        names = [name for name in ("reward", "accuracy", "length") if name in metrics]
        said = ", ".join(f"{name} {metrics[name]:.3f}" for name in names)
        self.progress.update(1, said)
        if self.progress.bar.disable and self.due(10):  # no terminal: every ten steps in any case
            say(f"step {self.step + 1} of {self.config.steps}: {said}, {seconds:.1f} s")

    def save(self) -> None:
        """The checkpoints that are due; the end of the run where it is asked for or hopeless."""
        config, step = self.config, self.step + 1
        dev = [m["dev_accuracy"] for m in self.history if "dev_accuracy" in m]
        if "dev_accuracy" in self.history[-1] and dev[-1] > max(dev[:-1], default=-1):
            # First: once the next one is there, this step is not done again.
            save_checkpoint(self.run, self.policy, self.optimizer, step, best=True)
        # A signal may reach one process a step before another.
        stopping = distributed.gathered(list(self.stopping))
        last = self.history[-NON_FINITE:]
        hopeless = len(last) == NON_FINITE and all(m.get("skipped") == 1 for m in last)
        if step == config.steps or self.due(config.save_every) or stopping or hopeless:
            save_checkpoint(self.run, self.policy, self.optimizer, step)
        if hopeless:
            raise UsageError(
                f"{NON_FINITE} steps in a row had no finite loss and gradient; the checkpoint of "
                f"step {step} is kept. A smaller --lr or --max-grad-norm would help, in a new run "
                f"from --init {self.run}"
            )
        if stopping and step < config.steps:
            say(f"stopped after step {step}; go on with: python train.py --resume {self.run}")
            raise SystemExit(128 + stopping[0])


@contextmanager
def stop_signals():
    """Within it SIGINT and SIGTERM let the step finish: their number appears in the list.

    A second one ends the process at once.
    """
    seen: list[int] = []

    def handler(number, frame):
        # torchrun sends SIGTERM after the SIGINT that all got.
        if seen and (distributed.world == 1 or number in seen):
            os._exit(128 + number)
        seen.append(number)
        say("stopping when this step is done and written; once more stops at once")

    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # Python's rule
        numbers = ()
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield seen
    finally:
        for number, old in zip(numbers, before):
            signal.signal(number, old)
