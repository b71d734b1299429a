"""A run's report on 127.0.0.1, made anew when the run has gone on.

Knows the run folder and the page; serves these two paths and no file. Nobody else on the network
can ask, and no page of another site can: requests must name this machine.
"""

import errno
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from modelkin.errors import ConfigError, ModelkinError
from modelkin.ledger import LEDGER_FILE
from modelkin.report import report_page
from modelkin.run import read_run

HOST = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """Serves `/`, the report, and `/version`, which changes when the run has gone on.

    Close it, or use it as a context manager; `server_port` says where it listens.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        """Make the report once, and listen.

        Args:
            folder: the run folder.
            port: 0 takes one that is free.

        Raises:
            LedgerError: `folder` is no run folder.
            ConfigError: the port is taken, or not for everyone to take.
        """
        self._folder = folder.resolve()
        self._lock = Lock()
        self._made: tuple[str, bytes] | None = None
        self.page()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "one that is taken" if taken else str(error)
            raise ConfigError(f"port {port}: expected a free port, found {reason}") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless the one who asked went away before the end of the answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def version(self) -> str:
        """What the ledger's files look like from outside: cheap, and new with each event."""
        marks = []
        # SQLite's log holds the newest events; reading makes an empty one for a moment.
        for name in (LEDGER_FILE, f"{LEDGER_FILE}-wal"):
            try:
                found = (self._folder / name).stat()
            except OSError:
                continue
            if found.st_size:
                marks.append(f"{found.st_size}.{found.st_mtime_ns}")
        return "-".join(marks)

    def page(self) -> bytes:
        """The report as the run stands."""
        with self._lock:
            # Taken before reading: what happens meanwhile makes the page old, never wrong.
            version = self.version()
            if self._made is None or version != self._made[0]:
                html = report_page([read_run(self._folder).source()], live=version)
                self._made = (version, html.encode())
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._send(HTTPStatus.FORBIDDEN, b"this is not for other sites\n", "text/plain")
        elif self.path == "/version":
            self._send(HTTPStatus.OK, self.server.version().encode(), "text/plain")
        elif self.path == "/":
            try:
                self._send(HTTPStatus.OK, self.server.page(), "text/html")
            except ModelkinError as error:
                message = f"{error}\n".encode()
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, message, "text/plain")
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is / and /version\n", "text/plain")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a page asks every other second."""
