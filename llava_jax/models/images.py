"""How a picture becomes tiles, and which encoder feature stands at each of its tokens.

A *tile* is a square of pixels that the vision encoder is given. A *mode* is a pure function of the
spec and of a picture's (width, height): it says how the pixels are cut into tiles (`views`) and how
many tokens the picture takes, each of them a feature of one of the tiles (`layout`). There is no
constant number of tokens for a picture: tokenizer, packer, engine and FLOP counter all call
`layout`. NumPy only, so the data workers need no JAX.

S side of a tile, P features of a tile, n tokens of a picture.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from llava_jax.errors import LlavaError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN_ID = -200  # IMAGE_TOKEN_INDEX of the original LLaVA: in no vocabulary
TEXT = -1  # in feature ids: this position holds no feature

Size = tuple[int, int]  # width, height


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a model's pictures are prepared.

    Attributes:
      size: side S of a tile in pixels.
      mode: a key of `MODES`.
      mean, std: RGB in 0..1, subtracted from the pixels and divided by on the device.
    """

    size: int = 336
    mode: str = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        if self.mode not in MODES:
            known = ", ".join(MODES)
            raise LlavaError(f"image_mode is {self.mode!r}: choose one of {known}")

    @property
    def by_size(self) -> bool:
        """Whether tiles and tokens depend on the size of a picture."""
        return MODES[self.mode].by_size


@dataclasses.dataclass(frozen=True)
class View:
    """One look at a picture: padded, resized (bicubic), cropped or padded again, cut into tiles.

    Attributes:
      padded: size of the mean-coloured canvas that the picture is centred on first.
      resized: size that this canvas is resized to.
      cut: size that is cropped from, or padded with black around, the centre of the result; a
        multiple of S both ways. Its S x S tiles are counted row by row.
    """

    padded: Size
    resized: Size
    cut: Size


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tiles and tokens of one picture.

    Attributes:
      tiles: how many tiles the encoder is given.
      features: int32[n], for each token of the picture the feature that stands there: feature k of
        tile t is t * P + k.
    """

    tiles: int
    features: np.ndarray

    def __len__(self) -> int:
        """Tokens that the picture takes."""
        return len(self.features)


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to prepare pictures.

    Attributes:
      views: (spec, size of the picture) -> its views; their tiles follow each other.
      features: (spec, P, size of the picture) -> `Layout.features`.
      by_size: whether the number of tiles or tokens depends on the size.
    """

    views: Callable[[ImageSpec, Size], tuple[View, ...]]
    features: Callable[[ImageSpec, int, Size], np.ndarray]
    by_size: bool = False


def _square(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """The shortest edge resized to S, then a centre crop (CLIPImageProcessor)."""
    short, long = min(size), max(size)
    # The long edge is rounded down, as transformers' get_resize_output_image_size does.
    long = int(spec.size * long / short)
    resized = (spec.size, long) if size[0] <= size[1] else (long, spec.size)
    return (View(size, resized, (spec.size, spec.size)),)


def _pad(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """Centred on a square of the mean colour (LlavaImageProcessor with do_pad)."""
    square = (spec.size, spec.size)
    return (View((max(size), max(size)), square, square),)


def _resize(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """Straight to S x S, whatever the aspect ratio (SigLIP)."""
    square = (spec.size, spec.size)
    return (View(size, square, square),)


def _all_of_one_tile(spec: ImageSpec, per_tile: int, size: Size) -> np.ndarray:
    return np.arange(per_tile, dtype=np.int32)


MODES = {
    "square": Mode(_square, _all_of_one_tile),
    "pad": Mode(_pad, _all_of_one_tile),
    "resize": Mode(_resize, _all_of_one_tile),
}


def views(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """How the tiles of a picture of (width, height) are cut."""
    return MODES[spec.mode].views(spec, size)


def layout(spec: ImageSpec, tokens_per_tile: int, size: Size) -> Layout:
    """The tiles and tokens of a picture of (width, height).

    >>> layout(ImageSpec(336, "pad"), 576, (640, 480))
    Layout(tiles=1, features=array([0, 1, ..., 575], dtype=int32))
    """
    tiles = sum(view.cut[0] * view.cut[1] for view in views(spec, size)) // spec.size**2
    return Layout(tiles, MODES[spec.mode].features(spec, tokens_per_tile, size))


def features_in_turn(is_image: np.ndarray) -> np.ndarray:
    """Feature ids, int32[..., T], of rows whose image positions show all features in their order.

    >>> features_in_turn(np.array([False, True, True, False, True]))
    array([-1,  0,  1, -1,  2], dtype=int32)
    """
    return np.where(is_image, np.cumsum(is_image, axis=-1) - 1, TEXT).astype(np.int32)
