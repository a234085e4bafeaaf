"""Pictures in tiles and videos as a folder's files describe them -> ImageSpec.

`image_grid_pinpoints` lists the sizes in pixels that a picture may be cut from. transformers reads
a pair as (height, width), the original code as (width, height): the same list gives other tiles.
Of two sizes that are equally good the first wins, so the order of the list is kept.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import MODES, ImageSpec
from llava_jax.models.video import VideoSpec
from llava_jax.models.vit import ViTConfig
from llava_jax.weights.llava_classes import ASPECT, PINPOINTS, STRATEGY, LlavaClass
from llava_jax.weights.own_keys import with_own_keys
from llava_jax.weights.read.fields import Fields, read_json
from llava_jax.weights.read.image_settings import TILED_KINDS, processor_values, settings_of

PINPOINT_ORDERS = ("hf", "original")


def check_choices(pinpoint_order: str | None, image_mode: str | None) -> None:
    """Raises LlavaError for options of `open_llava` that are none."""
    for name, value, choices in (
        ("pinpoint_order", pinpoint_order, PINPOINT_ORDERS),
        ("image_mode", image_mode, MODES),
    ):
        if value not in (None, *choices):
            raise LlavaError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def in_mode(spec: ImageSpec, mode: str) -> ImageSpec:
    """Pictures in another mode, without tiles and videos if that is of one view."""
    if mode == "anyres" and spec.tiling is None:
        raise LlavaError("image_mode is 'anyres': the checkpoint does not say which tiles it has")
    return (
        spec if mode == spec.mode else dataclasses.replace(spec, mode=mode, tiling=None, video=None)
    )


def as_asked(
    form: ImageSpec, values: Mapping, source: str, pinpoint_order: str | None
) -> ImageSpec:
    """Pictures as our keys of a `config.json` have them, unless an order of pinpoints is asked for.

    Args:
      form: what its other keys mean.
      pinpoint_order: whose code rounds: `hf` does, `original` does not; None for what is written.
    """
    image = with_own_keys(form, values, source)
    if pinpoint_order is None or image.tiling is None:
        return image
    tiling = dataclasses.replace(image.tiling, rounded=pinpoint_order == "hf")
    return dataclasses.replace(image, tiling=tiling)


def tiled_pictures(
    folder: Path,
    f: Fields,
    llava: LlavaClass,
    default: ImageSpec,
    vision: ViTConfig,
    pinpoint_order: str | None = None,
) -> ImageSpec:
    """Pictures and videos of a Hugging Face folder whose class cuts pictures into tiles.

    Args:
      f: its `config.json`.
      default: how the encoder's family prepares pictures, where no file says it.
      pinpoint_order: who reads the pinpoints: `hf` or `original`.
    Raises:
      LlavaError: the processor's files differ from `config.json`, or ask for what we do not do.
    """
    if (f[STRATEGY] == "full") == vision.class_token:
        f.refuse(STRATEGY, "the features of a tile must be a square of patches, without another")
    pictures, values = _pictures(folder, llava, default, vision)
    if values is not None and values.get(PINPOINTS, f[PINPOINTS]) != f[PINPOINTS]:
        raise LlavaError(
            f"{processor_values(folder)[0]} has {PINPOINTS}={values[PINPOINTS]!r}, and config.json "
            f"{f[PINPOINTS]!r}: they must be equal"
        )
    _check_processor(folder, f, vision)
    tiling = Tiling(
        grids=grids(f, pictures.size, pinpoint_order or "hf"),
        rounded=True,
        cap=cap(f) if llava.defaults.get(ASPECT) else 0,
        one_view=llava.one_view,
    )
    video = llava.video and _video(folder, f, llava, pictures)
    return dataclasses.replace(pictures, mode="anyres", tiling=tiling, video=video)


def _pictures(
    folder: Path, llava: LlavaClass, default: ImageSpec, vision: ViTConfig
) -> tuple[ImageSpec, dict | None]:
    """How a tile is prepared, and the values of the file that says so, if there is one."""
    path, values = processor_values(folder)
    if values is None:
        return dataclasses.replace(default, size=vision.image_size), None
    kinds = (llava.image_processor, *TILED_KINDS)
    return settings_of(values, str(path), kinds), values


def _check_processor(folder: Path, f: Fields, vision: ViTConfig) -> None:
    """Compares what the processor counts tokens by with the model's config."""
    path = folder / "processor_config.json"
    values = read_json(path) if path.exists() else {}
    for key, wanted in (("patch_size", vision.patch_size), (ASPECT, f[ASPECT])):
        if values.get(key) is not None and wanted is not None and values[key] != wanted:
            raise LlavaError(
                f"{path} has {key}={values[key]!r}, and config.json {wanted!r}: they must be equal"
            )


def _video(folder: Path, f: Fields, llava: LlavaClass, pictures: ImageSpec) -> VideoSpec | None:
    """How videos are shown; None if frames are normalised otherwise than pictures."""
    for key, value in (("spatial_pool_mode", "average"), ("spatial_pool_stride", 2)):
        if f[key] not in (None, value):
            f.refuse(key, f"only {value} is supported")
    frames = frame_settings(folder)
    if frames is None:
        return llava.video
    path, values = frames
    found = settings_of(values, str(path), (llava.name, *TILED_KINDS))
    if found.size != pictures.size:
        raise LlavaError(
            f"{path} makes frames of {found.size} pixels, and tiles of pictures have "
            f"{pictures.size}: they must be equal"
        )
    if (found.mean, found.std) != (pictures.mean, pictures.std):
        return None
    count = values.get("num_frames")
    count = count if type(count) is int and count > 0 else llava.video.frames
    return dataclasses.replace(llava.video, mode=found.mode, frames=count)


def frame_settings(folder: Path) -> tuple[Path, dict] | None:
    """The file about videos, and what it says."""
    path, values = processor_values(folder, "video_preprocessor_config.json", "video_processor")
    return None if values is None else (path, values)


def cap(f: Fields) -> int:
    """N of anyres_max_N."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(f[ASPECT]))
    if not found:
        f.refuse(ASPECT, "it must be anyres_max_N, such as anyres_max_9")
    return int(found[1])


def grids(f: Fields, side: int, order: str) -> tuple[tuple[int, int], ...]:
    """The pinpoints in tiles of `side` pixels, (columns, rows), in their own order.

    They are a list, a list written as a text, or "(1x1),...,(6x6)" for all grids in between.
    """
    value = f[PINPOINTS]
    if isinstance(value, str):
        ends = re.findall(r"\((\d+)x(\d+)\)", value)
        if ends:
            (left, top), (right, bottom) = (tuple(map(int, ends[i])) for i in (0, -1))
            spans = range(max(left, 1), right + 1), range(max(top, 1), bottom + 1)
            value = [[side * a, side * b] for a in spans[0] for b in spans[1]]
        else:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
    pairs = value if isinstance(value, list | tuple) else []
    for pair in pairs or [None]:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or any(type(n) is not int or n < 1 or n % side for n in pair):
            f.refuse(PINPOINTS, f"it must list pairs of multiples of {side}, a tile's pixels")
    turned = slice(None, None, -1 if order == "hf" else 1)
    return tuple(tuple(n // side for n in pair[turned]) for pair in pairs)
