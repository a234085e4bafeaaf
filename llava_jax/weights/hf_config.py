"""Hugging Face's `config.json` and `preprocessor_config.json` -> our configs, and back.

Omitted keys take the defaults of transformers' config class for that `model_type`, because
`save_pretrained` of the 4.x line left out whatever equalled a default inside LLaVA's sub-configs.
"""

import dataclasses
import json
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig, RopeScaling
from llava_jax.models.llava import CLIP_MEAN, CLIP_STD, IMAGE_TOKEN_ID, LlavaConfig
from llava_jax.models.vit import ACTIVATIONS, ViTConfig, feature_states

MAX_LAYERS = 1000
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json stores it


def read_json(path: Path) -> dict:
    """The object in a JSON file, or a LlavaError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LlavaError(f"{path} is missing: give the folder of a checkpoint.") from error
    except (OSError, ValueError) as error:
        raise LlavaError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise LlavaError(f"{path} must hold a JSON object.")
    return content


class _Fields:
    """Lookups in a config with transformers' defaults and errors that name the source."""

    def __init__(self, values: dict, defaults: dict, source: str):
        self.values, self.defaults, self.source = values, defaults, source

    def __getitem__(self, key: str):
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str, most: int = 2**31 - 1) -> int:
        value = self[key]
        if type(value) is not int or not 0 < value <= most:
            raise LlavaError(
                f"{self.source} has {key}={value!r}: it must be an integer from 1 to {most}."
            )
        return value

    def number(self, key: str) -> float:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LlavaError(f"{self.source} has {key}={value!r}: it must be a number.")
        return float(value)

    def check_plain(self) -> None:
        """Refuses settings that change the numbers and that no model of ours has."""
        if self["quantization_config"]:
            self.refuse("quantization_config", "save the weights in float32, bfloat16 or float16")
        rope = self["rope_parameters"] or self["rope_scaling"] or {}
        inside = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
        if (inside or self["partial_rotary_factor"] or 1) != 1:
            factor = inside or self["partial_rotary_factor"]
            raise LlavaError(
                f"{self.source} has partial_rotary_factor={factor}: only rotation of the whole "
                "head is supported."
            )

    def refuse(self, key: str, reason: str):
        raise LlavaError(f"{self.source} has {key}={self[key]!r}: {reason}.")


# --- decoders -------------------------------------------------------------------------------------

_DECODER_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = _DECODER_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


def decoder_config(values: dict, source: str = "config.json") -> DecoderConfig:
    """A Llama-family `config.json`, or LLaVA's `text_config`, as a DecoderConfig.

    Raises:
      LlavaError: a model type, activation or rotary scaling that the decoder does not have.
    """
    family = str(values.get("model_type", "llama"))
    if family not in DECODER_FAMILIES:
        raise LlavaError(
            f"{source} has model_type={family!r}: the language model must be one of "
            f"{', '.join(DECODER_FAMILIES)}."
        )
    return DECODER_FAMILIES[family](values, source)


def _llama(values: dict, source: str) -> DecoderConfig:
    f = _Fields(values, _DECODER_DEFAULTS, source)
    bias = bool(f["attention_bias"])
    return _decoder(f, qkv_bias=bias, o_bias=bias, mlp_bias=bool(f["mlp_bias"]))


def _mistral(values: dict, source: str) -> DecoderConfig:
    defaults = _DECODER_DEFAULTS | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    # null means no window (v0.2 and later); only an absent key means the default of v0.1.
    window = values.get("sliding_window", 4096)
    return _decoder(_Fields(values, defaults, source), sliding_window=window)


def _qwen2(values: dict, source: str) -> DecoderConfig:
    f = _Fields(values, _QWEN_DEFAULTS, source)
    return _decoder(f, qkv_bias=True, sliding_window=_qwen_window(f))


def _qwen3(values: dict, source: str) -> DecoderConfig:
    f = _Fields(values, _QWEN_DEFAULTS | {"head_dim": 128}, source)
    bias = bool(f["attention_bias"])
    window = _qwen_window(f)
    return _decoder(f, qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_window=window)


