"""The steps of the VAE's encoder and decoder with the shapes they meet (spec 3.3): what every count of it begins with.

No torch. `model.vae` is what runs; tests hold the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hvlite.dims import LatentShape, VaeDims

Kind = Literal["first", "resnet", "attention", "upsample", "downsample", "end_level", "last"]


@dataclass(frozen=True, slots=True)
class Clip:
    """The shape of a tensor [1,T,H,W,C]."""

    frames: int
    height: int
    width: int
    channels: int

    @property
    def line(self) -> int:
        return self.width * self.channels

    @property
    def frame(self) -> int:
        return self.height * self.line

    @property
    def elements(self) -> int:
        return self.frames * self.frame

    def with_channels(self, channels: int) -> "Clip":
        return Clip(self.frames, self.height, self.width, channels)


@dataclass(frozen=True, slots=True)
class Step:
    """`first` and `last` are the outer convolutions; at `end_level` callers let go of the level's input."""

    kind: Kind
    x: Clip
    out: Clip

    @property
    def flops(self) -> int:
        """Two for a multiplication and an addition; norms and the like are not counted."""
        pixels, channels, out_channels = self.out.elements // self.out.channels, self.x.channels, self.out.channels
        match self.kind:
            case "end_level":
                return 0
            case "resnet":
                shortcut = channels * out_channels if channels != out_channels else 0
                return 2 * pixels * (27 * (channels + out_channels) * out_channels + shortcut)
            case "attention":
                grid, frames = self.x.height * self.x.width, self.x.frames
                pairs = grid * grid * frames * (frames + 1) // 2
                return 2 * pixels * 4 * channels * channels + 4 * channels * pairs
            case _:
                return 2 * pixels * 27 * channels * out_channels


def decoder_steps(dims: VaeDims, latents: LatentShape) -> Iterator[Step]:
    """Of `Vae.decode`; the 1x1x1 convolution before it is left out."""
    outputs = dims.channels[::-1]
    given = Clip(latents.frames, latents.height, latents.width, dims.latent_channels)
    x = given.with_channels(outputs[0])
    yield Step("first", given, x)
    yield from _middle(x)
    for out_channels, (time, space) in zip(outputs, dims.level_ratios, strict=True):
        for _ in range(dims.layers_per_block + 1):
            yield Step("resnet", x, x.with_channels(out_channels))
            x = x.with_channels(out_channels)
        if max(time, space) > 1:
            frames = 2 * x.frames - 1 if time == 2 else x.frames
            larger = Clip(frames, 2 * x.height, 2 * x.width, x.channels)
            yield Step("upsample", x, larger)
            x = larger
        yield Step("end_level", x, x)
    yield Step("last", x, x.with_channels(3))


def encoder_steps(dims: VaeDims, latents: LatentShape) -> Iterator[Step]:
    """Of `Vae.encode` of the frames that these latents stand for; the 1x1x1 convolution after it is left out."""
    frames, space = dims.temporal_ratio * (latents.frames - 1) + 1, dims.spatial_ratio
    given = Clip(frames, space * latents.height, space * latents.width, 3)
    x = given.with_channels(dims.channels[0])
    yield Step("first", given, x)
    for out_channels, (time, space) in zip(dims.channels, dims.level_ratios, strict=True):
        for _ in range(dims.layers_per_block):
            yield Step("resnet", x, x.with_channels(out_channels))
            x = x.with_channels(out_channels)
        if max(time, space) > 1:
            smaller = Clip(
                (x.frames - 1) // time + 1, (x.height - 1) // space + 1, (x.width - 1) // space + 1, out_channels
            )
            yield Step("downsample", x, smaller)
            x = smaller
        yield Step("end_level", x, x)
    yield from _middle(x)
    yield Step("last", x, x.with_channels(2 * dims.latent_channels))


def _middle(x: Clip) -> Iterator[Step]:
    yield Step("resnet", x, x)
    yield Step("attention", x, x)
    yield Step("resnet", x, x)
