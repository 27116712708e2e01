"""How far a long phase is: a bar on a terminal, elsewhere a line every half a minute."""

import threading
import time

from tqdm import tqdm

from support import distributed

EVERY = 30.0  # seconds between two lines


class Progress:
    """with Progress("dev", 300) as progress: ...; progress.update(8, "3 right")

    Where there is no terminal a thread says the lines, so that they also come in the middle of one
    long forward pass. Without a label nothing is shown; of several processes only the first shows.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "item", done: int = 0):
        """total: None where it is not known how much there is to do; done: before this began."""
        self.label, self.total, self.unit = label, total, unit
        self.first, self.done, self.gave = done, done, ""
        self.began, self.over = time.monotonic(), threading.Event()
        self.shown = bool(label) and distributed.rank == 0
        disable = None if self.shown else True  # None: only where there is no terminal
        self.bar = tqdm(
            total=total, initial=done, desc=label, unit=unit, leave=False, disable=disable
        )

    def update(self, n: int = 1, gave: str = "") -> None:
        """n more are done; gave: what came of it so far, such as a reward."""
        self.done += n
        self.gave = gave
        self.bar.set_postfix_str(gave, refresh=False)
        self.bar.update(n)

    def talk(self) -> None:
        while not self.over.wait(EVERY):
            distributed.say(self.line(time.monotonic() - self.began))

    def line(self, seconds: float) -> str:
        """dev: 40 of 300 items, 12 right, 60 s so far, about 6 min left"""
        parts = [f"{self.done} of {self.total} {self.unit}s"] if self.total else []
        parts += [self.gave] if self.gave else []
        parts += [f"{span(seconds)} so far"]
        new = self.done - self.first
        if self.total and new:
            parts += [f"about {span(seconds / new * (self.total - self.done))} left"]
        return f"{self.label}: {', '.join(parts)}"

    def __enter__(self):
        if self.shown and self.bar.disable:
            threading.Thread(target=self.talk, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.bar.close()


def span(seconds: float) -> str:
    """A length of time in the largest unit of which there are two.

    >>> span(45), span(125), span(3 * 3600)
    ('45 s', '2 min', '3.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
