"""Facts about the ledger: append-only, all or nothing, one writer, and no guessing."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelkin.errors import DiskFullError, LedgerError
from modelkin.ledger import APPLICATION_ID, FORMAT, LEDGER_FILE, open_ledger, read_events
from modelkin.records import (
    Event,
    Failed,
    Founded,
    Measured,
    Merged,
    Proposal,
    Proposed,
    Recipe,
    Score,
    Scorecard,
    Scored,
    Similarity,
    Started,
    Stopped,
)

TEXT = st.text(max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CONFIG = st.dictionaries(TEXT, JSON, max_size=3)
RECIPE = st.builds(
    Recipe, st.tuples(TEXT, TEXT), base=TEXT, config=CONFIG, seed=st.integers(0, 2**31)
)
SCORE = st.builds(Score, NUMBER, st.none() | NUMBER, st.none() | st.integers(0, 10**6))
SIMILARITY = st.builds(Similarity, st.none() | NUMBER, st.none() | NUMBER, NUMBER)
EVENT: st.SearchStrategy[Event] = st.one_of(
    st.builds(Started, CONFIG, st.dictionaries(TEXT, TEXT, max_size=3), TEXT),
    st.builds(
        Founded, TEXT, TEXT, st.sampled_from(["base", "foundation"]), TEXT, st.none() | TEXT, TEXT
    ),
    st.builds(
        Proposed,
        st.integers(1, 99),
        st.lists(st.builds(Proposal, TEXT, TEXT, RECIPE, st.booleans()), max_size=3).map(tuple),
    ),
    st.builds(Merged, TEXT, TEXT, st.integers(0, 2**53), NUMBER),
    st.builds(
        Scored,
        TEXT,
        st.builds(Scorecard, st.dictionaries(TEXT, SCORE, max_size=3), TEXT),
        TEXT,
        NUMBER,
    ),
    st.builds(Measured, TEXT, st.dictionaries(TEXT, SIMILARITY, max_size=3), NUMBER),
    st.builds(Failed, TEXT, st.sampled_from(["merge", "measure", "evaluate"]), TEXT),
    st.builds(Stopped, TEXT),
)
SOME_EVENTS: tuple[Event, ...] = (
    Started({"k": 3}, {"python": "3"}, "evaluations"),
    Founded("b", "base", "base", "/base", None, "bb"),
    Founded("x", "X", "foundation", "/x", None, "xx"),
    Founded("y", "Y", "foundation", "org/y", "commit", "yy"),
    Scored("x", Scorecard({"qa": Score(0.5, 0.1, 25), "maths": Score(7)}, "p"), "e-x", 1.5),
    Scored("y", Scorecard({"qa": Score(0.25), "maths": Score(8)}, "p"), "e-y", 1.5),
    Proposed(1, (Proposal("z", "1-1", Recipe(("x", "y"), "b", {"merge_method": "m"}, 0)),)),
    Failed("z", "merge", "MergeError: it's gone"),
    Stopped("enough"),
)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(batches=st.lists(st.lists(EVENT, max_size=4), max_size=3))
def test_events_come_back_as_they_went_in(
    batches: list[list[Event]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Events of every kind are read back equal and in order, by this process and by others."""
    folder = tmp_path_factory.mktemp("run")
    with open_ledger(folder) as ledger:
        for batch in batches:
            ledger.append(*batch)
        everything = [event for batch in batches for event in batch]
        assert ledger.events() == everything
        assert read_events(folder) == everything
    assert read_events(folder) == everything


def test_the_order_of_tasks_survives(tmp_path: Path) -> None:
    """A scorecard comes back with its tasks in the protocol's order."""
    card = Scorecard({"z": Score(0.1), "m": Score(0.2), "a": Score(0.7)}, "p")
    with open_ledger(tmp_path) as ledger:
        ledger.append(Scored("x", card, "e", 0.0))
        (event,) = ledger.events()
    assert isinstance(event, Scored)
    assert list(event.scorecard.scores) == ["z", "m", "a"]


def test_opening_again_continues(tmp_path: Path) -> None:
    """A ledger that is opened again still has its events and takes more."""
    for event in SOME_EVENTS:
        with open_ledger(tmp_path) as ledger:
            ledger.append(event)
    assert tuple(read_events(tmp_path)) == SOME_EVENTS


