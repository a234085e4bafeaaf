"""Where pictures come from: a path, a `data:` or http(s) address, encoded bytes, Pillow."""

import base64
import binascii
import os
import urllib.error
import urllib.request

from PIL import Image

from llava_jax.errors import LlavaError

ImageSource = str | os.PathLike | bytes | Image.Image
MAX_BYTES = 50_000_000  # of a downloaded picture
TIMEOUT = 10  # seconds without an answer


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
    if _scheme(source) == "data":
        return _decode(source)
    if not allow_urls:
        raise LlavaError(f"{source:.80} is an address: download it, or allow addresses")
    return _download(source)


def is_address(source: str) -> bool:
    """Whether it begins as `data:`, http or https addresses do, and not as a path."""
    return _scheme(source) in ("data", "http", "https")


def _scheme(source: str) -> str:
    return source.partition(":")[0].lower()


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
    return default if _scheme(source) == "data" else source


def _decode(source: str) -> bytes:
    head, comma, data = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise LlavaError(f"{head[:40]!r} must be data:image/...;base64, and the encoded picture")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise LlavaError(f"a picture's base64 data cannot be decoded: {error}") from None


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
    try:
        with opener.open(address, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise LlavaError(f"cannot download {address:.200}: {error}") from None
    if len(data) > MAX_BYTES:
        raise LlavaError(f"{address:.200} has more than {MAX_BYTES:,} bytes")
    return data
