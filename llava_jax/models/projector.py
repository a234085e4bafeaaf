"""The projector between vision features and the language model's embedding space."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models.linear import Linear


def projector_depth(kind: str) -> int:
    """Number of linear layers of LLaVA's `mm_projector_type`: linear, mlpNx_gelu or identity."""
    if kind in ("linear", "identity"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not match:
        raise ValueError(
            f"unknown projector {kind!r}: choose linear, identity or mlpNx_gelu such as mlp2x_gelu"
        )
    return int(match.group(1))


def torch_linear_init(fan_in: int):
    """PyTorch's default for nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Projector(nn.Module):
    """[..., vision size] -> [..., D]: linear layers with exact (erf) GELU between them.

    Follows `build_vision_projector` of the original LLaVA.
    """

    kind: str
    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(projector_depth(self.kind)):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            init = torch_linear_init(x.shape[-1])
            axes = ("vision_embed" if i == 0 else "embed", "projector_out")
            x = Linear(
                self.features, axes, self.dtype, self.use_bias, init, init, name=f"linear_{i}"
            )(x)
        return x
