"""Model FLOPs of a training step, from the model's shape and real tokens alone, and peak rates.

A multiply-add counts 2; recomputation (remat) and padding count nothing; causal attention counts
the half that is needed. The compiler's own count is not used: it counts a scanned layer once.
"""

from collections.abc import Sequence

import jax

from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorSpec
from llava_jax.models.vit import num_blocks

# Dense bfloat16 peak of one device in FLOP/s, by a part of jax's `device_kind` (vendors' figures);
# the first that fits counts.
PEAK_FLOPS = (
    ("TPU7x", 1153.5e12),  # a device is half a chip
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("NVIDIA B200", 2250e12),  # not GB200
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


def peak_flops(kind: str) -> float | None:
    """Peak of a device of this `device_kind`, or None if it is not known (CPU)."""
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)


def decoder_flops_per_token(config: LlavaConfig) -> float:
    """Forward FLOPs of one token through the decoder's weights, without attention scores."""
    d = config.decoder
    attention = d.hidden_size * d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
    mlp = 3 * d.hidden_size * d.intermediate_size
    return 2.0 * d.num_layers * (attention + mlp)


def attention_flops(config: LlavaConfig, pairs: float) -> float:
    """Forward FLOPs of the decoder's attention over a number of (query, key) pairs."""
    d = config.decoder
    return 4.0 * pairs * d.num_layers * d.num_heads * d.head_dim


def image_flops(config: LlavaConfig) -> tuple[float, float]:
    """Forward FLOPs of one tile through the encoder's used blocks, and through the projector."""
    v = config.vision
    patches = (config.image.size // v.patch_size) ** 2
    tokens = patches + v.class_token
    weights = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    block = 2 * tokens * weights + 4 * tokens**2 * v.hidden_size
    embed = 2 * patches * 3 * v.patch_size**2 * v.hidden_size
    spec = ProjectorSpec.parse(config.projector)
    projector = spec.flops(patches, config.feature_size, config.decoder.hidden_size)
    return float(num_blocks(v, config.feature_layer) * block + embed), projector


def decoder_passes(trainable: set[str], reference: bool = False) -> int:
    """How often the weights of the decoder are multiplied by in a step.

    The gradient always flows through the decoder, to reach the decoder or the projector. A
    reference takes a forward pass more.
    """
    return (3 if "decoder" in trainable else 2) + reference


def step_flops(
    config: LlavaConfig,
    trainable: set[str],
    counts: dict[str, float],
    reference: bool = False,
    encodes: bool = True,
) -> float:
    """FLOPs of one step: forward, needed gradients of activations, gradients of trained weights.

    Args:
      trainable: top-level components with trained parameters.
      counts: `tokens` real tokens, `attention_pairs` (query, key) pairs seen, `images` real
        images, `supervised_tokens`.
      reference: whether the model is compared with the one that the stage starts from.
      encodes: whether the encoder is part of the step.
    """
    d = config.decoder
    passes = decoder_passes(trainable, reference)
    decoder = counts["tokens"] * decoder_flops_per_token(config)
    head = 2.0 * counts["supervised_tokens"] * d.hidden_size * d.vocab_size
    scores = attention_flops(config, counts["attention_pairs"])
    vision, projector = image_flops(config)
    vision *= encodes
    return (
        passes * (decoder + head)
        + (3 + reference) * scores
        + counts["images"] * (vision * (3 + reference if "vision" in trainable else 1))
        + counts["images"] * projector * (3 + reference if "projector" in trainable else 1)
    )


def mfu(flops: float, seconds: float, devices: Sequence[jax.Device]) -> float | None:
    """Share of the devices' peak that a step's model FLOPs took, or None if the peak is unknown."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else flops / seconds / (peak * len(devices))
