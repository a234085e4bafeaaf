"""Pictures from addresses: public hosts alone, and never for longer or more than allowed."""

import base64
import dataclasses
import http.server
import threading
import time

import pytest

from llava_jax.serving import pictures
from llava_jax.serving.pictures import PictureLimits, download, public_address
from tests.serving.live_server import data_url

PNG = base64.b64decode(data_url().partition(",")[2])
LIMITS = PictureLimits(bytes=10_000, seconds=2.0)


class Host(http.server.BaseHTTPRequestHandler):
    """Answers as the path says, and notes the names that it was asked by."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.headers["Host"])
        if self.path == "/drip":  # a byte at a time, for ever
            try:
                while True:
                    self.wfile.write(b"H")
                    time.sleep(0.05)
            except OSError:
                return
        status = {"/redirect": 302, "/gone": 404}.get(self.path, 200)
        body = bytes(20_000) if self.path in ("/large", "/unsaid") else PNG
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/picture.png")
        if self.path != "/unsaid":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture
def reachable(monkeypatch):
    """As if the server on this machine were a public host."""
    monkeypatch.setattr(pictures, "public_address", lambda *_: "127.0.0.1")


def test_a_picture_is_downloaded_by_the_name_of_its_host(port, reachable):
    assert download(f"http://pictures.test:{port}/picture.png", ["pictures.test"], LIMITS) == PNG
    assert Host.asked[-1] == f"pictures.test:{port}"


@pytest.mark.parametrize("path", ["/redirect", "/gone", "/large", "/unsaid"])
def test_redirects_errors_and_too_many_bytes_are_refused(port, reachable, path):
    with pytest.raises(ValueError):
        download(f"http://pictures.test:{port}{path}", (), LIMITS)


def test_a_host_that_never_finishes_is_left(port, reachable):
    limits, start = dataclasses.replace(LIMITS, seconds=0.5), time.monotonic()
    with pytest.raises((OSError, ValueError, pictures.http.client.HTTPException)):
        download(f"http://pictures.test:{port}/drip", (), limits)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "address",
    ["http://other.test/a", "http://me@pictures.test/a", "ftp://pictures.test/a", "http:///a"],
)
def test_an_address_that_is_not_allowed(address, reachable):
    with pytest.raises(ValueError):
        download(address, ["pictures.test"], LIMITS)


def test_a_host_on_this_machine_is_not_public(port):
    asked = len(Host.asked)
    for name in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1"):
        with pytest.raises((ValueError, OSError)):
            download(f"http://{name}:{port}/picture.png", (), LIMITS)
    assert len(Host.asked) == asked


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("2002:a00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses(address, public, monkeypatch):
    entries = [(0, 0, 0, "", (a, 80)) for a in ("93.184.216.34", address)]
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *_, **__: entries)
    if public:
        assert public_address("a.test", 80)
    else:
        with pytest.raises(ValueError):  # one address that is not public is enough
            public_address("a.test", 80)
