"""THE LINE: Request + Profile -> file, from the prompt to the final latents; `clip` goes on from there.

`generate` is a generator of events, so that the caller draws progress and cancels with plain Python. No grad mode and
no other switch is held across a yield; an abandoned generator gives the device back.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from hvlite import sampler
from hvlite.clip import choose_places, finish, finish_on_meta, made_so_far, with_tiles_of
from hvlite.dims import LatentShape, latent_shape
from hvlite.errors import RequestError
from hvlite.events import BlockDone, Chosen, Event, Loaded, Note, Parked, Preview, Saved, Stage, StepDone
from hvlite.memory.needs import Knobs
from hvlite.memory.stages import Stage as StageName
from hvlite.memory.streamer import Visited, Walk
from hvlite.memory.trace import to_host
from hvlite.model.dit import Activations, Conditioning, Dit, Workspace
from hvlite.model.text import PromptStates
from hvlite.opened import Model, open_model
from hvlite.planning import Wishes
from hvlite.profile import Profile
from hvlite.request import Request, ResolvedRequest, request_notes
from hvlite.run import MORE_MEMORY, SMALLER_CLIP, Outputs, Run, differences, released
from hvlite.unfinished import Progress, Unfinished, load_unfinished, save_unfinished

# On meta nothing differs from the second step on.
META_STEPS = 2
Value = TypeVar("Value")


def generate(
    request: Request,
    model: Model | str | Path,
    *,
    profile: Profile | None = None,
    device: str | None = None,
    outputs: Outputs | None = None,
    prompts: Sequence[PromptStates] | None = None,
    resume: Path | None = None,
) -> Generator[Event, None, None]:
    """Render `request`; yields events, the last one `Finished`.

    `model` is an opened Model, or a name or folder that is opened for this call with `profile` and `device`.
    `prompts`, if given, are the states of `prompts_of(request)` from `encode_prompts`: no encoder is loaded. `resume`
    is a file of latents that an earlier run of the same request left: it goes on from there.
    """
    outputs = outputs or Outputs()
    if isinstance(model, Model):
        yield from model.alone(_generate(request, model, outputs, prompts, resume))
        return
    with open_model(model, profile, device=device) as opened:
        yield from opened.alone(_generate(request, opened, outputs, prompts, resume))


def _generate(
    request: Request, model: Model, outputs: Outputs, prompts: Sequence[PromptStates] | None, resume: Path | None
) -> Generator[Event, None, None]:
    resolved = request.resolve(model.dims)
    if prompts is not None and len(prompts) != len(prompts_of(resolved)):
        raise RequestError(f"{len(prompts)} prompt states were given; this request needs {len(prompts_of(resolved))}")
    saved = None if resume is None else load_unfinished(resume)
    if saved is not None:
        outputs = with_tiles_of(saved.made, outputs)
    if resume is not None and saved is not None:
        saved.check(resume, resolved, model.dims, model.origin.fingerprint, model.profile.dtype)
    began = saved.progress.knobs if saved is not None and saved.progress is not None else None
    run = Run(model, resolved, outputs, model.plan(resolved, wishes_of(outputs, saved)))
    changes = differences(began, run.knobs)
    run.bit_exact = not changes and (saved is None or saved.made.bit_exact)
    places = None if model.device.type == "meta" else choose_places(outputs, resolved, resume)
    saving = None if places is None else Saving(places.latents, outputs.save_seconds)
    yield from map(Note, (*request_notes(request, model.dims), *run.plan.notes, *changes))
    if places is not None:
        yield Chosen(places.clip, places.latents)
    with released(model, lambda: run.plan, SMALLER_CLIP if saved is None else MORE_MEMORY):
        clip = (yield from begin(run, prompts)) if saved is None else go_on(run, saved)
        saved = None  # or its conditionings would stay beside the decode
        yield from denoise(run, clip, saving)
        if places is None:
            yield from finish_on_meta(run, clip.latents)
        elif clip.done < resolved.steps:
            yield Parked(places.latents, clip.done, resolved.steps)
        else:
            yield from finish(run, clip.latents, places)


def wishes_of(outputs: Outputs, saved: Unfinished | None) -> Wishes:
    """What the plan has to keep to: a clip that goes on does so with the knobs that it began with."""
    if saved is None:
        return Wishes(tiles=outputs.decode_tile)
    tiles = with_tiles_of(saved.made, outputs).decode_tile
    if saved.progress is None:
        return Wishes(tiles=tiles, stages=("decode",))
    before = saved.progress.knobs
    knobs = Knobs(token_chunk=before.token_chunk, head_groups=before.head_groups)
    return Wishes(tiles=tiles, knobs=knobs, stages=("denoise", "decode"), done=saved.progress.done)


@dataclass(slots=True)
class Between:
    """A clip between two steps: `done` of them are; one conditioning for each prompt, on the host."""

    done: int
    latents: Tensor
    conditionings: Sequence[Conditioning]


def begin(run: Run, prompts: Sequence[PromptStates] | None) -> Generator[Event, None, Between]:
    """Prompt and seed -> all that the first step needs."""
    model, resolved = run.model, run.resolved
    if prompts is None:
        yield Stage("text")
        with run.timings.measure("text"):
            prompts = yield from attempt(
                run, "text", lambda: model.encode(prompts_of(resolved), resolved.template, run.plan)
            )
    model.release(keep=run.plan.warm)
    yield from (note for states in prompts for note in states.notes)
    yield Stage("schedule")
    with run.timings.measure("schedule"):
        conditionings = yield from attempt(run, "schedule", lambda: prepare_schedule(run, prompts))
    shape = latent_shape(resolved.size, resolved.frames, model.dims.vae)
    noise = sampler.make_noise(shape, model.dims.dit.latent_channels, resolved.seed, model.device.type)
    return Between(0, noise.to(model.device), conditionings)


def attempt(run: Run, stage: StageName, work: Callable[[], Value]) -> Generator[Event, None, Value]:
    """What `work` gives; where it runs out of memory, again with the next rung of the plan."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError, OSError) as error:
            leaner = run.leaner(stage, error)
        yield run.descend(leaner, f"stage {stage}")


