"""A store of files on this machine, over HTTP; what its kinds have in common."""

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class LocalServer:
    """Serves `objects`, path -> bytes; to be used in a `with`.

    Args:
      handler: of its kind of requests.

    Attributes:
      requests: how often each was asked for.
    """

    def __init__(self, handler: type["StoreHandler"]):
        self.objects: dict[str, bytes] = {}
        self.requests = Counter()
        handler = type("Handler", (handler,), {"store": self})
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


class StoreHandler(BaseHTTPRequestHandler):
    """Answers for `store`, in silence."""

    store: LocalServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass
