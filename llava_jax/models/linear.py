"""The linear layer: operands in the compute dtype, sums and master gradients in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p

from llava_jax.models.precision import product_dtype, transposed

LINEAR_OUT = "linear_out"  # what a remat policy calls the products of linear layers


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., in] x [in, out] -> [..., out] in the dtype of x, summed in float32.

    The gradient follows the same rule, and a float32 kernel gets it unrounded: autodiff of a
    kernel cast to bfloat16 would round it.
    """
    return product(x, kernel, (x.ndim - 1, 0), x.dtype)


def product(x: jax.Array, y: jax.Array, contracted: tuple[int, int], dtype) -> jax.Array:
    """The product of two arrays over one axis of each, operands as `product_dtype` says.

    float32 is asked for and rounded afterwards: XLA's CPU compiler multiplies in bfloat16 only so.
    """
    operands = product_dtype(x.dtype)
    x, y = x.astype(operands), y.astype(operands)
    if contracted[0] == 0:
        x, contracted = transposed(x), (1, contracted[1])
    axes = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32).astype(dtype)


def _backward(residuals, dy):
    x, kernel = residuals
    rows = lambda array: array.reshape(-1, array.shape[-1])
    d_kernel = product(rows(x), rows(dy), (0, 0), kernel.dtype)
    return product(dy, kernel, (dy.ndim - 1, 1), x.dtype), d_kernel


matmul.defvjp(lambda x, kernel: (matmul(x, kernel), (x, kernel)), _backward)


def dropout(x: jax.Array, rate: jax.Array, keys: jax.Array) -> jax.Array:
    """x with a share of its numbers zero, the rest times 1 / (1 - rate).

    What is dropped depends on the key of a row alone: not on how rows are cut into microbatches or
    spread over devices. The rate is met to 1 / 65,536: 16 bits a number, as drawing them costs time
    (whole 32 by `jax.random.bits` would be four times the work).

    Args:
      x: [rows, T, features].
      keys: uint32[rows, 2], data of Threefry keys.
    """
    rows, length, features = x.shape
    quarter = -(-length // 4)
    count = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, (rows, quarter, features), axis)
    of_row = lambda word: jnp.broadcast_to(keys[:, word, None, None], (rows, quarter, features))
    words = threefry2x32_p.bind(of_row(0), of_row(1), count(1), count(2))
    drawn = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    drawn = jnp.concatenate(drawn, axis=1)[:, :length]
    kept = drawn >= jnp.round(rate * 65536).astype(jnp.uint32)
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)


class Linear(nn.Module):
    """[..., in] -> [..., features]; with a low-rank update where `lora_a` and `lora_b` are.

    Attributes:
      axes: logical axis names of the kernel [in, features].
      dtype: of the result, and of the operands unless `product_dtype` says otherwise.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if kernel.dtype == jnp.uint16:  # the bits of bfloat16: see `pack_kernels`
            kernel = jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
        y = checkpoint_name(matmul(x, kernel), LINEAR_OUT)
        if self.has_variable("params", "kernel_scale"):  # put there by `quantize_kernels`
            scale = self.get_variable("params", "kernel_scale")
            y = (y.astype(jnp.float32) * scale).astype(y.dtype)
        if self.has_variable("params", "lora_a"):  # put there by `attach_lora`
            y += self._update(x)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[1:])
            y += self.param("bias", bias_init, (self.features,)).astype(y.dtype)
        return y

    def _update(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features], the low-rank update's part of the result."""
        a, b = (self.get_variable("params", f"lora_{name}") for name in "ab")
        if self.has_variable("params", "lora_keys"):
            keys, rate = (self.get_variable("params", f"lora_{n}") for n in ("keys", "dropout"))
            by_row = x.reshape(len(keys), -1, x.shape[-1])  # images of a row, too
            x = dropout(by_row, rate, keys).reshape(x.shape)
        return matmul(matmul(x, a), b)
