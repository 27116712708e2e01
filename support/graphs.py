"""A decoding step recorded on a GPU as a CUDA graph and replayed: one launch in place of thousands.

A step of a 3B model is some two thousand kernels of microseconds. Python and the driver take longer
to launch them than the GPU to run them; a graph launches them all at once, from the same addresses.
"""

from contextlib import contextmanager
from functools import lru_cache, wraps

import torch

from support.distributed import say
from support.errors import first_line, ran_out


@lru_cache
def side_stream(device: torch.device):
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device):
    """On the side stream, in order with what stands before and behind it.

    The default stream cannot be recorded. A failed recording stays on its stream: here it is left.
    """
    if device.type != "cuda":
        yield
        return
    here, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def capture(step) -> torch.cuda.CUDAGraph:
    """The kernels of a step: recorded, not run."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's, may use the GPU meanwhile.
    stream, mode = torch.cuda.current_stream(), "thread_local"
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        step()
    return graph


class Failed(RuntimeError):
    """A recording, or what it does. Nothing that was sampled with it counts."""


class Replay:
    """A step called again and again: plainly, then recorded and replayed; anew where shapes change.

    One belongs to one sampling call, within one autocast block: a graph holds the addresses of
    autocast's copies of the weights, which go when that block ends and are stale after an update.
    """

    def __init__(self, step, draft, cache):
        self.step, self.draft, self.cache = step, draft, cache
        self.shape, self.graph = None, None

    def __call__(self) -> None:
        shape = (*self.draft.rows.shape, self.cache.span)
        if shape != self.shape:
            # Plainly, as a warm-up: libraries allocate at their first call, a recording cannot.
            self.shape, self.graph = shape, None  # the old one's memory is free before the new's
            with aside(self.cache.t.device):
                return self.step()
        if self.graph is None:
            self.record()
        self.graph.replay()

    def record(self) -> None:
        """Record the step and try it on the one before, which was done plainly in these shapes.

        Done again, that one must change nothing. A number of the host's is another one there.
        """
        try:
            with aside(self.cache.t.device):
                self.graph = capture(self.step)
        except RuntimeError as error:
            cause = error.__context__ or error  # the step's own, not what ended the recording
            if ran_out(cause):
                raise cause from None  # not the graph's fault: fewer rows would fit
            raise Failed(first_line(cause)) from error
        before = [x.clone() for x in (self.cache.t, self.draft.tokens, self.draft.logps)]
        self.cache.t -= 1
        self.graph.replay()
        after = self.cache.t, self.draft.tokens, self.draft.logps
        if not all(
            torch.allclose(x, y, rtol=0, atol=1e-3, equal_nan=True) for x, y in zip(before, after)
        ):
            raise Failed("a replayed step differs from a plain one")


def or_plainly(sample):
    """A sampling call whose recording fails starts again, by plain steps as all later ones."""

    @wraps(sample)
    def call(policy, *args, **kwargs):
        try:
            return sample(policy, *args, **kwargs)
        except Failed as error:
            say(f"decoding without CUDA graphs: {error}")
            policy.replay = False
        # Here, where the exception no longer holds the first call's buffers.
        return sample(policy, *args, **kwargs)

    return call
