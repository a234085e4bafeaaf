"""Model shapes by name. Weights are loaded separately; a folder that disagrees is an error."""

import dataclasses

from llava_jax.errors import LlavaError
from llava_jax.models.anyres import Tiling
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.video import VideoSpec
from llava_jax.models.vit import ViTConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_large(image_size: int) -> ViTConfig:
    """openai/clip-vit-large-patch14, at 224 or 336 pixels."""
    return ViTConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        patch_size=14,
        image_size=image_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        layer_scale=False,
    )


DINOV2_SMALL = ViTConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_layers=12,
    num_heads=6,
    patch_size=14,
    image_size=518,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    class_token=True,
    pre_norm=False,
    patch_bias=True,
    layer_scale=True,
)

# The 26 of the 27 blocks of google/siglip-so400m-patch14-384 that LLaVA runs.
SIGLIP_SO400M = ViTConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=26,
    num_heads=16,
    patch_size=14,
    image_size=384,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    layer_scale=False,
)

SMOLLM2_135M = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)

YI_34B = DecoderConfig(
    vocab_size=64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_layers=60,
    num_heads=56,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=5e6,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)

MISTRAL_7B = DecoderConfig(  # Instruct v0.2
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
)

LLAMA3_8B = dataclasses.replace(
    MISTRAL_7B, vocab_size=128256, rope_theta=5e5, max_position_embeddings=8192
)


def qwen2(size: str) -> DecoderConfig:
    """Qwen2, 0.5b, 7b or 72b."""
    vocabulary, hidden, feed_forward, layers, heads, kv_heads = {
        "0.5b": (151936, 896, 4864, 24, 14, 2),
        "7b": (152064, 3584, 18944, 28, 28, 4),
        "72b": (152064, 8192, 29568, 80, 64, 8),
    }[size]
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=size == "0.5b",
        qkv_bias=True,
        max_position_embeddings=32768,
    )


def vicuna(size: str, rms_norm_eps: float, max_positions: int) -> DecoderConfig:
    """Llama 1/2 and the Vicunas tuned from them, 7b or 13b; they differ in eps and context."""
    hidden, feed_forward, layers, heads = {
        "7b": (4096, 11008, 32, 32),
        "13b": (5120, 13824, 40, 40),
    }[size]
    return DecoderConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        rms_norm_eps=rms_norm_eps,
        max_position_embeddings=max_positions,
    )


def llava_v1(size: str) -> LlavaConfig:
    return LlavaConfig(
        vision=clip_large(224),
        decoder=vicuna(size, 1e-6, 2048),
        projector="linear",
        image=ImageSpec(224, "square"),
    )


def llava_15(size: str) -> LlavaConfig:
    return LlavaConfig(vision=clip_large(336), decoder=vicuna(size, 1e-5, 4096))


def llava_16(decoder: DecoderConfig) -> LlavaConfig:
    """LLaVA-NeXT; the pictures are those of its original code."""
    return LlavaConfig(
        vision=clip_large(336),
        decoder=decoder,
        image=ImageSpec(336, "anyres", tiling=Tiling(rounded=False)),
    )


def onevision(size: str) -> LlavaConfig:
    """LLaVA-OneVision on Qwen2; pictures and videos are those of its original code."""
    grids = tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7))
    return LlavaConfig(
        vision=SIGLIP_SO400M,
        decoder=qwen2(size),
        feature_layer=-1,
        image=ImageSpec(
            384,
            "anyres",
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            tiling=Tiling(grids, rounded=False, cap=9, one_view=True),
            video=VideoSpec(),
        ),
    )


PRESETS = {
    "llava-v1-7b": llava_v1("7b"),
    "llava-v1-13b": llava_v1("13b"),
    "llava-1.5-7b": llava_15("7b"),
    "llava-1.5-13b": llava_15("13b"),
    "llava16_7b": llava_16(vicuna("7b", 1e-5, 4096)),
    "llava16_13b": llava_16(vicuna("13b", 1e-5, 4096)),
    "llava16_34b": llava_16(YI_34B),
    "llava16_mistral_7b": llava_16(MISTRAL_7B),
    "llava16_llama3_8b": llava_16(LLAMA3_8B),
    "onevision_0p5b": onevision("0.5b"),
    "onevision_7b": onevision("7b"),
    "onevision_72b": onevision("72b"),
    "quickstart": LlavaConfig(
        vision=DINOV2_SMALL,
        decoder=SMOLLM2_135M,
        feature_layer=8,  # colour and shape are plainest there
        image=ImageSpec(56, "square", IMAGENET_MEAN, IMAGENET_STD),
    ),
}


def preset(name: str) -> LlavaConfig:
    """The config of a preset; LlavaError with the known names for any other."""
    if name not in PRESETS:
        raise LlavaError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
