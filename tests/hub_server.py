"""A Hub on loopback, as far as the real `huggingface_hub` client needs one.

It keeps what is uploaded, speaks LFS and no Xet (`HF_HUB_DISABLE_XET=1`), knows one
token, and logs every request:

    with hub_server() as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache_folder))
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
USER = "someone"


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with the file that it has."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        head = f"blob {len(self.content)}\0".encode()
        return hashlib.sha1(head + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        entry = {"type": "file", "path": path, "size": size, "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": size, "pointerSize": 130}
        return entry


Files = dict[str, File]


@dataclass
class Repo:
    private: bool
    gated: bool = False
    """Everybody may see what it holds, nobody may read it."""
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        content = f"{len(self.commits)} {branch} {sorted(files)}"
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        files = self.commits[self.branches[branch]]
        return {path: file.content for path, file in files.items()}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    sent: int
    """Bytes of the answer's body."""


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """What came by LFS, by its hash."""
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.whole_uploads = -1
        """How many more uploads arrive; those after them are cut. -1: all do."""
        self.was_cut = threading.Event()
        self.failures: dict[str, int] = {}
        """Statuses by a part of the paths that they answer; 0: the line goes dead."""

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What the client needs in its environment."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
        }

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Make a repo that holds files."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {path: File(data, False) for path, data in files.items()})
        return repo

    def served(self, pattern: str) -> list[Request]:
        """Downloads of files whose name matches."""
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and re.search(rf"/resolve/.*{pattern}", request.path)
        ]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a Hub within the body."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `Hub.requests` has it."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for part, status in self.server.failures.items():
            if part in url.path:
                self._fail(status)
                return
        if url.path.startswith("/lfs/"):
            self._receive(url.path.rpartition("/")[2])
            return
        self.body = self._read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    with self.server.lock:
                        answer(
                            self, *(unquote(group or "") for group in match.groups())
                        )
                    return
            raise Refusal(404, "NotFound", f"{self.command} {url.path}")
        except Refusal as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send(error.status, b"{}", headers)

    def _fail(self, status: int) -> None:
        self._read(int(self.headers.get("Content-Length", 0)))
        if status:
            self._send(status, b"")
        else:
            self.close_connection = True
            self.connection.close()

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        self.server.requests.append(
            Request(self.command, self.path, self.headers.get("Range"), sent)
        )
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if sent:
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "text/json"})

    def _repo(self, repo_id: str, writes: bool = False) -> Repo:
        token = self.headers.get("Authorization")
        knows_us = token == f"Bearer {TOKEN}"
        repo = self.server.repos.get(repo_id)
        if not knows_us and (repo is None or repo.private or writes):
            # The Hub sends no code; at an address with https the client takes it so.
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, Files]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def _create(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if repo_id in self.server.repos:
            raise Refusal(409, "", "You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.add(repo_id, {".gitattributes": b""}, private)
        self._json({"url": f"{self.server.url}/{repo_id}"})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _info(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        sha, files = self._files(repo, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.oid}
            for path, file in files.items()
        ]
        self._json(
            {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        )

    def _branch(self, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, writes=True)
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def _tree(self, repo_id: str, revision: str, folder: str) -> None:
        _, files = self._files(self._repo(repo_id), revision)
        found = {path: file for path, file in files.items() if path.startswith(folder)}
        if folder and not found:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self._json([file.entry(path) for path, file in found.items()])

    def _paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self._files(self._repo(repo_id), revision)
        asked = parse_qs(self.body.decode())["paths"]
        self._json([files[path].entry(path) for path in asked if path in files])

    def _preupload(self, repo_id: str, revision: str) -> None:
        _, files = self._files(self._repo(repo_id, writes=True), revision)
        answers = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path in (file["path"] for file in json.loads(self.body)["files"])
        ]
        self._json({"files": answers})

    def _batch(self, repo_id: str) -> None:
        self._repo(repo_id, writes=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                href = f"{self.server.url}/lfs/{repo_id}/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _receive(self, oid: str) -> None:
        """Take an upload, or drop the connection in the middle of it."""
        hub = self.server
        with hub.lock:
            is_cut = hub.whole_uploads == 0
            hub.whole_uploads -= hub.whole_uploads > 0
        if is_cut:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            hub.was_cut.set()
            return
        content = self._read(int(self.headers.get("Content-Length", 0)))
        assert hashlib.sha256(content).hexdigest() == oid
        hub.objects[oid] = content
        self._send(200, b"")

    def _commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, writes=True)
        sha, files = self._files(repo, revision)
        files = dict(files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    if value.get("parentCommit", sha) != sha:
                        raise Refusal(412, "", "A commit has happened since.")
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = File(content, is_lfs=False)
                case "lfsFile":
                    content = self.server.objects[value["oid"]]
                    files[value["path"]] = File(content, is_lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(revision, files)
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        sha, files = self._files(repo, revision)
        if repo.gated:
            raise Refusal(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            self._send(404, b"", headers)
            return
        content = files[path].content
        headers = {
            "ETag": f'"{files[path].oid}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, content, headers)
            return
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        part = content[start:stop]
        last = start + len(part) - 1
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self._send(206, part, headers)


_REPO = r"([^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"

ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler._create),
    ("POST", "/api/validate-yaml", Handler._validate),
    ("GET", rf"{_MODEL}(?:/revision/([^/]+))?", Handler._info),
    ("POST", rf"{_MODEL}/branch/([^/]+)", Handler._branch),
    ("GET", rf"{_MODEL}/tree/([^/]+)/?(.*)", Handler._tree),
    ("POST", rf"{_MODEL}/paths-info/([^/]+)", Handler._paths_info),
    ("POST", rf"{_MODEL}/preupload/([^/]+)", Handler._preupload),
    ("POST", rf"{_MODEL}/commit/([^/]+)", Handler._commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler._batch),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", Handler._resolve),
]
