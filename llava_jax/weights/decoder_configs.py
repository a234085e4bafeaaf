"""Language models: each family's `config.json`, or LLaVA's `text_config` -> DecoderConfig.

One function a family, named in its row of `families.py`. `values` is the way back.
"""

import dataclasses

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig, RopeScaling
from llava_jax.weights.read.fields import MAX_LAYERS, Fields, is_positive

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


def llama(values: dict, source: str) -> DecoderConfig:
    f = Fields(values, _DECODER_DEFAULTS, source)
    bias = bool(f["attention_bias"])
    return _decoder(f, qkv_bias=bias, o_bias=bias, mlp_bias=bool(f["mlp_bias"]))


def mistral(values: dict, source: str) -> DecoderConfig:
    defaults = _DECODER_DEFAULTS | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    # null means no window (v0.2 and later); only an absent key means the default of v0.1.
    window = values.get("sliding_window", 4096)
    return _decoder(Fields(values, defaults, source), sliding_window=window)


def qwen2(values: dict, source: str) -> DecoderConfig:
    f = Fields(values, _QWEN_DEFAULTS, source)
    return _decoder(f, qkv_bias=True, sliding_window=_qwen_window(f))


def qwen3(values: dict, source: str) -> DecoderConfig:
    f = Fields(values, _QWEN_DEFAULTS | {"head_dim": 128}, source)
    bias = bool(f["attention_bias"])
    window = _qwen_window(f)
    return _decoder(f, qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_window=window)


def seed_oss(values: dict, source: str) -> DecoderConfig:
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
    f = Fields(values, defaults, source)
    biases = {
        "qkv_bias": bool(f["attention_bias"]),
        "o_bias": bool(f["attention_out_bias"]),
        "mlp_bias": bool(f["mlp_bias"]),
    }
    return _decoder(f, **biases)


def _decoder(f: Fields, **variants) -> DecoderConfig:
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


def _qwen_window(f: Fields) -> int | None:
    if not f["use_sliding_window"] or not f["sliding_window"]:
        return None
    layers, full = f.integer("num_hidden_layers", MAX_LAYERS), f["max_window_layers"]
    if type(full) is not int:
        f.refuse("max_window_layers", "it must be a number of layers")
    kinds = f["layer_types"] or [
        "sliding_attention" if i >= full else "full_attention" for i in range(layers)
    ]
    if not isinstance(kinds, list):
        f.refuse("layer_types", "it must be a list")
    if any(kind != kinds[0] for kind in kinds):
        f.refuse("max_window_layers", "a window on some of the layers is not supported")
    return f.integer("sliding_window") if kinds[0] == "sliding_attention" else None


def _rope(f: Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from `rope_parameters` of transformers 5 or the two keys of 4."""
    values = f["rope_parameters"] or f["rope_scaling"] or {}
    if not isinstance(values, dict):
        f.refuse("rope_scaling", "it must be an object")
    theta = f["rope_theta"] if values.get("rope_theta") is None else values["rope_theta"]
    if not is_positive(theta):
        raise LlavaError(f"{f.source} has rope_theta={theta!r}: it must be a number above 0")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise LlavaError(
            f"{f.source} scales its rotary positions by {kind!r}: only linear and llama3 are "
            "supported"
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [n for n in names if not is_positive(values.get(n))]
    if missing:
        raise LlavaError(
            f"{f.source} has rotary scaling {kind!r} without a number {missing[0]} above 0"
        )
    return float(theta), RopeScaling(kind, **{n: values[n] for n in names})


def values(config: DecoderConfig) -> dict:
    """The keys of `config.json` that every family has, for a decoder."""
    return {
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


def qwen_window_keys(config: DecoderConfig) -> dict:
    """What Qwen's `config.json` adds: whether the window is used, from the first layer on."""
    return {"use_sliding_window": bool(config.sliding_window), "max_window_layers": 0}


def _rope_to_hf(scaling: RopeScaling | None) -> dict | None:
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    values["rope_type"] = values.pop("kind")
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return values