def _seed_oss(values: dict, source: str) -> DecoderConfig:
    defaults = _DECODER_DEFAULTS | {
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
    }
    f = _Fields(values, defaults, source)
    biases = {
        "qkv_bias": bool(f["attention_bias"]),
        "o_bias": bool(f["attention_out_bias"]),
        "mlp_bias": bool(f["mlp_bias"]),
    }
    return _decoder(f, **biases)


DECODER_FAMILIES = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "seed_oss": _seed_oss,
}


def _decoder(f: _Fields, **variants) -> DecoderConfig:
    f.check_plain()
    if f["hidden_act"] != "silu":
        f.refuse("hidden_act", "only silu is supported")
    heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
    theta, scaling = _rope(f)
    head_dim = f.integer("head_dim") if f["head_dim"] else hidden // heads
    # Null means one for each head in every family; only an absent key means the family's default.
    grouped = f["num_key_value_heads"] and f.values.get("num_key_value_heads", 0) is not None
    kv_heads = f.integer("num_key_value_heads") if grouped else heads
    if heads % kv_heads:
        f.refuse("num_key_value_heads", f"it must divide num_attention_heads={heads}")
    if head_dim % 2 or not head_dim:
        f.refuse("num_attention_heads", f"heads of {head_dim} numbers cannot be rotated in pairs")
    return DecoderConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=f.number("rms_norm_eps"),
        tie_word_embeddings=bool(f["tie_word_embeddings"]),
        max_position_embeddings=f.integer("max_position_embeddings"),
        **variants,
    )


