"""What an exact, untiled decode takes (`model.exact`): arithmetic, no torch.

Device memory is that of a few frames; what grows with the clip lies elsewhere: host memory or disk, of which the plan
tells the bytes and the traffic, since they are what it takes on top of the work.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hvlite.dims import LatentShape, VaeDims
from hvlite.memory.decode_needs import FP32, Tally
from hvlite.memory.vae_steps import Clip, Step, decoder_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactNeeds:
    """Of one clip: `device_bytes` beside the decoder's weights, `stored_bytes` the peak of what lies elsewhere."""

    device_bytes: int
    stored_bytes: int
    read_bytes: int
    written_bytes: int
    flops: int
    chunks: int


def exact_needs(dims: VaeDims, shape: LatentShape, dtype_bytes: int, device: str = "cuda") -> ExactNeeds:
    """Of decoding a clip of these latents as one."""
    steps = [step for step in decoder_steps(dims, shape) if step.kind != "end_level"]
    walk = _Walk(dtype_bytes, device)
    walk.hold(shape.frames * shape.height * shape.width * dims.latent_channels * dtype_bytes)
    for step in steps:
        walk.run(step)
    return ExactNeeds(
        device_bytes=walk.peak,
        stored_bytes=dtype_bytes * max(_stored(steps)),
        read_bytes=dtype_bytes * sum(_read(step) for step in steps),
        written_bytes=dtype_bytes * sum(_written(step) for step in steps),
        flops=sum(step.flops for step in steps),
        chunks=walk.chunks,
    )


def _stored(steps: list[Step]) -> Iterator[int]:
    """Elements stored during each step. A result that is no larger than its input takes the input's memory."""
    x = 0
    for step in steps:
        match step.kind:
            case "first":
                x = step.out.elements
                yield x
            case "resnet":
                widened = step.out.elements if step.out.channels > step.x.channels else 0
                yield x + step.out.elements + widened
                x = widened or x
            case "upsample":
                yield x + step.out.elements
                x = step.out.elements


def _read(step: Step) -> int:
    match step.kind:
        case "first":
            return 0
        case "resnet":
            return 2 * step.x.elements + step.out.elements
        case "attention":
            return 2 * step.x.elements
        case _:
            return step.x.elements


def _written(step: Step) -> int:
    match step.kind:
        case "last":
            return 0
        case "resnet":
            return 2 * step.out.elements
        case _:
            return step.out.elements


class _Walk(Tally):
    """A clip, step by step; `chunks` counts the pieces in which its results come."""

    def __init__(self, dtype_bytes: int, device: str) -> None:
        super().__init__(dtype_bytes, device)
        self.chunks = 0

    def run(self, step: Step) -> None:
        x, out = step.x, step.out
        match step.kind:
            case "resnet":
                self._conv(x, out, normed=True)
                self._conv(out, out, normed=True, added=x)
            case "attention":
                self.chunks += x.frames
                frame = x.frame * self.size
                held = self.attention(x)
                self.touch(frame, frame, self.block(x, 1))
                self.drop(held)
            case "upsample":
                self._upsample(x, out)
            case "last":
                self._conv(x, out, normed=True, is_last=True)
            case _:
                self._conv(x, out, reads=False)

    def _conv(
        self,
        x: Clip,
        out: Clip,
        *,
        normed: bool = False,
        added: Clip | None = None,
        reads: bool = True,
        is_last: bool = False,
    ) -> None:
        is_flat = x.frames == 1 and self.is_fp32
        chunk = self.chunk(x)
        self.chunks += -(-x.frames // chunk)
        held = [
            self.hold(x.channels * out.channels * 9 * FP32 if is_flat else 0),
            self.hold(2 * x.line * FP32 if normed else 0),
            self.hold(self.buffer(x, chunk, 0 if is_flat else 2)),
        ]
        self.touch(chunk * x.frame * self.size if reads else 0, self.rounding(x, chunk) if normed else 0)
        piece = chunk * out.frame * self.size
        if added is None:
            self._finish(out, chunk, piece, is_last)
        else:
            skipped = self.hold(chunk * added.frame * self.size)
            self.touch(piece, piece if added.channels != out.channels else 0)
            self.drop(skipped)
            self._finish(out, chunk, piece + piece, is_last)
        self.drop(*held)

    def _finish(self, out: Clip, chunk: int, piece: int, is_last: bool) -> None:
        """The moments of a piece while it is held."""
        self.touch(piece, 0 if is_last else self.block(out, chunk), 0 if is_last else 2 * out.line * FP32)

    def _upsample(self, x: Clip, large: Clip) -> None:
        if not self.is_fp32:
            self._upsample_plainly(x, large)
            return
        kernels, taps = self.folded_kernels(x, large)
        chunk = self.chunk(x)
        self.chunks += -(-x.frames // chunk)
        buffer = self.hold(self.buffer(x, chunk, taps - 1))
        self.touch(chunk * x.frame * self.size)
        frames = chunk
        if large.frames > x.frames:  # the clip's first frame is not doubled
            frames = max(2 * chunk - 1, 2 * min(chunk, x.frames - chunk))
        piece = frames * large.frame * self.size
        self.touch(piece, chunk * x.height * x.width * large.channels * FP32)
        self._finish(large, frames, piece, is_last=False)
        self.drop(kernels, buffer)

    def _upsample_plainly(self, x: Clip, large: Clip) -> None:
        chunk = self.chunk(large)
        self.chunks += -(-large.frames // chunk)
        buffer = self.hold(self.buffer(large, chunk, 2))
        small = chunk // 2 + 1 if large.frames > x.frames else chunk
        self.touch(small * x.frame * self.size)
        self._finish(large, chunk, chunk * large.frame * self.size, is_last=False)
        self.drop(buffer)
