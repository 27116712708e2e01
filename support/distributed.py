"""Several processes, started by torchrun, that train as one. Alone, each function does nothing.

Each process (rank) holds the whole model, samples and scores a share of the prompts, and its
gradient is added to the others'. Samples, log-probs and gradients are exchanged whole. Therefore
every rank computes the same advantages, weights, metrics and update as one process would, and
nothing else in this code needs to know how many there are. Only rank 0 writes.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from support.errors import UsageError
from support.metrics import Stats

rank, world = 0, 1  # this process's number, and how many there are; `start` sets them
PATIENCE = datetime.timedelta(minutes=20)  # how long one rank waits for another


def start() -> None:
    """Join the other processes, where torchrun started us."""
    global rank, world
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        processes, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > cards:
            raise UsageError(
                f"{processes} processes and {cards} GPUs: start torchrun with --nproc-per-node "
                f"{cards}, or set CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    dist.init_process_group(backend, timeout=PATIENCE)
    rank, world = dist.get_rank(), dist.get_world_size()


def share(n: int) -> range:
    """Which of n things in a row are this rank's.

    A contiguous part, empty where there are fewer things than ranks.
    """
    return range(n * rank // world, n * (rank + 1) // world)


def together(work, *args) -> None:
    """A collective call. UsageError where another process has ended: then it cannot be made."""
    try:
        work(*args)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160]
        raise UsageError(
            f"another process has ended, see its message ({reason}); go on with --resume RUN, on "
            "as many processes as you like"
        ) from None


def gathered(mine: list) -> list:
    """Every rank's list, one after the other; one's own things stay the same objects.

    It is also a place where all wait for each other.
    """
    if world == 1:
        return mine
    lists: list = [None] * world
    together(dist.all_gather_object, lists, mine)
    lists[rank] = mine
    return [thing for of_rank in lists for thing in of_rank]


def add_up(tensor: Tensor) -> None:
    """The tensor becomes its sum over the ranks, in place."""
    together(dist.all_reduce, tensor)


def add_gradients(parameters: dict[str, Parameter], stats: Stats) -> Stats:
    """The gradients of all ranks together, in place, and their metrics merged.

    The token weights already hold the normaliser, so gradients are added, not averaged. A parameter
    gets one where any rank has one. In the critic's warm-up, for example, the policy gets none, and
    AdamW must not move it.
    """
    moved_here = [name for name, p in parameters.items() if p.grad is not None]
    everyone = gathered([(stats, moved_here)])
    moved = {name for _, names in everyone for name in names}
    for name, p in parameters.items():
        if name in moved:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add_up(p.grad)
    merged = Stats()
    for of_rank, _ in everyone:
        merged.merge(of_rank)
    return merged


def say(message: str, everyone: bool = False) -> None:
    """A line on the screen, once however many processes there are.

    everyone: from this one in any case, and from which.
    """
    if everyone and world > 1:
        message = f"process {rank}: {message}"
    if everyone or rank == 0:
        tqdm.write(message, file=sys.stderr)
