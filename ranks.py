"""More than one GPU: what train.py and eval.py say to the other processes that torchrun has started with them. Alone, every function here does nothing.

A file of its own because training, evaluation and the run folder all need it. Each process (rank) holds the whole model, samples and scores a share
of the prompts, and adds its gradient to the others'. Samples, log-probs and gradients are exchanged whole, so that every rank then computes the same
advantages, weights, metrics and update as one process would have done: nothing else in this code knows how many there are. Only rank 0 writes.
"""
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import UsageError


def start() -> None:
    """Join the other processes, where torchrun started us."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                              # "cuda" means this one from here on
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=20))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> range:
    """Which of n things in a row are this rank's: a contiguous part, empty where there are fewer things than ranks."""
    return range(n * rank() // world(), n * (rank() + 1) // world())


def together(work, *args) -> None:
    """A collective call; it fails where another process has ended."""
    try:
        work(*args)
    except RuntimeError as error:
        raise UsageError(f"another process has ended, see its message ({str(error).splitlines()[0][:160]}); go on with --resume RUN, on as many processes as you like") from None


def gathered(mine: list) -> list:
    """Every rank's list, one after the other; one's own things stay the same objects. Also a place where all wait for each other."""
    if world() == 1:
        return mine
    lists: list = [None] * world()
    together(dist.all_gather_object, lists, mine)
    lists[rank()] = mine
    return [thing for of_rank in lists for thing in of_rank]


def add_up(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over the ranks, in place."""
    for tensor in tensors if world() > 1 else ():
        together(dist.all_reduce, tensor)


def say(message: str, everyone: bool = False) -> None:
    """A line on the screen, once however many processes there are; everyone: from this one in any case, and from which."""
    if everyone and world() > 1:
        message = f"process {rank()}: {message}"
    if everyone or rank() == 0:
        tqdm.write(message, file=sys.stderr)
