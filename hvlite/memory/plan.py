"""How a clip is rendered within a budget, and what that takes in every stage: arithmetic, without torch.

`make_plan` chooses (`choice`), says what each stage holds (`stages`, which says why) and where the weights are
meanwhile (`host`); `Plan.check` refuses what does not fit and names changes that would (`advice`); `Plan.next_rung` is
for a run that runs out of memory all the same.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from hvlite import paths
from hvlite.errors import DoesNotFit
from hvlite.memory.advice import cheapest_changes
from hvlite.memory.choice import Inputs, choose, has_room_to_spill, leaner, needs_of
from hvlite.memory.geometry import WIDE, Exact, Tiles, decoded_volume, tiles_text
from hvlite.memory.host import HostPlan, plan_host
from hvlite.memory.stages import Choice, Stage, StageNeed, exact_bytes
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """What an exact decode keeps beside the device at most, where, and the bytes that it writes there and reads."""

    place: Literal["disk", "host"]
    nbytes: int
    moved_bytes: int
    chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`residents` and `pinned` are indexes of blocks, `text_residents` of the text encoder's layers.

    `warm`: the parts (dit, text, vae) that stay on the device between clips. Bytes from disk are part of those that
    travel; `once_bytes` travel once a clip. `fits_host`: no block has to come from disk at every step.
    `decoded_volume`: latents decoded for each latent of the clip. `spilled`: of an exact decode.
    """

    fits: bool
    fits_host: bool
    budget_bytes: int
    peak_bytes: int
    host_bytes: int
    resident_blocks: int
    streamed_blocks: int
    bytes_per_step: int
    disk_bytes_per_step: int
    once_bytes: int
    stages: tuple[StageNeed, ...]
    token_chunk: int
    head_groups: int
    residents: tuple[int, ...]
    pinned: tuple[int, ...]
    text_residents: tuple[int, ...]
    tiles: Tiles
    decoded_volume: float
    spilled: Spilled | None
    warm: tuple[str, ...]
    notes: tuple[str, ...]
    inputs: Inputs = field(repr=False, compare=False)
    choice: Choice = field(repr=False, compare=False)

    @property
    def knobs_text(self) -> str:
        """How the steps are computed, in words."""
        blocks = self.resident_blocks + self.streamed_blocks
        return (
            f"{self.head_groups} group{'s' * (self.head_groups > 1)} of heads, {self.token_chunk} tokens a chunk, "
            f"{self.resident_blocks} of {blocks} blocks resident"
        )

    def stage(self, name: Stage) -> StageNeed:
        """What that stage takes."""
        return next(need for need in self.stages if need.name == name)

    def check(self) -> None:
        """DoesNotFit where a stage needs more than the budget: with both numbers, and changes that would fit."""
        if self.fits:
            return
        changes = self.advice()
        advice = f"Try {', or '.join(changes)}." if changes else f"No smaller clip fits either: {self._way_out()}."
        raise DoesNotFit(f"{self._shortage()}. {advice}")

    def _way_out(self) -> str:
        """Where no change of the clip helps."""
        budget = self.inputs.budget
        if budget.room_bytes is not None and budget.room_bytes > budget.device_bytes:
            return f"raise --memory, {_size(budget.room_bytes)} may be used here"
        return "it needs more memory" if self.inputs.task.kind == "cpu" else "it needs another card"

    def _shortage(self) -> str:
        """What there is too little of, with both numbers."""
        clip = _clip_text(self.inputs)
        first = next((need for need in self.stages if need.peak_bytes > self.budget_bytes), None)
        if first is None:
            assert self.spilled is not None
            return (
                f"{clip} decoded exactly keeps {_size(self.spilled.nbytes)} in {paths.scratch_folder()}, where "
                f"{_size(self.inputs.budget.disk_bytes or 0)} may be used"
            )
        tiles = "as it is" if isinstance(self.tiles, Exact) else f"even in tiles of {tiles_text(self.tiles)}"
        tried = {"denoise": f", even with {self.knobs_text}", "decode": f", {tiles}"}
        return (
            f"{clip} needs {first.peak_bytes / GIB:.2f} GiB in stage {first.name}"
            f"{tried.get(first.name, '')}; the budget is {self.budget_bytes / GIB:.2f} GiB"
        )

    def advice(self) -> list[str]:
        """The three cheapest changes, as flags, that make it fit; tried one by one, so it takes a moment."""
        return [] if self.fits else cheapest_changes(self.inputs)

    def next_rung(self, stage: Stage) -> "Plan | None":
        """The next leaner plan for a stage that ran out of memory; None if nothing is left to give up."""
        choice = leaner(self.inputs, self.choice, stage)
        return None if choice is None else _plan(self.inputs, choice)

    def as_dict(self) -> dict[str, object]:
        """What `hvlite plan --json` prints."""
        shown = asdict(self)
        del shown["inputs"], shown["choice"]
        return shown | {"decode_tile": tiles_text(self.tiles)}


