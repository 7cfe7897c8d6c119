"""Every error that a user may see, and the exit code it ends the program with.

    HvliteError                    1  the render failed for a reason of its own
    |-- RequestError (ValueError)  2  what was asked for cannot be rendered as asked
    |-- ProfileError (ValueError)  2  a profile or setting is wrong
    |-- DeviceError                2  the asked device is missing or too old
    |-- DoesNotFit                 3  memory: the run needs more than there is
    |-- Busy                       4  another process holds the GPU, the queue or a store
    |-- WeightsError               5  weights missing, truncated, of another shape, or unsafe to load
    |-- OutputError                1  the result cannot be written (disk full, folder missing)
    |-- QueueError                 1  the queue cannot be used, or not in this way

Messages are one line: what happened, with both numbers; why; what to do next. `str(error)` is what is shown.
Programmers' mistakes are `assert`s and never come from here.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """The contract with scripts; also listed in the README."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    BUSY = 4
    WEIGHTS = 5
    SOME_FAILED = 6
    INTERRUPTED = 130
    TERMINATED = 143


class HvliteError(Exception):
    """The base of all of them; raised itself only where no subclass says more."""

    exit_code = ExitCode.FAILED


class RequestError(HvliteError, ValueError):
    """A Request's field is out of range or contradicts another."""

    exit_code = ExitCode.USAGE


class ProfileError(HvliteError, ValueError):
    """A profile is unknown, or a value in it is of the wrong kind."""

    exit_code = ExitCode.USAGE


class DeviceError(HvliteError):
    """The named device is not there, or cannot do what was asked."""

    exit_code = ExitCode.USAGE


class DoesNotFit(HvliteError):
    """The memory is smaller than the need."""

    exit_code = ExitCode.DOES_NOT_FIT


class Busy(HvliteError):
    """Another process holds what only one may hold."""

    exit_code = ExitCode.BUSY


class WeightsError(HvliteError):
    """A checkpoint is missing, broken, or does not describe the model."""

    exit_code = ExitCode.WEIGHTS


class OutputError(HvliteError):
    """A result could not be written; what was computed before is kept."""


class QueueError(HvliteError):
    """The queue's database is of another version or damaged, or a job is no longer what was thought."""
