"""The worker: a process of its own that renders what its supervisor sends it, one clip after the other.

    python -P -m hvlite.jobs.worker DEVICE PID          PID is the supervisor's; its death is the worker's

Only what must be so from the first moment on is here; the work itself, and with it torch, is in `render`.
"""

import ctypes
import faulthandler
import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from hvlite.jobs.port import Terminated, open_port
from hvlite.jobs.wire import Ready

# prctl(2): the signal that this process gets when its parent is gone.
PR_SET_PDEATHSIG = 1
# The kernel, short of memory, ends this process rather than its supervisor, and rather than anybody's desktop.
OOM_SCORE = "500"


def die_with(parent: int) -> None:
    """End at once when the supervisor is gone: its claims are free then, and nobody may work on them twice."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def leave(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM: once, so that a second one does not disturb the saving."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Render until the supervisor closes the wire, or until this process is better replaced."""
    device, parent = sys.argv[1:]
    die_with(int(parent))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    faulthandler.enable()
    port = open_port()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    with suppress(Terminated):
        from hvlite.jobs.render import Renderer
        from hvlite.model.text import import_encoders

        renderer = Renderer(device, port)
        order = port.next_order()
        if order is not None and not order.has_checkpoint:
            import_encoders()  # takes seconds in which no clip could be left: nobody waits for who is not Ready
        port.say(Ready(version("hvlite")))
        while order is not None:
            ended = renderer.render(order)
            port.say(ended)
            if ended.is_last:
                break
            order = port.next_order()
    # Not by way of all destructors: the driver gives back everything, and it takes a second less.
    os._exit(0)


if __name__ == "__main__":
    main()
