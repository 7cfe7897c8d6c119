"""A decode that goes on when memory runs out: each rung of the ladder is another way to decode, leaner than the last.

A rung goes on at the first frame that has not left yet, and begins with a temporal tile of its own there. The tile
before, though made by the rung before, has left its tail, into which that tile fades just as into one of its own kind:
so no frame is missing, none is decoded twice, and there is no seam in time but the one that was there anyway. Only a
rung that leaves no tail (an exact decode, which has no tiles) cannot be followed up: the clip begins anew then.

Knows no model and no device. What a rung had allocated is let go before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hvlite.dims import LatentShape
from hvlite.memory.geometry import ladder, tiles_text
from hvlite.memory.tiles import Joint, TileGeometry, TileStep, decode_tiles

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way to decode a clip. `run` goes on from a joint (a new one: from the beginning) and keeps it up to date."""

    name: str
    run: Callable[[Joint], Iterator[TileStep]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fell:
    """Memory ran out; frames from `frame` on come from the rung `name`. With `anew`, those that have left are void."""

    name: str
    frame: int
    anew: bool
    reason: str


def decode_on_ladder(
    rungs: Iterable[Rung], is_out_of_memory: Callable[[BaseException], bool], give_back: Callable[[], None]
) -> Iterator[TileStep | Fell]:
    """The steps of the first rung; where an allocation fails a `Fell`, and those of the next one.

    `give_back` returns freed memory to the device. The last rung's failure is raised, as is any other error.
    """
    rest, joint = iter(rungs), Joint()
    rung = next(rest)
    while True:
        try:
            yield from rung.run(joint)
            return
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            following = next(rest, None)
            if following is None:
                raise
            reason = str(error)
        # from here on the error, whose traceback held the failed tile, is gone
        give_back()
        anew = joint.frames > 0 and joint.tail is None
        if anew:
            joint = Joint()
        rung = following
        yield Fell(name=rung.name, frame=joint.frames, anew=anew, reason=reason)


def tile_rungs(
    latents_BCTHW: Tensor, decode: Callable[[Tensor], Tensor], geometry: TileGeometry, where: str = ""
) -> Iterator[Rung]:
    """`geometry`, and all that are smaller; `where` (such as ` on cpu`) is added to their names."""
    shape = LatentShape(*latents_BCTHW.shape[2:])
    for rung in (geometry, *ladder(geometry, shape)):
        yield Rung(name=tiles_text(rung) + where, run=partial(decode_tiles, latents_BCTHW, decode, rung))


def untiled_rung(name: str, pieces: Callable[[], Iterator[Tensor | None]], count: int) -> Rung:
    """A decode without tiles (`model.exact`): `count` pieces, frames [3,F,H,W] or None, that cannot be followed up."""

    def run(joint: Joint) -> Iterator[TileStep]:
        assert joint.start == 0, "it begins at the beginning"
        for index, piece in enumerate(pieces()):
            if piece is None:
                yield TileStep(index, count)
                continue
            joint.frames += piece.shape[1]
            yield TileStep(index, count, piece.float())
            del piece  # not to be held beside the next one

    return Rung(name=name, run=run)
