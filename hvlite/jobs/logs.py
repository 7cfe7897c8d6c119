"""A job's log: what the worker and the libraries in it have to say while they work on it."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """All that is logged meanwhile, and all that libraries write to stdout and stderr, is added to `file`."""
    with ExitStack() as stack:
        with suppress(OSError):  # a job without a log is better than none
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(file.open("a", encoding="utf-8"))
            for number in (1, 2):
                stack.enter_context(_sent(number, stream.fileno()))
            handler = logging.StreamHandler(stream)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logging.getLogger().addHandler(handler)
            stack.callback(logging.getLogger().removeHandler, handler)
        yield


@contextmanager
def _sent(number: int, target: int) -> Iterator[None]:
    """What is written to one descriptor goes where another one leads."""
    before = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(before, number)
        os.close(before)
