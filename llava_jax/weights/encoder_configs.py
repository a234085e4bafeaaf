"""Vision encoders: each family's `config.json`, or LLaVA's `vision_config` -> ViTConfig.

One function a family, named in its row of `families.py`. `values` is the way back.
"""

from llava_jax.errors import LlavaError
from llava_jax.models.vit import ACTIVATIONS, ViTConfig
from llava_jax.weights.read.fields import MAX_LAYERS, Fields

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


def clip(values: dict, source: str) -> ViTConfig:
    variants = {"class_token": True, "pre_norm": True, "patch_bias": False, "layer_scale": False}
    return _vit(_encoder(values, source), _CLIP_DEFAULTS, source, **variants)


def siglip(values: dict, source: str) -> ViTConfig:
    variants = {"class_token": False, "pre_norm": False, "patch_bias": True, "layer_scale": False}
    return _vit(_encoder(values, source), _SIGLIP_DEFAULTS, source, **variants)


def dinov2(values: dict, source: str) -> ViTConfig:
    variants = {"class_token": True, "pre_norm": False, "patch_bias": True, "layer_scale": True}
    return _vit(values, _DINOV2_DEFAULTS, source, **variants)


def _encoder(values: dict, source: str) -> dict:
    """The encoder's values; in a model of texts and images they are an object of their own."""
    if values.get("model_type") in ("clip", "siglip"):
        values = values.get("vision_config") or values.get("vision_config_dict") or {}
        if not isinstance(values, dict):
            raise LlavaError(f"{source} has vision_config={values!r}: it must be an object")
    return values


def _vit(values: dict, defaults: dict, source: str, **variants: bool) -> ViTConfig:
    f = Fields(values, defaults, source)
    if str(f["hidden_act"]) not in ACTIVATIONS:
        f.refuse("hidden_act", f"the vision encoder has {', '.join(ACTIVATIONS)}")
    if f["num_channels"] != 3:
        f.refuse("num_channels", "pictures have 3")
    if f["use_swiglu_ffn"]:
        f.refuse("use_swiglu_ffn", "only a plain MLP is supported")
    if f["qkv_bias"] is not None and not f["qkv_bias"]:
        f.refuse("qkv_bias", "only query, key and value with biases are supported")
    if f.integer("hidden_size") % f.integer("num_attention_heads"):
        f.refuse("num_attention_heads", f"it must divide hidden_size={f['hidden_size']}")
    if f.integer("image_size") < f.integer("patch_size"):
        f.refuse("image_size", f"a patch alone has {f['patch_size']} pixels")
    if "mlp_ratio" in defaults:  # the families that have it do not read intermediate_size
        feed_forward = int(min(f["hidden_size"] * f.number("mlp_ratio"), 2**31))
        f = Fields(values | {"intermediate_size": feed_forward}, defaults, source)
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


def values(config: ViTConfig) -> dict:
    """The keys of `config.json` that every family has, for an encoder."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }


def clip_keys(config: ViTConfig) -> dict:
    # The projection is no part of a LLaVA; llama.cpp's script asks for its width all the same.
    return {"intermediate_size": config.intermediate_size, "projection_dim": 512}


def siglip_keys(config: ViTConfig) -> dict:
    return {"intermediate_size": config.intermediate_size}


def dinov2_keys(config: ViTConfig) -> dict:
    ratio = config.intermediate_size // config.hidden_size
    return {"mlp_ratio": ratio, "qkv_bias": True, "use_swiglu_ffn": False}
