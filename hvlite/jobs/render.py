"""What a worker does: a job's order -> its clip, with the last model kept open and the prompts to come read ahead.

Whatever happens becomes an Ended, and is in the job's log. A clip lies in the job's checkpoint until it is written;
what an earlier attempt has written already is found, not made again.
"""

import gc
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hvlite import metadata, paths
from hvlite.atomic import check_new, explained, make_folder, new_file, remove_leftovers
from hvlite.errors import HvliteError, RequestError
from hvlite.events import BlockDone, Event, Finished, Loaded, Note, Parked, Preview, Saved, Stage, StepDone, TileDone
from hvlite.jobs.asking import model_of
from hvlite.jobs.failures import failed
from hvlite.jobs.job import How
from hvlite.jobs.logs import logged_to
from hvlite.jobs.opening import open_asked
from hvlite.jobs.port import Port, Terminated
from hvlite.jobs.wire import Ended, Holds, Kept, Packed, Planned, Render, spoken
from hvlite.line import encode_prompts, generate, prompts_of, wishes_of
from hvlite.memory.device import choose_device, held_bytes, tensor_bytes
from hvlite.memory.geometry import parse_tiles
from hvlite.model.text import PromptStates
from hvlite.opened import Model
from hvlite.request import ResolvedRequest
from hvlite.run import Outputs
from hvlite.telemetry import host_state
from hvlite.unfinished import Unfinished, load_unfinished
from hvlite.video.latents import load_latents
from hvlite.video.mp4 import read_metadata
from hvlite.video.preview import write_strip
from hvlite.weights.pack import Progress

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)

# Blocks, tiles and slabs are told no more often than this.
TOLD_SECONDS = 0.1
# Pictures of a clip while it is made.
PREVIEWS = 10
PromptKey = tuple[str, str]
"""Template and text: what a prompt's states depend on, within one model."""


class Left(BaseException):
    """The clip is left in good order. No Exception: nobody that handles errors may swallow it."""


@dataclass(slots=True)
class Clip:
    """The clip at work."""

    order: Render
    stage: str = "load"
    done: int = 0
    """Steps that are finished."""
    kept: int = 0
    """Steps that the supervisor knows to be on disk."""
    step_seconds: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    told_at: float = 0.0
    shows: bool = True
    """Whether its previews work."""

    @property
    def checkpoint(self) -> Path:
        return paths.checkpoint_file(self.order.job)


