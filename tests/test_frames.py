"""Floats to uint8 as the reference does it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvlite.video.frames import as_frame, frames_to_uint8


def test_the_range_is_clamped_and_the_rest_truncated() -> None:
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.999, 1.0, 7.0])
    frames = values.reshape(1, 1, 1, -1).expand(3, 1, 1, -1)
    # 255 * (x / 2 + 0.5): -0.999 -> 0.1, 0 -> 127.5, 0.5 -> 191.25, 0.999 -> 254.87
    assert frames_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]


def test_axes_are_moved_and_the_input_kept() -> None:
    frames = torch.rand(3, 5, 4, 6) * 2 - 1
    before = frames.clone()
    out = frames_to_uint8(frames)
    assert out.shape == (5, 4, 6, 3)
    assert out.is_contiguous()
    assert torch.equal(frames, before)
    assert out[3, 2, 1, 2] == int(255 * (frames[2, 3, 2, 1] / 2 + 0.5))


@given(st.floats(-4, 4, width=32), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_value_becomes_what_the_reference_says(value: float, dtype: torch.dtype) -> None:
    frames = torch.full((3, 1, 1, 1), value, dtype=dtype)
    unit = (frames / 2 + 0.5).clamp(0, 1).float().numpy()
    assert frames_to_uint8(frames).flatten().tolist() == (255 * unit).astype(np.uint8).flatten().tolist()


def test_meta_frames_have_a_shape_and_no_bytes() -> None:
    out = frames_to_uint8(torch.empty(3, 129, 720, 1280, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((129, 720, 1280, 3), torch.uint8, "meta")


def test_as_frame_takes_tensors_and_strided_arrays() -> None:
    tensor = torch.arange(16 * 16 * 3, dtype=torch.uint8).reshape(16, 16, 3)
    assert np.array_equal(as_frame(tensor), tensor.numpy())
    mirrored = as_frame(tensor.numpy()[:, ::-1])
    assert mirrored.flags.c_contiguous
    assert np.array_equal(mirrored[:, 0], tensor.numpy()[:, -1])


@pytest.mark.parametrize("shape", [(16, 16), (3, 16, 16), (16, 16, 4), (1, 16, 16, 3)])
def test_other_shapes_are_a_mistake(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="shape"):
        as_frame(np.zeros(shape, np.uint8))
    with pytest.raises(AssertionError, match="uint8"):
        as_frame(np.zeros((16, 16, 3), np.float32))
