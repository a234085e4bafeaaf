"""A Hugging Face LLaVA's `config.json` -> LlavaConfig; `write/huggingface.py` is the way back."""

from pathlib import Path

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
from llava_jax.weights.read.fields import Fields, read_json
from llava_jax.weights.read.image_settings import image_settings

_STRATEGY = "vision_feature_select_strategy"
# Models that read pictures in other ways than LLaVA-1.5, by the start of their model_type.
_OTHER_FAMILIES = {
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "llava_qwen": "LLaVA-OneVision",
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


def _refuse_family(values: dict, source: str) -> None:
    """Raises LlavaError for the config.json of anything but a Hugging Face LLaVA."""
    family = str(values.get("model_type"))
    if family == "llava" and "text_config" in values:
        for key in ("text_config", "vision_config"):
            if not isinstance(values.get(key), dict | None):
                raise LlavaError(f"{source} has {key}={values[key]!r}: it must be an object")
        return
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
    names = [name for start, name in _OTHER_FAMILIES.items() if str(family).startswith(start)]
    if names:
        raise LlavaError(
            f"{source} is a {names[0]} checkpoint (model_type {family}): that family is not "
            "supported yet; LLaVA 1 and 1.5 are"
        )
    raise LlavaError(
        f"{source} has model_type={family!r}: LLaVA 1 and 1.5 can be read, in Hugging Face form "
        "(model_type llava, with text_config and vision_config) or the original's (mm_* keys)"
    )


def llava_config(folder: Path, values: dict | None = None) -> tuple[LlavaConfig, Families]:
    """The model in a folder that `LlavaForConditionalGeneration` of transformers loads.

    Args:
      values: the folder's `config.json`, if it is read already.
    """
    source = str(folder / "config.json")
    values = read_json(folder / "config.json") if values is None else values
    _refuse_family(values, source)
    f = Fields(
        values,
        {
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            _STRATEGY: "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
        },
        source,
    )
    families = Families(
        family_of("vision", _vision_values(values), f"{source} (vision_config)"),
        family_of("decoder", values["text_config"] or {}, f"{source} (text_config)"),
    )
    vision = families.vision.read(_vision_values(values), f"{source} (vision_config)")
    decoder = families.decoder.read(values["text_config"] or {}, f"{source} (text_config)")
    _check_llava(f, vision)
    image = image_settings(folder, families.vision.images, vision.image_size)
    if image.size != vision.image_size and not vision.layer_scale:
        raise LlavaError(
            f"{source} has an encoder for pictures of {vision.image_size} pixels, and the folder's "
            f"preprocessor makes {image.size}: only DINOv2 takes another size"
        )
    layers, drops_first = f["vision_feature_layer"], f[_STRATEGY] == "default"
    config = LlavaConfig(
        vision=vision,
        decoder=decoder,
        projector="mlp2x_gelu",
        projector_bias=bool(f["multimodal_projector_bias"]),
        feature_layer=tuple(layers) if isinstance(layers, list) else layers,
        keep_class_token=not drops_first and vision.class_token,
        drop_first_patch=drops_first and not vision.class_token,
        image=image,
        image_token_id=_image_token(f, decoder),
    )
    return config, families


def _image_token(f: Fields, decoder: DecoderConfig) -> int:
    token_id = f["image_token_id"]  # the newer spelling of the same key
    token_id = f["image_token_index"] if token_id is None else token_id
    if type(token_id) is not int or not 0 <= token_id < decoder.vocab_size:
        raise LlavaError(
            f"{f.source} has image_token_index={token_id!r}: it must be a token of the vocabulary "
            f"of {decoder.vocab_size}"
        )
    return token_id


def _vision_values(values: dict) -> dict:
    if values.get("vision_config") is not None:
        return values["vision_config"]
    return {  # transformers' LlavaConfig without a vision_config: CLIP-L/14 at 336 pixels
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }


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
    if f[_STRATEGY] not in ("default", "full"):
        f.refuse(_STRATEGY, "choose default or full")


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
