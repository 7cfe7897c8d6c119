"""The commands below `hvlite models`: the published weights and packed stores, each command one call.

See `cli` for the contract.
"""

import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from hvlite import paths
from hvlite.errors import ExitCode, HvliteError, OutputError, RequestError, WeightsError
from hvlite.events import Note
from hvlite.formats import TextWeights, Weights
from hvlite.progress import Interrupted, Talk, interruptible, print_json, printable
from hvlite.weights.published import LICENCES, Variant

if TYPE_CHECKING:
    from hvlite.weights.fetch import Progress
    from hvlite.weights.fetched import Plan
    from hvlite.weights.store import ListedStore

models = App(
    name="models",
    help="The published weights, and packed stores.",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)


@models.command(name="fetch")
def fetch_command(
    model: Literal["hunyuanvideo"],
    *,
    variant: Variant = "bf16",
    accept_license: Annotated[bool, Parameter(name=["--accept-license", "--accept-licence"])] = False,
    dry_run: bool = False,
) -> int:
    """Download the published weights, after showing files, sizes, free disk and licences.

    Parameters
    ----------
    model
        `hunyuanvideo`; it goes to HVLITE_HOME/models.
    variant
        The transformer as published, or the official fp8 one, half as large.
    accept_license
        Accept the licences that are shown, without being asked.
    dry_run
        Show it all and stop.
    """
    talk = Talk()
    with interruptible(talk):
        from hvlite.weights.fetch import accept, fetch, plan_fetch

        plan = plan_fetch(paths.models_folder() / model, variant)
        if not plan.is_done:
            _show_plan(plan, talk)
            if dry_run:
                return ExitCode.DONE
            plan.check_space()
            if plan.accepted is None:
                _ask_for_acceptance(accept_license)
                plan = accept(plan)
            _follow_fetch(fetch(plan), plan, talk)
        from hvlite.origin import find_origin

        find_origin(model, {})
    talk.say(
        f"{model} is complete. Render: hvlite gen PROMPT; smaller weights: hvlite models pack {model} --weights int8"
    )
    talk.result(str(plan.folder))
    return ExitCode.DONE


def _show_plan(plan: "Plan", talk: Talk) -> None:
    """All that somebody must know before the first byte."""
    from hvlite.weights.fetched import size_text

    absent = {file.place for file in plan.absent}
    talk.say(f"{plan.folder.name}, {plan.variant}: {len(plan.files)} files, {size_text(plan.total_bytes)}")
    for repository, commit in plan.commits.items():
        talk.say(f"from {plan.server}/{repository} at {commit}:")
        for file in plan.files:
            if file.repository == repository:
                state = "" if file.place in absent else "  (is here)"
                talk.say(f"{size_text(file.size):>11}  {file.place}{state}")
    talk.say(f"to {plan.folder}: {size_text(plan.needed_bytes)} to download, {size_text(plan.free_bytes)} free there")
    for number, licence in enumerate(LICENCES, 1):
        talk.say(f"licence {number}, of {licence.covers}: {licence.name} ({licence.version})")
        talk.say(f"  {licence.url}")
        for term in licence.terms:
            talk.say(f"  - {term}")
    if plan.accepted is not None:
        talk.say(f"these licences were accepted at {plan.accepted}")


