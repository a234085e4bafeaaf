"""A Hugging Face LLaVA's `config.json` -> LlavaConfig; `write/huggingface.py` is the way back."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.llava import IMAGE_TOKEN_ID, LlavaConfig
from llava_jax.models.vit import ViTConfig, feature_states
from llava_jax.weights.families import (
    DECODERS,
    ENCODERS,
    Families,
    family_of,
)
from llava_jax.weights.llava_classes import (
    CLASSES,
    NEXT_VIDEO,
    STRATEGY,
    LlavaClass,
    is_hugging_face,
)
from llava_jax.weights.read.fields import Fields, read_json
from llava_jax.weights.read.image_settings import image_settings, processor_values
from llava_jax.weights.read.tiled_pictures import as_asked, frame_settings, tiled_pictures
from llava_jax.weights.tensors import StoredTensor

HEAD = "lm_head.weight"

# Models that read pictures in other ways than LLaVA, by the start of their model_type.
_OTHER_FAMILIES = {
    "llavaonevision": "LLaVA-OneVision-1.5",
    "video_llava": "Video-LLaVA",
    "vipllava": "ViP-LLaVA",
    "blip": "BLIP",
    "instructblip": "InstructBLIP",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "idefics": "Idefics",
    "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "internvl": "InternVL",
    "mllama": "Llama 3.2 Vision",
    "llama4": "Llama 4",
    "mistral3": "Mistral 3",
    "pixtral": "Pixtral",
    "kosmos": "Kosmos",
    "fuyu": "Fuyu",
    "florence": "Florence",
    "aya_vision": "Aya Vision",
    "deepseek_vl": "DeepSeek-VL",
}


_VIDEO_ARCHITECTURE = NEXT_VIDEO.class_name


def llava_class(values: dict, source: str) -> LlavaClass:
    """The class of transformers that a `config.json` is for.

    Raises:
      LlavaError: it is of anything but a Hugging Face LLaVA.
    """
    family = str(values.get("model_type"))
    if family in CLASSES and is_hugging_face(values):
        for key in ("text_config", "vision_config"):
            if not isinstance(values.get(key), dict | None):
                raise LlavaError(f"{source} has {key}={values[key]!r}: it must be an object")
        # The first revisions of LLaVA-NeXT-Video call themselves llava_next.
        named = str(values.get("architectures"))
        return NEXT_VIDEO if _VIDEO_ARCHITECTURE in named else CLASSES[family]
    if family in DECODERS:
        raise LlavaError(
            f"{source} is of a {family} language model alone: give the folder of a vision encoder "
            "too (--vision_tower DIR, or vision_tower=)"
        )
    if family in ENCODERS:
        raise LlavaError(
            f"{source} is of a {family} vision encoder alone: give the language model's folder, "
            "and this one as --vision_tower (vision_tower=)"
        )
    names = [name for start, name in _OTHER_FAMILIES.items() if family.startswith(start)]
    if names:
        raise LlavaError(
            f"{source} is a {names[0]} checkpoint (model_type {family}): that family is not "
            f"supported; {', '.join(CLASSES)} are"
        )
    raise LlavaError(
        f"{source} has model_type={family!r}: LLaVAs can be read in Hugging Face form (model_type "
        f"{', '.join(CLASSES)}, with text_config and vision_config) or the original's (mm_* keys)"
    )


def llava_config(
    folder: Path, values: dict | None = None, pinpoint_order: str | None = None
) -> tuple[LlavaConfig, Families]:
    """The model in a folder that one of transformers' LLaVA classes loads.

    Args:
      values: the folder's `config.json`, if it is read already.
      pinpoint_order: as in `open_llava`.
    """
    source = str(folder / "config.json")
    values = read_json(folder / "config.json") if values is None else values
    llava = llava_class(values, source)
    f = Fields(values, llava.defaults, source)
    parts = {"vision": _vision_values(values, llava), "text": _text_values(values, llava)}
    families = Families(
        family_of("vision", parts["vision"], f"{source} (vision_config)"),
        family_of("decoder", parts["text"], f"{source} (text_config)"),
    )
    vision = families.vision.read(parts["vision"], f"{source} (vision_config)")
    decoder = families.decoder.read(parts["text"], f"{source} (text_config)")
    _check_llava(f, vision)
    if llava.tiled:
        image = tiled_pictures(folder, f, llava, families.vision.images, vision, pinpoint_order)
    else:
        image = image_settings(folder, families.vision.images, vision.image_size)
    if image.size != vision.image_size and not vision.layer_scale:
        raise LlavaError(
            f"{source} has an encoder for pictures of {vision.image_size} pixels, and the folder's "
            f"preprocessor makes {image.size}: only DINOv2 takes another size"
        )
    layers, drops_first = f["vision_feature_layer"], f[STRATEGY] == "default"
    image = as_asked(image, values, source, pinpoint_order)
    videos = {"video_token_id": _placeholder(f, "video", decoder)} if image.video else {}
    config = LlavaConfig(
        vision=vision,
        decoder=decoder,
        projector="mlp2x_gelu",
        projector_bias=bool(f["multimodal_projector_bias"]),
        feature_layer=tuple(layers) if isinstance(layers, list) else layers,
        keep_class_token=not drops_first and vision.class_token,
        drop_first_patch=drops_first and not vision.class_token,
        image=image,
        image_token_id=_placeholder(f, "image", decoder),
        **videos,
    )
    if config.video_token_id == config.image_token_id:
        f.refuse("video_token_index", "pictures have the same placeholder")
    return config, families


def huggingface_notes(folder: Path, values: dict, config: LlavaConfig) -> Iterator[str]:
    """What was assumed about a folder's pictures, and what of its config.json is not obeyed."""
    if not is_hugging_face(values):  # a language model, to which an encoder was given
        return
    _, pictures = processor_values(folder)
    if pictures is None:
        yield (
            f"{folder} has no preprocessor_config.json: pictures are prepared as for "
            f"{config.image.size} pixels in the mode {config.image.mode}, with the mean "
            f"{config.image.mean} and the deviation {config.image.std}"
        )
    text = values.get("text_config")
    stray = [key for key in ("factor", "type") if isinstance(text, dict) and key in text]
    if stray:
        yield (
            f"{folder}/config.json has {' and '.join(stray)} in text_config, outside rope_scaling: "
            "rotary positions are not scaled by it, as in transformers"
        )
    frames, llava = frame_settings(folder), llava_class(values, f"{folder}/config.json")
    if frames and llava.video and config.image.tiling and config.image.video is None:
        yield (
            f"{frames[0]} normalises frames otherwise than pictures are normalised: the model "
            "takes no videos"
        )


