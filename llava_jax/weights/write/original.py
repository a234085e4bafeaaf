"""The files of a folder in the form of the original LLaVA code, besides its weights.

Keys are those that llava/model/builder.py and llava_arch.py of haotian-liu/LLaVA read. The vision
encoder's own config and preprocessing are in a sub-folder with the last part of the name
`mm_vision_tower`.
"""

from pathlib import Path

from llava_jax.files import write_json
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.presets import clip_large
from llava_jax.models.projector import ProjectorSpec
from llava_jax.weights.families import encoder_to_hf, families_of
from llava_jax.weights.read.prompt_words import PromptWords
from llava_jax.weights.write.huggingface import (
    HFTokenizer,
    dtype_keys,
    generation_config_json,
    preprocessor_config_json,
)

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
    if config.image.mode not in ("square", "pad", "resize"):
        return f"the original code does not have the image mode {config.image.mode}"
    return None


def config_json(config: LlavaConfig, ids: dict[str, int], dtype: str) -> dict:
    """config.json of a model, the inverse of what `original.open_original` reads.

    Args:
      ids: bos_token_id, eos_token_id, pad_token_id.
      dtype: of the tensors.
    """
    family = families_of(config).decoder
    aspect = {} if config.image.mode == "resize" else {"image_aspect_ratio": config.image.mode}
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
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.keep_class_token else "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_use_im_patch_token": False,
        # With it the original code builds the encoder before it reads the weights.
        "unfreeze_mm_vision_tower": True,
        "tokenizer_model_max_length": config.decoder.max_position_embeddings,
        "tokenizer_padding_side": "right",
        **aspect,
    }


def tower_name(config: LlavaConfig) -> str:
    """mm_vision_tower: a public name, or that of the sub-folder."""
    return PUBLIC_TOWERS.get(config.vision, "vision_tower")


def write_side_files(
    folder: Path, config: LlavaConfig, tokenizer: HFTokenizer, words: PromptWords, dtype: str
) -> None:
    """Writes every file of the folder but the weights and their checksums."""
    write_json(folder / "config.json", config_json(config, tokenizer.ids, dtype))
    tower = folder / Path(tower_name(config)).name
    tower.mkdir()
    write_json(tower / "config.json", encoder_to_hf(config.vision) | dtype_keys(dtype))
    write_json(tower / "preprocessor_config.json", preprocessor_config_json(config))
    write_json(folder / "generation_config.json", generation_config_json(tokenizer, words))
    tokenizer.write(folder)
