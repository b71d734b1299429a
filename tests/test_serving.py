"""Serving a report: two paths, this machine only, always the run as it stands."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic import events_of

pytest.importorskip("plotly")
pytest.importorskip("scipy")

from modelkin.cli import app
from modelkin.errors import ConfigError, LedgerError
from modelkin.ledger import open_ledger, read_events
from modelkin.records import Proposed, Stopped
from modelkin.serving import ReportServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with what happened before the first generation."""
    events = events_of(8)
    first = next(n for n, event in enumerate(events) if isinstance(event, Proposed))
    with open_ledger(tmp_path) as ledger:
        ledger.append(*events[:first])
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ReportServer]:
    """Its report, served on a free port."""
    with ReportServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: ReportServer, path: str, *, host: str | None = None, method: str = "GET"
) -> tuple[int, str]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    try:
        connection.request(
            method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"}
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_serves_the_report_and_its_version(server: ReportServer) -> None:
    """The page knows the version that the server tells, and reading changes neither."""
    status, version = ask(server, "/version")
    assert (status, bool(version)) == (200, True)
    status, page = ask(server, "/")
    assert status == 200
    assert f'<body data-live="{version}">' in page
    assert ask(server, "/version") == (200, version)
    assert ask(server, "/") == (200, page)


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", "/ledger.db", "/../secret.txt", "/%2e%2e/secret.txt", "/index", "/version/"],
)
def test_it_serves_no_files(server: ReportServer, path: str) -> None:
    """Nothing but the two paths is found, whatever lies in the folder."""
    status, body = ask(server, path)
    assert status == 404
    assert "secret\n" not in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "0.0.0.0"])
def test_it_answers_no_other_site(server: ReportServer, host: str) -> None:
    """A page elsewhere, whose name was made to point here, is refused."""
    assert ask(server, "/", host=host)[0] == 403
    assert ask(server, "/version", host=host)[0] == 403
    assert ask(server, "/version", host=f"localhost:{server.server_port}")[0] == 200


def test_it_changes_nothing(server: ReportServer) -> None:
    """Only GET is known, and it listens on the loopback interface alone."""
    assert ask(server, "/", method="POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_it_follows_the_run(server: ReportServer, folder: Path) -> None:
    """An event changes the version, and the page says what happened."""
    _, before = ask(server, "/version")
    assert "it is still going on" in ask(server, "/")[1]
    with open_ledger(folder) as ledger:
        ledger.append(Stopped("reached the <limit>"))
    _, after = ask(server, "/version")
    assert after != before
    assert "reached the &lt;limit&gt;" in ask(server, "/")[1]


def test_a_run_that_breaks_is_an_answer(server: ReportServer, folder: Path) -> None:
    """A ledger that can no longer be read is said, and the server goes on."""
    (folder / "ledger.db").write_bytes(b"no database" * 100)
    status, body = ask(server, "/")
    assert status == 500
    assert "ledger.db" in body
    assert ask(server, "/version")[0] == 200


def test_a_taken_port_is_an_error(server: ReportServer, folder: Path) -> None:
    """The port that another server has is named."""
    port = server.server_port
    with pytest.raises(ConfigError, match=f"port {port}: expected a free port, found one that is"):
        ReportServer(folder, port)


def test_only_a_run_is_served(tmp_path: Path) -> None:
    """A folder without a ledger is no run folder."""
    with pytest.raises(LedgerError, match="is no run folder"):
        ReportServer(tmp_path, 0)


def test_serving_leaves_the_ledger_as_it_is(server: ReportServer, folder: Path) -> None:
    """Making the page appends nothing and a run can go on meanwhile."""
    events = read_events(folder)
    with open_ledger(folder) as ledger:
        assert ask(server, "/")[0] == 200
        ledger.append(Stopped("enough"))
        assert "enough" in ask(server, "/")[1]
    assert read_events(folder) == [*events, Stopped("enough")]


def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    """`modelkin serve` says where it is, answers there, and ends quietly on Ctrl-C."""
    command = [sys.executable, "-m", "modelkin.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", said)
        assert found, said
        connection = http.client.HTTPConnection("127.0.0.1", int(found.group(1)))
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"


def test_who_goes_away_is_no_error(server: ReportServer, capfd: pytest.CaptureFixture[str]) -> None:
    """A tab that is closed before the page has arrived leaves no traceback on the terminal."""
    before = threading.active_count()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            # Closing with unread bytes and no lingering resets the connection.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            host = f"127.0.0.1:{server.server_port}"
            client.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert client.recv(1) == b"H"
    assert ask(server, "/version")[0] == 200
    end = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)  # each answer has a thread
    assert capfd.readouterr().err == ""


def test_the_command_names_what_is_wrong(server: ReportServer, folder: Path) -> None:
    """A taken port and a folder that is no run are one line and exit status 2."""
    for words, expected in (
        ([str(folder), "--port", str(server.server_port)], "expected a free port"),
        ([str(folder / "none"), "--port", "0"], "is no run folder"),
    ):
        done = CliRunner().invoke(app, ["serve", *words])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