def _qwen_window(f: _Fields) -> int | None:
    if not f["use_sliding_window"] or not f["sliding_window"]:
        return None
    layers = f.integer("num_hidden_layers", MAX_LAYERS)
    kinds = f["layer_types"] or [
        "sliding_attention" if i >= f["max_window_layers"] else "full_attention"
        for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        f.refuse("max_window_layers", "a window on some of the layers is not supported")
    return f.integer("sliding_window") if kinds[0] == "sliding_attention" else None


def _rope(f: _Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from `rope_parameters` of transformers 5 or the two keys of 4."""
    values = f["rope_parameters"] or f["rope_scaling"] or {}
    if not isinstance(values, dict):
        f.refuse("rope_scaling", "it must be an object")
    theta = values.get("rope_theta") or f["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise LlavaError(f"{f.source} has rope_theta={theta!r}: it must be a number.")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise LlavaError(
            f"{f.source} scales its rotary positions by {kind!r}: only linear and llama3 are "
            "supported."
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [n for n in names if not isinstance(values.get(n), int | float)]
    if missing:
        raise LlavaError(f"{f.source} has rotary scaling {kind!r} without a number {missing[0]}.")
    return float(theta), RopeScaling(kind, **{n: values[n] for n in names})


def decoder_to_hf(config: DecoderConfig) -> dict:
    """The `config.json` that transformers reads as this decoder; inverse of `decoder_config`."""
    bias = (config.qkv_bias, config.o_bias, config.mlp_bias)
    if config.qk_norm:
        family, name = "qwen3", "Qwen3"
    elif bias == (True, False, False):
        family, name = "qwen2", "Qwen2"
    elif config.sliding_window:
        family, name = "mistral", "Mistral"
    elif config.qkv_bias == config.o_bias:
        family, name = "llama", "Llama"
    else:
        family, name = "seed_oss", "SeedOss"
    values = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
    }
    if family.startswith("qwen"):
        values |= {"use_sliding_window": bool(config.sliding_window), "max_window_layers": 0}
    if decoder_config(values) != config:
        raise LlavaError(f"no Hugging Face model type of ours has this combination: {config}.")
    return values


def _rope_to_hf(scaling: RopeScaling | None) -> dict | None:
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    values["rope_type"] = values.pop("kind")
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return values


# --- vision encoders ------------------------------------------------------------------------------

VISION_FAMILIES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2")
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_DEFAULTS = _CLIP_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_DINOV2_DEFAULTS = _CLIP_DEFAULTS | {
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}


def vision_config(values: dict, source: str = "config.json") -> ViTConfig:
    """A CLIP, SigLIP or DINOv2 `config.json`, or LLaVA's `vision_config`, as a ViTConfig.

    Raises:
      LlavaError: another model type, or a variant that the encoder does not have.
    """
    family = str(values.get("model_type", "clip_vision_model"))
    if family in ("clip", "siglip"):  # text and image model together
        values = values.get("vision_config") or values.get("vision_config_dict") or {}
    if family in ("clip", "clip_vision_model"):
        fields = _Fields(values, _CLIP_DEFAULTS, source)
        return _vit(fields, class_token=True, pre_norm=True, patch_bias=False, layer_scale=False)
    if family in ("siglip", "siglip_vision_model"):
        fields = _Fields(values, _SIGLIP_DEFAULTS, source)
        return _vit(fields, class_token=False, pre_norm=False, patch_bias=True, layer_scale=False)
    if family == "dinov2":
        return _dinov2(_Fields(values, _DINOV2_DEFAULTS, source))
    raise LlavaError(
        f"{source} has model_type={family!r}: the vision encoder must be clip, siglip or dinov2."
    )


def _dinov2(f: _Fields) -> ViTConfig:
    if f["use_swiglu_ffn"]:
        f.refuse("use_swiglu_ffn", "only DINOv2 with a plain MLP is supported")
    if not f["qkv_bias"]:
        f.refuse("qkv_bias", "only DINOv2 with query, key and value biases is supported")
    feed_forward = int(f.integer("hidden_size") * f.number("mlp_ratio"))
    f = _Fields(f.values | {"intermediate_size": feed_forward}, f.defaults, f.source)
    return _vit(f, class_token=True, pre_norm=False, patch_bias=True, layer_scale=True)


def _vit(f: _Fields, **variants: bool) -> ViTConfig:
    f.check_plain()
    if str(f["hidden_act"]) not in ACTIVATIONS:
        f.refuse("hidden_act", f"the vision encoder has {', '.join(ACTIVATIONS)}")
    if f["num_channels"] != 3:
        f.refuse("num_channels", "pictures have 3")
    if f.integer("hidden_size") % f.integer("num_attention_heads"):
        f.refuse("num_attention_heads", f"it must divide hidden_size={f['hidden_size']}")
    if f.integer("image_size") < f.integer("patch_size"):
        f.refuse("image_size", f"a patch alone has {f['patch_size']} pixels")
    return ViTConfig(
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", MAX_LAYERS),
        num_heads=f.integer("num_attention_heads"),
        patch_size=f.integer("patch_size"),
        image_size=f.integer("image_size"),
        hidden_act=f["hidden_act"],
        layer_norm_eps=f.number("layer_norm_eps"),
        **variants,
    )


def vision_to_hf(config: ViTConfig) -> dict:
    """The `config.json` that transformers reads as this encoder; the inverse of `vision_config`."""
    values = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if config.layer_scale:
        values |= {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "mlp_ratio": config.intermediate_size // config.hidden_size,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
        }
    else:
        name, family = ("CLIP", "clip") if config.class_token else ("Siglip", "siglip")
        values |= {
            "architectures": [f"{name}VisionModel"],
            "model_type": f"{family}_vision_model",
            "intermediate_size": config.intermediate_size,
        }
    if vision_config(values) != config:
        raise LlavaError(f"no Hugging Face model type of ours has this combination: {config}.")
    return values


# --- pictures -------------------------------------------------------------------------------------


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
    clip_like = "Siglip" not in str(values.get("image_processor_type", "CLIP"))
    f = _Fields(values, {"do_center_crop": clip_like, "resample": BICUBIC}, str(path))
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


def _channels(f: _Fields, key: str, default: tuple) -> tuple[float, float, float]:
    values = default if f[key] is None else f[key]
    numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) for v in values)
    if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
        f.refuse(key, "it must be three numbers, one a colour")
    return tuple(map(float, values))


def _side(size: object) -> int | None:
    """224 from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict):
        values = set(size.values())
        size = values.pop() if len(values) == 1 else None
    return size if type(size) is int and size > 0 else None


# --- LLaVA ----------------------------------------------------------------------------------------

_STRATEGY = "vision_feature_select_strategy"
# Models that read pictures in other ways than LLaVA-1.5, by model_type or how it begins.
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
                raise LlavaError(f"{source} has {key}={values[key]!r}: it must be an object.")
        return
    if family in DECODER_FAMILIES:
        raise LlavaError(
            f"{source} is of a {family} language model alone: give the folder of a vision encoder "
            "too (--vision_tower DIR, or vision_tower=)."
        )
    if family in VISION_FAMILIES:
        raise LlavaError(
            f"{source} is of a {family} vision encoder alone: give the language model's folder, "
            "and this one as --vision_tower (vision_tower=)."
        )
    names = [name for start, name in _OTHER_FAMILIES.items() if str(family).startswith(start)]
    if names:
        raise LlavaError(
            f"{source} is a {names[0]} checkpoint (model_type {family}): that family is not "
            "supported yet; LLaVA 1 and 1.5 are."
        )
    raise LlavaError(
        f"{source} has model_type={family!r}: LLaVA 1 and 1.5 can be read, in Hugging Face form "
        "(model_type llava, with text_config and vision_config) or the original's (mm_* keys)."
    )


def llava_config(folder: Path) -> LlavaConfig:
    """The LlavaConfig of a folder with a `LlavaForConditionalGeneration` of transformers."""
    source = str(folder / "config.json")
    values = read_json(folder / "config.json")
    _refuse_family(values, source)
    f = _Fields(
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
    vision = vision_config(_vision_values(values), f"{source} (vision_config)")
    decoder = decoder_config(values["text_config"] or {}, f"{source} (text_config)")
    _check_llava(f, vision)
    images = image_settings(folder) or default_images(vision)
    if images["image_size"] != vision.image_size and not vision.layer_scale:
        raise LlavaError(
            f"{source} has an encoder for pictures of {vision.image_size} pixels, and the folder's "
            f"preprocessor makes {images['image_size']}: only DINOv2 takes another size."
        )
    layers, drops_first = f["vision_feature_layer"], f[_STRATEGY] == "default"
    return LlavaConfig(
        vision=vision,
        decoder=decoder,
        projector="mlp2x_gelu",
        projector_bias=bool(f["multimodal_projector_bias"]),
        feature_layer=tuple(layers) if isinstance(layers, list) else layers,
        keep_class_token=not drops_first and vision.class_token,
        drop_first_patch=drops_first and not vision.class_token,
        image_token_id=_image_token(f, decoder),
        **images,
    )


def _image_token(f: _Fields, decoder: DecoderConfig) -> int:
    token_id = f["image_token_id"]  # the newer spelling of the same key
    token_id = f["image_token_index"] if token_id is None else token_id
    if type(token_id) is not int or not 0 <= token_id < decoder.vocab_size:
        raise LlavaError(
            f"{f.source} has image_token_index={token_id!r}: it must be a token of the vocabulary "
            f"of {decoder.vocab_size}."
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


def _check_llava(f: _Fields, vision: ViTConfig) -> None:
    f.check_plain()
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


def default_images(vision: ViTConfig) -> dict:
    if vision.class_token:
        mean, std, mode = CLIP_MEAN, CLIP_STD, "square"
    else:
        mean, std, mode = (0.5,) * 3, (0.5,) * 3, "resize"
    size = vision.image_size
    return {"image_mean": mean, "image_std": std, "image_mode": mode, "image_size": size}


def composed_config(vision_folder: Path, decoder_folder: Path, **fields) -> LlavaConfig:
    """A fresh LLaVA of an encoder folder and a language model folder.

    Pictures are prepared as the encoder's folder says; `fields` set or override LlavaConfig fields.
    """
    vision_source, decoder_source = vision_folder / "config.json", decoder_folder / "config.json"
    vision = vision_config(read_json(vision_source), str(vision_source))
    values = {
        "vision": vision,
        "decoder": decoder_config(read_json(decoder_source), str(decoder_source)),
        "image_token_id": IMAGE_TOKEN_ID,
        **(image_settings(vision_folder) or default_images(vision)),
    }
    return LlavaConfig(**(values | fields))
