"""Frames: uint8 [H,W,3], full-range RGB. What the decoder's floats become, and what files are written from.

No torch at run time: `hvlite info` reads a video's metadata without loading it.
"""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Frame: TypeAlias = npt.NDArray[np.uint8]
FrameLike: TypeAlias = "Frame | torch.Tensor"


def as_frame(frame: FrameLike) -> Frame:
    """`frame`, an array or a CPU tensor, as a contiguous array."""
    array = np.ascontiguousarray(frame)
    assert array.dtype == np.uint8, f"a frame is uint8, got {array.dtype}"
    assert array.ndim == 3, f"a frame is [H,W,3], got shape {array.shape}"
    assert array.shape[2] == 3, f"a frame is [H,W,3], got shape {array.shape}"
    return array


def frames_to_uint8(frames: "torch.Tensor") -> "torch.Tensor":
    """[3,F,H,W] in [-1,1] -> uint8 [F,H,W,3] on the same device; clamped, then truncated (spec 5.4).

    The arithmetic before fp32 is in the dtype given, as the reference does it (spec 3.5).
    """
    assert frames.ndim == 4, f"frames are [3,F,H,W], got shape {tuple(frames.shape)}"
    assert frames.shape[0] == 3, f"frames are [3,F,H,W], got shape {tuple(frames.shape)}"
    unit = frames.div(2).add_(0.5).clamp_(0, 1).float()
    return unit.mul_(255).byte().permute(1, 2, 3, 0).contiguous()