def make_plan(inputs: Inputs) -> Plan:
    """The first way that fits; the leanest one, with `fits` False, if none does."""
    return _plan(inputs, choose(inputs))


def _plan(inputs: Inputs, choice: Choice) -> Plan:
    task, needs = inputs.task, needs_of(inputs, choice)
    host = plan_host(task, choice, inputs.budget.host_bytes)
    peak, layers = max(need.peak_bytes for need in needs), task.dims.llama.used_layers
    return Plan(
        fits=peak <= inputs.budget.device_bytes and has_room_to_spill(inputs, choice),
        fits_host=host.disk_bytes_per_step == 0,
        budget_bytes=inputs.budget.device_bytes,
        peak_bytes=peak,
        host_bytes=host.host_bytes,
        resident_blocks=len(choice.residents),
        streamed_blocks=task.dims.dit.blocks - len(choice.residents),
        bytes_per_step=host.bytes_per_step,
        disk_bytes_per_step=host.disk_bytes_per_step,
        once_bytes=host.once_bytes,
        stages=needs,
        token_chunk=choice.knobs.token_chunk,
        head_groups=choice.knobs.head_groups,
        residents=choice.residents,
        pinned=host.pinned,
        text_residents=tuple(range(layers)) if "text" in choice.warm else (),
        tiles=choice.tiles,
        decoded_volume=decoded_volume(task.clip.shape, choice.tiles),
        spilled=_spilled(inputs, choice),
        warm=tuple(sorted(choice.warm)),
        notes=tuple(_notes(inputs, choice, host)),
        inputs=inputs,
        choice=choice,
    )


def _spilled(inputs: Inputs, choice: Choice) -> Spilled | None:
    if not isinstance(choice.tiles, Exact):
        return None
    needs = exact_bytes(inputs.task)
    return Spilled(
        place="disk" if choice.tiles.on_disk else "host",
        nbytes=needs.stored_bytes,
        moved_bytes=needs.written_bytes + needs.read_bytes,
        chunks=needs.chunks,
    )


def _notes(inputs: Inputs, choice: Choice, host: HostPlan) -> list[str]:
    """What a user should know of how it will run."""
    notes = []
    if host.disk_bytes_per_step and inputs.task.kind == "cuda":
        notes.append(
            f"{host.disk_bytes_per_step / GIB:.1f} of {host.wanted_bytes / GIB:.1f} GiB of streamed blocks are read "
            f"from disk at every step: {inputs.budget.host_bytes / GIB:.1f} GiB of host memory may be used"
        )
    if host.host_bytes > inputs.budget.host_bytes:
        notes.append(
            f"{_size(host.host_bytes)} of host memory are taken, though {_size(inputs.budget.host_bytes)} may be used: "
            "the vectors of all steps wait there, and weights pass through it from disk"
        )
    if "decode" not in inputs.stages:
        return notes
    spilled = _spilled(inputs, choice)
    if spilled is not None:
        where = f"on disk, in {paths.scratch_folder()}" if spilled.place == "disk" else "in the host's memory"
        notes.append(
            f"decoding without tiles keeps up to {_size(spilled.nbytes)} {where}, and moves "
            f"{_size(spilled.moved_bytes)} there and back"
        )
    elif inputs.asked.tiles == "auto" and choice.tiles != PUBLISHED_TILES:
        notes.append(
            f"the published decode tiles do not fit: {tiles_text(choice.tiles)} are used, and the clip differs a "
            "little from what other machines make of it"
        )
    elif inputs.asked.tiles == WIDE and _frames(choice.tiles) < _frames(PUBLISHED_TILES):
        notes.append(f"whole frames fit in tiles of {_frames(choice.tiles)} frames alone: short ones may flicker")
    return notes


def _frames(tiles: Tiles) -> int:
    assert isinstance(tiles, TileGeometry)
    return tiles.frames + 1


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def _clip_text(inputs: Inputs) -> str:
    shape, vae = inputs.task.clip.shape, inputs.task.dims.vae
    frames = (shape.frames - 1) * vae.temporal_ratio + 1
    return f"{shape.height * vae.spatial_ratio}x{shape.width * vae.spatial_ratio}x{frames}"
