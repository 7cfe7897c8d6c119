"""The tables of the queue's database, as numbered migrations: what is published is never changed, only followed."""

# "hvlq": marks the file as ours.
APPLICATION = 0x68766C71

# One tuple of statements for each version; the first one makes version 1 from nothing.
Migrations = tuple[tuple[str, ...], ...]

_JOB = """
CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled', 'parked')),
    sort_key INTEGER NOT NULL,             -- queued jobs run in this order; others keep theirs for undo
    revision INTEGER NOT NULL DEFAULT 0,   -- grows with every change but progress
    removed INTEGER,                       -- the action that removed it; the row stays as long as undo may need it
    request TEXT NOT NULL,                 -- JSON of Request
    how TEXT NOT NULL,                     -- JSON of How
    resolved TEXT,                         -- JSON of ResolvedRequest, once a worker knows the model's defaults
    folder TEXT,
    output TEXT,
    named INTEGER NOT NULL DEFAULT 0,      -- 1: the user named the output
    latents TEXT,
    stop_after INTEGER,
    reason TEXT,
    error TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    owner TEXT,
    lock TEXT,
    heartbeat REAL,
    beats INTEGER NOT NULL DEFAULT 0,
    asked TEXT CHECK (asked IN ('cancel', 'pause')),
    progress TEXT,
    checkpoint TEXT,
    checkpoint_step INTEGER,
    best_step INTEGER NOT NULL DEFAULT 0,
    progressed INTEGER NOT NULL DEFAULT 0,
    timings TEXT,
    seconds_per_step REAL,
    predicted_bytes INTEGER,
    peak_bytes INTEGER,
    log TEXT,
    version TEXT,
    created REAL NOT NULL,
    started REAL,
    finished REAL
) STRICT
"""

VERSION_1 = (
    _JOB,
    "CREATE INDEX job_line ON job (state, sort_key, id) WHERE removed IS NULL",
    "CREATE INDEX job_key ON job (sort_key)",
    "CREATE INDEX job_ended ON job (state, finished) WHERE removed IS NULL",
    "CREATE INDEX job_removed ON job (removed) WHERE removed IS NOT NULL",
    # A name is reserved for as long as a job may still write it; what is written is guarded by its file.
    """CREATE UNIQUE INDEX job_output ON job (output)
       WHERE output IS NOT NULL AND removed IS NULL AND state IN ('queued', 'running', 'parked')""",
    """CREATE UNIQUE INDEX job_latents ON job (latents)
       WHERE latents IS NOT NULL AND removed IS NULL AND state IN ('queued', 'running', 'parked')""",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    # What a user did, newest last, and for each job that it touched what the changed columns held before.
    "CREATE TABLE action (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, at REAL NOT NULL) STRICT",
    """CREATE TABLE change (
           action INTEGER NOT NULL REFERENCES action (id) ON DELETE CASCADE,
           job INTEGER NOT NULL,
           revision INTEGER NOT NULL,      -- what the action left behind; another one now forbids undo
           before TEXT,                    -- JSON of columns; NULL: the action made the job
           sort_key INTEGER,               -- before; a column, so that renumbering can follow
           obstacle TEXT,                  -- why it can never be undone
           PRIMARY KEY (action, job)
       ) STRICT, WITHOUT ROWID""",
)

MIGRATIONS: Migrations = (VERSION_1,)
