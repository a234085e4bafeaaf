"""The files of a folder in the form of the original LLaVA code, besides its weights.

Keys are those that llava/model/builder.py and llava_arch.py of haotian-liu/LLaVA read. The vision
encoder's own config and preprocessing are in a sub-folder with the last part of the name
`mm_vision_tower`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llava_jax.files import write_json
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.presets import SIGLIP_SO400M, clip_large
from llava_jax.models.projector import ProjectorSpec
from llava_jax.weights.families import encoder_to_hf, families_of
from llava_jax.weights.llava_classes import PINPOINTS
from llava_jax.weights.own_keys import OWN_KEY, in_words, own_keys
from llava_jax.weights.read.image_settings import image_settings
from llava_jax.weights.read.original import OWN_TOWER
from llava_jax.weights.read.original_pictures import (
    ASPECT,
    MERGE,
    POOL,
    POSITION,
    RESAMPLER,
    original_pictures,
)
from llava_jax.weights.read.prompt_words import PromptWords
from llava_jax.weights.write.huggingface import HFTokenizer, dtype_keys, generation_config_json
from llava_jax.weights.write.processor import pinpoints, preprocessor_config_json

# Encoders that the original code fetches by name; any other must be in a folder.
PUBLIC_TOWERS = {
    clip_large(224): "openai/clip-vit-large-patch14",
    clip_large(336): "openai/clip-vit-large-patch14-336",
}


def fault(config: LlavaConfig) -> str | None:
    """Why the original code cannot express a model, or None."""
    family = families_of(config).decoder
    if not family.original_class:
        return f"the original code does not have the language model {family.model_type}"
    if ProjectorSpec.parse(config.projector).fold > 1:
        return f"the original code does not have the projector {config.projector}"
    if not config.projector_bias:
        return "its projector has no bias"
    if not isinstance(config.feature_layer, int) or config.drop_first_patch:
        return "its image features are taken as only transformers does"
    image = config.image
    if image.mode not in ("square", "pad", "resize", "anyres"):
        return f"the original code does not have the image mode {image.mode}"
    if image.video and image.tiling is None:
        return "it takes videos without pictures in tiles"
    return None


def config_json(config: LlavaConfig, ids: dict[str, int], dtype: str) -> dict:
    """config.json of a model, the inverse of what `original.open_original` reads.

    Args:
      ids: bos_token_id, eos_token_id, pad_token_id.
      dtype: of the tensors.
    """
    family = families_of(config).decoder
    return {
        **family.write(config.decoder),
        **ids,
        **dtype_keys(dtype),
        "architectures": [family.original_class],
        "model_type": family.original_types[0],
        "use_mm_proj": True,
        "mm_projector_type": config.projector,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_vision_tower": tower_name(config),
        "mm_vision_select_layer": -2 if _is_shortened(config) else config.feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.keep_class_token else "patch",
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_use_im_patch_token": False,
        # With it the original code builds the encoder before it reads the weights.
        "unfreeze_mm_vision_tower": True,
        "tokenizer_model_max_length": config.decoder.max_position_embeddings,
        "tokenizer_padding_side": "right",
        **picture_keys(config.image),
    }


def picture_keys(image: ImageSpec) -> dict:
    """What config.json says of pictures and videos."""
    tiling, video = image.tiling, image.video
    if tiling is None:
        aspect = {} if image.mode == "resize" else {ASPECT: image.mode}
        return {MERGE: "flat"} | aspect
    keys = {
        ASPECT: f"anyres_max_{tiling.cap}" if tiling.cap else "anyres",
        PINPOINTS: pinpoints(image, "original"),
        MERGE: tiling.merge,
    }
    if video is None:
        return keys
    if video.pool == "average_before_projector":
        pool = {RESAMPLER: "spatial_pool", POOL: "average"}
    else:
        pool = {POSITION: video.newline, POOL: video.pool}
    timed = {"add_time_instruction": True} if video.time_instruction else {}
    return keys | pool | {"mm_spatial_pool_stride": 2} | timed


def _is_shortened(config: LlavaConfig) -> bool:
    """Whether the encoder is a SigLIP that the original code makes by taking away a last block."""
    siglip = families_of(config).vision.model_type == "siglip_vision_model"
    return siglip and config.feature_layer == -1


def tower_name(config: LlavaConfig) -> str:
    """mm_vision_tower: a public name, or that of the sub-folder."""
    if _is_shortened(config):
        public = config.vision == SIGLIP_SO400M
        return "google/siglip-so400m-patch14-384" if public else "siglip_vision_tower"
    return PUBLIC_TOWERS.get(config.vision, OWN_TOWER)


def _tower_files(folder: Path, config: LlavaConfig, dtype: str) -> ImageSpec:
    """Writes the encoder's config and preprocessing; how a picture is prepared by it."""
    tower, vision = folder / Path(tower_name(config)).name, config.vision
    tower.mkdir()
    if _is_shortened(config):
        vision = dataclasses.replace(vision, num_layers=vision.num_layers + 1)
    write_json(tower / "config.json", encoder_to_hf(vision) | dtype_keys(dtype))
    image, family = config.image, families_of(config).vision
    if image.tiling is not None:
        mode = image.video.mode if image.video else family.images.mode
        image = dataclasses.replace(image, mode=mode, tiling=None, video=None)
    plain = dataclasses.replace(config, image=image)
    write_json(tower / "preprocessor_config.json", preprocessor_config_json(plain))
    return image_settings(tower, family.images, image.size)


def write_side_files(
    folder: Path,
    config: LlavaConfig,
    tokenizer: HFTokenizer,
    words: PromptWords,
    dtype: str,
    log: Callable[[str], None],
) -> None:
    """Writes every file of the folder but the weights and their checksums.

    log: is given what the original code will do otherwise.
    """
    values = config_json(config, tokenizer.ids, dtype) | words.box_keys
    tower = _tower_files(folder, config, dtype)
    family = families_of(config).decoder
    form = original_pictures(values, "config.json", tower, config.vision, family)
    own = own_keys(form, config.image)
    if own:
        log(
            f"config.json keeps {in_words(own[OWN_KEY])} for llava-jax: the original code does not "
            "read that, and shows such pictures and videos in its own way"
        )
    write_json(folder / "config.json", values | own)
    write_json(folder / "generation_config.json", generation_config_json(tokenizer, words))
    tokenizer.write(folder)
