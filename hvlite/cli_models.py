"""The commands below `hvlite models`: packed stores, each command one call. See `cli` for the contract."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from hvlite import paths
from hvlite.errors import ExitCode, RequestError
from hvlite.events import Note
from hvlite.formats import TextWeights, Weights
from hvlite.progress import Talk, interruptible, print_json, printable

if TYPE_CHECKING:
    from hvlite.weights.store import ListedStore

models = App(
    name="models",
    help="Packed stores: made, listed, checked, removed.",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)


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
        from hvlite.opened import find_origin
        from hvlite.origin import Packed
        from hvlite.packing import pack_model, store_path, stored_formats
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
