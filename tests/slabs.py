"""Modules of a few numbers, and the slabs that hold them: what the tests of pool and streamer walk over."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hvlite.errors import WeightsError

ALIGNMENT = 64
POISON = 0xFF


class Block(nn.Module):
    """A parameter of its own, two below it, and three dtypes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width), requires_grad=False)
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.empty(3, width, dtype=torch.bfloat16), requires_grad=False)
        self.inner.codes = nn.Parameter(torch.empty(width, 2, dtype=torch.uint8), requires_grad=False)


@dataclass
class MemorySlabs:
    """Random slabs for blocks of these widths, named by number. Reading poisons the buffer first, then fills it.

    `failing` names a slab that cannot be read; `reads` are the names that were, in order.
    """

    widths: Sequence[int]
    seed: int = 0
    failing: str | None = None
    reads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.names = [f"blocks.{number}" for number in range(len(self.widths))]
        self._layouts = dict(zip(self.names, map(_layout, self.widths), strict=True))
        self.bytes = {
            name: torch.randint(0, 255, (self.slab_bytes(name),), generator=generator).to(torch.uint8)
            for name in self.names
        }

    def slab_bytes(self, name: str) -> int:
        return sum(_padded(placeholder.nbytes) for _, placeholder in self._layouts[name])

    def read_slab(self, name: str, buffer: Tensor) -> None:
        self.reads.append(name)
        buffer.fill_(POISON)
        if name == self.failing:
            raise WeightsError(f"slab {name} is damaged")
        buffer[: self.slab_bytes(name)] = self.bytes[name]

    def slab_views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        views, offset = {}, 0
        for path, placeholder in self._layouts[name]:
            nbytes = placeholder.nbytes
            views[path] = data[offset : offset + nbytes].view(placeholder.dtype).view(placeholder.shape)
            offset += _padded(nbytes)
        return views

    def walk(self) -> list[tuple[str, nn.Module]]:
        """A module on the meta device for each slab."""
        return [(name, meta_block(width)) for name, width in zip(self.names, self.widths, strict=True)]

    def wrong(self, name: str, views: dict[str, Tensor]) -> list[str]:
        """The tensors of the slab that are not what it holds, bit for bit."""
        expected = self.slab_views(name, self.bytes[name])
        return [path for path, view in views.items() if not torch.equal(bits(view), bits(expected[path]))]


def meta_block(width: int) -> Block:
    with torch.device("meta"):
        return Block(width)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """What the module would compute with now."""
    return {path: parameter.data for path, parameter in module.named_parameters()}


def is_unbound(module: nn.Module) -> bool:
    """Whether it holds no more than the placeholders that it was built with."""
    return all(parameter.is_meta for parameter in module.parameters())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _layout(width: int) -> list[tuple[str, nn.Parameter]]:
    return list(meta_block(width).named_parameters())


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