class Renderer:
    """Renders on one device, for the supervisor at the other end of `port`."""

    def __init__(self, device: str, port: Port) -> None:
        self._device, self._port = device, port
        self._bare_bytes = host_state().process_rss  # Python and its libraries: no part of any plan
        self.opened: tuple[How, Model] | None = None
        self._stack = ExitStack()
        self._states: dict[PromptKey, PromptStates] = {}

    def close(self) -> None:
        """Give the model back."""
        self.opened = None
        self._states.clear()
        self._stack.close()

    def render(self, order: Render) -> Ended:
        """Make the clip, or say why not. Never raises."""
        clip = Clip(order)
        with logged_to(paths.job_log(order.job)), left_when_asked(self._port):
            log.info("attempt %d of job %d (process %d)", order.attempt, order.job, os.getpid())
            try:
                ended = self._made(clip)
            except Left:
                ended = Ended(kind="stopped")
            except Terminated:
                ended = Ended(kind="stopped", is_last=True)
            except BaseException as error:
                log.exception("in stage %s", clip.stage)
                ended = failed(error, clip.stage)
            # past the handlers: an error holds the frames, and so the tensors, of what failed
            with suppress(Exception, Terminated):
                self._tell_kept(clip)
            log.info("%s: %s", ended.kind, ended.error or f"steps {clip.done}, seconds {ended.timings}")
        return ended

    def _made(self, clip: Clip) -> Ended:
        order = clip.order
        model = self._model(clip)
        resolved = order.request.resolve(model.dims)
        saved = self._saved(clip, model, resolved)
        tiles = parse_tiles(order.how.decode_tile or "auto")
        wishes, resumes = wishes_of(Outputs(decode_tile=tiles), saved), saved is not None
        del saved  # what it holds would stay beside what `generate` reads
        plan = model.plan(resolved, wishes)
        suffix = ".png" if resolved.frames == 1 else ".mp4"
        self._port.say(Planned(resolved=resolved, predicted_bytes=plan.peak_bytes, suffix=suffix, resumes=resumes))
        go = self._port.answer(order.job)
        if go is None:
            return Ended(kind="stopped")
        if _is_made_already(clip, go.output, resolved, model):
            clip.checkpoint.unlink(missing_ok=True)
            return Ended(kind="done", output=go.output)
        prompts = None if resumes else self._prompts(clip, model, resolved)
        outputs = Outputs(
            file=go.output,
            unfinished=clip.checkpoint,
            save_seconds=order.save_seconds,
            stop_after=order.stop_after,
            decode_tile=tiles,
            preview_steps=order.stop_after or max(1, resolved.steps // PREVIEWS),
        )
        if order.stop_after is not None and order.stop_after >= resolved.steps:
            self._note(f"no draft: it has {resolved.steps} steps, and was to stop after {order.stop_after}")
        _forget_peak()
        resume = clip.checkpoint if resumes else None
        stream = generate(order.request, model, outputs=outputs, prompts=prompts, resume=resume)
        return self._follow(clip, model, stream)

    def _follow(self, clip: Clip, model: Model, stream: Generator[Event, None, None]) -> Ended:
        """Tell every event, to the last."""
        last: Event | None = None
        with closing(stream):
            for last in stream:
                self._take(clip, model, last)
        gc.collect()  # what is held is measured, not what waits to be found
        return Ended(
            kind="parked" if isinstance(last, Parked) else "done",
            output=last.path if isinstance(last, Finished) else None,
            timings=clip.timings,
            seconds_per_step=statistics.median(clip.step_seconds) if clip.step_seconds else None,
            peak_bytes=model.peak_bytes() or max(0, host_state().process_peak - self._bare_bytes),
            held_bytes=held_bytes(model.device) - model.held_bytes,
        )

    def _take(self, clip: Clip, model: Model, event: Event) -> None:
        """One event of the engine's: act on it, and pass it on."""
        match event:
            case Stage(name):
                clip.stage = name
                log.info("stage %s", name)
            case StepDone(step, steps, seconds):
                clip.done = step + 1
                clip.step_seconds.append(seconds)
                log.info("step %d of %d: %.3f s", step + 1, steps, seconds)
            case Preview(_, _, latents):
                self._show(clip, model, latents)
                return
            case Saved("latents", path):
                clip.done = clip.order.request.resolve(model.dims).steps
                self._keep(clip)
                if clip.order.latents is not None:
                    _copy_new(path, clip.order.latents)
            case Saved("unfinished", _):
                self._keep(clip)
            case Note(text):
                log.info("%s", text)
            case Finished(_, timings):
                clip.timings |= timings
                return  # the supervisor says so when the queue does
            case Loaded() | BlockDone() | TileDone():
                if not self._is_time(clip):
                    return
                self._tell_memory(model)
        self._port.say(spoken(event))

    def _tell_memory(self, model: Model) -> None:
        taken = tensor_bytes(model.device)
        if taken is not None:
            self._port.say(Holds(tensor_bytes=taken, torch_bytes=held_bytes(model.device)))

    def _is_time(self, clip: Clip) -> bool:
        now = time.monotonic()
        is_time = now - clip.told_at >= TOLD_SECONDS
        if is_time:
            clip.told_at = now
        return is_time

    def _note(self, text: str) -> None:
        log.info("%s", text)
        self._port.say(spoken(Note(text)))

    # Checkpoints.

    def _saved(self, clip: Clip, model: Model, resolved: ResolvedRequest) -> Unfinished | None:
        """What an earlier attempt has left, if this one may go on from there; what it may not is removed."""
        path = clip.checkpoint
        if not clip.order.has_checkpoint:
            path.unlink(missing_ok=True)
            return None
        try:
            saved = load_unfinished(path)
            saved.check(path, resolved, model.dims, model.origin.fingerprint, model.profile.dtype)
        except RequestError as error:
            self._note(f"{error} It begins anew.")
            path.unlink(missing_ok=True)
            return None
        clip.done = clip.kept = _steps_in(saved)
        return saved

    def _keep(self, clip: Clip) -> None:
        clip.kept = clip.done
        self._port.say(Kept(clip.done))

    def _tell_kept(self, clip: Clip) -> None:
        """After the last event: what was saved when the clip was left."""
        if clip.checkpoint.exists():
            clip.done = _steps_in(load_unfinished(clip.checkpoint))
            if clip.done > clip.kept:
                self._keep(clip)

    def _show(self, clip: Clip, model: Model, latents: torch.Tensor) -> None:
        """A picture of the clip to be. What goes wrong with it is a note, once, and never touches the clip."""
        if not clip.shows:
            return
        try:
            file = paths.preview_file(clip.order.job)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_strip(file, latents, model.dims.name, title=clip.order.request.prompt)
        except Exception as error:
            clip.shows = False
            self._note(f"no previews of this clip: {error}")

    # The model and its prompts.

    def _model(self, clip: Clip) -> Model:
        """The model that the job names: the one that is open, or opened in its place."""
        how = clip.order.how
        if self.opened is not None and self.opened[0] == how:
            return self.opened[1]
        self.close()
        device = choose_device(self._device)
        opening = open_asked(model_of(how), how, device, lambda event: self._follow_packing(clip, event))
        model = self._stack.enter_context(opening)
        self.opened = (how, model)
        gc.freeze()  # a million objects of libraries and the model, which no later collection need look at
        return model

    def _follow_packing(self, clip: Clip, event: Progress | Note) -> None:
        """Tell how far it is; leave where that is asked for. What is packed stays packed."""
        if self._port.stop_asked:
            raise Terminated
        if isinstance(event, Note):
            self._note(event.text)
            return
        clip.stage = "pack"
        if self._is_time(clip):
            self._port.say(Packed(slab=event.slab, done_bytes=event.done_bytes, total_bytes=event.total_bytes))

    def _prompts(self, clip: Clip, model: Model, resolved: ResolvedRequest) -> list[PromptStates]:
        """The states of this clip's prompts; where they are new, those of clips to come are read too."""
        texts = prompts_of(resolved)
        ahead = (request.resolve(model.dims) for request in clip.order.ahead)
        more = [text for other in ahead if other.template == resolved.template for text in prompts_of(other)]
        keys = [(resolved.template, text) for text in dict.fromkeys((*texts, *more))]
        self._states = {key: self._states[key] for key in keys if key in self._states}
        if any((resolved.template, text) not in self._states for text in texts):
            self._take(clip, model, Stage("text"))
            began = time.monotonic()
            missing = [text for key, text in ((key, key[1]) for key in keys) if key not in self._states]
            self._read(model, resolved.template, [text for text in missing if text in texts], missing)
            clip.timings["text"] = round(time.monotonic() - began, 3)
        return [self._states[resolved.template, text] for text in texts]

    def _read(self, model: Model, template: str, needed: Sequence[str], wanted: Sequence[str]) -> None:
        """One pass over the encoder for all of `wanted`, or, where those are too many, for those that are needed."""
        try:
            states = encode_prompts(wanted, model, template)
        except HvliteError:
            if len(wanted) == len(needed):
                raise
            states = encode_prompts(needed, model, template)
            wanted = needed
        for text, state in zip(wanted, states, strict=True):
            kept = PromptStates(text=state.text.cpu(), pooled=state.pooled.cpu(), notes=state.notes)
            self._states[template, text] = kept


@contextmanager
def left_when_asked(port: Port) -> Iterator[None]:
    """Raise Left between two layers of any model once a stop is asked for: a block, a tile or an encoder may be long.

    The engine takes it as it takes running out of memory there: steps that are done are saved, and models stay usable.
    """

    def look(_layer: nn.Module, _inputs: object) -> None:
        if port.stop_asked:
            raise Left

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _forget_peak() -> None:
    """Count what this clip takes of the host, not what an earlier one did; of a card, `generate` counts."""
    with suppress(OSError):  # 5: the kernel forgets the peak of this process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _steps_in(saved: Unfinished) -> int:
    return saved.made.request.steps if saved.progress is None else saved.progress.done


def _is_made_already(clip: Clip, output: Path, resolved: ResolvedRequest, model: Model) -> bool:
    """Whether an earlier attempt came to its end but not to say so. Makes ready for writing where not."""
    order = clip.order
    for folder in {output.parent, clip.checkpoint.parent, *([order.latents.parent] if order.latents else [])}:
        make_folder(folder)
        remove_leftovers(folder)

    def is_ours(path: Path, read: Callable[[Path], str]) -> bool:
        if order.attempt == 1 or not path.exists():
            return False
        with suppress(RequestError):
            made = metadata.decode(read(path), path)
            return made.request == resolved and made.model.fingerprint == model.origin.fingerprint
        return False

    if order.latents is not None and not is_ours(order.latents, lambda path: load_latents(path).request):
        check_new(order.latents)
    return is_ours(output, read_metadata)


def _copy_new(source: Path, target: Path) -> None:
    """What an earlier attempt has copied stays."""
    if not target.exists():
        with new_file(target) as temporary, explained(target):
            shutil.copyfile(source, temporary)
