"""GPTQ: a kernel in four bits, rounded by what it is multiplied with.

Rounding to nearest treats each weight by itself. Here the weights of one input are rounded after
those of another, and the weights of the inputs to come make up for the error as far as the inputs
vary together. Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.attention import attention_mask
from llava_jax.models.decoder import DecoderBlock, DecoderConfig, inverse_frequencies
from llava_jax.models.linear import Linear
from llava_jax.models.quantization import four_bit_scale

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, added to it: as in the paper
BLOCK = 128  # inputs after whose rounding all later weights are changed at once


def read_block(
    config: DecoderConfig,
    params: dict,
    x: jax.Array,
    position_ids: jax.Array,
    segment_ids: jax.Array,
    turn_ids: jax.Array | None = None,
) -> tuple[jax.Array, dict[tuple[str, ...], jax.Array]]:
    """Runs one block of a decoder in float32 and looks at what its kernels are multiplied with.

    Args:
      params: of one layer.
      x: hidden states [B, T, D].
      position_ids, segment_ids, turn_ids: int[B, T], as in `Decoder`; padding is not looked at.

    Returns:
      Hidden states [B, T, D], and for the names of linear layers that have the same inputs, as
      `self_attn/q_proj`, the Gram matrix of these: float32[in, in], the sum of outer products.
    """
    names, inputs = {}, {}

    def look(call, arguments, keywords, context):
        if isinstance(context.module, Linear):
            names.setdefault(id(arguments[0]), []).append("/".join(context.module.path))
            inputs[id(arguments[0])] = arguments[0]  # kept, so that no other gets its id
        return call(*arguments, **keywords)

    angles = position_ids[..., None] * inverse_frequencies(config)
    rope, window = (jnp.cos(angles), jnp.sin(angles)), config.sliding_window
    mask = attention_mask(position_ids, position_ids, segment_ids, segment_ids, window, turn_ids)
    with nn.intercept_methods(look):
        block = DecoderBlock(config, jnp.float32)
        (x, _), _ = block.apply({"params": params}, (x, None), 0, rope, mask, None, None)
    real = (segment_ids > 0)[..., None]

    def gram(inputs: jax.Array) -> jax.Array:
        inputs = jnp.where(real, inputs.reshape(*real.shape[:2], -1), 0)
        return jnp.einsum("bti,btj->ij", inputs, inputs)

    return x, {tuple(found): gram(inputs[key]) for key, found in names.items()}


def round_by_inputs(
    kernel: np.ndarray, gram: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a kernel to four bits so that its products with inputs like those seen change little.

    Args:
      kernel: floats [in, out].
      gram: [in, in], see `read_block`. An input that was never seen is rounded to nearest.
      group: inputs that share a scale; it divides BLOCK.

    Returns:
      Integers from -8 to 7, int8[in, out], and scales float16[in / group, out]. As in
      `quantization.rounded` the largest weight of a group, by size, becomes -8.
    """
    weights = kernel.astype(np.float32)
    gram = gram.astype(np.float64)
    seen = np.diag(gram) > 0
    damping = DAMPING * np.mean(np.diag(gram)[seen]) if seen.any() else 1.0
    gram[np.diag_indices_from(gram)] += damping
    later = np.linalg.cholesky(np.linalg.inv(gram)).T.astype(np.float32)
    values, scales = np.empty(weights.shape, np.int8), []
    for begin in range(0, len(weights), BLOCK):
        end = min(begin + BLOCK, len(weights))
        errors = np.empty_like(weights[begin:end])
        for i in range(begin, end):
            if i % group == 0:
                scales.append(four_bit_scale(weights[i : i + group], np.float16, np))
            scale = scales[-1].astype(np.float32)
            values[i] = np.clip(np.rint(weights[i] / scale), -8, 7)
            errors[i - begin] = (weights[i] - values[i] * scale) / later[i, i]
            weights[i + 1 : end] -= later[i, i + 1 : end, None] * errors[i - begin]
        weights[end:] -= later[begin:end, end:].T @ errors
    return values, np.stack(scales)


def relative_error(kernel: np.ndarray, rounded: np.ndarray, gram: np.ndarray) -> float:
    """How far products with the inputs seen are off: |x W - x V|^2 over |x W|^2, summed over x."""
    squares = lambda weights: np.sum((gram @ weights) * weights, dtype=np.float64)
    return float(squares(kernel - rounded) / squares(kernel))
