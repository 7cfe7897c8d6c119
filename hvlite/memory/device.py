"""Which device a run uses, what it must be able to do, and waiting for it. The only module that asks CUDA anything.

`cpu`, `cuda`, `cuda:N` and `meta` (real shapes, no bytes) are all there are.
"""

from pathlib import Path

import torch

from hvlite.errors import DeviceError

MIN_CAPABILITY = (8, 0)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(asked: str | None = None) -> torch.device:
    """The asked device, checked; with none asked the CUDA device with most free memory, else the CPU."""
    if asked is None:
        return _freest_cuda() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"unknown device {asked!r}; use cpu, cuda, cuda:N or meta") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"device {asked!r} is not supported; use cpu, cuda, cuda:N or meta")
    if device.type == "cuda":
        return _checked_cuda(device)
    return device


def check_dtype(device: torch.device, dtype: str) -> None:
    """bf16 needs compute capability 8.0: DeviceError names the card below it."""
    if device.type != "cuda" or dtype == "fp32":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise DeviceError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; {dtype} needs "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}. Use --dtype fp32 (slow), or another card."
        )


def device_name(device: torch.device) -> str:
    """The card's name, or the device's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wait_for(device: torch.device) -> None:
    """Return when the device has finished all that it was asked: what is then reported is done, not queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """Return memory that no tensor holds to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA's and Python's own errors, or torch's CPU allocator, which has no class."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def unused_card_note() -> str | None:
    """A sentence if an NVIDIA driver is loaded that this torch cannot use; None otherwise."""
    if torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return None
    driver = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    return (
        f"an NVIDIA driver is loaded ({driver}) but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot "
        "use it. Update the driver, or install a torch build for it (see README, Install)."
    )


def _freest_cuda() -> torch.device:
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return torch.device("cuda", free.index(max(free)))


def _checked_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        why = unused_card_note() or f"torch {torch.__version__} sees no CUDA device"
        raise DeviceError(f"device {device} is not available: {why} Use --device cpu to render without it.")
    count = torch.cuda.device_count()
    if device.index is None:
        return _freest_cuda()
    if device.index >= count:
        raise DeviceError(f"device {device} does not exist: this machine has {count} (cuda:0 to cuda:{count - 1})")
    return device
