"""What happened in a run, kept in one SQLite file that survives a crash at any moment.

An append-only table of events, with views that a person can query. Knows nothing of what the
events mean: the state is their fold (see `state`).
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from modelkin.errors import DiskFullError, LedgerError, is_disk_full
from modelkin.records import Event, event_from_json, event_to_json

LEDGER_FILE = "ledger.db"
# Stored in the file's header; a reader that finds another number does not guess.
FORMAT = 1
APPLICATION_ID = 0x6D6B696E  # "mkin"

_SCHEMA = f"""
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS events_are_never_changed BEFORE UPDATE ON events
    BEGIN SELECT raise(ABORT, 'events are append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_are_never_deleted BEFORE DELETE ON events
    BEGIN SELECT raise(ABORT, 'events are append-only'); END;
CREATE VIEW IF NOT EXISTS models AS
    SELECT json_extract(body, '$.name') AS name, 0 AS generation,
           json_extract(body, '$.model') AS model, json_extract(body, '$.source') AS source
    FROM events WHERE kind = 'founded' AND json_extract(body, '$.role') = 'foundation'
    UNION ALL
    SELECT json_extract(proposal.value, '$.name'), json_extract(body, '$.generation'),
           json_extract(proposal.value, '$.model'),
           json_extract(proposal.value, '$.recipe.parents')
    FROM events, json_each(body, '$.proposals') AS proposal WHERE kind = 'proposed';
CREATE VIEW IF NOT EXISTS scores AS
    SELECT json_extract(body, '$.model') AS model, score.key AS task,
           json_extract(score.value, '$.value') AS value,
           json_extract(score.value, '$.stderr') AS stderr,
           json_extract(score.value, '$.n') AS n
    FROM events, json_each(body, '$.scorecard.scores') AS score WHERE kind = 'scored';
CREATE VIEW IF NOT EXISTS failures AS
    SELECT json_extract(body, '$.model') AS model, json_extract(body, '$.stage') AS stage,
           json_extract(body, '$.message') AS message
    FROM events WHERE kind = 'failed';
COMMIT;
"""


class Ledger:
    """The events of one run, open for appending by this process alone. See `open_ledger`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def events(self) -> list[Event]:
        """All events so far, oldest first."""
        return _read(self._connection, self._path)

    def append(self, *events: Event) -> None:
        """Record events, all or none; they are on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [(now, event.kind, event_to_json(event)) for event in events]
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT INTO events (time, kind, body) VALUES (?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            if is_disk_full(error):
                raise DiskFullError(f"{self._path}: the disk is full") from error
            raise LedgerError(f"{self._path}: cannot be written: {error}") from error


@contextmanager
def open_ledger(folder: Path) -> Iterator[Ledger]:
    """Open a run folder's ledger for writing, making it if there is none.

    Raises:
        LedgerError: another process has it open, or the file is no ledger of this format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LEDGER_FILE
    lock = FileLock(folder / "ledger.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LedgerError(
            f"{folder}: another process is working on this run; wait for it or stop it"
        ) from None
    try:
        with closing(_connect(path)) as connection:
            try:
                # Every event is on disk before the work that follows from it starts.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(_SCHEMA)
            except sqlite3.Error as error:
                if is_disk_full(error):
                    raise DiskFullError(f"{path}: the disk is full") from error
                raise LedgerError(f"{path}: cannot be opened: {error}") from error
            yield Ledger(connection, path)
    finally:
        lock.release()


def read_events(folder: Path) -> list[Event]:
    """The events of a run folder, whether or not a process is working on it.

    Raises:
        LedgerError: `folder` is no run folder.
    """
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise LedgerError(f"{folder}: is no run folder: expected {LEDGER_FILE} in it")
    # Where nothing can be written SQLite can take no locks, and needs to be told that nobody else
    # writes; but what is in the log beside the file, it then passes over.
    alone = not os.access(folder, os.W_OK) and not path.with_name(f"{LEDGER_FILE}-wal").exists()
    with closing(_connect(path, alone=alone)) as connection:
        return _read(connection, path)


def _connect(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    try:
        if alone:
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
        else:
            connection = sqlite3.connect(path)
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: is no ledger: {error}") from error
    # A process killed while it made the file leaves one without tables: as good as none.
    if tables and owner != APPLICATION_ID:
        connection.close()
        raise LedgerError(f"{path}: expected a ledger, found a database of something else")
    if tables and found != FORMAT:
        connection.close()
        raise LedgerError(f"{path}: expected a ledger of format {FORMAT}, found {found}")
    return connection


def _read(connection: sqlite3.Connection, path: Path) -> list[Event]:
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            return []  # made by a process that was killed before it wrote anything
        rows: Sequence[tuple[int, str]] = connection.execute(
            "SELECT seq, body FROM events ORDER BY seq"
        ).fetchall()
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: cannot be read: {error}") from error
    events: list[Event] = []
    for seq, body in rows:
        try:
            events.append(event_from_json(body))
        except ValidationError as error:
            raise LedgerError(f"{path}: event {seq} is not readable: {body[:100]}") from error
    return events
