"""A Hub on 127.0.0.1, in memory: the endpoints that pushing to and loading from a model repository use.

    with LoopbackHub() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

The environment has to be set before `huggingface_hub` is imported, hence the processes of their own.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Repository:
    """Files of one repository; every commit has a name that follows from what it holds."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.commit()

    def commit(self) -> str:
        content = json.dumps([len(self.commits), *sorted((name, etag(data)) for name, data in self.files.items())])
        self.commits.append(hashlib.sha1(content.encode()).hexdigest())
        return self.commits[-1]

    def apply(self, line: dict, uploads: dict[str, bytes]) -> None:
        """One line of a commit: a file in place, a file uploaded before, or a deletion."""
        kind, value = line["key"], line["value"]
        if kind == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            self.files[value["path"]] = uploads[value["oid"]]
        elif kind == "deletedFile":
            del self.files[value["path"]]


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LoopbackHub:
    """The server, running in a thread while its `with` block lasts.

    Attributes:
        repositories: `{"org/name": Repository}`, for the test to look into.
        requests: `"METHOD /path"` of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to take this server for the Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """Requests by the shape of their path; everything else is an honest 404."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path_parts()
        if parts == ["api", "whoami-v2"]:
            self.answer({"type": "user", "name": "loopback", "orgs": [], "auth": {"type": "access_token"}})
        elif parts[:2] == ["api", "models"] and (repository := self.repository(parts[2:4])):
            self.answer(tree(repository) if parts[4:5] == ["tree"] else model_info(repository))
        elif len(parts) > 4 and parts[2] == "resolve" and (repository := self.repository(parts[:2])):
            self.resolve(repository, "/".join(parts[4:]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        parts, body = self.path_parts(), self.body()
        if parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.answer(upload_actions(self.hub.endpoint, json.loads(body)))
        elif parts[:2] == ["api", "models"] and (repository := self.repository(parts[2:4])):
            if parts[4] == "preupload":
                self.answer({"files": [upload_mode(file) for file in json.loads(body)["files"]]})
            else:
                self.commit(repository, body)

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.uploads[etag(data)] = data
        self.answer({})

    def path_parts(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def repository(self, owner_and_name: list[str]) -> Repository | None:
        repository = self.hub.repositories.get("/".join(owner_and_name))
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return repository

    def create(self, request: dict) -> None:
        repo_id = f"{request.get('organization') or 'loopback'}/{request['name']}"
        exists = repo_id in self.hub.repositories
        self.hub.repositories.setdefault(repo_id, Repository(repo_id))
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}, 409 if exists else 200)

    def resolve(self, repository: Repository, name: str) -> None:
        headers = {"X-Repo-Commit": repository.commits[-1]}
        if name not in repository.files:
            return self.answer({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        data = repository.files[name]
        self.send(data, 200, headers | {"ETag": f'"{etag(data)}"', "Content-Type": "application/octet-stream"})

    def commit(self, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            repository.apply(json.loads(line), self.hub.uploads)
        name = repository.commit()
        url = f"{self.hub.endpoint}/{repository.repo_id}/commit/{name}"
        self.answer({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def answer(self, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args) -> None:
        """Silent: `LoopbackHub.requests` has them."""


def tree(repository: Repository) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
        for name, data in sorted(repository.files.items())
    ]


def model_info(repository: Repository) -> dict:
    repo_id = repository.repo_id
    siblings = [{"rfilename": name} for name in sorted(repository.files)]
    return {"id": repo_id, "modelId": repo_id, "sha": repository.commits[-1], "siblings": siblings, "private": False}


def upload_mode(file: dict) -> dict:
    """As the Hub: weights go to large file storage, text into the commit."""
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def upload_actions(endpoint: str, request: dict) -> dict:
    objects = [
        {**entry, "actions": {"upload": {"href": f"{endpoint}/upload/{entry['oid']}", "header": {}}}}
        for entry in request["objects"]
    ]
    return {"transfer": "basic", "objects": objects}
