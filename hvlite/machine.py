"""The machine as a run meets it: how much room a device has, and which profile `auto` stands for on it."""

import os
from dataclasses import replace

import torch

from hvlite import paths
from hvlite.errors import DoesNotFit
from hvlite.planning import fits_by_plan
from hvlite.profile import CPU, GIB, Choice, Room, choose_profile
from hvlite.telemetry import Card, Holder, cards, disk_state, host_state

AUTO = "auto"
# On the meta device nothing is taken, so there is nothing to measure a profile against.
ON_META = "24g"
# Of the disk, what an exact decode leaves for the clip itself.
SPARED_DISK = 1 << 30


def default_profile(device: torch.device) -> str:
    """What is used where no profile is named."""
    return {"cuda": AUTO, "meta": ON_META}.get(device.type, CPU)


def room_of(device: torch.device) -> Room:
    """What a run finds on the device now; of a card the driver is asked, so that no CUDA context takes its part."""
    if device.type == "cuda":
        card = card_of(device)
        if card is not None and card.total_bytes is not None and card.free_bytes is not None:
            # what this process has of it is not taken away by others
            own = sum(holder.held_bytes or 0 for holder in card.holders or () if holder.pid == os.getpid())
            free, total = card.free_bytes + own, card.total_bytes
        else:
            free, total = torch.cuda.mem_get_info(device)
        host_bytes = host_state().available_bytes
        return Room(kind="cuda", total_bytes=total, free_bytes=free, host_bytes=host_bytes, disk_bytes=scratch_bytes())
    host = host_state()
    total = host.total_bytes if host.cgroup_limit is None else host.cgroup_limit
    return Room(kind="cpu", total_bytes=total, free_bytes=host.available_bytes, disk_bytes=scratch_bytes())


def as_of_now(room: Room | None) -> Room | None:
    """With the disk as it is by now; memory stays as it was found, so that all plans of a model are for one budget."""
    return None if room is None else replace(room, disk_bytes=scratch_bytes())


def scratch_bytes() -> int:
    """What an exact decode may put on disk now."""
    return max(0, disk_state(paths.scratch_folder()).free_bytes - SPARED_DISK)


def card_of(device: torch.device) -> Card | None:
    """The driver's view of a CUDA device. CUDA and the driver count cards differently, so they are matched by UUID."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return next((card for card in cards() if card.uuid is not None and card.uuid.endswith(uuid)), None)


def auto_profile(device: torch.device) -> str:
    """The profile that `auto` stands for; DoesNotFit says who holds the card where not even the smallest fits."""
    if device.type == "meta":
        return ON_META
    room = room_of(device)
    choice = choose_profile(room, fits_by_plan)
    if choice.name is not None:
        return choice.name
    card = card_of(device) if device.type == "cuda" else None
    raise DoesNotFit(none_fits(choice, card))


def none_fits(choice: Choice, card: Card | None) -> str:
    """Why `auto` found nothing, and what to do."""
    smallest = choice.verdicts[-1]
    held = f" Held by {holders_text(card.holders)}." if card is not None and card.holders else ""
    return (
        f"no profile fits: even the smallest, {smallest.name}, {smallest.why}.{held} "
        f"Free memory on the card, or name less: --profile {smallest.name} --memory GIB"
    )


def holders_text(holders: tuple[Holder, ...]) -> str:
    """NAME[PID] SIZE, ..."""
    return ", ".join(_holder_text(holder) for holder in holders)


def _holder_text(holder: Holder) -> str:
    size = "" if holder.held_bytes is None else f" {holder.held_bytes / GIB:.1f} GiB"
    return f"{holder.name or 'process'}[{holder.pid}]{size}"
