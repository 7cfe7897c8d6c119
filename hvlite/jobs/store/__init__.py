"""The durable queue: one SQLite file that several processes read and write at once. Nothing outside knows SQL.

    with open_store() as store:             # every method is one transaction, on disk when it returns
        store.add([NewJob(...)])
    claims = store.claims(owner, lock, {None, "cuda"})      # the worker's side

Read on in: `schema` (the tables), `opening` and `salvage` (made, migrated, refused, repaired), `database`
(transactions), `queue` (users' actions), `history` (undo), `ordering` (the line), `claims` (workers), `preferences`
(settings, pause).
"""

from hvlite.jobs.store.claims import ClaimLost, Claims
from hvlite.jobs.store.history import Undone
from hvlite.jobs.store.queue import Store, open_store

__all__ = ["ClaimLost", "Claims", "Store", "Undone", "open_store"]
