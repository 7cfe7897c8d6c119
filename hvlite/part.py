"""A part of the model: a module that is built empty once, and whose weights come for a stage and go."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hvlite.memory.trace import not_counted
from hvlite.quant.linear import Scratch
from hvlite.quant.swap import swap
from hvlite.weights import load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_THE_HOST = "embed_tokens."


class Part:
    """See the module's text."""

    def __init__(self, module: nn.Module, scratch: Scratch | None = None) -> None:
        self.module = module
        self.scratch = Scratch() if scratch is None else scratch
        """What its weights are dequantised into; given back after each stage."""
        self.held: frozenset[str] = frozenset()
        """The prefixes of the names of the weights that are there; "" for all."""
        self._empty = dict(module.named_parameters())

    def has(self, prefixes: tuple[str, ...]) -> bool:
        """Whether the weights whose names begin with one of these are there."""
        return "" in self.held or self.held.issuperset(prefixes)

    def fill(self, tensors: Iterable[tuple[str, Tensor]], device: torch.device, prefixes: tuple[str, ...]) -> None:
        """Take those of `tensors`, each in the dtype that the module has for it; looked up ones stay as they are."""
        # on meta all is on one device: a copy has to be asked for, and what would be on the host takes nothing
        is_meta = device.type == "meta"

        def placed(name: str, tensor: Tensor) -> Tensor:
            if name.startswith(ON_THE_HOST):
                return self._empty[name] if is_meta else tensor
            return tensor.to(device, self._empty[name].dtype, copy=is_meta)

        load.fill_some(self.module, ((name, each) for name, each in tensors if name.startswith(prefixes)), placed)
        self.held = frozenset(prefixes)

    @property
    def nbytes(self) -> int:
        """What its weights take now."""
        return sum(each.nbytes for each in self.module.parameters() if not each.is_meta)

    def unload(self, keep: tuple[str, ...] = ()) -> None:
        """Give all weights back but those whose names begin with one of `keep`."""
        for name, place in self._empty.items():
            if not (keep and name.startswith(keep)):
                owner, _, leaf = name.rpartition(".")
                self.module.get_submodule(owner)._parameters[leaf] = place
        self.held = frozenset(keep)


def exchange(module: nn.Module, quantised: str | None, plain: str) -> Scratch:
    """Put Linears in place for what a store holds: matrices in `quantised` form, the others in the dtype `plain`.

    Returns the memory that they dequantise into.
    """
    scratch, dtype = Scratch(), next(module.parameters()).dtype
    with not_counted():
        if quantised is not None:
            swap(module, quantised, scratch)
        if DTYPES[plain] != dtype:
            swap(module, plain, scratch)
    return scratch
