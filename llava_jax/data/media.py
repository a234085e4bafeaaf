"""Image files -> uint8 squares, with the pixels of the Hugging Face CLIP and LLaVA processors.

Every image is decoded by Pillow, on every machine the same: EXIF orientation applied, transparency
laid over white, then RGB (as transformers 5 does when it loads an image).
"""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from llava_jax.errors import RecordError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 40_000_000
IMAGE_MODES = ("square", "pad", "resize")
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
    source: str | bytes | Image.Image, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A path, encoded bytes or a Pillow image -> an upright RGB Pillow image.

    name: what errors call it (default: the path). Raises ImageError for a missing, truncated or
    non-image file, and for one of more than `max_pixels` pixels, before decoding it.
    """
    name = name or (source if isinstance(source, str) else "image")
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name, max_pixels)
        return _decode(source, name)  # it may be of a file that nothing was read of yet
    with _open(source, name, max_pixels) as image:
        return _decode(image, name)


def inspect_image(
    source: str | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Size (width, height) of an image file, from its first and last bytes where they suffice.

    Raises what `load_image` would for a missing, truncated or non-image file or too many pixels;
    damage in the middle of a file stays unseen. Decodes only where the end looks wrong.
    """
    name = name or (source if isinstance(source, str) else "image")
    with _open(source, name, max_pixels) as image:
        if not _ends_well(image):
            _decode(image, name)
        return image.size


def _open(source: str | bytes, name: str, max_pixels: int) -> Image.Image:
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
        _check_pixels(image.size, name, max_pixels)
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


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            "image too large",
            f"image {name!r} has {width}x{height} = {width * height:,} pixels, "
            f"over the limit of {max_pixels:,}",
        )
    if width * height == 0:
        raise ImageError("unreadable image", f"image {name!r} has no pixels ({width}x{height})")


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
    image_size: int,
    mode: str = "square",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An RGB image -> uint8 [S, S, 3], not yet normalised.

    mode "square": bicubic resize of the shortest edge to S, centre crop (CLIPImageProcessor).
    "pad": first grow to a square of the mean colour, image in the middle
    (LlavaImageProcessor(do_pad=True)). "resize": straight to S x S, bicubic (SigLIP style).
    mean: of the model's normalisation, RGB in 0..1; the colour of "pad" is int(mean * 255).
    Raises ImageError for an image so long that its square or resized form would be huge.
    """
    if mode not in IMAGE_MODES:
        raise ValueError(f"unknown image mode {mode!r}; known: {', '.join(IMAGE_MODES)}")
    if mode == "resize":
        return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    check_shape(image.size, image_size, mode, name, max_pixels)
    if mode == "pad":
        image = _pad_to_square(image, tuple(int(channel * 255) for channel in mean))
    return np.asarray(_resize_and_crop(image, image_size))


def check_shape(
    size: tuple[int, int], image_size: int, mode: str, name: str, max_pixels: int = MAX_PIXELS
) -> None:
    """Raises ImageError where `preprocess` would, knowing only an image's (width, height)."""
    short, long = sorted(size)
    if mode == "resize":
        return
    largest = long * long if mode == "pad" else image_size * (image_size * long // short)
    if largest > 4 * max_pixels:
        raise ImageError(
            "image too elongated",
            f"image {name!r} of {size[0]}x{size[1]} pixels is too elongated for "
            f"image_mode {mode!r}",
        )


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    # The long edge is rounded down, as transformers' get_resize_output_image_size does.
    long = int(size * long / short)
    resized = (size, long) if width <= height else (long, size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
