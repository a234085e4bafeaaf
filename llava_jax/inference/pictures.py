"""Where pictures and videos come from: a path, an address, encoded bytes, Pillow, `Video`.

S side of a tile.
"""

import contextlib
import functools
import http.client
import os
import stat
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

import numpy as np
from PIL import Image

from llava_jax.data import sources
from llava_jax.data.addresses import decode_data_address, is_address, scheme
from llava_jax.data.media import MAX_PIXELS, load_image
from llava_jax.data.sources import Media, Seen
from llava_jax.data.video import Video, is_video_path
from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Picture
from llava_jax.inference.prompts import error_prefix
from llava_jax.models.images import needed_video
from llava_jax.models.llava import LlavaConfig

ImageSource = str | os.PathLike | bytes | Image.Image | Video
MAX_BYTES = 50_000_000  # of a downloaded picture
TIMEOUT = 10  # seconds without an answer
PATIENCE = 60  # seconds for the whole of one
RECENT = 8  # pictures kept as tiles: many questions about a picture follow each other


class PictureReader:
    """Makes the pictures of requests: their layouts at once, their tiles when they are needed.

    May be used by several threads.

    Args:
      config: of the model.
      allow_urls: pictures may be http(s) addresses.
    """

    def __init__(self, config: LlavaConfig, allow_urls: bool):
        self._config, self._allow_urls = config, allow_urls
        self._recent = _Recent(RECENT)
        self._pillow = threading.Lock()  # one image may be that of several requests
        self._file_seen = functools.lru_cache(1024)(
            lambda source, version, *args: sources.look_at(source, config.image, *args)
        )

    def pictures(self, images, where: str = "") -> tuple[Picture, ...]:
        """The pictures and videos of None, one source or several.

        where: begins the messages of errors while they are read.
        """
        given = as_sources(images)
        several = sum(not isinstance(source, Video) for source in given) > 1
        return tuple(
            self.picture(source, f"image {i}", where, several) for i, source in enumerate(given)
        )

    def picture(self, source: ImageSource, name: str, where: str, several: bool = False) -> Picture:
        """The picture or video of one source.

        Args:
          name: what messages call a source without a name.
          several: it is one of several pictures of a prompt.
        """
        name, by_size = source_name(source, name), self._config.image.by_size
        is_video = isinstance(source, Video)
        several = several and not is_video  # a video is shown alike with others
        if is_video:
            with error_prefix(where):
                needed_video(self._config.image)  # before any file is looked for
        if isinstance(source, str) and is_address(source) and not by_size:
            seen = Seen((1, 1))  # any: it is downloaded when it is needed
        else:
            source = fetch(source, self._allow_urls)
            seen = self._look_at(source, name, several)
        (layout,) = self._config.layouts([seen.source], several)
        known = seen if by_size else None
        load = functools.partial(self._load, source, name, where, several, known, object())
        key = (_identity(source), several)
        original = None if is_video else functools.partial(self._original, source, name, where)
        return Picture(layout, load, key, is_video, seen.time, original)

    def _look_at(self, source: Media, name: str, several: bool) -> Seen:
        """The head of a file that has not changed is read once for several requests."""
        if version := _version(source, name):
            return self._file_seen(source, version, name, MAX_PIXELS, several)
        with self._pillow if isinstance(source, Image.Image) else contextlib.nullcontext():
            return sources.look_at(source, self._config.image, name, several=several)

    def _load(
        self,
        source: ImageSource,
        name: str,
        where: str,
        several: bool,
        seen: Seen | None,
        picture: object,
    ) -> np.ndarray:
        """uint8[tiles, S, S, 3]. A file that has not changed is read once for several requests.

        seen: what its layout was made for, if that depends on it.
        """
        with error_prefix(where):
            found = fetch(source, self._allow_urls)
            version = _version(found, name)
            key = (found, version, name, several) if version else picture
            now, tiles = self._recent.get(key, lambda: self._tiles(found, name, several))
            if seen is not None and now != seen:
                raise LlavaError(
                    f"{name!r} changed while it was asked about: it had {_extent(seen)} and has "
                    f"{_extent(now)}; ask again"
                )
            return tiles

    def _tiles(self, source: Media, name: str, several: bool) -> tuple[Seen, np.ndarray]:
        if isinstance(source, Image.Image):
            source = self._image(source, name)
        return sources.tiles(source, self._config.image, name, several=several)

    def _original(self, source: ImageSource, name: str, where: str) -> Image.Image:
        with error_prefix(where):
            return self._image(fetch(source, self._allow_urls), name)

    def _image(self, source: str | bytes | Image.Image, name: str) -> Image.Image:
        with self._pillow if isinstance(source, Image.Image) else contextlib.nullcontext():
            return load_image(source, name)


