"""How the original code's `config.json` prepares pictures and videos: mm_* keys -> ImageSpec.

Follows llava/mm_utils.py and llava_arch.py of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

import dataclasses
import re

from llava_jax.models.anyres import MERGES, Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from llava_jax.models.vit import ViTConfig
from llava_jax.weights.families import DecoderFamily
from llava_jax.weights.read.fields import Fields
from llava_jax.weights.read.tiled_pictures import as_asked, grids, in_mode

ASPECT, MERGE, POSITION = "image_aspect_ratio", "mm_patch_merge_type", "mm_newline_position"
POOL, RESAMPLER = "mm_spatial_pool_mode", "mm_resampler_type"
DEFAULTS = {ASPECT: "square", MERGE: "flat", POSITION: "one_token", POOL: "bilinear"}
# Options that no published model has: they change what the model computes.
_OFF = ("s2", "add_faster_video", "use_pos_skipping")


def original_pictures(
    values: dict,
    source: str,
    tower: ImageSpec,
    vision: ViTConfig,
    family: DecoderFamily,
    pinpoint_order: str | None = None,
    image_mode: str | None = None,
) -> ImageSpec:
    """How the pictures and videos of an original LLaVA are prepared.

    Args:
      tower: how its encoder's processor prepares a picture.
      pinpoint_order, image_mode: as in `open_llava`.
    """
    f = Fields(values, DEFAULTS, source)
    for key in _OFF:
        if f[key]:
            f.refuse(key, "only models without it are supported")
    if f[RESAMPLER] not in (None, "spatial_pool"):
        f.refuse(RESAMPLER, "only models without a resampler, and spatial_pool, are supported")
    aspect = str(f[ASPECT])
    if image_mode is None and not re.fullmatch(r"anyres(_max_[1-9]\d*)?", aspect):
        if aspect not in ("square", "pad"):
            f.refuse(ASPECT, "choose square, pad, anyres or anyres_max_N")
        if f[MERGE] != "flat":
            f.refuse(MERGE, f"with {ASPECT}={aspect!r} it must be flat; or name an image_mode")
        return as_asked(_one_view(tower, aspect), values, source, pinpoint_order)
    if image_mode not in (None, "anyres"):
        return in_mode(tower, image_mode)
    if f[MERGE] not in MERGES:
        f.refuse(MERGE, f"choose one of {', '.join(MERGES)}")
    limit = re.search(r"_max_(\d+)", aspect)
    limit = int(limit[1]) if limit else 0
    tiling = Tiling(
        grids(f, tower.size, pinpoint_order or "original"),
        f[MERGE],
        rounded=False,
        cap=limit if f[MERGE] == "spatial_unpad" else 0,
        one_view=_shows_several_as_one_view(family, vision, bool(limit)),
    )
    video = _video(f, tower, bool(limit))
    spec = dataclasses.replace(tower, mode="anyres", tiling=tiling, video=video)
    return as_asked(spec, values, source, pinpoint_order)


def _one_view(tower: ImageSpec, aspect: str) -> ImageSpec:
    return dataclasses.replace(tower, mode="pad") if aspect == "pad" else tower


def _shows_several_as_one_view(family: DecoderFamily, vision: ViTConfig, limited: bool) -> bool:
    """OneVision, LLaVA-Video and Interleave were trained so; 1.6 cuts all pictures into tiles."""
    return limited or (family.model_type == "qwen2" and not vision.class_token)


def _video(f: Fields, tower: ImageSpec, limited: bool) -> VideoSpec | None:
    """How videos are shown; None for models of a time before there were any."""
    average_first = f[RESAMPLER] == "spatial_pool"
    named = any(f.values.get(key) is not None for key in (POOL, POSITION))
    if not (average_first or limited or named) or f[MERGE] == "flat":
        return None
    choices = ("average",) if average_first else ("bilinear", "average")
    pool = f.values.get(POOL) or choices[0]
    if pool not in choices:
        f.refuse(POOL, f"only {' and '.join(choices)} are supported")
    if average_first:
        if f["mm_spatial_pool_stride"] not in (None, 2):
            f.refuse("mm_spatial_pool_stride", "only 2 is supported")
        return VideoSpec(tower.mode, "average_before_projector", "no_token")
    position = f[POSITION]
    if position not in ("no_token", "one_token", "frame", "grid"):
        f.refuse(POSITION, "choose no_token, one_token, frame or grid")
    if position == "one_token" and f[MERGE] != "spatial_unpad":
        position = "no_token"
    frames = f["frames_upbound"]
    if type(frames) is not int or frames < 1:
        frames = 64 if position == "grid" else 32  # as LLaVA-Video and OneVision are asked
    return VideoSpec(
        mode=tower.mode,
        pool=pool,
        newline=position,
        frames=frames,
        time_instruction=bool(f["add_time_instruction"]),
    )
