"""A Hugging Face hub on this machine: what HfFileSystem asks of a data set, over HTTP."""

import hashlib
import json
import re
from urllib.parse import unquote, urlsplit

from tests.data.local_server import LocalServer, StoreHandler

DATA_SET = "owner/name"


class HubServer(LocalServer):
    """Serves `objects`, path -> bytes, as hf://datasets/owner/name/PATH; to be used in a `with`.

    The answers are those of the hub: `404 EntryNotFound` to a path that is not there, 401 to a data
    set that is not there or is private, which it does not tell apart.

    Attributes:
      requests: how often each was asked for: "info", "list FOLDER", "read PATH".
      on_request: called with such a text before the answer.
    """

    def __init__(self):
        super().__init__(_Handler)
        self.on_request = lambda request: None


class _Handler(StoreHandler):
    def do_GET(self):
        url = unquote(urlsplit(self.path).path)
        asked = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/main/?(.*))?", url)
        read = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", url)
        name, kind, path = (read[1], "read", read[2]) if read else asked.groups()
        request = {"read": f"read {path}", "tree": f"list {path}"}.get(kind, "info")
        self.store.requests[request] += 1
        self.store.on_request(request)
        if name != DATA_SET:
            self._send(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif request == "info":
            self._send(200, json.dumps({"id": name}).encode())
        elif kind == "tree" and (entries := self._entries(f"{path}/".lstrip("/"))):
            self._send(200, json.dumps(entries).encode())
        elif kind == "read" and path in self.store.objects:
            data = self.store.objects[path]
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            stop = int(part[2]) + 1 if part and part[2] else len(data)
            self._send(206 if part else 200, data[int(part[1]) if part else 0 : stop])
        else:
            self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    def _entries(self, prefix: str) -> list[dict]:
        """The files and folders right below a folder."""
        found = {}
        for path, data in self.store.objects.items():
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