def go_on(run: Run, saved: Unfinished) -> Between:
    """Where an earlier run of the same clip ended."""
    done = run.resolved.steps if saved.progress is None else saved.progress.done
    return Between(done, saved.latents.to(run.model.device), saved.conditionings)


def prompts_of(resolved: ResolvedRequest) -> list[str]:
    """The texts to encode: the prompt, and the negative one where true guidance is on."""
    return [resolved.prompt, resolved.negative_prompt] if resolved.uses_cfg else [resolved.prompt]


def encode_prompts(texts: Sequence[str], model: Model, template: str = "video") -> list[PromptStates]:
    """Text states without padding and the pooled vector of each text; several cost one pass over the weights."""
    plan = model.text_plan(len(texts))
    with released(model, lambda: plan):
        return model.encode(list(texts), template, plan)


def prepare_schedule(run: Run, prompts: Sequence[PromptStates]) -> list[Conditioning]:
    """All modulation vectors and the refined text of every step, one Conditioning for each prompt, on the host."""
    device = run.model.device
    timesteps = sampler.make_timesteps(run.sigmas).to(device)
    states = [(prompt.text.to(device), prompt.pooled.to(device)) for prompt in prompts]
    with run.model.modulation() as (dit, visit):
        made = dit.prepare_schedule(timesteps, run.resolved.guidance, states, run.model.attention, visit)
    return [each.moved(to_host) for each in made]


def denoise(run: Run, clip: Between, saving: "Saving | None" = None) -> Generator[Event, None, None]:
    """The remaining steps, or those that are asked for; yields after every block and every step.

    Out of memory in a step -> the next rung of the plan, from the latents before that step.
    """
    yield Stage("denoise")
    with run.timings.measure("denoise"):
        while clip.done < run.last_step:
            try:
                yield from _steps(run, clip, saving)
                break
            except (RuntimeError, MemoryError, OSError) as error:
                leaner = run.leaner("denoise", error)
            finally:
                if saving is not None:  # also when the caller goes away, or when this was the leanest plan
                    saving.leave(run, clip)
            # past the handler: an error holds the frames, and so the tensors, of the step that failed
            yield run.descend(leaner, f"step {clip.done + 1}")
    run.model.release(keep=run.plan.warm)
    clip.conditionings = ()  # decode has better use for the host's memory


