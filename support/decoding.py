"""A step of sampling: which token is picked, who has finished, and quicker products on a CPU."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

FEW_ROWS = 64


def draws(seed: int, rows: range, n: int) -> Tensor:
    """[len(rows), n] uniform numbers; a row's depend on (seed, row) alone, not on its company."""
    streams = (np.random.Generator(np.random.Philox(key=[seed % 2**64, row])) for row in rows)
    return torch.from_numpy(np.stack([stream.random(n) for stream in streams]))


def pick(logits: Tensor, uniform: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob. logits [P, 1 or G, V], uniform [P, G] -> [P, G] x 2

    By inversion of the distribution function: the token is the first whose cumulated probability
    exceeds u. That takes one random number, and never finds a token of probability 0.
    """
    logps = logits.log_softmax(-1).expand(*uniform.shape, -1)  # [P, G, V]: the first is shared
    if greedy:
        token = logits.argmax(-1, keepdim=True).expand(*uniform.shape, 1)
    else:
        cdf = logps.exp().cumsum(-1)
        total = cdf[..., -1:]  # 1 but for rounding
        just_below = torch.nextafter(total, torch.zeros_like(total))
        # Never at the total itself: the token found there could be one of probability 0.
        target = torch.minimum(uniform[..., None].to(cdf.dtype) * total, just_below)
        token = torch.searchsorted(cdf, target, right=True)
    return token[..., 0], logps.gather(-1, token)[..., 0]


def drop_finished(rows: Tensor, starts: Tensor, done: Tensor, cache) -> tuple[Tensor, Tensor]:
    """Close ranks where it saves a tenth of the slots. rows [P, G] -> [P', G'], starts [P] -> [P']

    What is left are the prompts with a live row, and as many slots as the liveliest of them needs.
    """
    alive = ~done[rows]  # [P, G]
    prompts, G = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
    if len(prompts) * G > 0.9 * rows.numel():
        return rows, starts
    # Live rows first; a dead one fills what is left.
    order = alive[prompts].to(torch.int8).argsort(dim=1, descending=True, stable=True)
    slots = order[:, :G]
    cache.keep(prompts, slots)
    return rows[prompts[:, None], slots], starts[prompts]


def thin_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x^T instead of x W^T: on two threads MKL is 1.2 to 1.6 times as fast at it, with few rows.

    On one thread it gains nothing.
    """
    if x.shape[:-1].numel() > FEW_ROWS:
        return nn.Linear.forward(layer, x)
    y = (layer.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])  # [..., out]
    return y if layer.bias is None else y + layer.bias


@contextmanager
def thin_products(model: nn.Module):
    """Within it the model's linear layers multiply so; scoring always multiplies in the one way."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    if model.device.type != "cpu":
        layers = []
    for layer in layers:
        layer.forward = partial(thin_product, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
