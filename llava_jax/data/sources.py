"""What a place in a text shows, a picture or a video alike: its size, its tiles, its files.

S side of a tile, N tiles.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.data import video
from llava_jax.data.buckets import StoredObject, is_url
from llava_jax.data.media import (
    MAX_PIXELS,
    ImageError,
    check_shape,
    check_views,
    encoded,
    file_state,
    inspect_image,
    load_image,
    preprocess,
)
from llava_jax.data.stored import Stored
from llava_jax.data.video import Video
from llava_jax.models.images import ImageSpec, Source, frame_views, needed_video

# A path or encoded bytes of a picture, here or in a larger file, a picture, or a video.
Media = str | bytes | Stored | Image.Image | Video


class Seen(NamedTuple):
    """What is known of a source.

    source: as `ImageSpec` layouts take it. time: of a video of a model that reads one, the
    sentences about its duration and times; else "".
    """

    source: Source
    time: str = ""


def look_at(
    media: Media, spec: ImageSpec, name: str, max_pixels: int = MAX_PIXELS, several: bool = False
) -> Seen:
    """What the head of a file says of it.

    several: it is one of several pictures of a prompt.

    Raises:
      ImageError: what `tiles` would, but for damage in the middle of the file.
      LlavaError: it is a video and the model takes none, or PyAV is missing.
    """
    if not isinstance(media, Video):
        with _readable(media, name):
            size = inspect_image(media, name, max_pixels)
        check_shape(size, spec, name, max_pixels, several)
        return Seen(size)
    media = dataclasses.replace(media, source=encoded(media.source, name, "video"))
    of_model = needed_video(spec)
    with _readable(media, name):
        footage = video.inspect_video(media, name, max_pixels)
    check_views(frame_views(spec, footage.size), footage.size, name, max_pixels)
    numbers = video.sampled(footage, *media.sampling(of_model), name)
    return _seen(footage, numbers, spec, name)


def tiles(
    media: Media, spec: ImageSpec, name: str, max_pixels: int = MAX_PIXELS, several: bool = False
) -> tuple[Seen, np.ndarray]:
    """What it is, and its pixels, uint8 [N, S, S, 3]; arguments and errors as of `look_at`."""
    if not isinstance(media, Video):
        image = load_image(media, name, max_pixels)
        return Seen(image.size), preprocess(image, spec, name, max_pixels, several)
    media = dataclasses.replace(media, source=encoded(media.source, name, "video"))
    with _readable(media, name):
        footage, numbers, pixels = video.video_tiles(media, spec, name, max_pixels)
    return _seen(footage, numbers, spec, name), pixels


def _seen(footage: video.Footage, numbers: np.ndarray, spec: ImageSpec, name: str) -> Seen:
    timed = spec.video.time_instruction
    time = video.time_instruction(footage, numbers, name) if timed else ""
    return Seen((*footage.size, len(numbers)), time)


def digest(media: Media, name: str) -> bytes:
    """SHA-256 of the content of a picture, or of a video and how it is sampled.

    ImageError if it cannot be read.
    """
    with _readable(media, name):
        if isinstance(media, str):
            with open(media, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        if isinstance(media, Image.Image):
            return hashlib.sha256(f"{media.mode} {media.size} ".encode() + media.tobytes()).digest()
        if not isinstance(media, Video):
            return hashlib.sha256(encoded(media, name)).digest()
        names, parts = [], media.source
        if isinstance(parts, str) and os.path.isdir(parts):
            names = sorted(file.name for file in os.scandir(parts) if file.is_file())
            parts = tuple(os.path.join(parts, file) for file in names)
        parts = parts if isinstance(parts, tuple) else (parts,)
        whole = hashlib.sha256(repr((media.frames, media.fps, media.rate, names)).encode())
        for part in parts:
            whole.update(digest(part, name))
        return whole.digest()


def place_of(media: Media) -> str | None:
    """Where a picture (`i:`) or video (`v:`) that has a file of its own is; None for others."""
    path = media.source if isinstance(media, Video) else media
    path = path.url if isinstance(path, StoredObject) else path
    return f"{'iv'[isinstance(media, Video)]}:{path}" if isinstance(path, str) else None


def at_place(text: str) -> Media:
    """The inverse of `place_of`."""
    path = StoredObject(text[2:]) if is_url(text[2:]) else text[2:]
    return Video(path) if text.startswith("v") else path


def state(media: Media, name: str) -> bytes:
    """Changes when a file or a frame's file does: its path, size or time, its tag in a bucket.

    Empty for what is in memory. ImageError if there is no file.
    """
    path = media.source if isinstance(media, Video) else media
    if isinstance(path, Stored):
        return path.state()
    if not isinstance(path, str):
        return b""
    try:
        if not isinstance(media, Video) or not os.path.isdir(path):
            return file_state(path)
        files = sorted(os.path.join(path, file) for file in os.listdir(path))
        return b"".join(map(file_state, files))
    except (OSError, ValueError) as error:  # the latter: a zero byte in the path
        raise _missing(media, name, error) from None


@contextlib.contextmanager
def _readable(media: Media, name: str) -> Iterator[None]:
    """What the file system refuses is an ImageError: a file may go while it is read."""
    try:
        yield
    except OSError as error:
        raise _missing(media, name, error) from None


def _missing(media: Media, name: str, error: Exception) -> ImageError:
    word = "video" if isinstance(media, Video) else "image"
    reason = getattr(error, "strerror", None) or error
    return ImageError(f"missing {word}", f"no {word} file {name!r}: {reason}")
