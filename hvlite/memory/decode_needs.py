"""How many bytes decoding or encoding one tile takes at its peak, weights apart: arithmetic, no torch.

The steps of `model.vae` and `model.causal` are walked in their order, and a tally is kept of what they allocate and
let go; a test holds the result to within 2 % of what a run on meta tensors allocates. Not in it, since no tensor
shows them: a convolution's own workspace and, on a CPU, what oneDNN reorders.
"""

from collections.abc import Iterable

from hvlite.dims import (
    BLOCK_ELEMENTS,
    BLOCK_ELEMENTS_CPU,
    CONV_ELEMENTS,
    CONV_ELEMENTS_CPU,
    LatentShape,
    VaeDims,
)
from hvlite.memory.tiles import TileGeometry, space_cuts, tile_shapes
from hvlite.memory.vae_steps import Clip, Step, decoder_steps, encoder_steps

FP32 = 4
PAGE = 512
"""What the device's allocator rounds to."""


def decoder_weight_bytes(dims: VaeDims, dtype_bytes: int) -> int:
    """The weights that decoding needs: `decoder.*` and `post_quant_conv.*`."""
    outputs, latents = dims.channels[::-1], dims.latent_channels
    count = _conv_weights(latents, latents, 1) + _conv_weights(latents, outputs[0]) + _middle_weights(outputs[0])
    count += _levels_weights(outputs, dims, dims.layers_per_block + 1)
    return (count + 2 * outputs[-1] + _conv_weights(outputs[-1], 3)) * dtype_bytes


def encoder_weight_bytes(dims: VaeDims, dtype_bytes: int) -> int:
    """The weights that encoding needs: `encoder.*` and `quant_conv.*`."""
    outputs, moments = dims.channels, 2 * dims.latent_channels
    count = _conv_weights(moments, moments, 1) + _conv_weights(3, outputs[0]) + _middle_weights(outputs[-1])
    count += _levels_weights(outputs, dims, dims.layers_per_block)
    return (count + 2 * outputs[-1] + _conv_weights(outputs[-1], moments)) * dtype_bytes


def _conv_weights(channels: int, out_channels: int, taps: int = 27) -> int:
    return channels * out_channels * taps + out_channels


def _resnet_weights(channels: int, out_channels: int) -> int:
    shortcut = _conv_weights(channels, out_channels, 1) if channels != out_channels else 0
    convs = _conv_weights(channels, out_channels) + _conv_weights(out_channels, out_channels)
    return 2 * channels + 2 * out_channels + convs + shortcut


def _levels_weights(outputs: tuple[int, ...], dims: VaeDims, layers: int) -> int:
    """Of all levels with the steps after them."""
    count = 0
    for channels, out_channels, ratios in zip((outputs[0], *outputs[:-1]), outputs, dims.level_ratios, strict=True):
        count += _resnet_weights(channels, out_channels) + (layers - 1) * _resnet_weights(out_channels, out_channels)
        count += _conv_weights(out_channels, out_channels) if max(ratios) > 1 else 0
    return count


def _middle_weights(channels: int) -> int:
    return 2 * _resnet_weights(channels, channels) + 2 * channels + 4 * _conv_weights(channels, channels, 1)


def decode_tile_bytes(dims: VaeDims, tile: LatentShape, dtype_bytes: int, device: str = "cuda") -> int:
    """Live peak of `Vae.decode` on a tile of latents [1,16,t,h,w]; the tile itself is not in it."""
    walk = _Walk(dtype_bytes, device)
    walk.hold(tile.frames * tile.height * tile.width * dims.latent_channels * dtype_bytes)
    return walk.run(decoder_steps(dims, tile))


def encode_tile_bytes(dims: VaeDims, tile: LatentShape, dtype_bytes: int, device: str = "cuda") -> int:
    """Live peak of `Vae.encode` on the frames [1,3,4t-3,8h,8w] of a tile of latents; the frames are not in it."""
    return _Walk(dtype_bytes, device).run(encoder_steps(dims, tile))


def decode_host_bytes(shape: LatentShape, geometry: TileGeometry, dtype_bytes: int = FP32) -> int:
    """At most what `tiles.decode_tiles` and its caller hold where tiles are joined, with the tile that arrives.

    It is one temporal tile in fp32 and its overlaps, and does not grow with the clip's length.
    """
    rows, columns = space_cuts(shape.height, shape.width, geometry)
    tiles = tile_shapes(shape, geometry)
    longest, in_time = max(tile.frames for tile in tiles), len(tiles) // (len(rows) * len(columns))
    frames, pixel = geometry.temporal_ratio * (longest - 1) + 1, 3 * FP32 * geometry.spatial_ratio**2
    area = pixel * shape.height * shape.width
    tail = 0 if in_time == 1 else (frames - 1 - geometry.frames_stride) * area
    tile = frames * pixel * max(rows) * max(columns)
    arriving = tile if dtype_bytes == FP32 else tile + tile * dtype_bytes // FP32
    if len(rows) == len(columns) == 1:
        before = frames * area if tail else 0  # the caller still has those frames when the next ones arrive
        return before + tail + max(arriving, tile + tail)
    _, (_, down), _ = geometry.latents
    above = frames * pixel * max(0, max(rows) - down) * sum(columns)
    blending = tile // 2  # an overlap, its copy for the row below, and one channel's product
    return frames * area + tail + max(above + tile + arriving + blending, tail)


