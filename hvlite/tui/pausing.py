"""Pausing the queue and letting it go on, by one key for both."""

from hvlite.jobs.store import Store
from hvlite.tui import words, workers
from hvlite.tui.desk import View


def turn(store: Store, *, now: bool) -> str:
    """Pause, or go on where the queue is paused so far already -> what to tell."""
    running = store.page(("running",))
    asked = any(job.asked == "pause" for job in running)
    state = store.settings().queue
    if state == "paused" or (state == "draining" and (not now or asked)):
        store.resume()
        return "the queue goes on"
    paused = store.pause(now=now)
    if paused.queue == "paused":
        return "the queue is paused"
    held = workers.held_locks()
    if running and all(workers.is_gone(job, held) for job in running):
        left = words.named([job.id for job in running])
        return f"the queue is paused; the worker of {left} is gone: W starts a new one, which goes on"
    return "the running job stops and goes on later" if now else "nothing starts after the running job"


def lift(store: Store) -> str:
    """A worker is to work: let the queue go on -> what to tell of that, "" if it was not paused."""
    settings = store.settings()
    if settings.queue == "active":
        return ""
    store.resume()
    return f"; the queue was paused{f' ({settings.pause_reason})' if settings.pause_reason else ''} and goes on"


def pause_words(view: View) -> str:
    """Why nothing starts, and the key that changes it."""
    reason = f": {view.settings.pause_reason}" if view.settings.pause_reason else ""
    what = "the queue pauses after the running job" if view.settings.queue == "draining" else "the queue is paused"
    return f"{what}{reason}; p lets it go on"
