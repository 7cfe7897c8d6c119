"""What the VAE is made of: causal convolutions, GroupNorm and upsampling of clips that are read a few frames at a time.

No padded, normalised or enlarged copy of a whole clip is made: a convolution reads a `Source` through one padded
buffer. Every tensor in here lies [B,T,H,W,C], which oneDNN and cuDNN prefer and in which norms and 1x1x1
convolutions need no copy. A clip need not be one tensor (`Clip`), nor its results (`convolved`).

    B batch   T frames   H, W height and width   C channels   G norm groups   O output channels
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvlite.dims import BLOCK_ELEMENTS, BLOCK_ELEMENTS_CPU, CONV_ELEMENTS, CONV_ELEMENTS_CPU

Chunks = Iterator[tuple[int, Tensor]]
"""A few frames [B,t,H,W,C] at a time, in order, each time with the number of the first."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames that lie anywhere: `read(start, stop)` gives some of them on the device, not to be changed."""

    shape: tuple[int, int, int, int, int]
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """Frames as a convolution reads them: `write(start, stop, into)` puts them into `into` [B,t,H,W,C]."""

    shape: tuple[int, int, int, int, int]
    write: Callable[[int, int, Tensor], None]


def clip_of(x_BTHWC: Tensor) -> Clip:
    """A clip that is one tensor."""
    return Clip(_shape(x_BTHWC), lambda start, stop: x_BTHWC[:, start:stop])


def plain(clip: Clip) -> Source:
    """The frames as they are, in the reader's dtype."""

    def write(start: int, stop: int, into: Tensor) -> None:
        into.copy_(clip.read(start, stop))

    return Source(clip.shape, write)


def normalised(clip: Clip, norm: nn.GroupNorm, moments: "Moments", *, silu: bool = True) -> Source:
    """GroupNorm by the whole clip's moments, then SiLU, both in fp32 (spec 3.5), rounded to the reader's dtype."""
    scale, shift = (_line(values, clip.shape[3])[:, None] for values in _scale_and_shift(norm, moments))

    def write(start: int, stop: int, into: Tensor) -> None:
        source, target = _lines(clip.read(start, stop)), _lines(into)
        for block in _blocks(source):
            _apply_lines(source[block], scale, shift, target[block], silu)

    return Source(clip.shape, write)


