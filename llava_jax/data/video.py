"""Videos -> frames -> uint8 tiles: files through PyAV, folders of pictures, lists of pictures.

Which frames of a video are shown follows the original LLaVA-NeXT (process_video_with_decord in
llava/utils.py, load_video of its evaluation). Frame numbers count from 0 in the order of showing.

F frames that are shown, S side of a tile.
"""

import bisect
import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.data.media import (
    MAX_PIXELS,
    ImageError,
    check_pixels,
    check_views,
    inspect_image,
    load_image,
    tiles_of,
)
from llava_jax.data.stored import Stored
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec, frame_views, needed_video
from llava_jax.models.video import VideoSpec

SUFFIXES = tuple(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv".split())
PICTURE_SUFFIXES = tuple(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
PICTURE_RATE = 2.0  # frames a second of a folder or list: those of ShareGPTVideo, in the original
# Containers of one file alone: a playlist would have this machine open what it names.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif"


@dataclass(frozen=True)
class Video:
    """A video to show, wherever a picture may stand.

        Video("cat.mp4")                      a file
        Video("frames/", rate=5)              a folder of pictures, in the natural order of names
        Video([first, second])                paths, encoded bytes or Pillow images
        Video("cat.mp4", frames=64, fps=1)    a frame each second, but no more than 64

    Attributes:
      source: a path, the encoded bytes of a file, or the pictures.
      frames, fps: as in `VideoSpec`, None for the model's own.
      rate: pictures a second, of a folder or list of them; None for PICTURE_RATE.
    """

    source: str | os.PathLike | bytes | Stored | Sequence
    frames: int | None = None
    fps: float | None = None
    rate: float | None = None

    def __post_init__(self):
        if isinstance(self.source, os.PathLike):
            object.__setattr__(self, "source", os.fspath(self.source))
        elif isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))
        elif not isinstance(self.source, str | bytes | Stored | tuple):
            raise LlavaError(
                "a video is a path, encoded bytes or a list of pictures, "
                f"not {type(self.source).__name__}"
            )
        for name in ("frames", "fps", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise LlavaError(f"{name} of a video is {value}: it must not be negative")

    def sampling(self, spec: VideoSpec) -> tuple[int, float]:
        """(frames, fps) that this video is sampled by."""
        return (
            spec.frames if self.frames is None else self.frames,
            spec.fps if self.fps is None else self.fps,
        )


class Footage(NamedTuple):
    """What is known of a video before it is decoded.

    size: (width, height) as stored. frames: how many it has. rate: frames a second, None if the
    file does not say. still: it is a folder or list of pictures.
    """

    size: tuple[int, int]
    frames: int
    rate: float | None
    still: bool


def sampled(footage: Footage, frames: int, fps: float, name: str) -> np.ndarray:
    """Which frames are shown, int[F].

    With fps 0 as many as `frames`, evenly spread, so a shorter file shows some twice (the
    original's force_sample). With fps above 0 every round(rate / fps)-th; where these are more than
    `frames`, if it is above 0, then `frames` evenly spread ones. Pictures are all shown, once, if
    nothing forbids.

        10 frames at 4 a second    frames=3 -> 0 4 9      fps=2 -> 0 2 4 6 8
        footage of 2 frames        frames=3 -> 0 0 1      fps=2, frames=3 -> 0 4 9

    Raises:
      ImageError: the rate is not known but needed.
    """
    spread = lambda: np.linspace(0, footage.frames - 1, frames, dtype=int)
    if not fps:
        if not frames:
            raise LlavaError(f"video {name!r}: frames and fps are both 0, so nothing is shown")
        return np.arange(footage.frames) if footage.still and footage.frames <= frames else spread()
    numbers = np.arange(0, footage.frames, max(1, round(needed_rate(footage, name) / fps)))
    return spread() if 0 < frames < len(numbers) else numbers


def needed_rate(footage: Footage, name: str) -> float:
    if not footage.rate:
        raise ImageError(
            "no frame rate",
            f"video {name!r} does not say how many frames a second it has: write the file anew, "
            "such as with ffmpeg -r 25, or sample a number of frames",
        )
    return footage.rate


def time_instruction(footage: Footage, numbers: np.ndarray, name: str) -> str:
    """The sentences that LLaVA-Video reads before a question, with the times of the frames.

    They are number / rate. (The original divides by the step between frames where it samples by
    fps, so that its times are true for one frame a second alone.)
    """
    rate = needed_rate(footage, name)
    times = ",".join(f"{number / rate:.2f}s" for number in numbers)
    return (
        f"The video lasts for {footage.frames / rate:.2f} seconds, and {len(numbers)} frames are "
        f"uniformly sampled from it. These frames are located at {times}.Please answer the "
        "following questions related to this video."
    )


def is_video_path(source) -> bool:
    """Whether a path is a video by the ending of its name."""
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    return isinstance(path, str) and path.lower().endswith(SUFFIXES)


def inspect_video(video: Video, name: str, max_pixels: int = MAX_PIXELS) -> Footage:
    """What the head of a file says of it, or the first picture.

    A file whose format has no index of its frames is read to its end, but not decoded.

    Raises:
      ImageError: there is no file, it is no video, is cut off, or has too many pixels.
      LlavaError: PyAV is not installed.
    """
    pictures = _pictures(video, name)
    if pictures is not None:
        return _still_footage(pictures, video.rate, name, max_pixels)
    with _opened(video.source, name) as (_, stream, packets):
        return _footage(stream, packets, video.source, name, max_pixels)


def video_tiles(
    video: Video, spec: ImageSpec, name: str, max_pixels: int = MAX_PIXELS
) -> tuple[Footage, np.ndarray, np.ndarray]:
    """The shown frames of a video: what it is, their numbers int[F], tiles uint8[F, S, S, 3].

    A frame's pixels are those of Pillow's bicubic, as for pictures. Only frames that are shown are
    turned into pictures, and only what leads to them from the key frame before is decoded.

    Raises:
      ImageError: as `inspect_video`, or a frame cannot be decoded.
    """
    frames, fps = video.sampling(needed_video(spec))
    tile = lambda image: _tile(image, spec, name, max_pixels)
    footage, numbers, tiles = _shown(video, frames, fps, name, max_pixels, tile)
    return footage, numbers, np.concatenate([tiles[number] for number in numbers.tolist()])


def frames(video: Video, name: str, count: int) -> list[Image.Image]:
    """So many frames of a video, evenly spread, each once; for people. Errors as `video_tiles`."""
    return [*_shown(video, count, 0, name, MAX_PIXELS, lambda image: image)[2].values()]


def _shown(
    video: Video, frames: int, fps: float, name: str, max_pixels: int, use: Callable
) -> tuple[Footage, np.ndarray, dict]:
    """Footage, numbers int[F], and number -> `use` of its picture, of which one is kept a time."""
    pictures = _pictures(video, name)
    if pictures is not None:
        footage = _still_footage(pictures, video.rate, name, max_pixels)
        numbers = sampled(footage, frames, fps, name)
        load = lambda n: load_image(pictures[n], f"{name}, frame {n}", max_pixels)
        return footage, numbers, {n: use(load(n)) for n in dict.fromkeys(numbers.tolist())}
    with _opened(video.source, name) as (container, stream, packets):
        footage = _footage(stream, packets, video.source, name, max_pixels)
        numbers = sampled(footage, frames, fps, name)
        wanted = np.unique(numbers)
        images = _decoded(container, stream, packets(), wanted, footage.frames, name)
        return footage, numbers, dict(zip(wanted.tolist(), map(use, images), strict=True))


def _tile(image: Image.Image, spec: ImageSpec, name: str, max_pixels: int) -> np.ndarray:
    """uint8[1, S, S, 3]."""
    found = frame_views(spec, image.size)
    check_views(found, image.size, name, max_pixels)
    return tiles_of(image, spec, found)


def _pictures(video: Video, name: str) -> Sequence | None:
    """The pictures of a folder or list; None of a file."""
    if isinstance(video.source, tuple):
        if not video.source:
            raise ImageError("empty video", f"video {name!r} is an empty list of pictures")
        return video.source
    if isinstance(video.source, bytes) or not os.path.isdir(video.source):
        return None
    files = [p for p in Path(video.source).iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    files = [str(path) for path in files if path.is_file()]
    if not files:
        endings = ", ".join(PICTURE_SUFFIXES)
        raise ImageError(
            "empty video", f"the folder {name!r} holds no frames: no file ends in {endings}"
        )
    return sorted(files, key=_natural)


def _still_footage(pictures: Sequence, rate: float | None, name: str, max_pixels: int) -> Footage:
    first, at = pictures[0], f"{name}, frame 0"
    size = first.size if isinstance(first, Image.Image) else inspect_image(first, at, max_pixels)
    check_pixels(size, at, max_pixels)
    return Footage(size, len(pictures), PICTURE_RATE if rate is None else rate, still=True)


def _natural(path: str) -> list:
    """A key by which frame 2 stands before frame 10."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _pyav():
    try:
        import av  # an extra, of 100 MB
    except ImportError:
        raise LlavaError(
            "video files are read by PyAV, which is not installed: "
            "pip install 'llava_jax[video]', or give a folder of frames"
        ) from None
    return av


@contextlib.contextmanager
def _opened(source: str | bytes, name: str) -> Iterator[tuple]:
    """The container of a file, its video stream, and what gives its `_packets`, read once.

    What FFmpeg finds wrong is an ImageError.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if isinstance(file, str) and not os.path.isfile(file):
        raise ImageError("missing video", f"no video file {name!r}")
    av = _pyav()
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(file, options=options, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise ImageError(
            "not a video",
            f"{name!r} is empty, cut off or no video ({_reason(error)}): write it anew, such as "
            "with ffmpeg",
        ) from None
    with container:
        if not container.streams.video:
            raise ImageError("not a video", f"{name!r} holds no pictures, only sound")
        try:
            stream = container.streams.video[0]
            yield container, stream, functools.cache(lambda: _packets(container, stream))
        except (av.FFmpegError, EOFError) as error:
            raise _broken(name, _reason(error)) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _broken(name: str, reason: str) -> ImageError:
    return ImageError(
        "unreadable video",
        f"video {name!r} is broken or cut off: {reason}; get it again or leave it out",
    )


def _footage(stream, packets, source: str | bytes, name: str, max_pixels: int) -> Footage:
    size = stream.codec_context.width, stream.codec_context.height
    check_pixels(size, name, max_pixels)
    frames = _count(stream, packets, source, name)
    if not frames:
        raise ImageError("empty video", f"video {name!r} has no frames")
    rate = stream.average_rate or stream.guessed_rate
    return Footage(size, frames, float(rate) if rate else None, still=False)


def _count(stream, packets, source: str | bytes, name: str) -> int:
    """Frames of a file: of its index if it has one (MP4, AVI), else of the packets."""
    entries = stream.index_entries
    if not stream.frames or len(entries) != stream.frames:
        return len(packets()[0])
    frames = end = 0
    for entry in entries:
        frames, end = frames + (not entry.is_discard), max(end, entry.pos + entry.size)
    length = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    if end > length:
        raise _broken(name, f"its last frame would end at byte {end:,} of {length:,}")
    return frames


def _packets(container, stream) -> tuple[list[int], list[tuple[int, int]]]:
    """The times of all frames, and those of the key frames as (shown, stored), sorted.

    In units of the stream. Of a file whose packets have no times they are numbers, and no frame is
    a key frame.
    """
    container.seek(0)
    found = [p for p in container.demux(stream) if p.size and not p.is_discard]
    if any(packet.pts is None for packet in found):
        return list(range(len(found))), []
    keys = [(p.pts, p.pts if p.dts is None else min(p.pts, p.dts)) for p in found if p.is_keyframe]
    return sorted(packet.pts for packet in found), sorted(keys)


def _decoded(container, stream, packets, wanted: np.ndarray, frames: int, name: str) -> Iterator:
    """The pictures of the frames with the rising numbers `wanted`, upright RGB."""
    times, keys = packets
    if len(times) != frames:
        raise _broken(name, f"its index names {frames} frames, it has {len(times)}")
    if not keys:
        yield from _counted(container, stream, wanted, name)
        return
    position, decoder, frame = -1, iter(()), None  # number of `frame`, which was decoded last
    for number in wanted.tolist():
        time = times[number]
        before = keys[: bisect.bisect_right(keys, time, key=lambda key: key[0])]
        if frame is None or before and bisect.bisect_left(times, before[-1][0]) > position + 1:
            decoder = _decoder_at(container, stream, time, before)
        while frame is None or frame.pts < time:
            frame = next(decoder, None)
            if frame is None:
                raise _broken(name, f"frame {number} of {frames} is missing")
            position = bisect.bisect_left(times, frame.pts)
        yield _picture(frame, number, name)


def _decoder_at(container, stream, time: int, keys: list[tuple[int, int]]) -> Iterator:
    """Frames that lead to the one at `time`, from the latest of `keys` that allows it.

    Some formats land behind the key frame that is asked for, and a frame that is shown before an
    open key frame but stored after it needs the one before: then the next earlier is tried.
    """
    for _, stored in reversed(keys):
        container.seek(stored, stream=stream)
        decoder = _frames(container, stream)
        first = next(decoder, None)
        if first is not None and first.pts <= time:
            yield first
            yield from decoder
            return
    container.seek(0)
    yield from _frames(container, stream)


def _frames(container, stream) -> Iterator:
    """All frames from where the container stands."""
    return container.decode(stream)


def _counted(container, stream, wanted: np.ndarray, name: str) -> Iterator:
    """As `_decoded`, from the beginning: of a file whose packets have no times."""
    container.seek(0)
    decoder = enumerate(_frames(container, stream))
    for number in wanted.tolist():
        for at, frame in decoder:
            if at == number:
                yield _picture(frame, number, name)
                break
        else:
            raise _broken(name, f"frame {number} is missing")


def _picture(frame, number: int, name: str) -> Image.Image:
    if frame.is_corrupt:
        raise _broken(name, f"frame {number} cannot be decoded")
    image = frame.to_image()
    quarter_turns = round(frame.rotation / 90) % 4  # as a phone was held
    return image.rotate(90 * quarter_turns, expand=True) if quarter_turns else image
