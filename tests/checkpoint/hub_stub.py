"""A stub of the hub's HTTP interface on loopback: enough of it for the real client to download from.

What a client sees follows the model's name: `org/gated`, `org/private` and `org/missing` are refused as the hub
refuses them. `cut` and `reset` break one answer in the middle.
"""

import hashlib
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubStub:
    """Serves `files` as the revision `main` of every model it knows."""

    files: dict[str, bytes]
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its next answer ends, once
    reset: dict[str, int] = field(default_factory=dict)  # the same, with a TCP reset
    fail: list[int] = field(default_factory=list)  # statuses of the next calls of the API
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def __enter__(self) -> "HubStub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloads(self, file: str) -> list[str | None]:
        """The Range header (or None) of each GET of a file."""
        return [rng for method, path, rng in self.requests if method == "GET" and path.endswith(f"/{file}")]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").split("/"))
        else:
            owner, name, _, revision, file = path.strip("/").split("/", 4)
            self._file(f"{owner}/{name}", revision, file)

    def _refused(self, model: str, revision: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "bad":
            self._error(401, message="Invalid credentials in Authorization header")
        elif model == "org/missing" or (model == "org/private" and token != "good"):
            self._error(401, "RepoNotFound", "Repository not found")  # the hub does not tell the two apart
        elif revision not in ("main", COMMIT):
            self._error(404, "RevisionNotFound", "Invalid rev id")
        else:
            return False
        return True

    def _api(self, parts: list[str]) -> None:
        model = "/".join(parts[:2])
        kind, revision = (parts[2], parts[3]) if len(parts) > 3 else ("revision", "main")
        if self.hub.fail:
            return self._error(self.hub.fail.pop(0))
        if self._refused(model, revision):
            return None
        if kind == "tree":
            tree = [{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in self.hub.files.items()]
            return self._json(tree)
        files = [{"rfilename": path} for path in self.hub.files]
        return self._json({"_id": "1", "id": model, "modelId": model, "sha": COMMIT, "siblings": files, "tags": []})

    def _file(self, model: str, revision: str, file: str) -> None:
        if self._refused(model, revision):
            return
        if model == "org/gated" and self.headers.get("Authorization") != "Bearer good":
            return self._error(403, "GatedRepo", "Access to model org/gated is restricted")
        content = self.hub.files[file]
        start = 0
        if rng := self.headers.get("Range"):
            start = int(rng.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if rng else 200)
        if rng:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._body(file, content, start)

    def _body(self, file: str, content: bytes, start: int) -> None:
        end = min(self.hub.cut.pop(file, len(content)), self.hub.reset.get(file, len(content)))
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True
            if self.hub.reset.pop(file, None):  # linger 0: close() sends RST, as a dying proxy does
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _error(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
