"""Image files -> uint8 tiles, with the pixels of the Hugging Face CLIP and LLaVA processors.

Every image is decoded by Pillow, on every machine the same: EXIF orientation applied, transparency
laid over white, then RGB (as transformers 5 does when it loads an image).
"""

import io
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from llava_jax.data.buckets import Unreachable
from llava_jax.data.stored import Stored
from llava_jax.errors import LlavaError, RecordError
from llava_jax.models.images import ImageSpec, View, views

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 40_000_000
# What Pillow's decoders raise on broken files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError,
                  struct.error, zlib.error, OverflowError, NotImplementedError)  # fmt: skip
# The last bytes of a whole file, by format.
_END_OF_FILE = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "PNG": b"\x00\x00\x00\x00IEND\xaeB`\x82",
    "GIF": b"\x3b",
}


class ImageError(RecordError):
    """An image that cannot be used; `kind` names the fault."""

    def __reduce__(self):
        return ImageError, (self.kind, str(self))


def load_image(
    source: str | bytes | Stored | Image.Image,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """A path, encoded bytes (here or in a larger file) or a Pillow image -> an upright RGB one.

    name: what errors call it (default: the path). Raises ImageError for a missing, truncated or
    non-image file, and for one of more than `max_pixels` pixels, before decoding it.
    """
    name = name or (source if isinstance(source, str) else "image")
    if isinstance(source, Image.Image):
        check_pixels(source.size, name, max_pixels)
        return _decode(source, name)  # it may be of a file that nothing was read of yet
    with _open(source, name, max_pixels) as image:
        return _decode(image, name)


def inspect_image(
    source: str | bytes | Stored | Image.Image,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Upright size (width, height) of an image, of a file by its first and last bytes if they do.

    Raises what `load_image` would for a missing, truncated or non-image file or too many pixels;
    damage in the middle of a file stays unseen. Decodes only where the end looks wrong.
    """
    name = name or (source if isinstance(source, str) else "image")
    if isinstance(source, Image.Image):
        check_pixels(source.size, name, max_pixels)
        return _upright_size(source)
    with _open(source, name, max_pixels) as image:
        if not _ends_well(image):
            _decode(image, name)
        return _upright_size(image)


def file_state(source: str | bytes | Stored) -> bytes:
    """Changes when the path, size or time of modification of an image file does."""
    if not isinstance(source, str):
        return b""
    status = os.stat(source)
    state = f"{source}\0{status.st_size}\0{status.st_mtime_ns}\0"
    return state.encode(errors="surrogateescape")


def encoded(source, name: str, kind: str = "image"):
    """A source with its bytes in place of where they are stored; any other source as it is.

    kind: image or video. Raises ImageError if the file around it is damaged or gone.
    """
    if not isinstance(source, Stored):
        return source
    try:
        return source.read()
    except Unreachable:  # no fault of the image
        raise
    except LlavaError as error:
        raise ImageError(f"unreadable {kind}", f"cannot read {kind} {name!r}: {error}") from None


def _open(source: str | bytes | Stored, name: str, max_pixels: int) -> Image.Image:
    source = encoded(source, name)
    try:
        image = Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        )
    except FileNotFoundError:
        raise ImageError("missing image", f"no image file {name!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("image too large", f"image {name!r}: {error}") from None
    except Image.UnidentifiedImageError:
        raise ImageError(
            "not an image", f"{name!r} is not an image (of {', '.join(FORMATS)})"
        ) from None
    except _DECODE_ERRORS as error:
        raise ImageError("unreadable image", f"cannot read image {name!r}: {error}") from None
    try:
        check_pixels(image.size, name, max_pixels)
    except ImageError:
        image.close()
        raise
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _upright_rgb(image)
    except _DECODE_ERRORS as error:
        raise ImageError(
            "unreadable image", f"image {name!r} is broken or truncated: {error}"
        ) from None


def _ends_well(image: Image.Image) -> bool:
    end = _END_OF_FILE.get(image.format)
    if end is None:
        return False
    position = image.fp.tell()
    length = image.fp.seek(0, io.SEEK_END)
    image.fp.seek(max(0, length - len(end)))
    tail = image.fp.read()
    image.fp.seek(position)
    return tail == end


def check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raises ImageError for an image of no pixels, or of more than `max_pixels`."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            "image too large",
            f"image {name!r} has {width}x{height} = {width * height:,} pixels, "
            f"over the limit of {max_pixels:,}",
        )
    if width * height == 0:
        raise ImageError("unreadable image", f"image {name!r} has no pixels ({width}x{height})")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """The size after `_upright_rgb`, without decoding pixels."""
    try:
        # Of a PNG, Pillow decodes the pixels to look for EXIF data behind them, which few have.
        known = image.format != "PNG" or "exif" in image.info or _has_late_exif(image.fp)
        turned = known and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in `_upright_rgb`
        turned = False
    return image.size[::-1] if turned else image.size


def _has_late_exif(file) -> bool:
    """Whether a PNG that was opened has EXIF data behind its pixels; a decoded one has no file."""
    if file is None:
        return False
    position, found = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8:  # of a chunk: its length and its type
        if found := head[4:] == b"eXIf":
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    file.seek(position)
    return found


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data tells no orientation; the pixels are still good
        pass
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit samples at 255.
        samples = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(samples, 0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def preprocess(
    image: Image.Image,
    spec: ImageSpec,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
    several: bool = False,
) -> np.ndarray:
    """An RGB image -> its tiles, uint8 [N, S, S, 3], not yet normalised.

    several: it is one of several images of a prompt. Raises ImageError for an image so elongated
    that a form of it on the way would be huge.
    """
    check_shape(image.size, spec, name, max_pixels, several)
    return tiles_of(image, spec, views(spec, image.size, several))


def check_shape(
    size: tuple[int, int],
    spec: ImageSpec,
    name: str,
    max_pixels: int = MAX_PIXELS,
    several: bool = False,
) -> None:
    """Raises ImageError if `preprocess` would, given only an image's (width, height)."""
    check_views(views(spec, size, several), size, name, max_pixels)


def check_views(
    found: Sequence[View], size: tuple[int, int], name: str, max_pixels: int = MAX_PIXELS
) -> None:
    """Raises ImageError if the views of an image of (width, height) are far larger than it."""
    for view in found:
        for width, height in (view.padded, view.resized):
            if width * height > 4 * max_pixels:
                raise ImageError(
                    "image too elongated",
                    f"image {name!r} of {size[0]}x{size[1]} pixels is too elongated to be resized "
                    f"to {width}x{height} on its way to a tile",
                )


def tiles_of(image: Image.Image, spec: ImageSpec, found: Sequence[View]) -> np.ndarray:
    """The tiles of an RGB image's views, uint8 [N, S, S, 3]."""
    return np.concatenate([_tiles(image, spec, view) for view in found])


def _tiles(image: Image.Image, spec: ImageSpec, view: View) -> np.ndarray:
    """The tiles of one view, uint8 [N, S, S, 3], row by row."""
    mean_colour = tuple(int(channel * 255) for channel in spec.mean)
    image = _centred(image, view.padded, mean_colour)
    image = image.resize(view.resized, Image.Resampling.BICUBIC)
    pixels = np.asarray(_centred(image, view.cut, (0, 0, 0)))  # [H, W, 3]
    grid = pixels.reshape(-1, spec.size, view.cut[0] // spec.size, spec.size, 3)
    return grid.swapaxes(1, 2).reshape(-1, spec.size, spec.size, 3)


def _centred(image: Image.Image, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """An image in the middle of a canvas of `size`: padded with a colour, or cropped."""
    if image.size == size:
        return image
    # Rounded towards zero, so that padding and cropping both leave the larger half at the end.
    left, top = (int((new - old) / 2) for new, old in zip(size, image.size, strict=True))
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, (left, top))
    return canvas
