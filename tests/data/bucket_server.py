"""A small object store on this machine, which answers gcsfs as Google's does, and can fail."""

import contextlib
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from tests.data.local_server import LocalServer, StoreHandler

BUCKET = "bkt"


class BucketServer(LocalServer):
    """Serves `objects`, key -> bytes, as gs://bkt/KEY; to be used in a `with`.

    Attributes:
      requests: how often each was asked for: "list PREFIX", "info KEY", "read KEY".
      fault: called with such a text before the answer; what it returns, if not None, is what
        happens in place of it: a status, "cut" (half of the bytes come) or "short" (fewer bytes
        come than were asked for).
    """

    def __init__(self):
        super().__init__(_Handler)
        self.fault = lambda request: None


class _Handler(StoreHandler):
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
