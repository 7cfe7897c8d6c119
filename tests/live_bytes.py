"""Counts the bytes of tensors that are alive while a function runs, as a device's allocator would."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PAGE = 512


class LiveBytes(TorchDispatchMode):
    """What is allocated inside of it; memory that was there before counts nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_iter((args, kwargs)):
            self._see(given, is_new=False)
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            self._see(made, is_new=True)
        return result

    def _see(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._sizes:
            return
        storage = value.untyped_storage()
        size = -(-storage.nbytes() // PAGE) * PAGE if is_new else 0
        self._sizes[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak of what `run` allocates; inputs and weights made before are not in it."""
    with torch.no_grad(), LiveBytes() as live:
        run()
    peak: int = live.peak
    return peak
