"""The decoder over a whole clip: no tiles, no seams, and the device memory of a few frames.

GroupNorm spans the clip, so a layer can begin only when the one before it has seen every frame: layer after layer
runs over the whole clip, a few frames at a time, and what lies between two layers is put outside of the device
(`Storage`). A layer's moments are gathered as it is written. The numbers are those of `Vae.decode` on the whole clip,
up to rounding in the sums of those moments.

    T frames   H, W height and width   C channels   N = T*H*W
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from hvlite.model.causal import (
    Chunks,
    Clip,
    Moments,
    Source,
    clip_of,
    convolved,
    normalised,
    plain,
    pointwise,
    upsample_convolved,
)
from hvlite.model.vae import FrameAttention, Resnet, UpBlock, Upsample, Vae


class Frames(Protocol):
    """A clip [1,T,H,W,C] outside of the device."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Some frames, on the device; not to be changed."""

    def write(self, first: int, frames_BTHWC: Tensor) -> None:
        """Frames from number `first` on."""

    def with_channels(self, channels: int) -> "Frames":
        """Fewer channels in the same memory. Its frame f lies no later than this one's frame f."""

    def close(self) -> None:
        """Give the memory back; also that of `with_channels`."""


class Storage(Protocol):
    """Where clips lie between two layers."""

    def new(self, shape: tuple[int, int, int, int, int]) -> Frames:
        """Memory for a clip in the decoder's dtype; what is in it is undefined."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer has made: all its frames, and their moments."""

    frames: Frames
    moments: Moments

    @property
    def clip(self) -> Clip:
        return Clip(self.frames.shape, self.frames.read)

    def normed(self, norm: nn.GroupNorm, *, silu: bool = True) -> Source:
        return normalised(self.clip, norm, self.moments, silu=silu)


Kind = TypeVar("Kind", bound=nn.Module)
Making = Generator[None, None, Layer]
"""Stops after each chunk, and returns the layer."""


@torch.no_grad()
def exact_decode(vae: Vae, latents_BCTHW: Tensor, storage: Storage) -> Iterator[Tensor | None]:
    """Latents [1,16,T,H,W], divided by the scaling factor -> [3,F,H,W] around [-1,1], the clip's frames in order.

    None is yielded after each chunk of a layer before the last one: `memory.exact_needs` counts the chunks.
    """
    assert latents_BCTHW.shape[0] == 1, f"one clip at a time, got {latents_BCTHW.shape[0]}"
    decoder = vae.decoder
    latents_BTHWC = latents_BCTHW.to(vae.post_quant_conv.weight.dtype).permute(0, 2, 3, 4, 1)
    first_conv, source = decoder.conv_in.conv, clip_of(pointwise(vae.post_quant_conv, latents_BTHWC))
    out = storage.new((*source.shape[:4], first_conv.out_channels))
    x = yield from _put(convolved(first_conv, plain(source)), out)
    first, second = _all(Resnet, decoder.mid_block.resnets)
    (attention,) = _all(FrameAttention, decoder.mid_block.attentions)
    x = yield from _resnet(first, x, storage)
    x = yield from _put(_attended(attention, x), x.frames)
    x = yield from _resnet(second, x, storage)
    for block in _all(UpBlock, decoder.up_blocks):
        x = yield from _up_block(block, x, storage)
    for _, chunk_BTHWC in convolved(decoder.conv_out.conv, x.normed(decoder.conv_norm_out)):
        yield chunk_BTHWC[0].permute(3, 0, 1, 2)
    x.frames.close()


def _put(chunks: Chunks, out: Frames) -> Making:
    """Writes a layer's chunks as they come."""
    moments: Moments | None = None
    for first, chunk in chunks:
        if moments is None:
            moments = Moments(chunk)
        else:
            moments.add(chunk)
        out.write(first, chunk)
        del chunk  # not to be held beside the next one
        yield
    assert moments is not None
    return Layer(out, moments)


def _resnet(resnet: Resnet, x: Layer, storage: Storage) -> Making:
    """The sum takes its input's place wherever it is no larger."""
    size, channels, out_channels = x.frames.shape[:4], x.frames.shape[4], resnet.conv2.conv.out_channels
    hidden = yield from _put(convolved(resnet.conv1.conv, x.normed(resnet.norm1)), storage.new((*size, out_channels)))
    widens = out_channels > channels
    out = storage.new((*size, out_channels)) if widens else x.frames.with_channels(out_channels)
    summed = yield from _put(_sums(resnet, x, hidden), out)
    hidden.frames.close()
    if widens:
        x.frames.close()
    return summed


def _sums(resnet: Resnet, x: Layer, hidden: Layer) -> Chunks:
    for first, chunk in convolved(resnet.conv2.conv, hidden.normed(resnet.norm2)):
        skipped = x.frames.read(first, first + chunk.shape[1])
        if resnet.conv_shortcut is not None:
            skipped = pointwise(resnet.conv_shortcut.conv, skipped)
        yield first, chunk.add_(skipped)
        del chunk, skipped  # not to be held beside the next ones


def _attended(attention: FrameAttention, x: Layer) -> Chunks:
    """Keys and values of the frames so far stay on the device: they are as small as the latents' grid."""
    for frame, attended in attention.attended(x.normed(attention.group_norm, silu=False)):
        yield frame, attended.add_(x.frames.read(frame, frame + 1))


def _up_block(block: UpBlock, x: Layer, storage: Storage) -> Making:
    for resnet in _all(Resnet, block.resnets):
        x = yield from _resnet(resnet, x, storage)
    for upsample in _all(Upsample, block.upsamplers):
        _, frames, height, width, _ = x.frames.shape
        conv, frames = upsample.conv.conv, 2 * frames - 1 if upsample.doubles_time else frames
        chunks = upsample_convolved(conv, x.clip, doubles_time=upsample.doubles_time)
        larger = yield from _put(chunks, storage.new((1, frames, 2 * height, 2 * width, conv.out_channels)))
        x.frames.close()
        x = larger
    return x


def _all(kind: type[Kind], modules: nn.ModuleList) -> list[Kind]:
    """The modules, known to be of this kind."""
    found = [module for module in modules if isinstance(module, kind)]
    assert len(found) == len(modules), f"expected {kind.__name__} only: {modules}"
    return found
