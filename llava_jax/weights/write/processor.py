"""The files of a Hugging Face LLaVA that say how pictures and videos are prepared.

Keys are those of the llava-hf checkpoints; what a class cannot say is left to `own_keys`.
"""

from pathlib import Path

from llava_jax.files import write_json
from llava_jax.models.images import ImageSpec, cells_a_side
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.conversation import IMAGE_TOKEN, VIDEO_TOKEN
from llava_jax.weights.llava_classes import (
    ASPECT,
    NEXT_VIDEO,
    ONEVISION,
    PINPOINTS,
    STRATEGY,
    class_of,
)
from llava_jax.weights.read.image_settings import BICUBIC

PICTURES, FRAMES = "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"


def strategy(config: LlavaConfig) -> str:
    """vision_feature_select_strategy."""
    drops = config.drop_first_patch or (config.vision.class_token and not config.keep_class_token)
    return "default" if drops else "full"


def picture_keys(config: LlavaConfig) -> dict:
    """What config.json says of pictures and videos."""
    image, llava = config.image, class_of(config.image)
    keys = {STRATEGY: strategy(config)}
    if not llava.tiled:
        return keys | {"image_seq_length": config.tokens_per_tile}
    keys[PINPOINTS] = pinpoints(image)
    if llava is ONEVISION:
        keys[ASPECT] = _aspect(image)
    else:
        keys["image_seq_length"] = cells_a_side(image, config.tokens_per_tile) ** 2
    if llava is NEXT_VIDEO:
        keys |= {"spatial_pool_mode": "average", "spatial_pool_stride": 2}
    return keys


def pinpoints(image: ImageSpec, order: str = "hf") -> list[list[int]]:
    """image_grid_pinpoints: (height, width), or (width, height) as the original code reads them."""
    turned = slice(None, None, -1 if order == "hf" else 1)
    return [[image.size * n for n in grid[turned]] for grid in image.tiling.grids]


def _aspect(image: ImageSpec) -> str:
    """vision_aspect_ratio: without a cap, one that no picture reaches."""
    most = max(columns * rows for columns, rows in image.tiling.grids)
    return f"anyres_max_{image.tiling.cap or most}"


def preprocessor_config_json(config: LlavaConfig) -> dict:
    """preprocessor_config.json: our picture mode, in the keys of transformers."""
    image, llava = config.image, class_of(config.image)
    square, edge = _square(image.size), {"shortest_edge": image.size}
    if llava.tiled:
        kind = llava.image_processor, {"do_pad": True, PINPOINTS: pinpoints(image)}
    else:
        kind = {
            "pad": ("Llava", {"do_pad": True}),
            "square": ("CLIP", {}),
            "resize": ("Siglip", {}),
        }[image.mode]
    name, more = kind
    cropped = llava is not ONEVISION and image.mode != "resize"
    if cropped:
        more |= {"do_center_crop": True, "crop_size": square}
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{llava.name}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": edge if cropped else square,
        "resample": BICUBIC,
        **more,
        **_normalised(image),
    }


def video_preprocessor_config_json(config: LlavaConfig) -> dict:
    """video_preprocessor_config.json: how a frame becomes its tile."""
    image, llava = config.image, class_of(config.image)
    square = _square(image.size)
    if image.video.mode == "square":
        size = {"shortest_edge": image.size}
        crop = {"do_center_crop": True, "crop_size": square}
    else:
        size, crop = square, {"do_center_crop": False}
    return {
        "video_processor_type": f"{llava.name}VideoProcessor",
        "processor_class": f"{llava.name}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": BICUBIC,
        **crop,
        **_normalised(image),
        "do_sample_frames": False,
        "num_frames": image.video.frames,
    }


def _square(side: int) -> dict:
    return {"height": side, "width": side}


def _normalised(image: ImageSpec) -> dict:
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def processor_config_json(config: LlavaConfig, image_token: str = IMAGE_TOKEN) -> dict:
    """processor_config.json: what it takes to count the tokens of an image."""
    llava, class_token = class_of(config.image), int(config.vision.class_token)
    values = {
        "processor_class": f"{llava.name}Processor",
        "image_token": image_token,
        STRATEGY: strategy(config),
    }
    if llava.video:
        values["video_token"] = VIDEO_TOKEN
    if llava is not ONEVISION:
        counted = {"num_additional_image_tokens": class_token}
        return values | {"patch_size": config.vision.patch_size} | counted
    tokens = config.tokens_per_tile + class_token  # less one where it is dropped
    return values | {"num_image_tokens": tokens, ASPECT: _aspect(config.image)}


def write_processor(folder: Path, config: LlavaConfig, image_token: str) -> None:
    """Writes the files of a processor."""
    write_json(folder / PICTURES, preprocessor_config_json(config))
    if config.image.video:
        write_json(folder / FRAMES, video_preprocessor_config_json(config))
    write_json(folder / PROCESSOR, processor_config_json(config, image_token))
