"""Request: what to render. One frozen value = the CLI's flags = a queue row = the file's metadata.

None means "the model's default"; `resolve` fills those in, and only a resolved Request is stored or hashed.
All checks that need no model are in `__post_init__`, so that every front end has one set of rules and one
wording.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hvlite.dims import ModelDims, RequestDefaults
from hvlite.errors import RequestError

Template = Literal["video", "image"]
SIZE_MULTIPLE = 16
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 100_000
DEFAULT_NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, "
    "bad teeth, bad eyes, bad limbs, distortion"
)


@dataclass(frozen=True, slots=True)
class Request:
    """What to render. `size` is (height, width) in pixels; None leaves a choice to the model."""

    prompt: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    flow_shift: float | None = None
    flow_reverse: bool = True
    negative_prompt: str | None = None
    cfg_scale: float = 1.0
    seed: int = 0
    template: Template | None = None

    def __post_init__(self) -> None:
        _check_text("a prompt", self.prompt)
        _check_text("a negative prompt", self.negative_prompt or "")
        if self.size is not None:
            object.__setattr__(self, "size", _checked_size(self.size))
        if self.frames is not None:
            _check_frames(self.frames)
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise RequestError(f"steps must be 1 to 1000; got {self.steps}")
        _check_number("guidance", self.guidance, 0.0, 100.0)
        _check_number("flow_shift", self.flow_shift, 0.01, 100.0)
        _check_number("cfg_scale", self.cfg_scale, 0.0, 100.0)
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed must be 0 to {MAX_SEED}; got {self.seed} (the CLI's --seed -1 draws one)")
        if self.template not in (None, "video", "image"):
            raise RequestError(f"template must be video or image; got {self.template!r}")

    def resolve(self, dims: ModelDims) -> "ResolvedRequest":
        """The complete Request for this model: no None left, prompt stripped."""
        defaults = dims.defaults
        frames = self.frames if self.frames is not None else defaults.frames
        negative = ""
        if self.cfg_scale > 1:
            negative = DEFAULT_NEGATIVE_PROMPT if self.negative_prompt is None else self.negative_prompt
        return ResolvedRequest(
            prompt=self.prompt.strip(),
            size=self.size or defaults.size,
            frames=frames,
            steps=self.steps if self.steps is not None else defaults.steps,
            guidance=self.guidance if self.guidance is not None else defaults.guidance,
            flow_shift=self.flow_shift if self.flow_shift is not None else defaults.flow_shift,
            flow_reverse=self.flow_reverse,
            negative_prompt=negative.strip(),
            cfg_scale=self.cfg_scale,
            seed=self.seed,
            template=self.template or default_template(frames),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A Request with every choice made; what metadata, latents and checkpoints hold."""

    prompt: str
    size: tuple[int, int]
    frames: int
    steps: int
    guidance: float
    flow_shift: float
    flow_reverse: bool
    negative_prompt: str
    cfg_scale: float
    seed: int
    template: Template

    @property
    def uses_cfg(self) -> bool:
        """True two-pass guidance: twice the work, and the negative prompt counts."""
        return self.cfg_scale > 1.0

    def as_request(self) -> Request:
        """The same clip as a Request, for `--like`; a template that follows from the frames is left to follow."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not self.uses_cfg:
            fields["negative_prompt"] = None
        if self.template == default_template(self.frames):
            fields["template"] = None
        return Request(**fields)


def default_template(frames: int) -> Template:
    """One frame is described as an image, more as a video."""
    return "image" if frames == 1 else "video"


def check_stored(resolved: ResolvedRequest) -> None:
    """Hold a Request that was read from a file against the same rules as one that was typed."""
    resolved.as_request()


def request_notes(request: Request, dims: ModelDims) -> list[str]:
    """What a user should know of this Request before it is rendered."""
    resolved = request.resolve(dims)
    notes = [unusual_size_note(resolved.size, dims.defaults)]
    if request.negative_prompt and not resolved.uses_cfg:
        notes.append(
            f"the negative prompt has no effect at cfg_scale {request.cfg_scale:g}: add --cfg-scale 6 or so "
            "(it doubles the time)"
        )
    if not request.flow_reverse:
        notes.append("the schedule runs from data to noise (--no-flow-reverse): released weights give noise that way")
    return [note for note in notes if note is not None]


def unusual_size_note(size: tuple[int, int], defaults: RequestDefaults) -> str | None:
    """A sentence for sizes outside the model's published table; None inside it."""
    if not defaults.known_sizes or size in defaults.known_sizes:
        return None
    known = ", ".join(f"{height}x{width}" for height, width in defaults.known_sizes)
    return (
        f"{size[0]}x{size[1]} (height x width) is not a published size; it works without guarantee. Published: {known}"
    )


def _check_text(name: str, text: str) -> None:
    if "\0" in text or len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(f"{name} has at most {MAX_PROMPT_CHARACTERS:,} characters and no NUL; got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is Unicode text; character {error.start + 1} is half of one (is its file or terminal not UTF-8?)"
        ) from None


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    for name, value in (("height", height), ("width", width)):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            nearest = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise RequestError(f"{name} must be a multiple of {SIZE_MULTIPLE}; got {value}. Nearest: {nearest}.")
        if value > 8192:
            raise RequestError(f"{name} must be at most 8192; got {value}")
    return height, width


def _check_frames(frames: int) -> None:
    if frames < 1 or (frames - 1) % 4:
        nearest = max(1, round((frames - 1) / 4) * 4 + 1)
        raise RequestError(f"frames must be 4k+1 (1, 5, 9, ... 129); got {frames}. Nearest: {nearest}.")
    if frames > 4097:
        raise RequestError(f"frames must be at most 4097; got {frames}")


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and (not math.isfinite(value) or not low <= value <= high):
        raise RequestError(f"{name} must be {low:g} to {high:g}; got {value}")
