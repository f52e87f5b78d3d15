"""A small server that speaks the routes of the Hugging Face hub which its client uses to publish and fetch a model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"
Answer = Callable[["Request"], bool]


@dataclass
class Repo:
    """A repository: files by commit, and the commit of each branch and tag."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add files to a branch and return the new commit."""
        before = self.commits.get(self.branches.get(branch, self.branches.get("main", "")), {})
        sha = hashlib.sha1(f"{len(self.commits)}{branch}{id(self)}".encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit that a revision names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server with its repositories. `log` holds every request; `instead` is asked first, and may answer itself."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []
        self.instead: Answer = lambda request: False

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """The address that large files are fetched from, which is another host's on the hub too."""
        return f"http://localhost:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """The files whose content was asked for; large ones by their digest."""
        return [line.rpartition("/")[2] for line in self.log if line.startswith("GET") and "/api/" not in line]

    def start(self) -> "Hub":
        """Answer in a thread of its own."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class Request(BaseHTTPRequestHandler):
    """One request to the hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self) -> None:
        """Answer by the first route that fits."""
        self.route = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {self.route}")
        if self.server.instead(self):
            return
        for pattern, handler in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {self.route}")
            if found:
                handler(self, **found.groupdict())
                return
        self.fail(404, "", f"no such route: {self.command} {self.route}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        """Send bytes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def tell(self, value: Any, status: int = 200, **headers: str) -> None:
        """Send JSON."""
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def fail(self, status: int, code: str, message: str) -> None:
        """Refuse as the hub does."""
        told = {"X-Error-Code": code} if code else {}
        self.tell({"error": message}, status, **told, **{"X-Error-Message": message})

    @property
    def allowed(self) -> bool:
        """Whether the token is the owner's."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """Return a repository that may be read, or written; answer with an error where there is none."""
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.allowed):
            self.fail(404, "RepoNotFound", "Repository not found")
        elif found.gated and not self.allowed:
            self.fail(403, "GatedRepo", "Access to this model is restricted")
        elif write and not self.allowed:
            self.fail(403, "", "You have no write access")
        else:
            return found
        return None

    def create(self) -> None:
        """Create a repository."""
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.allowed:
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif asked["organization"] != "user":
            self.fail(403, "", f"You don't have the rights to create a model under {asked['organization']}")
        elif name in self.server.repos:
            self.fail(409, "", "You already created this model repo")
        else:
            made = self.server.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.tell({"url": f"{self.server.url}/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        """Describe a repository."""
        repo = self.repo(name)
        if repo is None:
            return
        sha = repo.find(revision)
        if sha is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = [self.describe(file, content) for file, content in repo.commits[sha].items()]
        self.tell({"id": name, "sha": sha, "private": repo.private, "siblings": files})

    @staticmethod
    def describe(file: str, content: bytes) -> dict[str, Any]:
        """What the hub says of a file."""
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"rfilename": file, "size": len(content), "blobId": git} | ({"lfs": large} if is_large(file) else {})

    def resolve(self, name: str, revision: str, file: str) -> None:
        """Send a file; a large one from another address, as the hub does."""
        repo = self.repo(name)
        sha = repo.find(revision) if repo else None
        if repo is None:
            return
        if sha is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file not in repo.commits[sha]:
            self.tell({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        else:
            content, facts = repo.commits[sha][file], self.describe(file, repo.commits[sha][file])
            if is_large(file):
                digest = facts["lfs"]["sha256"]
                self.server.large[digest] = content
                self.send(b"", 302, Location=f"{self.server.storage}/large/{digest}", X_Repo_Commit=sha,
                          X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(content)))  # fmt: skip
            else:
                self.send(content, ETag=f'"{facts["blobId"]}"', X_Repo_Commit=sha)

    def download(self, digest: str) -> None:
        """Send a large file."""
        self.send(self.server.large[digest])

    def preupload(self, name: str, revision: str) -> None:
        """Say which files go by which way."""
        if self.repo(name, write=True):
            files = json.loads(self.body)["files"]
            modes = [(file["path"], "lfs" if is_large(file["path"]) else "regular") for file in files]
            self.tell({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def batch(self, name: str) -> None:
        """Say where large files are to be put."""
        if self.repo(name, write=True):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(self.body)["objects"]
            ]
            self.tell({"transfer": "basic", "objects": objects})

    def put(self, digest: str) -> None:
        """Take a large file."""
        self.server.large[digest] = self.body
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        """Add files to a branch, all or none."""
        repo = self.repo(name, write=True)
        if repo is None:
            return
        if revision not in repo.branches:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files, message = {}, ""
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                message = value["summary"]
            else:
                large = part["key"] == "lfsFile"
                files[value["path"]] = self.server.large[value["oid"]] if large else base64.b64decode(value["content"])
        sha = repo.commit(files, revision, message)
        self.tell({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def branch(self, name: str, revision: str) -> None:
        """Create a branch."""
        repo = self.repo(name, write=True)
        if repo is None:
            return
        if revision in repo.branches:
            self.fail(409, "", "Reference already exists")
        else:
            repo.branches[revision] = repo.branches["main"]
            self.tell({})


def is_large(file: str) -> bool:
    """Whether the hub stores a file apart from git."""
    return file.endswith((".safetensors", ".bin", ".pt"))


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", Request.create),
    ("POST /api/validate-yaml", lambda request: request.tell({"warnings": [], "errors": []})),
    (f"GET /api/models/{NAME}", Request.info),
    (rf"GET /api/models/{NAME}/revision/(?P<revision>.+)", Request.info),
    (rf"POST /api/models/{NAME}/preupload/(?P<revision>.+)", Request.preupload),
    (rf"POST /api/models/{NAME}/commit/(?P<revision>.+)", Request.commit),
    (rf"POST /api/models/{NAME}/branch/(?P<revision>.+)", Request.branch),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Request.batch),
    ("PUT /large/(?P<digest>[0-9a-f]{64})", Request.put),
    ("GET /large/(?P<digest>[0-9a-f]{64})", Request.download),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(?P<revision>.+)/(?P<file>[^/]+)", Request.resolve),
]
