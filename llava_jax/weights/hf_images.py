"""How a folder's pictures are prepared: its `preprocessor_config.json` -> LlavaConfig fields."""

from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.llava import CLIP_MEAN, CLIP_STD
from llava_jax.models.vit import ViTConfig
from llava_jax.weights.hf_fields import Fields, is_positive, read_json

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json stores it


def image_settings(folder: Path) -> dict | None:
    """The LlavaConfig fields `image_mean`, `image_std`, `image_mode` and `image_size`.

    Read from the folder's `preprocessor_config.json`, or the `processor_config.json` that
    transformers 5 writes; None where there is neither.

    Raises:
      LlavaError: the file asks for preprocessing that none of our image modes does.
    """
    path, values = folder / "preprocessor_config.json", None
    if path.exists():
        values = read_json(path)
    elif (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
        values = read_json(path).get("image_processor")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise LlavaError(f"{path} has image_processor={values!r}: it must be an object.")
    clip_like = "Siglip" not in str(values.get("image_processor_type", "CLIP"))
    f = Fields(values, {"do_center_crop": clip_like, "resample": BICUBIC}, str(path))
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(step) is False:
            f.refuse(step, "pictures are always resized, divided by 255 and normalised")
    if f["resample"] != BICUBIC:
        f.refuse("resample", "only bicubic (3) is supported")
    mode = "pad" if f["do_pad"] else "square" if f["do_center_crop"] else "resize"
    side = _side(f["crop_size"] if mode != "resize" and f["crop_size"] else f["size"])
    if side is None:
        f.refuse("size", "pictures must become squares of one size")
    default_mean, default_std = (CLIP_MEAN, CLIP_STD) if clip_like else ((0.5,) * 3, (0.5,) * 3)
    return {
        "image_mean": _channels(f, "image_mean", default_mean),
        "image_std": _channels(f, "image_std", default_std),
        "image_mode": mode,
        "image_size": side,
    }


def _channels(f: Fields, key: str, default: tuple) -> tuple[float, float, float]:
    values = default if f[key] is None else f[key]
    numbers = isinstance(values, list | tuple) and all(v == 0 or is_positive(v) for v in values)
    if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
        f.refuse(key, "it must be three numbers, one a colour")
    return tuple(map(float, values))


def _side(size: object) -> int | None:
    """224 from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict):
        first, *others = [*size.values()] or [None]
        size = first if all(side == first for side in others) else None
    return size if type(size) is int and size > 0 else None


def default_images(vision: ViTConfig) -> dict:
    if vision.class_token:
        mean, std, mode = CLIP_MEAN, CLIP_STD, "square"
    else:
        mean, std, mode = (0.5,) * 3, (0.5,) * 3, "resize"
    size = vision.image_size
    return {"image_mean": mean, "image_std": std, "image_mode": mode, "image_size": size}
