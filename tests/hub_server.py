"""A model hub on loopback: the part of the hub's API that huggingface_hub uses to list, read, download and upload.

Each repository that is read is a folder with a single commit. What is uploaded is kept in memory, by branch. Switches cut
connections, ignore ranges, gate a repository or let commits be overtaken; every request is logged with the bytes it sent.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


class HubServer:
    """`url` is its address; `requests` the log of [method, path, bytes sent]; `uploads` what was committed to each repo, `branches`
    to other branches than main, by (repo, branch). With `large_files` weights are uploaded apart from commits, as on the real hub.
    `overtaken` commits are refused as if another had come first."""

    def __init__(self):
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.without_ranges: set[str] = set()  # repos whose files are always sent whole
        self.cuts: dict[str, list[int]] = {}  # file -> [bytes to send, times]
        self.requests: list[list] = []
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.large_files = False
        self.overtaken = 0
        self.committing = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add_repo(self, name: str, folder: Path, gated: bool = False) -> None:
        self.repos[name] = Path(folder)
        if gated:
            self.gated.add(name)

    def cut(self, file: str, after: int, times: int) -> None:
        """Closes the connection after so many bytes of `file`, so many times."""
        self.cuts[file] = [after, times]

    def sent(self, file: str) -> int:
        """Bytes of `file` sent so far."""
        return sum(count for method, path, count in self.requests if method == "GET" and path.endswith(f"/{file}"))

    def environment(self, home: Path) -> dict[str, str]:
        """For a client: this hub, an empty cache, no waiting on retries of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def serve_this_process(self, monkeypatch, home: Path) -> None:
        """The same for this process, where huggingface_hub has read its environment long ago."""
        from huggingface_hub import constants

        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def running_hub():
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *args) -> None:
        """The log is `requests`."""

    def do_GET(self) -> None:
        self._route(body=True)

    def do_HEAD(self) -> None:
        self._route(body=False)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.server_hub.uploads.setdefault(name, {})
            self._json({"url": f"{self.server_hub.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = [f["path"] for f in json.loads(data)["files"]]
            modes = ["lfs" if self.server_hub.large_files and f.endswith(".safetensors") else "regular" for f in files]
            self._json({"files": [{"path": f, "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes)]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self._commit(match[1], match[2], data)
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            if (match[1], match[2]) in self.server_hub.branches:
                self._refuse(409, "BranchExists")
                return
            self.server_hub.branches[match[1], match[2]] = {}
            self._json({})
        elif match := re.fullmatch(r"/api/models/(.+)/paths-info/(.+)", path):
            held = self._held(match[1], match[2])
            wanted = [name for name in parse_qs(data.decode())["paths"] if name in held]
            self._json([self._described(name, held[name]) for name in wanted])
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for each in objects:
                if each["oid"] not in self.server_hub.objects:
                    each["actions"] = {"upload": {"href": f"{self.server_hub.url}/lfs/{each['oid']}", "header": {}}}
            self._json({"transfer": "basic", "objects": objects})
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rpartition("/")[2]
        if _hash(data) != oid:
            self._refuse(400, "BadObject")
            return
        self.server_hub.objects[oid] = data
        self._json({})

    def do_DELETE(self) -> None:
        match = re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path.partition("?")[0])
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if match is None or self.server_hub.branches.pop((match[1], match[2]), None) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            self._json({})

    def _held(self, repo: str, branch: str) -> dict[str, bytes]:
        return self.server_hub.uploads[repo] if branch == "main" else self.server_hub.branches[repo, branch]

    def _described(self, name: str, data: bytes) -> dict:
        found = {"type": "file", "path": name, "size": len(data), "oid": _hash(data)[:40]}
        if _hash(data) in self.server_hub.objects:
            found["lfs"] = {"oid": _hash(data), "size": len(data), "pointerSize": 130}
        return found

    def _commit(self, repo: str, branch: str, data: bytes) -> None:
        with self.server_hub.committing:
            if self.server_hub.overtaken:
                self.server_hub.overtaken -= 1
                self._refuse(412, "PreconditionFailed")
                return
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self._held(repo, branch)[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self._held(repo, branch)[value["path"]] = self.server_hub.objects[value["oid"]]
        self._json({"commitUrl": f"{self.server_hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _route(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        hub = self.server_hub
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._refuse(401, "Unauthorized")
                return
            self._json({"name": "loopback", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            repo, revision, file = match.groups()
            if repo not in hub.repos:
                self._refuse(404, "RepoNotFound")
            elif repo in hub.gated:
                self._refuse(403, "GatedRepo")
            elif revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            elif not (hub.repos[repo] / file).is_file():
                self._refuse(404, "EntryNotFound")
            else:
                self._file(hub.repos[repo] / file, file, body, ranged=repo not in hub.without_ranges)
        else:
            self._refuse(404, "RepoNotFound")

    def _info(self, repo: str, revision: str | None) -> None:
        hub = self.server_hub
        if repo not in hub.repos:
            self._refuse(401, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            siblings = []
            for path in sorted(p for p in hub.repos[repo].rglob("*") if p.is_file()):
                data = path.read_bytes()
                entry = {"rfilename": str(path.relative_to(hub.repos[repo])), "size": len(data), "blobId": _hash(data)[:40]}
                if path.suffix in (".safetensors", ".bin"):
                    entry["lfs"] = {"sha256": _hash(data), "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            gated = "manual" if repo in hub.gated else False
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "gated": gated, "private": False})

    def _file(self, path: Path, name: str, body: bool, ranged: bool) -> None:
        hub = self.server_hub
        data = path.read_bytes()
        start, end, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and ranged:
            start = int(wanted[1])
            end = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_hash(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        entry = self._log(0)
        self.end_headers()
        if not body:
            return
        piece = data[start:end]
        cut = hub.cuts.get(name)
        if cut and cut[1] > 0 and len(piece) > cut[0]:
            cut[1] -= 1
            self._send(piece[: cut[0]], entry)
            self.close_connection = True
            return
        self._send(piece, entry)

    def _send(self, piece: bytes, entry: list) -> None:
        for at in range(0, len(piece), 1 << 16):
            part = piece[at : at + (1 << 16)]
            entry[2] += len(part)
            try:
                self.wfile.write(part)
            except OSError:  # the client has read what it wanted
                entry[2] -= len(part)
                self.close_connection = True
                return

    def _log(self, count: int) -> list:
        """Adds to the log, before anything is sent: who has an answer finds its request there."""
        entry = [self.command, self.path.partition("?")[0], count]
        self.server_hub.requests.append(entry)
        return entry

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self._log(len(data))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self._log(0)
        self.end_headers()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