def _placeholder(f: Fields, kind: str, decoder: DecoderConfig) -> int:
    """The placeholder of an `image` or a `video`."""
    token_id = f[f"{kind}_token_id"]  # the newer spelling of the same key
    token_id = f[f"{kind}_token_index"] if token_id is None else token_id
    if type(token_id) is not int or not 0 <= token_id < decoder.vocab_size:
        raise LlavaError(
            f"{f.source} has {kind}_token_index={token_id!r}: it must be a token of the vocabulary "
            f"of {decoder.vocab_size}"
        )
    return token_id


def _vision_values(values: dict, llava: LlavaClass) -> dict:
    if values.get("vision_config") is None:
        return dict(llava.vision)
    return {"model_type": llava.vision["model_type"]} | values["vision_config"]


def _text_values(values: dict, llava: LlavaClass) -> dict:
    return {"model_type": llava.text_type} | (values.get("text_config") or {})


def _check_llava(f: Fields, vision: ViTConfig) -> None:
    if f["projector_hidden_act"] != "gelu":
        f.refuse("projector_hidden_act", "only gelu is supported")
    layers = f["vision_feature_layer"]
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or any(type(layer) is not int for layer in layers):
        f.refuse("vision_feature_layer", "it must be the number of a layer, or a list of such")
    try:
        feature_states(vision, tuple(layers))
    except ValueError as error:
        f.refuse("vision_feature_layer", str(error))
    if f[STRATEGY] not in ("default", "full"):
        f.refuse(STRATEGY, "choose default or full")


def settle_tying(
    config: LlavaConfig, values: dict, decoder_tensors: dict[str, StoredTensor]
) -> LlavaConfig:
    """Decides whether the output head is the embedding table.

    In every version of transformers they are tied if `text_config` says so. The top level, which is
    true by default in the 4.x line whatever the model, counts only if there is no head. A head that
    differs from the table is one of its own: LLaVA-NeXT of transformers 5 is tied by its top level,
    and its other classes do not tie tables that differ.
    """
    held = HEAD in decoder_tensors
    tied = config.decoder.tie_word_embeddings
    tied |= bool(values.get("tie_word_embeddings")) and not held
    tables = [t for name, t in decoder_tensors.items() if name.endswith("embed_tokens.weight")]
    if tied and held and tables and config.image.tiling is not None:
        tied = _same_rows(*tables, decoder_tensors[HEAD])
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(config, decoder=decoder)


def _same_rows(first: StoredTensor, second: StoredTensor, rows: int = 16) -> bool:
    """Whether two tables are equal in some rows from the first to the last."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    some = np.linspace(0, first.shape[0] - 1, rows).astype(int)
    return np.array_equal(first.map()[some], second.map()[some])


def composed_config(
    vision_folder: Path, decoder_folder: Path, **fields
) -> tuple[LlavaConfig, Families]:
    """A fresh LLaVA of an encoder folder and a language model folder.

    Pictures are prepared as the encoder's folder says; `fields` set or override LlavaConfig fields.
    """
    found = {}
    for part, folder in (("vision", vision_folder), ("decoder", decoder_folder)):
        source = str(folder / "config.json")
        values = read_json(folder / "config.json")
        family = family_of(part, values, source)
        found[part] = family, family.read(values, source)
    (encoder, vision), (language, decoder) = found["vision"], found["decoder"]
    image = image_settings(vision_folder, encoder.images, vision.image_size, trained=False)
    fields = {"image_token_id": IMAGE_TOKEN_ID, "image": image} | fields
    return LlavaConfig(vision, decoder, **fields), Families(encoder, language)
