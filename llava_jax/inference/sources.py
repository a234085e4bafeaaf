"""Where pictures come from: a path, a `data:` or http(s) address, encoded bytes, Pillow."""

import http.client
import os
import stat
import time
import urllib.request

from PIL import Image

from llava_jax.data.addresses import decode_data_address, is_address, scheme
from llava_jax.errors import LlavaError

ImageSource = str | os.PathLike | bytes | Image.Image
MAX_BYTES = 50_000_000  # of a downloaded picture
TIMEOUT = 10  # seconds without an answer
PATIENCE = 60  # seconds for the whole of one


def fetch(source: ImageSource, allow_urls: bool) -> str | bytes | Image.Image:
    """A source as `load_image` takes it; LlavaError for an address that is not or cannot be read.

    `data:image/...;base64,...` is decoded; http and https are downloaded where `allow_urls` says
    so, since whoever writes the addresses makes this machine ask for them.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    source = os.fspath(source)
    if not is_address(source):
        return source
    if scheme(source) == "data":
        return decode_data_address(source)
    if not allow_urls:
        raise LlavaError(f"{source:.80} is an address: download it, or allow addresses")
    return _download(source)


def as_sources(images) -> list[ImageSource]:
    """None, one image or several -> a list; LlavaError for anything that is no image source."""
    if images is None:
        return []
    images = images if isinstance(images, list | tuple) else [images]
    for image in images:
        if not isinstance(image, ImageSource):
            raise LlavaError(
                f"an image must be a path, encoded bytes or a Pillow image, "
                f"not {type(image).__name__}"
            )
    return list(images)


def source_name(source: ImageSource, default: str) -> str:
    """What messages call a source."""
    if not isinstance(source, str | os.PathLike):
        return default
    source = os.fspath(source)
    if scheme(source) == "data":
        return default
    return source if len(source) <= 300 else f"{source[:300]}..."  # a picture's bytes, no path


def file_version(path: str, name: str) -> tuple[int, ...]:
    """What changes when a file does; LlavaError where there is none. `name` is as it is told."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # the latter: a zero byte in the path
        told = getattr(error, "strerror", None) or error
        raise LlavaError(f"no image file {name!r}: {told}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write
        raise LlavaError(f"{name!r} is not a file")
    return status.st_ino, status.st_mtime_ns, status.st_size


def _download(address: str) -> bytes:
    # Only these two: the default opener would follow a redirect to ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    data, end = bytearray(), time.monotonic() + PATIENCE
    try:
        with opener.open(address, timeout=TIMEOUT) as answer:
            # Piece by piece: a server that sends a byte now and then would keep all others waiting.
            while piece := answer.read1(1 << 20):
                data += piece
                if len(data) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes more than {PATIENCE} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise LlavaError(f"cannot download {address:.200}: {told}") from None
    return bytes(data)
