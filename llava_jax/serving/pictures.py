"""Pictures that clients send: `data:` addresses, and http(s) ones if the server allows them.

Nothing that a client writes is ever opened as a file.
"""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llava_jax.data.media import ImageError, inspect_image
from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Picture
from llava_jax.serving.api import ApiError

# What a client reads for each kind of fault: no library's words, no path.
FAULTS = {
    "not an image": "is not a picture of a known format",
    "unreadable image": "is broken or truncated",
    "image too large": "has too many pixels",
    "image too elongated": "is too elongated",
}
# IPv6 addresses of hosts; others, and those of 6to4, may hold a private IPv4 address.
UNICAST = ipaddress.ip_network("2000::/3")


@dataclass(frozen=True)
class PictureLimits:
    """What a picture may cost.

    Attributes:
      bytes: of the encoded picture.
      pixels: of the picture, read from its header before it is decoded.
      square: pixels of the square around it, which `pad` fills.
      seconds: for the whole download of one.
    """

    bytes: int = 20_000_000
    pixels: int = 20_000_000
    square: int = 40_000_000
    seconds: float = 10.0


class PictureReader:
    """Loads pictures on threads of its own, a few at a time.

    Args:
      read: (encoded picture, several=) -> the engine's picture, not yet decoded; `several`: the
        request has others.
      url_hosts: names of hosts that pictures may be downloaded from; None for no downloads, an
        empty tuple for every public host.
      threads: pictures that are decoded or downloaded at the same time.
    """

    def __init__(
        self,
        read: Callable[..., Picture],
        limits: PictureLimits = PictureLimits(),
        url_hosts: Sequence[str] | None = None,
        threads: int = 2,
    ):
        self._read_bytes, self.limits, self.url_hosts = read, limits, url_hosts
        self._decoding = ThreadPoolExecutor(threads, "decode")
        self._downloads = ThreadPoolExecutor(4 * threads, "download")  # mostly waiting

    async def read(
        self, addresses: Sequence[str], names: Sequence[str], originals: bool = False
    ) -> list[Picture]:
        """The pictures of one request, in order; with `originals` they are kept as they came too.

        Raises:
          ApiError: naming the part of the request whose picture cannot be used.
        """
        several = len(addresses) > 1
        jobs = [self._read_one(*pair, several) for pair in zip(addresses, names, strict=True)]
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            found = await asyncio.gather(*tasks)
            return [p if originals else dataclasses.replace(p, original=None) for p in found]
        finally:
            for task in tasks:
                task.cancel()

    async def _read_one(self, address: str, name: str, several: bool) -> Picture:
        loop = asyncio.get_running_loop()
        scheme = address[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            if self.url_hosts is None:
                raise _refused(name, "addresses are turned off on this server: send data: URLs")
            try:
                async with asyncio.timeout(self.limits.seconds + 2):  # a name may resolve slowly
                    data = await loop.run_in_executor(
                        self._downloads, self._download, address, name
                    )
            except TimeoutError:
                raise _refused(name, "cannot be fetched") from None
        elif scheme == "data":
            data = address
        else:
            raise _refused(name, "must be a data:image/...;base64, address")
        return await loop.run_in_executor(self._decoding, self._decode, data, name, several)

    def _decode(self, data: bytes | str, name: str, several: bool) -> Picture:
        """The picture with its tiles made, so that the engine never waits for them."""
        if isinstance(data, str):
            data = _decode_base64(data, name, self.limits.bytes)
        try:
            width, height = inspect_image(data, "it", self.limits.pixels)
            if max(width, height) ** 2 > self.limits.square:
                raise _refused(name, FAULTS["image too elongated"])
            picture = self._read_bytes(data, several=several)
            tiles = picture.load()
            return dataclasses.replace(picture, load=lambda: tiles)
        except ImageError as error:
            raise _refused(name, FAULTS.get(error.kind, "cannot be read")) from None
        except LlavaError:
            raise _refused(name, "cannot be read") from None

    def _download(self, address: str, name: str) -> bytes:
        try:
            return download(address, self.url_hosts, self.limits)
        except (OSError, ValueError, http.client.HTTPException):
            # Nothing of the other side's answer: this server must not be a means to look around.
            raise _refused(name, "cannot be fetched") from None

    def close(self) -> None:
        self._decoding.shutdown(wait=False, cancel_futures=True)
        self._downloads.shutdown(wait=False, cancel_futures=True)


def _refused(name: str, fault: str) -> ApiError:
    return ApiError(400, f"the picture of {name} {fault}", name, "invalid_image")


def _decode_base64(address: str, name: str, most: int) -> bytes:
    head, comma, data = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused(name, "must be base64: data:image/...;base64,...")
    if len(data) > most * 4 // 3 + 4:
        raise _refused(name, f"has more than {most:,} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise _refused(name, "is not valid base64") from None


def download(address: str, hosts: Sequence[str], limits: PictureLimits) -> bytes:
    """A picture from a public host.

    The host's name is resolved once, every address of it must be globally routable, and the
    connection is made to one of those addresses. Redirects are not followed and no proxy is used.

    Args:
      hosts: names that are allowed; empty for every public host.

    Raises:
      ValueError, OSError, http.client.HTTPException: it cannot be fetched, or may not be.
    """
    parts = urllib.parse.urlsplit(address)
    host = (parts.hostname or "").lower()
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ValueError("not an address of a picture")
    if hosts and host not in hosts:
        raise ValueError("a host that is not allowed")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    end = time.monotonic() + limits.seconds
    connection = http.client.HTTPConnection(host, port, timeout=limits.seconds)
    connection.sock = socket.create_connection((public_address(host, port), port), limits.seconds)
    # However slowly the other side sends its answer, even a byte at a time, it ends then.
    deadline = threading.Timer(limits.seconds, _shut, [connection])
    deadline.daemon = True
    deadline.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError("no picture there")
        if int(answer.headers.get("Content-Length") or 0) > limits.bytes:
            raise ValueError("too many bytes")
        data = bytearray()
        while piece := answer.read1(1 << 16):
            data += piece
            if len(data) > limits.bytes or time.monotonic() > end:
                raise ValueError("too many bytes, or too slow")
        return bytes(data)
    finally:
        deadline.cancel()
        connection.close()


def _shut(connection: http.client.HTTPConnection) -> None:
    """Ends what another thread reads from a connection."""
    with contextlib.suppress(OSError, AttributeError):
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # below TLS


def public_address(host: str, port: int) -> str:
    """One address of a host whose addresses are all globally routable; ValueError otherwise."""
    found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        inside = address.version == 6 and (address not in UNICAST or address.sixtofour)
        if not address.is_global or address.is_multicast or inside:
            raise ValueError("not a public host")
    return sorted(found)[0]
