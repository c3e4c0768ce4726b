"""A Hub of a few lines: serves folders as model repositories on the loopback address."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _names(folder: Path, subfolder: Path) -> list[str]:
    """All files below a sub-folder, named from the folder."""
    return sorted(file.relative_to(folder).as_posix() for file in subfolder.rglob("*") if file.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
            return
        repo, _, rest = path.partition("/resolve/")
        file = self.root / repo / rest.partition("/")[2]
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, file.read_bytes(), headers)

    do_HEAD = do_GET

    def _api(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        folder = self.root / repo
        if not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        _, _, tree = path.partition("/tree/")
        if tree:
            subfolder = folder / tree.partition("/")[2]
            if not subfolder.is_dir():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            body: Any = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": _digest(folder / name)}
                for name in _names(folder, subfolder)
            ]
        else:
            siblings = [{"rfilename": name} for name in _names(folder, folder)]
            body = {"_id": COMMIT[:24], "id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve(root: Path) -> Iterator[str]:
    r"""
    Serves the folders `root/OWNER/NAME` as repositories OWNER/NAME, each with one commit.

    Args:
        root (`Path`): The folders' folder.

    Yields:
        `str`: The address, for `HF_ENDPOINT`.
    """
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
