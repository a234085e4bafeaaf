"""How pictures and videos become tiles, and which encoder feature stands at each of their tokens.

A *tile* is a square of pixels that the vision encoder is given. A *mode* is a pure function of the
spec and of a picture's (width, height): it says how the pixels are cut into tiles (`views`) and how
many tokens the picture takes, each of them a feature of one of the tiles (`layouts`). There is no
constant number of tokens for a picture: tokenizer, packer, engine and FLOP counter all call
`layouts`. NumPy only, so the data workers need no JAX.

S side of a tile, P features of a tile, n tokens of a picture.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models import anyres
from llava_jax.models.anyres import Size, Tiling
from llava_jax.models.taps import TAPS, TEXT, Taps, bilinear, join
from llava_jax.models.video import VideoSpec, video_tokens

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN_ID = -200  # IMAGE_TOKEN_INDEX of the original LLaVA: in no vocabulary

# What a place in a prompt shows: (width, height) of a picture, (width, height, frames) of a video.
Source = tuple[int, int] | tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a model's pictures and videos are prepared.

    Attributes:
      size: side S of a tile in pixels.
      mode: a key of `MODES`.
      mean, std: RGB in 0..1, subtracted from the pixels and divided by on the device.
      tiling: of mode `anyres`, None for others.
      video: of models that take videos, None for others.
    """

    size: int = 336
    mode: str = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    tiling: Tiling | None = None
    video: VideoSpec | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            known = ", ".join(MODES)
            raise LlavaError(f"image_mode is {self.mode!r}: choose one of {known}")
        if self.mode == "anyres" and self.tiling is None:
            object.__setattr__(self, "tiling", Tiling())
        if self.mode != "anyres" and self.tiling is not None:
            raise LlavaError(f"image_mode is {self.mode!r}: only anyres cuts pictures into tiles")

    @property
    def by_size(self) -> bool:
        """Whether tiles and tokens depend on sizes, on how many there are, or on frames."""
        return MODES[self.mode].by_size or self.video is not None

    @property
    def taps(self) -> int:
        """Features that a token may mix: 1, or TAPS where features are shrunk or pooled."""
        shrinks = self.tiling is not None and self.tiling.cap > 0
        pools = self.video is not None and not self.pools_in_encoder
        return TAPS if shrinks or pools else 1

    @property
    def pools_in_encoder(self) -> bool:
        """Whether P counts the pooled features too, which follow the others of each tile."""
        return self.video is not None and self.video.pool == "average_before_projector"

    @property
    def newline(self) -> bool:
        """Whether the model has a learnt newline."""
        of_video = self.video is not None and self.video.newline != "no_token"
        return of_video or (self.tiling is not None and self.tiling.newline)

    @classmethod
    def from_values(cls, values: dict) -> "ImageSpec":
        """The inverse of `dataclasses.asdict`, also of what JSON has made of it."""
        values = {**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])}
        if tiling := values.get("tiling"):
            grids = tuple((columns, rows) for columns, rows in tiling["grids"])
            values["tiling"] = Tiling(**{**tiling, "grids": grids})
        if video := values.get("video"):
            values["video"] = VideoSpec(**video)
        return cls(**values)


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

    def on_picture(self, size: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        """(start, scale) across and down: pixel x of the cut is start + scale * x of a picture.

        size: of the picture. What is outside it is padding.
        """
        axes = []
        for padded, resized, cut, side in zip(
            self.padded, self.resized, self.cut, size, strict=True
        ):
            scale = padded / resized
            # Rounded towards zero, as the pixels are put in place.
            axes.append((-int((padded - side) / 2) - int((cut - resized) / 2) * scale, scale))
        return tuple(axes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tiles and tokens of one picture or video.

    Attributes:
      tiles: how many tiles the encoder is given.
      features: int32[n], for each token the feature that stands there: feature k of tile t is
        t * P + k; NEWLINE for the learnt newline. Of a spec with several taps int32[n, TAPS], the
        features that the token mixes, TEXT for none.
      weights: float32[n, TAPS] of the mixed features; None with one tap.
      grid: (columns, rows) of a picture's tiles without the base view, None if it is one tile.
    """

    tiles: int
    features: np.ndarray
    weights: np.ndarray | None = None
    grid: Size | None = None

    def __len__(self) -> int:
        """Tokens that the picture takes."""
        return len(self.features)

    def placed(self, first_tile: int, per_tile: int) -> np.ndarray:
        """`features` where the tiles begin at `first_tile` of a row's tiles of P features."""
        return np.where(self.features < 0, self.features, first_tile * per_tile + self.features)


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to prepare pictures.

    Attributes:
      views: (spec, size of the picture) -> its views; their tiles follow each other.
      features: (spec, P, size of the picture) -> feature ids int32[n] as in `Layout.features`, or
        the Taps [n] of tokens that mix several.
      by_size: whether the number of tiles or tokens depends on the size.
    """

    views: Callable[[ImageSpec, Size], tuple[View, ...]]
    features: Callable[[ImageSpec, int, Size], np.ndarray | Taps]
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
    """All features, but not those that are pooled for videos."""
    count = cells_a_side(spec, per_tile) ** 2 if spec.pools_in_encoder else per_tile
    return np.arange(count, dtype=np.int32)


def _anyres(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """The whole picture squashed to one tile, then a grid of tiles padded with black."""
    columns, rows = anyres.choose_grid(spec.tiling.grids, spec.size, size)
    canvas = (columns * spec.size, rows * spec.size)
    return (*_resize(spec, size), View(size, anyres.fitted(size, canvas), canvas))


def _anyres_features(spec: ImageSpec, per_tile: int, size: Size) -> Taps:
    """The base view's features, then those of the grid without its padding, row by row.

    A picture twice as wide as high, P = 4, two tiles side by side; / is NEWLINE:

        tile 0  0 1     tiles 1, 2   4 5 |  8  9      features  0 1 2 3 4 5 8 9 / 6 7 10 11 /
                2 3                  6 7 | 10 11
    """
    tiling, side = spec.tiling, cells_a_side(spec, per_tile)
    columns, rows = anyres.choose_grid(tiling.grids, spec.size, size)
    base = np.arange(side * side)
    tiles = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)
    cells = tiles * per_tile + base.reshape(1, side, 1, side)  # [rows, side, columns, side]
    if tiling.merge == "flat":
        return Taps.of(np.concatenate([base, cells.swapaxes(1, 2).reshape(-1)]))
    cells = cells.reshape(rows * side, columns * side)
    if tiling.merge == "spatial":
        return Taps.of(np.concatenate([base, cells.reshape(-1)]))
    cells = cells[anyres.kept_cells(size, cells.shape[::-1], tiling.rounded)]
    smaller = anyres.shrunk(*cells.shape, side * side, tiling.cap)
    grid = Taps.of(cells) if smaller == cells.shape else bilinear(cells, *smaller)
    return join([Taps.of(base), grid.ended().in_a_row()])


MODES = {
    "square": Mode(_square, _all_of_one_tile),
    "pad": Mode(_pad, _all_of_one_tile),
    "resize": Mode(_resize, _all_of_one_tile),
    "anyres": Mode(_anyres, _anyres_features, by_size=True),
}


def cells_a_side(spec: ImageSpec, per_tile: int) -> int:
    """Side of the square of features that P counts, without pooled ones.

    Raises:
      ValueError: they are no square, such as with a class token.
    """
    if spec.pools_in_encoder:  # side^2 + (side // 2)^2
        side = next(s for s in range(per_tile + 1) if s * s + (s // 2) ** 2 >= per_tile)
        whole = side * side + (side // 2) ** 2 == per_tile
    else:
        side = math.isqrt(per_tile)
        whole = side * side == per_tile
    if not whole:
        raise ValueError(f"the {per_tile} features of a tile are no square")
    return side


def views(spec: ImageSpec, size: Size, several: bool = False) -> tuple[View, ...]:
    """How the tiles of a picture of (width, height) are cut.

    several: it is one of several pictures of a prompt.
    """
    return _pad(spec, size) if _is_one_view(spec, several) else MODES[spec.mode].views(spec, size)


def _is_one_view(spec: ImageSpec, several: bool) -> bool:
    return several and spec.tiling is not None and spec.tiling.one_view


def box_view(spec: ImageSpec, size: Size, several: bool = False) -> View:
    """The view whose square boxes are on: the picture's only one, of AnyRes the padded square.

    AnyRes looks at a picture several times; its checkpoints learnt from the boxes of LLaVA-1.5.
    """
    return (_pad(spec, size) if spec.tiling is not None else views(spec, size, several))[0]


def frame_views(spec: ImageSpec, size: Size) -> tuple[View, ...]:
    """How the tile of a video's frame is cut."""
    return MODES[needed_video(spec).mode].views(spec, size)


def needed_video(spec: ImageSpec) -> VideoSpec:
    """How videos are prepared; LlavaError if the model takes none."""
    if spec.video is None:
        raise LlavaError("the model takes pictures, not videos: give single frames as pictures")
    return spec.video


def layouts(
    spec: ImageSpec, per_tile: int, sources: Sequence[Source], several: bool | None = None
) -> list[Layout]:
    """The tiles and tokens of all pictures and videos of a prompt, in their order.

    >>> layouts(ImageSpec(336, "pad"), 576, [(640, 480)])
    [Layout(tiles=1, features=array([0, 1, ..., 575], dtype=int32), ...)]

    Args:
      per_tile: P.
      sources: (width, height) of a picture, (width, height, frames) of a video.
      several: whether the prompt has more than one picture; None if these are all.
    """
    if several is None:
        several = sum(len(source) == 2 for source in sources) > 1
    found = []
    for source in sources:
        if len(source) == 2:
            found.append(_picture(spec, per_tile, source, several))
        else:
            side, frames = cells_a_side(spec, per_tile), source[2]
            tokens = video_tokens(needed_video(spec), per_tile, side, frames)
            found.append(_layout(spec, frames, tokens))
    return found


def _picture(spec: ImageSpec, per_tile: int, size: Size, several: bool) -> Layout:
    cuts = [view.cut for view in views(spec, size, several)]
    grids = [(width // spec.size, height // spec.size) for width, height in cuts]
    if _is_one_view(spec, several):
        tokens = Taps.of(np.arange(cells_a_side(spec, per_tile) ** 2))
        tokens = tokens.ended() if spec.tiling.newline else tokens
    else:
        tokens = MODES[spec.mode].features(spec, per_tile, size)
    tiles = sum(columns * rows for columns, rows in grids)
    return _layout(spec, tiles, tokens, grids[1] if len(grids) > 1 else None)


def _layout(spec: ImageSpec, tiles: int, tokens: Taps | np.ndarray, grid=None) -> Layout:
    """Tokens in the form that the spec's taps ask for."""
    if spec.taps == 1:
        features = tokens.features[:, 0] if isinstance(tokens, Taps) else tokens
        return Layout(tiles, features, None, grid)
    tokens = tokens if isinstance(tokens, Taps) else Taps.of(tokens)
    return Layout(tiles, *tokens, grid)


def features_in_turn(is_image: np.ndarray) -> np.ndarray:
    """Feature ids, int32[..., T], of rows whose image positions show all features in their order.

    >>> features_in_turn(np.array([False, True, True, False, True]))
    array([-1,  0,  1, -1,  2], dtype=int32)
    """
    return np.where(is_image, np.cumsum(is_image, axis=-1) - 1, TEXT).astype(np.int32)