def _steps(run: Run, clip: Between, saving: "Saving | None") -> Generator[Event, None, None]:
    """From `clip.done` on, which counts up with `clip.latents`."""
    model, resolved, first = run.model, run.resolved, clip.done
    last = min(run.last_step, META_STEPS) if model.device.type == "meta" else run.last_step
    sigmas = run.sigmas.to(model.device)
    yield from (Loaded(each.done_bytes, each.total_bytes) for each in model.load_blocks(run.plan))
    with model.blocks(run.plan, last - first) as (dit, walk):
        yield from map(Note, model.notes())
        work = _make_workspace(run, dit, clip)
        for step in range(first, last):
            began = time.monotonic()
            velocities = yield from _velocities(dit, walk, clip, step, work)
            velocity = velocities[0]
            if resolved.uses_cfg:
                velocity = sampler.guide(velocities[1], velocity, resolved.cfg_scale)
            if run.wants_preview(step):
                ended = sampler.predict_end(clip.latents, velocity, sigmas, step)
                yield Preview(step, resolved.steps, ended.cpu())
            clip.latents = sampler.euler_step(clip.latents, velocity, sigmas, step)
            del velocity, velocities  # or they would be held through the next step
            clip.done = step + 1
            yield StepDone(step, resolved.steps, time.monotonic() - began)
            if saving is not None and saving.is_due(clip):
                yield saving.save(run, clip)


def _make_workspace(run: Run, dit: Dit, clip: Between) -> Workspace:
    shape = LatentShape(*clip.latents.shape[2:])
    knobs = Activations(
        token_chunk=run.plan.token_chunk, head_groups=run.plan.head_groups, attention=run.model.attention
    )
    text_tokens = max(each.text.shape[1] for each in clip.conditionings)
    return dit.make_workspace(shape, text_tokens, knobs, run.model.dtype)


def _velocities(
    dit: Dit, walk: Walk, clip: Between, step: int, work: Workspace
) -> Generator[Event, None, list[Tensor]]:
    """The model's output for every prompt; each block is visited once for all of them."""
    steps = clip.conditionings[0].text.shape[0]

    def told(blocks: list[Visited]) -> Iterator[Event]:
        for block in blocks:
            yield BlockDone(step=step, steps=steps, block=block.index, blocks=dit.dims.blocks, waited_s=block.waited_s)

    conditionings = [each.at_step(step, clip.latents.device) for each in clip.conditionings]
    streams = [dit.embed(clip.latents, each.text[0]) for each in conditionings]
    for index in range(dit.dims.blocks):
        with walk.visit(index):
            for branch, conditioning in enumerate(conditionings):
                dit.run_block(index, streams[branch], conditioning.of_block(index)[0], work)
        yield from told(walk.finished())
    yield from told(walk.drain())
    shape, chunk = LatentShape(*clip.latents.shape[2:]), work.knobs.token_chunk
    return [dit.head(streams.pop(0), each.final[0], shape, chunk) for each in conditionings]


@dataclass(slots=True)
class Saving:
    """Keeps an unfinished clip on disk: `path` is replaced when `seconds` have gone by since the last time."""

    path: Path
    seconds: float
    done: int = 0
    at: float = field(default_factory=time.monotonic)

    def is_due(self, clip: Between) -> bool:
        """Whether it is time to save; the last step is saved by whoever decodes it."""
        return clip.done < len(clip.conditionings[0].text) and time.monotonic() - self.at >= self.seconds

    def save(self, run: Run, clip: Between) -> Saved:
        """Save now."""
        unfinished = Unfinished(
            made=made_so_far(run),
            progress=Progress(done=clip.done, branches=len(clip.conditionings), knobs=run.knobs),
            latents=clip.latents,
            conditionings=clip.conditionings,
        )
        save_unfinished(self.path, unfinished)
        self.done, self.at = clip.done, time.monotonic()
        return Saved("unfinished", self.path)

    def leave(self, run: Run, clip: Between) -> None:
        """Save the steps that are done and in no file yet."""
        if self.done < clip.done < run.resolved.steps:
            self.save(run, clip)
