"""Video files of which every frame shows its own number."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image


def frame(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A grey picture, which `number_of` tells apart from those of 39 other numbers."""
    return Image.new("RGB", size, (6 * (number % 40) + 5,) * 3)


def number_of(image) -> int:
    """The number of a `frame`, from its pixels."""
    return round((float(np.asarray(image).mean()) - 5) / 6)


def write_video(
    path: Path,
    frames: int,
    rate: int = 10,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    key_every: int = 12,
    container: dict | None = None,
    times: list[int] | None = None,
    **options,
) -> Path:
    """Frames 0, 1, … as a file; `options` are of the codec, `container` of the format.

    times: of the frames, in units of 1 / rate; by default 0, 1, …
    """
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate, stream.codec_context.gop_size = 8_000_000, key_every
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = av.VideoFrame.from_image(frame(number, size))
            if times:
                picture.pts, picture.time_base = times[number], Fraction(1, rate)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path
