"""A Hugging Face hub on this machine: what HfFileSystem asks of a data set, over HTTP."""

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATA_SET = "owner/name"


class HubServer:
    """Serves `files`, path -> bytes, as hf://datasets/owner/name/PATH; to be used in a `with`.

    The answers are those of the hub: `404 EntryNotFound` to a path that is not there, 401 to a data
    set that is not there or is private, which it does not tell apart.

    Attributes:
      requests: how often each was asked for: "info", "list FOLDER", "read PATH".
      on_request: called with such a text before the answer.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests, self.on_request = Counter(), lambda request: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def upload(self, folder: Path) -> None:
        """All files of a folder."""
        for path in Path(folder).rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        url = unquote(urlsplit(self.path).path)
        asked = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/main/?(.*))?", url)
        read = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", url)
        name, kind, path = (read[1], "read", read[2]) if read else asked.groups()
        request = {"read": f"read {path}", "tree": f"list {path}"}.get(kind, "info")
        self.hub.requests[request] += 1
        self.hub.on_request(request)
        if name != DATA_SET:
            self._send(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif request == "info":
            self._send(200, json.dumps({"id": name}).encode())
        elif kind == "tree" and (entries := self._entries(f"{path}/".lstrip("/"))):
            self._send(200, json.dumps(entries).encode())
        elif kind == "read" and path in self.hub.files:
            data = self.hub.files[path]
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            stop = int(part[2]) + 1 if part and part[2] else len(data)
            self._send(206 if part else 200, data[int(part[1]) if part else 0 : stop])
        else:
            self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    def _entries(self, prefix: str) -> list[dict]:
        """The files and folders right below a folder."""
        found = {}
        for path, data in self.hub.files.items():
            if path.startswith(prefix):
                name, slash, _ = path.removeprefix(prefix).partition("/")
                kind, size = ("directory", 0) if slash else ("file", len(data))
                oid = hashlib.sha1(b"" if slash else data).hexdigest()
                found[name] = {"type": kind, "path": prefix + name, "size": size, "oid": oid}
        return list(found.values())

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
