"""A small Hugging Face Hub on loopback, for tests: repositories commits, branches, tokens, faults on demand.

Clients are processes of their own, as ``HF_ENDPOINT`` is read when huggingface_hub is imported: see ``LocalHub.env``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jeidnn_hf


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees, path -> bytes; ``uploaded`` says for each what its request carried."""

    private: bool = False
    gated: bool = False
    forbidden: bool = False
    truncated: list[str] = field(default_factory=list)
    """How the coming downloads of weights end: "closed" in the middle, or "short" of the length that HEAD announced."""
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploaded: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        listing = "".join(f"{path} {git_oid(tree[path])}\n" for path in sorted(tree))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]


class LocalHub:
    """``with LocalHub() as hub:`` serves ``hub.repos``, and lists ``(method, path)`` of what is asked.

    A Space is under the name ``spaces/org/name``.
    """

    READ, WRITE = "hf_read", "hf_write"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit("main", files)
        return repo

    def env(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a client with an empty cache in ``home``."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "JEIDNN_", "HUGGING"))}
        env = {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(jeidnn_hf.__file__).parents[1]),
            "NO_PROXY": "127.0.0.1",
        }
        return env | ({"HF_TOKEN": token} if token else {}) | more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/(?P<name>(?:models|spaces)/[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<name>(?:models|spaces)/[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/(?P<name>(?:models|spaces)/[^/]+/[^/]+)/branch/(?P<branch>.+)", "branch"),
        ("GET", r"/api/(?P<name>(?:models|spaces)/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", r"/api/(?P<name>(?:models|spaces)/[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("HEAD|GET", r"/(?P<name>(?:spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command == "POST" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        for methods, pattern, answer in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "name" in parts:
                    parts["name"] = parts["name"].removeprefix("models/")
                return getattr(self, answer)(**parts)
        self.error(404, None, "Not Found")

    do_HEAD = do_POST = do_GET

    # Who may do what.

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def repo(self, name: str) -> Repo | None:
        """The repository, where the client may read it; else the error is sent and it is None."""
        repo = self.hub.repos.get(name)
        if self.token not in (None, LocalHub.READ, LocalHub.WRITE):
            return self.error(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and self.token is None):
            return self.error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repo.gated:
            return self.error(403, "GatedRepo", f"Access to model {name} is restricted")
        if repo.forbidden:
            return self.error(403, None, "Forbidden for this token")
        return repo

    def at(self, name: str, revision: str) -> tuple[Repo | None, str | None]:
        """The repository and the commit of a revision; else the error is sent and the commit is None."""
        repo = self.repo(name)
        sha = repo and repo.sha(revision)
        if repo is not None and sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    def may_write(self) -> bool:
        if self.token == LocalHub.WRITE:
            return True
        if self.token == LocalHub.READ:
            self.error(403, None, "You need a write token")
        else:
            self.error(401, None, "Invalid username or password")
        return False

    # Endpoints.

    def create(self):
        if not self.may_write():
            return
        asked = json.loads(self.body)
        kind = asked.get("type", "model")
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if kind == "space":
            if asked.get("sdk") != "gradio":
                return self.error(400, None, "Expected the SDK of the Space")
            name = f"spaces/{name}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return self.json(answer | {"error": f"You already created this {kind} repo"}, 409)
        self.hub.repos[name] = Repo(private=bool(asked.get("private")))
        self.json(answer)

    def validate_yaml(self):
        self.json({"errors": [], "warnings": []})

    def whoami(self):
        self.json({"type": "user", "name": "me", "orgs": []})

    def preupload(self, name: str, revision: str):
        repo = self.repo(name) if self.may_write() else None
        if repo is None:
            return
        tree = repo.tree(revision) if repo.sha(revision) else {}
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": git_oid(tree[file["path"]]) if file["path"] in tree else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.json({"files": files})

    def commit(self, name: str, revision: str):
        repo = self.repo(name) if self.may_write() else None
        if repo is None:
            return
        if repo.sha(revision) is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree, uploaded = dict(repo.tree(revision)), {}
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
                uploaded[value["path"]] = len(tree[value["path"]])
            elif operation["key"] == "deletedFile":
                tree.pop(value["path"])
        sha = repo.commit(revision, tree)
        repo.uploaded.append(uploaded)
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def branch(self, name: str, branch: str):
        repo = self.repo(name) if self.may_write() else None
        if repo is None:
            return
        if branch in repo.refs:
            return self.json({"error": "Reference already exists"}, 409)
        repo.refs[branch] = repo.refs["main"]
        self.json({})

    def info(self, name: str, revision: str = "main"):
        repo, sha = self.at(name, revision)
        if sha is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.json({"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, path: str = ""):
        repo, sha = self.at(name, revision)
        if sha is None:
            return
        self.json(
            [
                {"type": "file", "path": file, "size": len(content), "oid": git_oid(content)}
                for file, content in sorted(repo.tree(revision).items())
                if file.startswith(path)
            ]
        )

    def resolve(self, name: str, revision: str, path: str):
        repo, sha = self.at(name, revision)
        if sha is None:
            return
        content = repo.commits[sha].get(path)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
        kind = "application/octet-stream"
        if self.command == "HEAD":
            return self.answer(200, content, kind, headers)
        status, start = 200, int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        how = repo.truncated.pop(0) if repo.truncated and path.endswith(".safetensors") else None
        if how == "short":
            return self.answer(status, rest[: len(rest) // 2], kind, headers)
        self.close_connection = self.close_connection or how == "closed"
        self.answer(status, rest[: len(rest) // 2] if how else rest, kind, headers, length=len(rest))

    # Answers.

    def json(self, values, status: int = 200):
        self.answer(status, json.dumps(values).encode(), "application/json", {})

    def error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str], length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_):
        pass
