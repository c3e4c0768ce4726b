"""A Hub of a few lines on the loopback address: serves folders as repositories, and takes commits and uploads."""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


# The one commit of a folder that is served as it is.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".png", ".parquet")
# Seconds for the file that uploads wait for: who waits for the uploads in turn makes no end of it.
MAX_WAIT = 600


@dataclass
class Repo:
    """Commits by their id, each a dict of file contents; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False


class Hub:
    r"""
    Args:
        root (`Path`, *optional*): The folders `root/OWNER/NAME` are repositories OWNER/NAME with one commit, `COMMIT`.
        token (`str`, *optional*): What private repositories and every write ask for.
    """

    def __init__(self, root: Path | None = None, token: str | None = None):
        self.root, self.token = root, token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        # Sizes of the uploads so far, and after how many they break.
        self.uploads: list[str] = []
        self.break_after: int | None = None
        # What lies between a client's hashes of its files and their uploads: seconds, and until a file is there.
        self.delay = 0.0
        self.waits_for: Path | None = None
        self.uploading = threading.Lock()

    def repo(self, name: str) -> Repo | None:
        folder = None if self.root is None else self.root / name
        if name not in self.repos and name.count("/") == 1 and folder is not None and folder.is_dir():
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            contents = {path: file.read_bytes() for path, file in sorted(files.items())}
            self.repos[name] = Repo({COMMIT: contents}, {"main": COMMIT})
        return self.repos.get(name)

    def commit(self, repo: Repo, branch: str, changes: dict[str, bytes], deleted: Sequence[str] = ()) -> str:
        files = dict(repo.commits.get(repo.branches.get(branch, ""), {})) | changes
        files = {name: data for name, data in files.items() if name not in deleted}
        text = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(f"{len(repo.commits)}{text}".encode()).hexdigest()
        repo.commits[commit] = dict(sorted(files.items()))
        repo.branches[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    # ------------------------------------------------------------------------------------------------- reading

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/whoami-v2":
            known = self._may_write()
            self._json(
                {"name": "me", "type": "user", "orgs": []} if known else {"error": "no token"}, 200 if known else 401
            )
        elif path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
        else:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(name, revision, file)

    do_HEAD = do_GET

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        data = repo.commits[commit].get(file)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        etag = hashlib.sha1(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _api(self, path: str) -> None:
        name, _, rest = path.partition("/")
        owner, name = name, rest.partition("/")[0]
        action, _, revision = rest.partition("/")[2].partition("/")
        repo = self._readable(f"{owner}/{name}")
        if repo is None:
            return
        revision, _, below = revision.partition("/")
        commit = self._commit(repo, revision or "main")
        if commit is None:
            return
        files = repo.commits[commit]
        if action == "tree":
            inside = [file for file in files if file.startswith(f"{below}/" if below else "")]
            if below and not inside:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            self._json(
                [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(files[file]),
                        "oid": hashlib.sha1(files[file]).hexdigest(),
                    }
                    for file in inside
                ]
            )
        elif action == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": target}
                for branch, target in repo.branches.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": []})
        else:
            siblings = [{"rfilename": file} for file in files]
            info = {"_id": commit[:24], "id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "tags": []}
            self._json(info | {"private": repo.private})

    # ------------------------------------------------------------------------------------------------- writing

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if not self._may_write():
            self._json({"error": "Invalid username or password."}, 401)
            return
        if path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("api/models/"):
            owner, name, action, revision = path.removeprefix("api/models/").split("/", 3)
            repo = self._readable(f"{owner}/{name}")
            if repo is not None and action == "preupload":
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif repo is not None and action == "commit":
                self._take_commit(repo, f"{owner}/{name}", revision, body)
            elif repo is not None and action == "branch":
                repo.branches[revision] = repo.branches["main"]
                self._json({})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{name}"
        if self.hub.repo(name) is not None:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=bool(private))
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": url, "name": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        time.sleep(self.hub.delay)
        end = time.monotonic() + MAX_WAIT
        while self.hub.waits_for is not None and not self.hub.waits_for.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for entry in asked["objects"]:
            found = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.blobs:
                found["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{entry['oid']}"}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(data).hexdigest() == oid
        # Clients upload several files at once.
        with self.hub.uploading:
            is_broken = self.hub.break_after is not None and len(self.hub.uploads) >= self.hub.break_after
            if not is_broken:
                self.hub.blobs[oid] = data
                self.hub.uploads.append(oid)
        if is_broken:
            self._json({"error": "the line broke"}, 400)
        else:
            self._send(200, b"", {})

    def _take_commit(self, repo: Repo, name: str, branch: str, body: bytes) -> None:
        if branch not in repo.branches:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        changes, deleted = {}, []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        commit = self.hub.commit(repo, branch, changes, deleted)
        self._json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit})

    # ------------------------------------------------------------------------------------------------- answering

    def _may_write(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _readable(self, name: str) -> Repo | None:
        repo = self.hub.repo(name)
        if repo is None or (repo.private and not self._may_write()):
            # Private ones are not there, for those who may not read them.
            self._send(401 if repo is not None else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve(root: Path | Hub) -> Iterator[str]:
    r"""
    Serves a Hub.

    Args:
        root (`Path` or `Hub`): The Hub, or the folder of its repositories' folders.

    Yields:
        `str`: The address, for `HF_ENDPOINT`.
    """
    handler = type("Handler", (_Handler,), {"hub": root if isinstance(root, Hub) else Hub(root)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
