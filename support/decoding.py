"""Sampling: which token is picked, who is still to be written, and products for a few rows."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from support.lora import LoRALinear

FEW_ROWS = 64


class Draft:
    """The rows that a sampling call is writing, and which of them sit in which slot.

    Rows are numbered over all completions, an item's together; slots [P', G'] hold those of
    them that are still written. What a step changes is changed in place.
    """

    def __init__(self, seed: int, rows: range, max_new: int, starts: Tensor, t: Tensor):
        """starts [P]: position of a prompt's first completion token. t [1]: the token at hand."""
        N, device = len(rows), starts.device
        # A row's random numbers depend on (seed, row) alone, not on its company.
        streams = (np.random.Generator(np.random.Philox(key=[seed % 2**64, r])) for r in rows)
        uniforms = np.stack([stream.random(max_new) for stream in streams])
        self.uniforms = torch.from_numpy(uniforms).to(device)  # [N, max_new]
        self.tokens = torch.zeros(N, max_new, dtype=torch.long, device=device)
        self.logps = torch.zeros(N, max_new, device=device)
        self.starts, self.t = starts, t
        self.done = torch.zeros(N, dtype=torch.bool)  # on the host, as `slots`
        self.slots = torch.arange(N).view(len(starts), -1)  # [P', G']: the row in each slot
        self.rows = self.slots.to(device)  # the same

    def pick(self, logits: Tensor, greedy: bool) -> None:
        """Token t of each row and its log-prob. logits [P', 1 or G', V], of slots [P', G']

        By inversion of the distribution function: the token is the first whose cumulated
        probability exceeds u. That takes one random number, and no token of probability 0 is found.
        """
        u = self.uniforms[self.rows, self.t][..., None]  # [P', G', 1]
        logps = logits.log_softmax(-1).expand(*self.rows.shape, -1)  # the first token's are shared
        if greedy:
            token = logits.argmax(-1, keepdim=True).expand_as(u)
        else:
            cdf = logps.exp().cumsum(-1)
            total = cdf[..., -1:]  # 1 but for rounding
            just_below = torch.nextafter(total, torch.zeros_like(total))
            # Never at the total itself: the token found there could be one of probability 0.
            token = torch.searchsorted(
                cdf, torch.minimum(u.to(cdf.dtype) * total, just_below), right=True
            )
        self.tokens[self.rows, self.t] = token[..., 0]
        self.logps[self.rows, self.t] = logps.gather(-1, token)[..., 0]

    def close_ranks(self, written: int, end: Callable, cache) -> None:
        """Leave finished rows out where it saves a tenth of the slots, on a GPU half of them.

        A GPU has to record its steps anew then. What is left are the prompts with a live row, and
        as many slots as the liveliest of them needs. `end(ids)` is None for ids that do not end.
        """
        # One read for all rows, since the host waits for it. 32 tokens surely hold </answer>.
        latest = self.tokens[self.rows, max(0, written - 32) : written].flatten(0, 1).tolist()
        ended = torch.tensor([end(ids) is not None for ids in latest])
        self.done[self.slots] |= ended.view_as(self.slots)
        alive = ~self.done[self.slots]  # [P, G]
        prompts, G = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
        worth = 0.5 if self.rows.is_cuda else 0.9
        if not 0 < len(prompts) * G <= worth * alive.numel():
            return
        # Live rows first; a dead one fills what is left.
        order = alive[prompts].to(torch.int8).argsort(dim=1, descending=True, stable=True)
        slots = order[:, :G]
        self.slots = self.slots[prompts[:, None], slots]
        self.rows, prompts, slots = (x.to(self.rows.device) for x in (self.slots, prompts, slots))
        self.starts = self.starts[prompts]
        cache.keep(prompts, slots)


def thin_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x^T instead of x W^T: with few rows, MKL on two threads is 1.3 times as fast at it."""
    if x.shape[:-1].numel() > FEW_ROWS:
        return nn.Linear.forward(layer, x)
    y = (layer.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])  # [..., out]
    return y if layer.bias is None else y + layer.bias


@contextmanager
def quick_products(model: nn.Module):
    """Within it adapters are cast to their layers' type once, where each token would cast them.

    And on a CPU of several threads linear layers multiply by `thin_product`; on one, or on a GPU,
    it gains nothing. Afterwards the model is as it was: scoring always multiplies in the one way.
    """
    adapted = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    thin = [layer for layer in model.modules() if type(layer) is nn.Linear]
    if model.device.type != "cpu" or torch.get_num_threads() == 1:
        thin = []
    for layer in adapted:
        name, dtype = layer.switch["adapters"], layer.base.weight.dtype
        if name is not None:
            layer.cast = layer.A[name].to(dtype), layer.B[name].to(dtype)
    for layer in thin:
        layer.forward = partial(thin_product, layer)
    try:
        yield
    finally:
        for layer in adapted:
            layer.cast = None
        for layer in thin:
            del layer.forward
