"""A prompt file all the way: every kind of prompt through the queue and the real renderer to a file of its own."""

from pathlib import Path

from hvlite import metadata
from hvlite.jobs.job import How, NewJob, Outcome
from hvlite.jobs.render import Renderer
from hvlite.jobs.store import Claims, open_store
from hvlite.jobs.wire import Go, Planned
from hvlite.request import Request
from hvlite.video.mp4 import read_metadata
from tests.test_batch import PROMPTS, requests
from tests.test_render import Wire, order


class QueueWire(Wire):
    """Has the queue choose the file of `job`."""

    def __init__(self, claims: Claims) -> None:
        super().__init__(Path())
        self.claims = claims
        self.job = 0

    def answer(self, job: int) -> Go:
        planned = self.said[-1]
        assert isinstance(planned, Planned)
        return Go(job, self.claims.reserve_output(self.job, planned.suffix))


def chosen() -> list[str]:
    """Every 25th prompt of the file, its longest ones, and what a file name would stumble over."""
    texts = [request.prompt for request in requests(PROMPTS.read_bytes(), PROMPTS.name)]
    odd = ['"said", it\'s a \N{CAT FACE}', "../a/../b", "Ein Kreis\t\N{EM DASH}\n\nnach links", "-rf *", "x" * 5000]
    return [*texts[::25], *sorted(texts, key=len)[-2:], *odd]


def test_prompts_of_all_kinds_become_files_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    how, texts = How(model=str(tiny_model)), chosen()
    with open_store() as store:
        clips = [Request(text, size=(16, 16), frames=1, steps=1) for text in texts]
        store.add([NewJob(request=clip, how=how, folder=tmp_path / "clips") for clip in clips])
        claims = store.claims("worker", "cpu", {None})
        wire = QueueWire(claims)
        renderer = Renderer("cpu", wire)
        while (job := claims.claim()) is not None:
            assert job.request is not None
            wire.job = job.id
            ahead = [other.request for other in claims.next_alike(job, 16) if other.request is not None]
            ended = renderer.render(order(tiny_model, job=job.id, request=job.request, ahead=ahead))
            assert ended.kind == "done", ended.error
            claims.end(job.id, Outcome(state="done"))
        renderer.close()
        made = {job.output: job.prompt for job in store.page(("done",)) if job.output is not None}
    assert len(made) == len(texts) > 20
    assert {file: metadata.decode(read_metadata(file), file).request.prompt for file in made} == made
    assert {file.parent for file in made} == {tmp_path / "clips"}