class Tally:
    """Bytes held now, and their peak; and the sizes of the pieces that `model.causal` handles at once."""

    def __init__(self, dtype_bytes: int, device: str) -> None:
        self.now = self.peak = 0
        self.size = dtype_bytes
        self.is_fp32 = dtype_bytes == FP32
        self._conv_limit = CONV_ELEMENTS_CPU if device == "cpu" else CONV_ELEMENTS
        self._block_limit = BLOCK_ELEMENTS_CPU if device == "cpu" else BLOCK_ELEMENTS

    def hold(self, nbytes: int) -> int:
        """Allocate; what it returns is given to `drop` later."""
        held = -(-nbytes // PAGE) * PAGE
        self.now += held
        self.peak = max(self.peak, self.now)
        return held

    def drop(self, *held: int) -> None:
        self.now -= sum(held)

    def touch(self, *sizes: int) -> None:
        """Allocate all of them, and let go."""
        self.drop(*[self.hold(nbytes) for nbytes in sizes])

    def chunk(self, x: Clip, step: int = 1) -> int:
        """Frames of x that a convolution reads at once."""
        return min(max(1, self._conv_limit // x.frame // step) * step, x.frames)

    def buffer(self, x: Clip, chunk: int, front: int) -> int:
        """Bytes of the padded frames."""
        return (front + chunk) * (x.height + 2) * (x.width + 2) * x.channels * self.size

    def block(self, x: Clip, frames: int) -> int:
        """Bytes, in fp32, of the largest block of so many frames that a norm handles at once."""
        rows = max(1, min(x.height, self._block_limit // x.line))
        return min(frames, max(1, self._block_limit // x.frame)) * rows * x.line * FP32

    def rounding(self, x: Clip, frames: int) -> int:
        """Bytes of fp32 values on the way to a smaller dtype."""
        return 0 if self.is_fp32 else self.block(x, frames)

    def attention(self, x: Clip) -> int:
        """Holds keys and values; touches all else of one frame."""
        frame = x.frame * self.size
        held = [self.hold(2 * x.line * FP32), *[self.hold(x.elements * self.size) for _ in "kv"], self.hold(frame)]
        self.touch(self.rounding(x, 1))
        self.touch(frame, frame, frame)
        return sum(held)

    def folded_kernels(self, x: Clip, large: Clip) -> tuple[int, int]:
        """(bytes held, taps in time) of the small kernels of an upsampling in fp32."""
        doubles_time = large.frames > x.frames
        pairs = x.channels * large.channels * FP32
        taps = 1 if x.frames == 1 else 2 if doubles_time else 3
        kernel = 4 * taps * pairs
        held = [self.hold(9 * pairs if x.frames == 1 else 0)]
        held += [self.hold(kernel) for _ in range(8 if doubles_time else 4)]
        self.touch(18 * pairs if doubles_time else 0, 6 * taps * pairs, kernel // 2)
        return sum(held), taps


class _Walk(Tally):
    """A tile, step by step. The residual stream is changed in place: `_x` is the size of its memory, `_stale` that of
    memory that a widening resnet has left but a caller still holds."""

    def __init__(self, dtype_bytes: int, device: str) -> None:
        super().__init__(dtype_bytes, device)
        self._x = self._stale = 0

    def run(self, steps: Iterable[Step]) -> int:
        """The peak of all steps."""
        for step in steps:
            match step.kind:
                case "first":
                    self._x = self._conv(step.x, step.out)
                case "resnet":
                    self._resnet(step.x, step.out)
                case "attention":
                    self._moments(step.x)
                    self.drop(self.attention(step.x))
                case "downsample":
                    self._replace(self._conv(step.x, step.out))
                case "upsample":
                    self._replace(self._upsample(step.x, step.out))
                case "end_level":
                    self.drop(self._stale)
                    self._stale = 0
                case "last":
                    self._moments(step.x)
                    self._conv(step.x, step.out, normed=True)
        return self.peak

    def _replace(self, held: int) -> None:
        self.drop(self._x)
        self._x = held

    def _resnet(self, x: Clip, out: Clip) -> None:
        self._moments(x)
        hidden = self._conv(x, out, normed=True)
        if out.channels > x.channels:
            self._stale, self._x = self._x, self.hold(out.elements * self.size)
        elif out.channels < x.channels:
            pixels = min(self._block_limit // x.channels, x.elements // x.channels)
            self.touch(pixels * out.channels * self.size)
        self._moments(out)
        self._conv(out, out, normed=True, adds=True)
        self.drop(hidden)

    def _moments(self, x: Clip) -> None:
        self.touch(x.line * FP32, self.block(x, x.frames), x.line * FP32)

    def _conv(self, x: Clip, out: Clip, *, normed: bool = False, adds: bool = False) -> int:
        """The memory that is taken for the result: none where it `adds` to what is there."""
        step = 2 if out.frames < x.frames else 1
        is_flat = x.frames == 1 and self.is_fp32
        chunk = self.chunk(x, step)
        held = [
            self.hold(x.channels * out.channels * 9 * FP32 if is_flat else 0),
            self.hold(2 * x.line * FP32 if normed else 0),
            self.hold(self.buffer(x, chunk, 0 if is_flat else 2)),
        ]
        piece = ((chunk - 1) // step + 1) * out.frame * self.size
        self.touch(self.rounding(x, chunk) if normed else 0)
        if adds or chunk < x.frames:
            result = self.hold(0 if adds else out.elements * self.size)
            self.touch(piece)
            self.touch(self.rounding(x, min(chunk, x.frames - chunk)) if normed else 0)
        else:
            result = self.hold(piece)
        self.drop(*held)
        return result

    def _upsample(self, x: Clip, large: Clip) -> int:
        if not self.is_fp32:
            return self._conv(large, large)
        result = self.hold(large.elements * FP32)
        kernels, taps = self.folded_kernels(x, large)
        chunk = self.chunk(x)
        self.touch(self.buffer(x, chunk, taps - 1), chunk * x.height * x.width * large.channels * FP32)
        self.drop(kernels)
        return result