def normed(x_BTHWC: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Source:
    """A clip that is one tensor, by its own moments."""
    return normalised(clip_of(x_BTHWC), norm, Moments(x_BTHWC), silu=silu)


def upsampled(clip: Clip, *, doubles_time: bool) -> Source:
    """Nearest neighbour, twice as high and wide; in time all frames but the first double too: T -> 2T-1."""
    batch, frames, height, width, channels = clip.shape

    def write(start: int, stop: int, into: Tensor) -> None:
        cells = into.view(*into.shape[:2], height, 2, width, 2, channels)
        shown = [(frame + 1) // 2 if doubles_time else frame for frame in range(start, stop)]
        small = clip.read(shown[0], shown[-1] + 1)
        for index, frame in enumerate(shown):
            cells[:, index].copy_(small[:, frame - shown[0], :, None, :, None])

    return Source((batch, 2 * frames - 1 if doubles_time else frames, 2 * height, 2 * width, channels), write)


def _shape(x_BTHWC: Tensor) -> tuple[int, int, int, int, int]:
    batch, frames, height, width, channels = x_BTHWC.shape
    return batch, frames, height, width, channels


def _lines(x_BTHWC: Tensor) -> Tensor:
    """The view [B,T,H,W*C]: rows long enough for vector instructions whatever the channel count."""
    return x_BTHWC.view(*x_BTHWC.shape[:3], -1)


def _blocks(lines: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts of [B,T,H,W*C] along T, or along H too where one frame is large."""
    limit = _block_elements(lines)
    batch, frames, height, line = lines.shape
    rows = max(1, min(height, limit // (batch * line)))
    step = max(1, limit // (batch * line * height))
    for frame in range(0, frames, step):
        for row in range(0, height, rows):
            yield slice(None), slice(frame, frame + step), slice(row, row + rows)


def _block_elements(x: Tensor) -> int:
    return BLOCK_ELEMENTS_CPU if x.device.type == "cpu" else BLOCK_ELEMENTS


def _apply_lines(x: Tensor, scale: Tensor, shift: Tensor, into: Tensor, silu: bool) -> None:
    if into.dtype == torch.float32 == x.dtype:
        torch.addcmul(shift, x, scale, out=into)
        if silu:
            F.silu(into, inplace=True)
        return
    values = torch.addcmul(shift, x, scale)
    into.copy_(F.silu(values, inplace=True) if silu else values)


def _line(values_BC: Tensor, width: int) -> Tensor:
    """What `_lines` are combined with: the values for every pixel of a row, [B,1,W*C] in fp32."""
    return values_BC.float()[:, None].expand(-1, width, -1).flatten(1)[:, None]


def _scale_and_shift(norm: nn.GroupNorm, moments: "Moments") -> tuple[Tensor, Tensor]:
    """Per-channel scale and shift [B,C], fp64, that are this GroupNorm on a clip of these moments."""
    mean, variance = moments.of_groups(norm.num_groups)
    per_group = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, 1) * norm.weight.double()
    return scale, norm.bias.double() - mean.repeat_interleave(per_group, 1) * scale


class Moments:
    """Mean and variance over all frames and pixels of a clip that comes in pieces.

    Sums are taken about each channel's mean in the first frame, block by block in fp32 and together in fp64: right
    also where the mean is a thousand times the deviation.
    """

    def __init__(self, first_BTHWC: Tensor) -> None:
        """`first_BTHWC` is the first piece, which is added."""
        self._pivot_BC = first_BTHWC[:, 0].mean((1, 2), dtype=torch.float32)
        self._total, self._squares = self._pivot_BC.new_zeros((2, *self._pivot_BC.shape), dtype=torch.float64)
        self._count = 0
        self.add(first_BTHWC)

    def add(self, x_BTHWC: Tensor) -> None:
        """The next frames of the clip. How it is cut into pieces changes no bit: each frame has its own sums."""
        pivot_line, lines = _line(self._pivot_BC, x_BTHWC.shape[3])[:, None], _lines(x_BTHWC)
        for block in _blocks(lines):
            deviations = torch.sub(lines[block], pivot_line)
            self._collect(self._total, deviations)
            self._collect(self._squares, deviations.square_())
            del deviations  # or two would be held
        self._count += x_BTHWC[0, ..., 0].numel()

    def _collect(self, into_BC: Tensor, lines: Tensor) -> None:
        channels = into_BC.shape[1]
        sums_BTC = lines.sum(2).unflatten(2, (-1, channels)).sum(2, dtype=torch.float64)
        for sum_BC in sums_BTC.unbind(1):
            into_BC += sum_BC

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [B,G], fp64, over the channels of a group too."""
        shift, squares = self._total / self._count, self._squares / self._count
        mean = (self._pivot_BC + shift).unflatten(1, (groups, -1))
        variance = (squares - shift.square()).unflatten(1, (groups, -1))
        group_mean = mean.mean(-1)
        return group_mean, (variance + (mean - group_mean[..., None]).square()).mean(-1)


def causal_conv(conv: nn.Conv3d, source: Source, add_to: Tensor | None = None) -> Tensor:
    """The whole of `convolved` [B,T',H',W',C'], added to `add_to` in place if that is given."""
    frames, out = (source.shape[1] - 1) // conv.stride[0] + 1, add_to
    for first, chunk in convolved(conv, source):
        if out is None and chunk.shape[1] == frames:
            return chunk
        if out is None:
            out = chunk.new_empty(chunk.shape[0], frames, *chunk.shape[2:])
        target = out[:, first : first + chunk.shape[1]]
        if add_to is None:
            target.copy_(chunk)
        else:
            target.add_(chunk)
        del chunk  # not to be held beside the next one
    assert out is not None
    return out


def convolved(conv: nn.Conv3d, source: Source) -> Chunks:
    """Replicate-padded convolution, two frames of padding in front (spec 3.2).

    A clip of one frame is convolved in 2-D with the weight summed over time: the same numbers up to fp32 rounding, a
    third of the work.
    """
    weight, step = conv.weight, conv.stride[0]
    front = weight.shape[2] - 1
    if source.shape[1] == 1 and may_sum(weight):
        weight, front = weight.sum(2, keepdim=True), 0
    for start, _, padded in _read_padded(source, weight, front, step):
        yield start // step, _convolve(padded, weight, conv.bias, conv.stride)


def may_sum(weight: Tensor) -> bool:
    """Taps are summed in fp32 only: elsewhere a sum would be rounded to another weight than the model's."""
    return weight.dtype == torch.float32


def upsample_conv(conv: nn.Conv3d, x_BTHWC: Tensor, *, doubles_time: bool) -> Tensor:
    """The whole of `upsample_convolved` [B,T',2H,2W,C']."""
    batch, frames, height, width, _ = x_BTHWC.shape
    if not may_sum(conv.weight):
        return causal_conv(conv, upsampled(clip_of(x_BTHWC), doubles_time=doubles_time))
    frames = 2 * frames - 1 if doubles_time else frames
    out = x_BTHWC.new_empty(batch, frames, 2 * height, 2 * width, conv.out_channels)
    for _ in _upsample_folded(conv, clip_of(x_BTHWC), doubles_time, lambda first, last: out[:, first:last]):
        pass  # each chunk is written to its place
    return out


def upsample_convolved(conv: nn.Conv3d, clip: Clip, *, doubles_time: bool) -> Chunks:
    """Nearest upsampling and the causal convolution after it (spec 3.3)."""
    batch, _, height, width, _ = clip.shape
    if not may_sum(conv.weight):
        yield from convolved(conv, upsampled(clip, doubles_time=doubles_time))
        return

    def place(first: int, last: int) -> Tensor:
        return conv.weight.new_empty(batch, last - first, 2 * height, 2 * width, conv.out_channels)

    yield from _upsample_folded(conv, clip, doubles_time, place)


def _upsample_folded(conv: nn.Conv3d, clip: Clip, doubles_time: bool, place: Callable[[int, int], Tensor]) -> Chunks:
    """Convolve the small frames, not the enlarged ones: 8 taps an output (12 without time) instead of 27.

    Along a doubled axis the three taps of an output meet only two different inputs, and which two taps share one
    depends on whether the output's index is even or odd: a small kernel for every combination of parities.
    `place(first, last)` gives the memory for some frames of the result.
    """
    doubles_time = doubles_time and clip.shape[1] > 1
    weight_OTHWI = conv.weight.permute(0, 2, 3, 4, 1)
    if clip.shape[1] == 1:
        weight_OTHWI = weight_OTHWI.sum(1, keepdim=True)
    kernels = list(_folded_kernels(weight_OTHWI, doubles_time))
    front = kernels[0][1].shape[2] - 1
    for start, stop, padded in _read_padded(plain(clip), conv.weight, front, 1):
        # the frame between 0 and the padding in front of it does not exist
        first, last = (max(0, 2 * start - 1), 2 * stop - 1) if doubles_time else (start, stop)
        out = place(first, last)
        cells = out.view(clip.shape[0], last - first, clip.shape[2], 2, clip.shape[3], 2, -1)
        for (t, y, x), kernel in kernels:
            begin = max(start, t)
            inputs = padded[:, begin - start :, y : y + clip.shape[2] + 1, x : x + clip.shape[3] + 1]
            outputs = slice(2 * begin - t - first, None, 2) if doubles_time else slice(None)
            if inputs.shape[1] > front:
                cells[:, outputs, :, y, :, x].copy_(_convolve(inputs, kernel, conv.bias, (1, 1, 1)))
        yield first, out
        del out, cells  # not to be held beside the next ones


def _folded_kernels(weight_OTHWI: Tensor, time: bool) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """The parities (t, y, x) of an output, and its kernel [O,I,t,2,2]; t is 1 for the frames in between."""
    for t in (0, 1) if time else (0,):
        along_t = _fold(weight_OTHWI, 1, t) if time else weight_OTHWI
        for y in (0, 1):
            along_y = _fold(along_t, 2, y)
            for x in (0, 1):
                yield (t, y, x), _fold(along_y, 3, x).permute(0, 4, 1, 2, 3)


def _fold(weight: Tensor, axis: int, parity: int) -> Tensor:
    """Three taps on a doubled axis as two on the axis itself."""
    before, centre, after = weight.unbind(axis)
    return torch.stack((before + centre, after) if parity else (before, centre + after), axis)


def _read_padded(source: Source, weight: Tensor, front: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, frames start-front..stop with one replicated pixel around), the buffer being reused.

    Chunks are whole multiples of the time stride `step`, so that cutting changes no output frame.
    """
    batch, frames, height, width, channels = source.shape
    limit = CONV_ELEMENTS_CPU if weight.device.type == "cpu" else CONV_ELEMENTS
    chunk = max(1, limit // (batch * height * width * channels) // step) * step
    chunk = min(chunk, frames)
    shape = (batch, front + chunk, height + 2, width + 2, channels)
    buffer = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, frames, chunk):
        stop = min(start + chunk, frames)
        if start > 0 and front > 0:
            for carried in range(front):  # one by one, in this order: they may overlap
                buffer[:, carried] = buffer[:, chunk + carried]
        fresh = buffer[:, front : front + stop - start]
        source.write(start, stop, fresh[:, :, 1:-1, 1:-1])
        _replicate_edges(fresh)
        if start == 0:
            buffer[:, :front] = fresh[:, :1]
        yield start, stop, buffer[:, : front + stop - start]


def _replicate_edges(padded_BTHWC: Tensor) -> None:
    """Rows first, then columns: so the corners get theirs."""
    padded_BTHWC[:, :, 0] = padded_BTHWC[:, :, 1]
    padded_BTHWC[:, :, -1] = padded_BTHWC[:, :, -2]
    padded_BTHWC[:, :, :, 0] = padded_BTHWC[:, :, :, 1]
    padded_BTHWC[:, :, :, -1] = padded_BTHWC[:, :, :, -2]


def _convolve(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    """An unpadded convolution of frames that lie [B,T,H,W,C].

    torch sends small fp32 convolutions with a batch of one to a kernel five times slower than oneDNN: oneDNN is
    asked directly wherever it can do the job.
    """
    x = x_BTHWC.permute(0, 4, 1, 2, 3)
    if x.device.type == "meta":
        # its convolution forgets the layout: a copy would be counted that no device makes
        sizes = [
            (size - taps) // step + 1 for size, taps, step in zip(x.shape[2:], weight.shape[2:], stride, strict=True)
        ]
        return x.new_empty(x.shape[0], *sizes, weight.shape[0])
    if _onednn_takes(x):
        out = torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    else:
        out = F.conv3d(x, weight, bias, stride)
    return out.permute(0, 2, 3, 4, 1).contiguous()


def _onednn_takes(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() is True
    return x.dtype == torch.float32


def pointwise(conv: nn.Conv3d, x_BTHWC: Tensor) -> Tensor:
    """A 1x1x1 convolution, which is a Linear over the channels."""
    return F.linear(x_BTHWC, conv.weight.flatten(1), conv.bias)


def pointwise_over(conv: nn.Conv3d, x_BTHWC: Tensor) -> Tensor:
    """`pointwise`, written over its own input where the result is no larger: the decoder's largest tensors."""
    channels, out_channels = conv.in_channels, conv.out_channels
    if out_channels > channels:
        return pointwise(conv, x_BTHWC)
    pixels_NC = x_BTHWC.view(-1, channels)
    out_NC = x_BTHWC.view(-1)[: len(pixels_NC) * out_channels].view(-1, out_channels)
    step = max(1, _block_elements(x_BTHWC) // channels)
    for start in range(0, len(pixels_NC), step):
        here = slice(start, start + step)
        # the result's rows are shorter, so that they end before the first input row that is still to be read
        out_NC[here] = pointwise(conv, pixels_NC[here])
    return out_NC.view(*x_BTHWC.shape[:-1], out_channels)
