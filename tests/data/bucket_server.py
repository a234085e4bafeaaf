"""A small object store on this machine, which answers gcsfs as Google's does, and can fail."""

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bkt"


class BucketServer:
    """Serves `objects`, key -> bytes, as gs://bkt/KEY; to be used in a `with`.

    Attributes:
      requests: how often each was asked for: "list PREFIX", "info KEY", "read KEY".
      fault: called with such a text before the answer; what it returns, if not None, is what
        happens in place of it: a status, "cut" (half of the bytes come) or "short" (fewer bytes
        come than were asked for).
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.requests, self.fault = Counter(), lambda request: None
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def upload(self, folder: Path, prefix: str = "") -> None:
        """All files of a folder, below a prefix."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.objects[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: BucketServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        split = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", split.path)
        bucket, key = (match[1], unquote(match[2] or "")) if match else (None, "")
        if not key:
            request = f"list {query.get('prefix', '')}"
        else:
            request = f"{'read' if query.get('alt') == 'media' else 'info'} {key}"
        self.store.requests[request] += 1
        fault = self.store.fault(request)
        if isinstance(fault, int):
            message = {403: "Forbidden", 401: "Invalid Credentials"}.get(fault, "fault")
            error = {"error": {"code": fault, "message": message, "errors": [{"message": message}]}}
            self._send(fault, json.dumps(error).encode())
        elif bucket != BUCKET or key and key not in self.store.objects:
            self._send(404, b"{}")
        elif request.startswith("list"):
            self._send(200, json.dumps(self._listing(query)).encode())
        elif request.startswith("info"):
            self._send(200, json.dumps(self._metadata(key)).encode())
        else:
            data, status = self.store.objects[key], 200
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data, status = data[int(part[1]) : int(part[2]) + 1], 206
            self._send(status, data[:-1] if fault == "short" else data, cut=fault == "cut")

    def _send(self, status: int, data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # some clients go without the answer
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def _metadata(self, key: str) -> dict:
        data = self.store.objects[key]
        tag = hashlib.sha256(data).hexdigest()[:12]
        times = dict.fromkeys(("updated", "timeCreated"), "2024-01-01T00:00:00Z")
        return {"name": key, "bucket": BUCKET, "size": str(len(data)), "etag": tag, **times}

    def _listing(self, query: dict) -> dict:
        prefix, items, folders = query.get("prefix", ""), [], {}
        for key in sorted(self.store.objects):
            if key.startswith(prefix):
                name, slash, _ = key.removeprefix(prefix).partition("/")
                if slash and query.get("delimiter"):
                    folders[f"{prefix}{name}/"] = None
                else:
                    items.append(self._metadata(key))
        return {"items": items, "prefixes": [*folders]}
