"""Which slabs stay on the device, and how large the slots are that the others pass through: arithmetic without torch.

The plan counts with the functions that the streamer works by, so that the two cannot come apart.
"""

from collections.abc import Sequence

RING = 2
"""Slots of a walk: one is computed with while the next slab arrives in the other. Spare memory goes to residents."""


STAGING = 2
"""Buffers of host memory through which slabs come from disk to a card."""


def spread(count: int, of: int) -> tuple[int, ...]:
    """`count` of the numbers 0 to of - 1, as evenly as can be, also from the last one round to the first.

    Neighbouring gaps differ by one at most, so that no copy has much less computing to hide behind than another.
    """
    assert 0 <= count <= of, f"{count} of {of}"
    return tuple(number * of // count for number in range(count))


def stays_in_slot(streamed: int) -> bool:
    """Whether so few slabs are streamed that each has a slot of its own and is loaded once for all rounds."""
    return streamed <= RING


def slot_sizes(streamed_bytes: Sequence[int]) -> tuple[int, ...]:
    """The bytes of every slot of a walk that streams slabs of these sizes."""
    if stays_in_slot(len(streamed_bytes)):
        return tuple(streamed_bytes)
    return (max(streamed_bytes),) * RING
