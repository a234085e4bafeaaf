"""Pictures from paths, addresses, base64 and Pillow."""

import base64
import http.server
import io
import socket
import threading
import time

import pytest

from llava_jax.data.media import load_image
from llava_jax.errors import LlavaError
from llava_jax.inference import pictures
from llava_jax.inference.pictures import fetch
from tests.tiny_model import random_image


def png(seed: int) -> bytes:
    file = io.BytesIO()
    random_image(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server():
    """An address that serves one picture, a redirect to it, one to ftp, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            to = {"/moved": "/a.png", "/ftp": "ftp://localhost/a.png"}.get(self.path)
            self.send_response(302 if to else 200 if self.path == "/a.png" else 404)
            if to:
                self.send_header("Location", to)
            self.end_headers()
            self.wfile.write(png(0))

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_kind_of_source_is_the_same_picture(server, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    data = "data:image/png;base64," + base64.b64encode(png(0)).decode()
    wrapped = "data:image/png;base64,\n" + base64.encodebytes(png(0)).decode()
    every = [
        str(tmp_path / "a.png"), tmp_path / "a.png", data, wrapped, png(0), random_image(0),
        f"{server}/a.png", f"{server}/moved",
    ]  # fmt: skip
    pictures = [load_image(fetch(source, allow_urls=True)).tobytes() for source in every]
    assert set(pictures) == {random_image(0).tobytes()}


def test_addresses_are_off_unless_allowed(server):
    with pytest.raises(LlavaError, match="is an address: download it, or allow addresses"):
        fetch(f"{server}/a.png", allow_urls=False)


@pytest.mark.parametrize(
    "path, message",
    [
        ("/no.png", "cannot download .*404"),
        ("/ftp", "cannot download"),
        ("/a b.png", "cannot download .*control characters"),
    ],
)
def test_a_failed_download_is_reported(server, path, message):
    with pytest.raises(LlavaError, match=message):
        fetch(server + path, allow_urls=True)


@pytest.mark.parametrize(
    "source, message",
    [
        ("data:image/png;base64,@@@", "base64 data cannot be decoded"),
        ("data:image/png;base64,\N{LATIN SMALL LETTER E WITH ACUTE}", "cannot be decoded"),
        ("data:image/png,abc", "must be data:image/...;base64,"),
        ("http://127.0.0.1:port/a.png", "cannot download .*nonnumeric port"),
        ("http://127.0.0.1:9/a.png", "cannot download"),
        ("http://[broken", "cannot download"),
    ],
)
def test_wrong_addresses_are_refused(source, message):
    with pytest.raises(LlavaError, match=message):
        fetch(source, allow_urls=True)


@pytest.fixture
def speak():
    """Makes an address whose server sends these bytes, one every 20 ms if `slow`."""
    sockets = []

    def start(reply: bytes, slow: bool = False) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                for piece in (bytes([byte]) for byte in reply) if slow else [reply]:
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return
                    time.sleep(0.02 * slow)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"

    yield start
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize(
    "reply, message",
    [
        (b"no HTTP at all\r\n\r\n", "no HTTP at all"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "more than 65536"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "not allowed"),
    ],
)
def test_servers_that_break_the_protocol_are_reported(speak, reply, message):
    with pytest.raises(LlavaError, match=f"cannot download .*{message}"):
        fetch(speak(reply), allow_urls=True)


def test_servers_that_are_too_slow_or_send_too_much_are_left(speak, monkeypatch):
    begin = b"HTTP/1.1 200 OK\r\n\r\n"
    with monkeypatch.context() as hurried:
        hurried.setattr(pictures, "PATIENCE", 0.3)
        with pytest.raises(LlavaError, match="it takes more than 0.3 seconds"):
            fetch(speak(begin + b"a" * 100, slow=True), allow_urls=True)
    monkeypatch.setattr(pictures, "MAX_BYTES", 99)
    with pytest.raises(LlavaError, match="it has more than 99 bytes"):
        fetch(speak(begin + b"a" * 100), allow_urls=True)
