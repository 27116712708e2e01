"""What a CUDA graph does with a step, done on a CPU: so a machine without a GPU tests the step."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Records each operation of one call of `step` with its very tensors and numbers; `replay`.

    It refuses what a capture refuses. As with a capture, recording leaves no trace: what the step
    wrote is put back, and what it made is filled with garbage until the first replay.
    """

    def __init__(self, step):
        super().__init__()
        self.calls = []
        # By memory: what was there before, what the step made, what of the former it wrote to.
        self.outside, self.made, self.before = {}, {}, {}
        try:
            with self:
                step()
        finally:  # a recording that fails leaves no trace either
            for place, saved in self.before.items():
                self.outside[place].untyped_storage().copy_(saved)
            for x in self.made.values():
                x.untyped_storage().fill_(0xFF)  # as a number NaN, as an index -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if fault := refusal(func, args):
            raise RuntimeError(f"a CUDA graph cannot hold {func}: {fault}")
        for x in tensors((args, kwargs)):
            if memory(x) not in self.made:
                self.outside[memory(x)] = x
        named = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
        for argument in func._schema.arguments:
            if argument.is_write and memory(x := named[argument.name]) in self.outside:
                self.before.setdefault(memory(x), x.untyped_storage().clone())
        out = func(*args, **kwargs)
        self.made |= {memory(x): x for x in tensors(out) if memory(x) not in self.outside}
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs))):
                if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                    old.copy_(new)


def refusal(func, args) -> str:
    """Why a capture would fail at this operation, or ""."""
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.data_dependent_output in func.tags:
        return "the host would wait for a value"
    if name.startswith(("index", "_index_put", "_unsafe_index")):
        masks = [x for x in tensors(args[1:2]) if x.dtype in (torch.bool, torch.uint8)]
        return "a mask has as many elements as it has" if masks else ""
    if torch.Tag.dynamic_output_shape in func.tags:
        return "its shape depends on values"
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "random numbers come from outside"
    return "numbers of the host, copied to the device" if name in ("lift_fresh", "lift") else ""
