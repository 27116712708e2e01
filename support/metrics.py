"""How logged numbers merge over micro-batches, processes and optimiser steps.

The rows of an optimiser step are seen in parts: micro-batches, and the share of each process. Means
of parts cannot be added. Therefore a metric is kept as (weighted sum, weight), as a plain sum or as
a maximum until every part is in, and whoever makes a number says which. Then no micro-batch size
and no number of processes can change what is logged.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Stats:
    """The metrics of one optimiser step, or of a part of it.

    >>> part, rest = Stats(), Stats()
    >>> part.mean("entropy", torch.tensor([1., 2.]), torch.tensor([1., 1.]))
    >>> rest.mean("entropy", torch.tensor([6., 9.]), torch.tensor([1., 0.]))
    >>> part.merge(rest)
    >>> part["entropy"]                                                  # (1 + 2 + 6) / (1 + 1 + 1)
    3.0
    """

    # name -> kind, value, weight
    kept: dict[str, tuple[str, Tensor, Tensor | float]] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor | float, weights: Tensor | float) -> None:
        """A weighted mean, sum(values * weights) / sum(weights), over all parts together.

        What stands beside the loss is logged with the loss's own token weights. The two shapes are
        broadcast. What stands where the weight is 0 is not counted, not even a NaN.
        """
        values, weights = (torch.as_tensor(x).detach().double() for x in (values, weights))
        weighted = torch.where(weights != 0, values * weights, 0)
        self._add(name, "mean", weighted.sum(), weights.expand_as(weighted).sum())

    def sum(self, name: str, value: Tensor | float) -> None:
        """A plain sum over the parts: the loss, whose normaliser is in its weights."""
        self._add(name, "sum", value)

    def max(self, name: str, values: Tensor | float) -> None:
        """The largest of all values. Pass counted ones only, `x[mask]`: padding would take part."""
        values = torch.as_tensor(values)
        if values.numel():
            self._add(name, "max", values.max())

    def merge(self, other: "Stats") -> None:
        """Take in what another part of the same optimiser step has."""
        if not isinstance(other, Stats):
            raise TypeError(f"metrics come as Stats, not as {type(other).__name__}")
        for name, kept in other.kept.items():
            self._add(name, *kept)

    def _add(
        self, name: str, kind: str, value: Tensor | float, weight: Tensor | float = 0.0
    ) -> None:
        value = torch.as_tensor(value).detach().double()
        if name in self.kept:
            kind_before, value_before, weight_before = self.kept[name]
            if kind_before != kind:
                raise TypeError(f"the metric {name!r} is a {kind_before} here and a {kind} there")
            value = torch.maximum(value_before, value) if kind == "max" else value_before + value
            weight += weight_before
        self.kept[name] = kind, value, weight

    def figures(self) -> dict[str, float]:
        """name -> the number to log. A mean over no weight is no number: it is left out."""
        found = {}
        for name, (kind, value, weight) in self.kept.items():
            value, weight = float(value), float(weight)
            if kind != "mean":
                found[name] = value
            elif weight != 0:
                found[name] = value / weight
        return found

    def __getstate__(self) -> dict:
        """What another process gets: plain numbers."""
        kept = {}
        for name, (kind, value, weight) in self.kept.items():
            kept[name] = kind, value.cpu(), float(weight)
        return {"kept": kept}

    def __getitem__(self, name: str) -> float:
        return self.figures()[name]

    def __setitem__(self, name: str, value) -> None:
        raise TypeError(
            f"how do parts of {name!r} merge? Say stats.mean({name!r}, values, weights)"
            f", stats.max({name!r}, values) or stats.sum({name!r}, value)"
        )


def over_steps(steps: list[Stats]) -> dict[str, float]:
    """The figures of several optimiser steps: their means, each step the same, and their maxima."""
    merged = Stats()
    for stats in steps:
        for name, figure in stats.figures().items():
            if stats.kept[name][0] == "max":
                merged.max(name, figure)
            else:
                merged.mean(name, figure, 1.0)
    return merged.figures()
