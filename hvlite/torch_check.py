"""What this build of torch can do with this machine's NVIDIA cards: use them, pin memory, attend in one kernel."""

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvlite.memory.device import MIN_CAPABILITY
from hvlite.telemetry import Card, Driver, has_nvidia_card

# The oldest driver that runs a major version of CUDA; install.sh says the same.
NEEDED_DRIVER = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True, slots=True)
class TorchSeen:
    """What torch says of itself; `said` is its warning, if it cannot use a card."""

    version: str
    cuda: str | None
    usable: bool
    said: str = ""


def torch_advice(
    driver: Driver, seen: TorchSeen, *, plugged: bool | None = None, visible: str | None = None
) -> list[str]:
    """Why torch cannot use a card that is there, with versions, and what to do next; [] where all is well.

    `plugged`: whether a card is plugged in. `visible`: CUDA_VISIBLE_DEVICES. None: look.
    """
    plugged = has_nvidia_card() if plugged is None else plugged
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    if seen.usable:
        return [advice for card in driver.cards for advice in _card_advice(card)]
    if not driver.cards:
        if plugged or (driver.fault and driver.version):
            return [f"an NVIDIA card is there, but {driver.fault}. Install or update its driver, then reboot"]
        return []
    number = (driver.version or "").split(".")[0]
    needed = NEEDED_DRIVER.get((seen.cuda or "").split(".")[0])
    what = f"torch {seen.version} cannot use the {driver.cards[0].name} (driver {driver.version}, CUDA {driver.cuda})"
    if seen.cuda is None:
        why = f"it is built without CUDA. Install a torch for CUDA {driver.cuda} or older (README, Install)"
    elif needed is not None and number.isdigit() and int(number) < needed:
        why = (
            f"CUDA {seen.cuda} needs driver {needed} or newer. Update the driver, or install a torch for an older CUDA"
        )
    elif visible is not None:
        why = f"CUDA_VISIBLE_DEVICES is set to {visible!r}. Unset it"
    else:
        why = f"{seen.said or 'it gives no reason'}. Run nvidia-smi; if that fails too, reboot"
    return [f"{what}: {why}"]


def _card_advice(card: Card) -> list[str]:
    if card.capability is None or card.capability >= MIN_CAPABILITY:
        return []
    found = ".".join(map(str, card.capability))
    return [f"{card.name} has compute capability {found}, below 8.0: it lacks bf16, so use --dtype fp32 (slow)"]


def fused_kernels() -> list[str]:
    """Attention kernels of torch that are switched on for CUDA; none of them holds tokens x tokens."""
    backends = torch.backends.cuda
    enabled = {
        "flash": backends.flash_sdp_enabled() and backends.is_flash_attention_available(),
        "cuDNN": backends.cudnn_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
    }
    return [name for name, is_on in enabled.items() if is_on]


def probe_pinning(sizes: Sequence[int], register: Callable[[int], bool]) -> tuple[int, int | None]:
    """The largest size that `register` took, and the first that it refused; sizes rise."""
    taken = 0
    for size in sizes:
        if not register(size):
            return taken, size
        taken = size
    return taken, None


def can_register(nbytes: int) -> bool:
    """Whether CUDA takes so much ordinary memory as pinned; it is given back at once."""
    runtime = torch.cuda.cudart()
    with mmap.mmap(-1, nbytes) as memory:
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(start)
        del start  # a mapping with a view of it cannot be closed
        if int(runtime.cudaHostRegister(address, nbytes, 0)) != 0:
            return False
        runtime.cudaHostUnregister(address)
    return True
