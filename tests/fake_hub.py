"""A Hugging Face Hub on the loopback, in memory: what huggingface_hub and transformers ask of it for models.

Repositories have commits, and no branch but `main`; without the token nothing is written, and private ones are not
found. `fail` makes requests fail, `calls` remembers them all.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fake"

_LARGE = (".safetensors", ".png")  # what goes through LFS; the Hub looks at sizes and contents, too


class Call(NamedTuple):
    method: str
    path: str


class Answer(NamedTuple):
    body: Any = b""
    status: int = 200
    headers: dict[str, str] = {}


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b"*.bin lfs\n"}})
    """By hash, in order, the files at each commit."""
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


@dataclass
class Failure:
    method: str
    path: str
    status: int
    times: int


class FakeHub:
    """The server. `with FakeHub().serve() as hub` has it at `hub.endpoint`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.endpoint = ""
        self._failures: list[Failure] = []
        self._lock = threading.Lock()

    @contextmanager
    def serve(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with hub._lock:
                    answer = hub._answer(self.command, self.path, self.headers, body)
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def fail(self, method: str, path: str, status: int = 500, times: int = 1) -> None:
        """Answer the next `times` requests whose path matches a pattern with an error."""
        self._failures.append(Failure(method, path, status, times))

    def sent(self, method: str, path: str) -> list[Call]:
        """The requests so far whose path matches a pattern."""
        return [call for call in self.calls if call.method == method and re.search(path, call.path)]

    def _answer(self, method: str, url: str, headers: Any, body: bytes) -> Answer:
        path = unquote(urlsplit(url).path)
        self.calls.append(Call(method, path))
        for failure in self._failures:
            if failure.times and failure.method == method and re.search(failure.path, path):
                failure.times -= 1
                return Answer({"error": "out of order"}, failure.status)
        knows_token = headers.get("Authorization") == f"Bearer {TOKEN}"
        for wanted, pattern, respond in self._routes():
            if wanted in (method, "ANY") and (found := re.fullmatch(pattern, path)):
                names = found.groupdict()
                if (name := names.pop("repo", None)) is not None:
                    repository = self.repositories.get(name)
                    if repository is None or (repository.private and not knows_token):
                        return _error(404 if knows_token else 401, "RepoNotFound")
                    names["repository"] = repository
                    names["name"] = name
                if method in ("POST", "PUT") and not knows_token and not path.startswith("/blobs/"):
                    return _error(401, "Unauthorized")
                return respond(body=body, **names)
        return _error(501, f"NotInThisFake {method} {path}")

    def _routes(self) -> list[tuple[str, str, Callable[..., Answer]]]:
        repo, revision = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
        return [
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", "/api/repos/create", self._create),
            ("POST", f"/api/models/{repo}/preupload/{revision}", self._preupload),
            ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/blobs/(?P<oid>\w+)", self._put_blob),
            ("POST", f"/api/models/{repo}/commit/{revision}", self._commit),
            ("GET", f"/api/models/{repo}/tree/{revision}(?:/(?P<folder>.*))?", self._tree),
            ("GET", f"/api/models/{repo}(?:/revision/{revision})?", self._info),
            ("ANY", f"/{repo}/resolve/{revision}/(?P<file>.+)", self._resolve),
        ]

    def _validate(self, body: bytes) -> Answer:
        content = json.loads(body)["content"]
        return Answer({"errors": [] if content.startswith("---\n") else [{"message": "no metadata"}], "warnings": []})

    def _create(self, body: bytes) -> Answer:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            return Answer({"error": "You already created this model repo"}, 409)
        self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return Answer({"url": f"{self.endpoint}/{name}", "id": name, "name": name})

    def _preupload(self, body: bytes, repository: Repository, name: str, revision: str) -> Answer:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], repository.files[file["path"]]) if file["path"] in repository.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        return Answer({"files": files})

    def _batch(self, body: bytes, repository: Repository, name: str) -> Answer:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.blobs:
                item["actions"] = {"upload": {"href": f"{self.endpoint}/blobs/{item['oid']}"}}
        return Answer({"transfer": "basic", "objects": objects})

    def _put_blob(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _error(400, "WrongHash")
        self.blobs[oid] = body
        return Answer()

    def _commit(self, body: bytes, repository: Repository, name: str, revision: str) -> Answer:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repository.head) != repository.head:
            return _error(412, "PreconditionFailed")
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return _error(400, operation["key"])
        commit = hashlib.sha1(body + repository.head.encode()).hexdigest()
        repository.commits[commit] = files
        repository.messages.append(header["value"]["summary"])
        return Answer(
            {"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}
        )

    def _info(self, body: bytes, repository: Repository, name: str, revision: str | None) -> Answer:
        if (commit := _find(repository, revision)) is None:
            return _error(404, "RevisionNotFound")
        siblings = [{"rfilename": file} for file in repository.commits[commit]]
        return Answer({"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, body: bytes, repository: Repository, name: str, revision: str, folder: str | None) -> Answer:
        if (commit := _find(repository, revision)) is None:
            return _error(404, "RevisionNotFound")
        if folder:  # there are none
            return _error(404, "EntryNotFound")
        files = repository.commits[commit].items()
        return Answer([{"type": "file", "path": path, "size": len(x), "oid": _oid(path, x)} for path, x in files])

    def _resolve(self, body: bytes, repository: Repository, name: str, revision: str, file: str) -> Answer:
        if (commit := _find(repository, revision)) is None:
            return _error(404, "RevisionNotFound")
        if (content := repository.commits[commit].get(file)) is None:
            return _error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        return Answer(content, headers={"ETag": f'"{_oid(file, content)}"', "X-Repo-Commit": commit})


def _find(repository: Repository, revision: str | None) -> str | None:
    if revision in (None, "main"):
        return repository.head
    return revision if revision in repository.commits else None


def _oid(path: str, content: bytes) -> str:
    """The name of a file's content: of large files their SHA-256, of others git's."""
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})