@pytest.mark.parametrize("statement", ["UPDATE events SET body = '{}'", "DELETE FROM events"])
def test_events_cannot_be_changed(tmp_path: Path, statement: str) -> None:
    """SQLite itself refuses to update or delete an event."""
    with open_ledger(tmp_path) as ledger:
        ledger.append(*SOME_EVENTS)
    with (
        closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        connection.execute(statement)
    assert tuple(read_events(tmp_path)) == SOME_EVENTS


def test_there_is_one_writer(tmp_path: Path) -> None:
    """A second writer is refused, while readers see what the first one wrote; later it may."""
    with open_ledger(tmp_path) as ledger:
        ledger.append(*SOME_EVENTS)
        with pytest.raises(LedgerError, match="another process"), open_ledger(tmp_path):
            pass
        assert tuple(read_events(tmp_path)) == SOME_EVENTS
    with open_ledger(tmp_path) as ledger:
        assert tuple(ledger.events()) == SOME_EVENTS


def test_an_error_within_releases_the_lock(tmp_path: Path) -> None:
    """After an exception the ledger can be opened again and has what was appended before it."""
    with pytest.raises(ZeroDivisionError), open_ledger(tmp_path) as ledger:
        ledger.append(SOME_EVENTS[0])
        raise ZeroDivisionError
    with open_ledger(tmp_path) as ledger:
        assert ledger.events() == [SOME_EVENTS[0]]


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    """A file of something else is named and left as it is."""
    path = tmp_path / LEDGER_FILE
    path.write_text("This is a diary, not a database. " * 100)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"ledger\.db: is no ledger"), open_ledger(tmp_path):
        pass
    with pytest.raises(LedgerError, match=r"ledger\.db: is no ledger"):
        read_events(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("application", "version"), [(APPLICATION_ID, FORMAT + 1), (0, 0), (0, FORMAT)]
)
def test_another_database_is_refused(tmp_path: Path, application: int, version: int) -> None:
    """A ledger of another format, or somebody else's database, is refused and left as it is."""
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        connection.execute("CREATE TABLE recipes (flour INTEGER)")
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    before = (tmp_path / LEDGER_FILE).read_bytes()
    with pytest.raises(LedgerError, match="expected a ledger"), open_ledger(tmp_path):
        pass
    with pytest.raises(LedgerError, match="expected a ledger"):
        read_events(tmp_path)
    assert (tmp_path / LEDGER_FILE).read_bytes() == before


@pytest.mark.parametrize("body", ["", "{}", '{"kind": "gossip"}', '{"kind": "stopped"}', "[1"])
def test_an_unreadable_event_is_named(tmp_path: Path, body: str) -> None:
    """An event that is not readable is named by its number, and never skipped."""
    with open_ledger(tmp_path) as ledger:
        ledger.append(SOME_EVENTS[0])
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        connection.execute("INSERT INTO events (time, kind, body) VALUES ('', '', ?)", [body])
        connection.commit()
    with pytest.raises(LedgerError, match="event 2 is not readable"):
        read_events(tmp_path)
    with (
        open_ledger(tmp_path) as ledger,
        pytest.raises(LedgerError, match="event 2 is not readable"),
    ):
        ledger.events()


def test_a_folder_without_ledger_is_no_run(tmp_path: Path) -> None:
    """Reading a folder that is no run raises, and makes no file in it."""
    with pytest.raises(LedgerError, match="is no run folder"):
        read_events(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_as_good_as_none(tmp_path: Path) -> None:
    """A process killed right after it made the file leaves nothing that hinders the next one."""
    (tmp_path / LEDGER_FILE).touch()
    with open_ledger(tmp_path) as ledger:
        assert ledger.events() == []
        ledger.append(*SOME_EVENTS)
    assert tuple(read_events(tmp_path)) == SOME_EVENTS


def test_an_event_that_cannot_be_written_takes_its_batch_with_it(tmp_path: Path) -> None:
    """Events are appended all or none."""
    with open_ledger(tmp_path) as ledger:
        ledger.append(SOME_EVENTS[0])
        with pytest.raises(ValueError, match="JSON compliant"):
            ledger.append(Stopped("fine"), Merged("z", "f", 1, seconds=float("nan")))
        assert ledger.events() == [SOME_EVENTS[0]]


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    """When there is no room the batch is dropped whole, and with room again it is taken."""
    big = [Failed(f"model-{number}", "evaluate", "x" * 100) for number in range(200)]
    with open_ledger(tmp_path) as ledger:
        ledger.append(SOME_EVENTS[0])
        # SQLite's own limit gives the error of a full disk.
        limit = ledger._connection.execute("PRAGMA page_count").fetchone()[0] + 1
        ledger._connection.execute(f"PRAGMA max_page_count = {limit}")
        with pytest.raises(DiskFullError, match=r"ledger\.db: the disk is full"):
            ledger.append(*big)
        assert ledger.events() == [SOME_EVENTS[0]]
    assert read_events(tmp_path) == [SOME_EVENTS[0]]
    with open_ledger(tmp_path) as ledger:
        ledger.append(*big)
        assert ledger.events() == [SOME_EVENTS[0], *big]


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        (
            "models",
            [
                ("X", 0, "x", "/x"),
                ("Y", 0, "y", "org/y"),
                ("1-1", 1, "z", '["x","y"]'),
            ],
        ),
        (
            "scores",
            [
                ("x", "maths", 7.0, None, None),
                ("x", "qa", 0.5, 0.1, 25),
                ("y", "maths", 8.0, None, None),
                ("y", "qa", 0.25, None, None),
            ],
        ),
        ("failures", [("z", "merge", "MergeError: it's gone")]),
    ],
)
def test_views_answer_in_plain_sql(tmp_path: Path, view: str, rows: list[Any]) -> None:
    """The views list models, scores and failures for a person with `sqlite3`."""
    with open_ledger(tmp_path) as ledger:
        ledger.append(*SOME_EVENTS)
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        found = connection.execute(f"SELECT * FROM {view}").fetchall()
    assert sorted(found, key=str) == sorted(rows, key=str)
