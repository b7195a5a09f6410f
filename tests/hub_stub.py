"""A Hugging Face Hub small enough for tests: a local HTTP server that answers the few requests of a download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# What the real Hub answers for these names: status and X-Error-Code, X-Error-Message.
REFUSALS: dict[str, tuple[int, dict[str, str]]] = {
    "someone/missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "someone/private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}),
    "someone/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "someone/gated-anonymous": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
    "someone/forbidden": (403, {"X-Error-Message": "Your token may not read this."}),
    "someone/bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "someone/broken": (418, {}),
}


@contextmanager
def hub(models: dict[str, Path] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve ``models`` (id -> folder) and the refusals; yields the address and the list of requested paths."""
    asked: list[str] = []
    folders = models or {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api/models")
            asked.append(path)
            name = "/".join(path.strip("/").split("/")[:2])
            rest = path.strip("/").split("/")[2:]
            if name in REFUSALS:
                self.answer(REFUSALS[name][0], b"{}", REFUSALS[name][1])
            elif name not in folders:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[0] == "resolve":
                data = (folders[name] / "/".join(rest[2:])).read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            elif rest[0] == "tree":
                files = sorted(file for file in folders[name].rglob("*") if file.is_file())
                entries = [
                    {
                        "type": "file",
                        "path": file.relative_to(folders[name]).as_posix(),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
                self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            else:
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()
                self.answer(200, body, {"Content-Type": "application/json"})

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