class _Recent:
    """The latest results of computations by key; a thread waits for another's with the same key."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._results: OrderedDict[object, Future] = OrderedDict()

    def get(self, key, compute: Callable[[], object]):
        with self._lock:
            future = self._results.get(key)
            new = future is None
            if new:
                future = self._results[key] = Future()
            self._results.move_to_end(key)
            while len(self._results) > self._size:
                self._results.popitem(last=False)
        if new:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._results.pop(key, None)
        return future.result()


def fetch(source: ImageSource, allow_urls: bool) -> str | bytes | Image.Image:
    """A source as `load_image` takes it; LlavaError for an address that cannot be read.

    `data:image/...;base64,...` is decoded; http and https are downloaded only if `allow_urls`,
    since whoever writes the addresses makes this machine ask for them.
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
    """None, one image or several as a list, in which the path of a video file is a Video.

    LlavaError for anything else.
    """
    if images is None:
        return []
    images = images if isinstance(images, list | tuple) else [images]
    for image in images:
        if not isinstance(image, ImageSource):
            raise LlavaError(
                f"an image must be a path, encoded bytes, a Pillow image or a Video, "
                f"not {type(image).__name__}"
            )
    return [Video(image) if is_video_path(image) else image for image in images]


def deal_sources(images, prompts: int) -> list:
    """One entry of `images` for each of so many prompts."""
    if images is None:
        return [None] * prompts
    wanted = "give one entry a prompt (None, an image or a list of images)"
    if isinstance(images, ImageSource | Mapping) or not isinstance(images, Iterable):
        raise LlavaError(f"images must be a list, not {type(images).__name__}: {wanted}")
    images = list(images)
    if len(images) != prompts:
        raise LlavaError(f"{len(images)} entries in images for {prompts} prompts: {wanted}")
    return images


def source_name(source: ImageSource, default: str) -> str:
    """The name of a source in messages; `default` if it has none of its own."""
    source = source.source if isinstance(source, Video) else source
    if not isinstance(source, str | os.PathLike):
        return default
    source = os.fspath(source)
    if scheme(source) == "data":
        return default
    return source if len(source) <= 300 else f"{source[:300]}..."  # a picture's bytes, no path


def _version(source: Media, name: str) -> object:
    """Changes when a file does, None for what is in memory; LlavaError if there is no file."""
    if isinstance(source, Video):
        return sources.state(source, name) or None
    if not isinstance(source, str):
        return None
    try:
        status = os.stat(source)
    except (OSError, ValueError) as error:  # the latter: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise LlavaError(f"no image file {name!r}: {reason}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write
        raise LlavaError(f"{name!r} is not a file")
    return status.st_ino, status.st_mtime_ns, status.st_size


def _identity(source: Media):
    """Equal for two sources that are the same: of pictures in memory, without comparing pixels."""
    if isinstance(source, Video):
        return source if isinstance(source.source, str) else id(source.source)
    return id(source) if isinstance(source, Image.Image) else source


def _extent(seen: Seen) -> str:
    """`640x480 pixels`, `640x480 pixels and 32 frames`."""
    width, height, *frames = seen.source
    return f"{width}x{height} pixels" + "".join(f" and {count} frames" for count in frames)


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
            # Piece by piece: a server that sends a byte now and then must not take for ever.
            while piece := answer.read1(1 << 20):
                data += piece
                if len(data) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes more than {PATIENCE} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LlavaError(f"cannot download {address:.200}: {reason}") from None
    return bytes(data)
