"""A clip in the middle: latents, how many steps are done, and all that the steps to come need but the weights.

So a resume loads no text encoder and no modulation, and goes on with the very numbers of the run that ended: resumed
equals uninterrupted, bit for bit, where the knobs that were saved with it are used again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
from torch import Tensor

from hvlite import metadata
from hvlite.dims import DitDims, ModelDims, latent_shape
from hvlite.errors import RequestError
from hvlite.metadata import Metadata
from hvlite.model.dit import Conditioning
from hvlite.request import ResolvedRequest
from hvlite.video.latents import SavedLatents, load_latents, save_latents


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    """What changes a clip's last bits without being asked for in its request."""

    device: str
    dtype: str
    attention: str
    token_chunk: int
    head_groups: int
    threads: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a clip is: `done` of its steps, each with `branches` prompts."""

    done: int
    branches: int
    knobs: Knobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unfinished:
    """A clip between two steps; tensors on any device. `made` says what is being made, and with which model.

    Without `progress` all steps are done, and no conditioning is kept.
    """

    made: Metadata
    latents: Tensor
    progress: Progress | None = None
    conditionings: Sequence[Conditioning] = ()

    def check(self, path: Path, resolved: ResolvedRequest, dims: ModelDims, fingerprint: str, dtype: str) -> None:
        """RequestError unless it is of this request, these weights and this dtype, and whole."""
        if self.made.model.fingerprint != fingerprint:
            raise RequestError(
                f"{path} was made with other weights (model {self.made.model.name}, {self.made.model.fingerprint}, "
                f"now {fingerprint}): name those with --model, or render the clip anew"
            )
        for name in (each.name for each in fields(resolved)):
            was, asked = getattr(self.made.request, name), getattr(resolved, name)
            if was != asked:
                raise RequestError(f"{path} is of a clip with {name} {was}, now {asked} is asked for: render it anew")
        shape = latent_shape(resolved.size, resolved.frames, dims.vae)
        expected = (1, dims.dit.latent_channels, shape.frames, shape.height, shape.width)
        _equal(path, "latents", tuple(self.latents.shape), expected)
        if self.progress is not None:
            if self.progress.knobs.dtype != dtype:
                raise RequestError(
                    f"{path} was begun in {self.progress.knobs.dtype}, now {dtype} is asked for: "
                    f"go on with --dtype {self.progress.knobs.dtype}"
                )
            self._check_progress(path, self.progress, resolved, dims.dit)

    def _check_progress(self, path: Path, progress: Progress, resolved: ResolvedRequest, dims: DitDims) -> None:
        if not 0 <= progress.done < resolved.steps:
            raise RequestError(f"{path} is damaged: {progress.done} of {resolved.steps} steps are done. Render it anew")
        _equal(path, "prompts", len(self.conditionings), 2 if resolved.uses_cfg else 1)
        for each in self.conditionings:
            steps, hidden = resolved.steps, dims.hidden
            _equal(path, "double", tuple(each.double.shape), (steps, dims.double_blocks, 2, 6, hidden))
            _equal(path, "single", tuple(each.single.shape), (steps, dims.single_blocks, 3, hidden))
            _equal(path, "final", tuple(each.final.shape), (steps, 2, hidden))
            _equal(path, "text", (each.text.shape[0], *each.text.shape[2:]), (steps, hidden))


def _equal(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RequestError(f"{path} is damaged: {what} is {found}, this request makes {expected}. Render the clip anew")


def save_unfinished(path: Path, clip: Unfinished) -> None:
    """Write it in place of what is there, whole or not at all."""
    tensors = {
        f"{branch}.{name}": tensor.cpu()
        for branch, conditioning in enumerate(clip.conditionings)
        for name, tensor in _tensors(conditioning).items()
    }
    saved = SavedLatents(
        latents=clip.latents.cpu(),
        request=metadata.encode(clip.made),
        progress=None if clip.progress is None else msgspec.json.encode(clip.progress).decode(),
        tensors=tensors,
    )
    save_latents(path, saved)


def load_unfinished(path: Path) -> Unfinished:
    """What `save_unfinished` wrote, or finished latents; RequestError for anything else."""
    saved = load_latents(path)
    made = metadata.decode(saved.request, path)
    if saved.progress is None:
        return Unfinished(made=made, latents=saved.latents)
    try:
        progress = msgspec.json.decode(saved.progress, type=Progress)
        branches = [_conditioning(saved.tensors, branch) for branch in range(progress.branches)]
    except (msgspec.DecodeError, KeyError) as error:
        raise RequestError(f"{path} is damaged: {error}. Render the clip again.") from None
    return Unfinished(made=made, latents=saved.latents, progress=progress, conditionings=branches)


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    return {each.name: getattr(conditioning, each.name) for each in fields(conditioning)}


def _conditioning(tensors: Mapping[str, Tensor], branch: int) -> Conditioning:
    return Conditioning(*(tensors[f"{branch}.{each.name}"] for each in fields(Conditioning)))
