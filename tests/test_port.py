"""The worker's end of the wire."""

import os
from pathlib import Path

from hvlite.jobs.port import Port
from hvlite.jobs.wire import Go, Stop, line_of


def test_an_answer_for_a_clip_that_was_left_is_not_taken_for_the_next_one() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as incoming:
        port = Port(incoming, writing)
        for job, name in ((1, "late.mp4"), (2, "mine.mp4")):
            os.write(writing, line_of(Go(job, Path(name))))
        assert port.answer(2) == Go(2, Path("mine.mp4"))
        os.write(writing, line_of(Stop()))
        assert port.answer(3) is None
        os.close(writing)
        assert port.next_order() is None