def _ask_for_acceptance(given: bool) -> None:
    """Return only if the licences are accepted."""
    if given:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RequestError(
            "the licences above must be accepted, and there is no terminal to ask on: read them, then add "
            "--accept-license. Nothing was downloaded."
        )
    print("Type yes to accept all of these licences: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise HvliteError("the licences were not accepted, so nothing was downloaded")


def _follow_fetch(stream: "Generator[Progress, None, None]", plan: "Plan", talk: Talk) -> None:
    """Show how far a download is; where it ends early, what is kept."""
    from hvlite.weights.fetched import size_text

    stage = None
    try:
        with closing(stream):
            for event in stream:
                if isinstance(event, Note):
                    talk.event(event)
                    continue
                if event.stage != stage:
                    talk.close()
                    stage = event.stage
                size = f"{size_text(event.done_bytes)} of {size_text(event.total_bytes)}"
                talk.advance(event.stage, event.done_bytes, event.total_bytes, f"{size}  {event.place}")
    except (Interrupted, OutputError, WeightsError):
        talk.close()
        whole, kept = len(plan.files) - len(plan.absent), plan.total_bytes - plan.needed_bytes
        talk.insist(
            f"kept in {plan.work}: {whole} of {len(plan.files)} files, {size_text(kept)} of "
            f"{size_text(plan.total_bytes)}; the same command goes on from there"
        )
        raise
    talk.close()


@models.command(name="pack")
def pack_command(
    source: str,
    *,
    weights: Weights = "bf16",
    text_weights: TextWeights = "fp16",
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    delete_source: bool = False,
) -> int:
    """Turn a checkpoint of any published layout into a packed store, with the memory of one block.

    Parameters
    ----------
    source
        `shapes`, `hunyuanvideo`, or a checkpoint folder.
    weights
        Form of the transformer's weights.
    text_weights
        Form of the text encoder's weights.
    output
        The folder to make (by default one below HVLITE_HOME/packed).
    delete_source
        Delete the checkpoint's weight files when the store is verified.
    """
    talk = Talk()
    with interruptible(talk):
        from hvlite.origin import Packed, find_origin
        from hvlite.packing import pack_model, store_path
        from hvlite.planning import stored_formats
        from hvlite.weights.pack import delete_source as delete
        from hvlite.weights.store import open_store

        origin = find_origin(source, {})
        if isinstance(origin, Packed):
            raise RequestError(f"{source} is a packed store already; pack the checkpoint that it was made from")
        formats = stored_formats(weights, text_weights)
        out = output or store_path(origin.sources, origin.dims, formats)
        talk.say(f"packing {origin.folder} to {out}")
        talk.follow_packing(pack_model(origin.sources, origin.dims, out, formats))
        if delete_source:
            for event in delete(origin.sources, open_store(out)):
                if isinstance(event, Note):
                    talk.event(event)
    talk.result(str(out))
    return ExitCode.DONE


@models.command(name="ls")
def ls_command(*, json: bool = False) -> int:
    """List the packed stores below HVLITE_HOME/packed."""
    from hvlite.weights.store import list_stores

    stores = list_stores(paths.packed_folder())
    if json:
        print_json({"stores": [_store_row(store) for store in stores]})
        return ExitCode.DONE
    for store in stores:
        row = _store_row(store)
        state = store.fault or f"{row['model']} {row['weights']}/{row['text_weights']}"
        print(f"{store.disk_bytes / 1e9:8.2f} GB  {store.path}  {printable(state)}")
    return ExitCode.DONE


def _store_row(store: "ListedStore") -> dict[str, object]:
    index = store.index
    return {
        "path": str(store.path),
        "model": index.dims.name if index else None,
        "weights": index.weights if index else None,
        "text_weights": index.text_weights if index else None,
        "bytes": store.disk_bytes,
        "fault": store.fault,
    }


@models.command(name="verify")
def verify_command(store: Path) -> int:
    """Read a packed store whole and compare every hash.

    Parameters
    ----------
    store
        Its folder.
    """
    talk = Talk()
    with interruptible(talk):
        from hvlite.weights.store import open_store

        for seen in open_store(store).verify():
            talk.advance("verify", seen.done_bytes, seen.total_bytes, seen.file)
    talk.result(f"{store}: every hash is right")
    return ExitCode.DONE


@models.command(name="rm")
def rm_command(store: Path) -> int:
    """Remove a packed store.

    Parameters
    ----------
    store
        Its folder; anything that is no store is refused.
    """
    from hvlite.weights.store import remove_store

    remove_store(store)
    return ExitCode.DONE
