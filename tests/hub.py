"""A Hugging Face hub with one model, on this machine: what `snapshot_download` needs of one."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """The address of a hub whose only model has the files of `folder`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
            if path == f"/api/models/{name}/revision/main":
                siblings = [{"rfilename": file} for file in files]
                self.reply(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path == f"/api/models/{name}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                    for file, content in files.items()
                ]
                self.reply(json.dumps(tree).encode())
            elif path.startswith(f"/{name}/resolve/{COMMIT}/") and path.rpartition("/")[2] in files:
                content = files[path.rpartition("/")[2]]
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.reply(content, {"ETag": tag, "X-Repo-Commit": COMMIT})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def reply(self, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def failing() -> Iterator[tuple[str, list[object]]]:
    """The address of a server that resets every connection, and a list that gets an item for each."""
    tries: list[object] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it is closed
                return
            tries.append(None)
            with connection:  # closed with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", tries
