"""What an error in the worker means: for the job, and for the process in which it happened."""

import errno

from hvlite.errors import (
    Busy,
    DeviceError,
    DoesNotFit,
    HvliteError,
    OutputError,
    ProfileError,
    RequestError,
    WeightsError,
)
from hvlite.jobs.wire import Ended
from hvlite.memory.device import is_device_lost, is_out_of_memory

REASONS: tuple[tuple[type[HvliteError], str], ...] = (
    (RequestError, "request"),
    (ProfileError, "profile"),
    (DeviceError, "device"),
    (DoesNotFit, "does not fit"),
    (WeightsError, "weights"),
    (OutputError, "output"),
)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def failed(error: BaseException, stage: str) -> Ended:
    """What an error means for the job, and whether this process may go on."""
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    if any(is_device_lost(each) for each in chain):
        return Ended(kind="device", reason="device", error=str(error), is_last=True)
    if any(is_out_of_memory(each) for each in chain):
        return Ended(kind="memory", reason=f"out of memory in {stage}", error=str(error), is_last=True)
    if isinstance(error, Busy):
        return Ended(kind="busy", error=str(error))
    if isinstance(error, HvliteError):
        return Ended(kind="failed", reason=reason_of(error), error=str(error))
    name = type(error).__name__
    return Ended(kind="failed", reason=name, error=f"{name}: {error}", is_last=True)


def reason_of(error: HvliteError) -> str:
    """A few words, equal for equal causes."""
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
        return "disk full"
    return next((reason for kind, reason in REASONS if isinstance(error, kind)), type(error).__name__)
