"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained matrices beside frozen layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x, W frozen, A and B trained in fp32.

    A [rank, in] is drawn, B [out, rank] starts at 0. One layer can hold several pairs by name: the
    "policy", a "critic", a frozen "reference". `switch["adapters"]` names the one in force; None:
    the layer is as it was.
    """

    scale = 2.0  # alpha / rank, as in most recipes

    def __init__(self, base: nn.Linear, rank: int, switch: dict, names: list[str], generator):
        super().__init__()
        self.base, self.switch = base, switch
        self.cast: tuple[Tensor, Tensor] | None = None  # A and B in force, while sampling
        bound, device = base.in_features**-0.5, base.weight.device
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name in names:
            A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
            self.A[name] = A.to(device)
            self.B[name] = torch.zeros(base.out_features, rank, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y, name = self.base(x), self.switch["adapters"]
        if name is None:
            return y
        A, B = self.cast or (self.A[name], self.B[name])
        low = F.linear(x, A.to(x.dtype))  # [..., rank]
        # Product, scale and sum are one kernel, in place: y is this call's own.
        y.flatten(0, -2).addmm_(low.flatten(0, -2), B.to(y.dtype).T, alpha=self.scale)
        return y


def add_lora(module: nn.Module, rank: int, switch: dict, names: list[str], seed: int) -> None:
    """Replace every linear layer of a decoder or vision tower by a LoRALinear."""
    generator = torch.Generator().manual_seed(seed)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, switch, names, generator))


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """W + (alpha / rank) B A in place of each adapted layer, rounded once to W's type.

    The adapters are gone after it.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                weight = layer.base.weight
                change = layer.scale * (layer.B["policy"] @ layer.A["policy"])
                weight.copy_(weight.float() + change)
                setattr(parent, name, layer.base)
