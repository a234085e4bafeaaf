"""How a folder's pictures are prepared: its `preprocessor_config.json` -> ImageSpec."""

import dataclasses
import math
import re
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.images import CLIP_MEAN, CLIP_STD, ImageSpec
from llava_jax.weights.read.fields import Fields, is_positive, read_json

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json stores it
_KINDS = ("CLIP", "Siglip", "Llava", "Bit")  # of image processors; DINOv2's is Bit
TILED_KINDS = ("LlavaNext", "LlavaNextVideo", "LlavaOnevision")
_CLIP_DEFAULTS = {
    "do_center_crop": True,
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
}
_SIGLIP_DEFAULTS = _CLIP_DEFAULTS | {
    "do_center_crop": False,
    "size": {"height": 224, "width": 224},
}
_ONEVISION_DEFAULTS = _CLIP_DEFAULTS | {
    "do_center_crop": False,
    "size": {"height": 384, "width": 384},
}


def image_settings(folder: Path, default: ImageSpec, size: int, trained: bool = True) -> ImageSpec:
    """How pictures are prepared for the model in a folder.

    Read from the folder's `preprocessor_config.json`, or the `processor_config.json` that
    transformers 5 writes; `default` if there is neither.

    Args:
      default: how its encoder's family prepares pictures, taken with `size` if no file says it.
      size: side in pixels of the encoder's own pictures.
      trained: whether a model was trained with exactly these pictures. For one that is not, a
        square of `crop_size` is taken of the whole picture if `size` is another.
    Raises:
      LlavaError: the file asks for preprocessing that none of our image modes does.
    """
    path, values = processor_values(folder)
    if values is None:
        return dataclasses.replace(default, size=size)
    return settings_of(values, str(path), _KINDS, trained)


def processor_values(
    folder: Path, name: str = "preprocessor_config.json", key: str = "image_processor"
) -> tuple[Path, dict | None]:
    """A processor's file and what it says: a file of its own, else `key` of the one for all."""
    path = folder / name
    if path.exists():
        return path, read_json(path)
    path = folder / "processor_config.json"
    values = read_json(path).get(key) if path.exists() else None
    if not isinstance(values, dict | None):
        raise LlavaError(f"{path} has {key}={values!r}: it must be an object")
    return path, values


def settings_of(
    values: dict, source: str, kinds: tuple[str, ...], trained: bool = True
) -> ImageSpec:
    """How a processor's values prepare a picture, or a tile of one, or a frame.

    Args:
      kinds: beginnings of class names that are understood; CLIP, or the first, is meant if the
        values name none.
    """
    default = "CLIP" if "CLIP" in kinds else kinds[0]
    kind = values.get("image_processor_type") or values.get("video_processor_type") or default
    # Some names end in Fast or Pil.
    kind = re.split("ImageProcessor|VideoProcessor|FeatureExtractor", str(kind))[0]
    siglip = kind == "Siglip"
    defaults = {"Siglip": _SIGLIP_DEFAULTS, "LlavaOnevision": _ONEVISION_DEFAULTS}
    f = Fields(values, defaults.get(kind, _CLIP_DEFAULTS), source)
    if kind not in kinds:
        f.refuse("image_processor_type", f"only those of {', '.join(kinds)} are supported")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(step) is False:
            f.refuse(step, "pictures are always resized, divided by 255 and normalised")
    if f["resample"] != BICUBIC:
        f.refuse("resample", "only bicubic (3) is supported")
    if not math.isclose(f.number("rescale_factor"), 1 / 255, rel_tol=1e-6):
        f.refuse("rescale_factor", "pictures are always divided by 255")
    mode, side = _mode_and_side(f, trained, padded=kind not in TILED_KINDS and bool(f["do_pad"]))
    default_mean, default_std = ((0.5,) * 3, (0.5,) * 3) if siglip else (CLIP_MEAN, CLIP_STD)
    mean, std = _channels(f, "image_mean", default_mean), _channels(f, "image_std", default_std)
    return ImageSpec(side, mode, mean, std)


def _mode_and_side(f: Fields, trained: bool, padded: bool) -> tuple[str, int]:
    """padded: pictures are padded to squares; do_pad of tiled classes is about batches."""
    size, side, crop = f["size"], _side(f["size"]), f["do_center_crop"]
    if side is None:
        f.refuse("size", "pictures must become squares of one size")
    if crop and _side(f["crop_size"]) != side:
        if trained or _side(f["crop_size"]) is None:
            f.refuse("crop_size", f"it must be the square that size={size!r} leaves")
        side = _side(f["crop_size"])
    if padded:
        return "pad", side
    if isinstance(size, dict) and "height" in size:
        return "resize", side
    if not crop:
        f.refuse("do_center_crop", "pictures resized by their shortest edge must be cropped")
    return "square", side


def _channels(f: Fields, key: str, default: tuple) -> tuple[float, float, float]:
    values = default if f[key] is None else f[key]
    numbers = isinstance(values, list | tuple) and all(v == 0 or is_positive(v) for v in values)
    if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
        f.refuse(key, "it must be three numbers, one a colour")
    return tuple(map(float, values))


def _side(size: object) -> int | None:
    """224 from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict) and set(size) in ({"shortest_edge"}, {"height", "width"}):
        first, *others = size.values()
        size = first if all(side == first for side in others) else None
    return size if type(size) is int and size > 0 else None
