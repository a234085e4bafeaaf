"""The linear layer: operands in the compute dtype, sums and master gradients in float32."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from llava_jax.models.quantization import PARTS, dequantized

LINEAR_OUT = "linear_out"  # the name of these products in remat policies


def product_dtype(dtype) -> jnp.dtype:
    """The dtype that operands of a product are rounded to.

    `dtype`, or bfloat16 under `jax.default_matmul_precision("bfloat16")`, which keeps float32
    arrays and multiplies in bfloat16. TPUs follow the setting by themselves; XLA's CPU compiler
    ignores it unless the operands are cast.
    """
    if jax.config.jax_default_matmul_precision == "bfloat16":
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(dtype)


def transposed(x: jax.Array) -> jax.Array:
    """[..., m, n] -> [..., n, m], the first operand of a product over its last axis.

    XLA's CPU compiler folds a transpose into the product and multiplies that form in float32. If
    the transpose is written to memory first, the product is one of bfloat16, twice as fast. Arrays
    sharded over devices are only transposed: the layout constraint would gather them.
    """
    x = x.swapaxes(-1, -2)
    mesh = jax.sharding.get_abstract_mesh()
    if jax.config.jax_default_matmul_precision != "bfloat16" or not (mesh.empty or mesh.size == 1):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """[..., *in] x [*in, *out] -> [..., *out] in the dtype of x, summed in float32.

    The gradient follows the same rule. A float32 kernel gets an unrounded gradient; autodiff of a
    kernel cast to bfloat16 would round it.

    Args:
      inputs: number of axes of `in`.
    """
    return product(x, kernel, tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)), x.dtype)


def product(
    x: jax.Array, y: jax.Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...], dtype
) -> jax.Array:
    """The product of two arrays over the first or last axes of each.

    Operands are rounded to `product_dtype`. A device sums in float32; partial sums are reduced
    across devices in `dtype`, which for gradients in bfloat16 is half the bytes.
    """
    operands = product_dtype(x.dtype)

    def of_arrays(x, y):
        axes = (x_axes, y_axes), ((), ())
        return jax.lax.dot_general(x, y, axes, preferred_element_type=dtype)

    def of_matrices(x, y):  # the only form that XLA's CPU compiler multiplies in bfloat16
        kept = [x.shape[i] for i in range(x.ndim) if i not in x_axes]
        kept += [y.shape[i] for i in range(y.ndim) if i not in y_axes]
        (x, x_axis), (y, y_axis) = _as_matrix(x, x_axes), _as_matrix(y, y_axes)
        axes = ((1,), (y_axis,)), ((), ())
        x = x if x_axis else transposed(x)
        dot = jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
        return dot.reshape(kept).astype(dtype)

    x, y = x.astype(operands), y.astype(operands)
    return jax.lax.platform_dependent(x, y, cpu=of_matrices, default=of_arrays)


def _as_matrix(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, int]:
    """x as a matrix, its first or last `axes` merged into one, and which of the two that is."""
    size = math.prod(x.shape[i] for i in axes)
    return (x.reshape(size, -1), 0) if axes[0] == 0 else (x.reshape(-1, size), 1)


def _backward(inputs, residuals, dy):
    x, kernel = residuals
    rows = tuple(range(x.ndim - inputs))
    outputs = tuple(range(len(rows), dy.ndim)), tuple(range(inputs, kernel.ndim))
    return product(dy, kernel, *outputs, x.dtype), product(x, dy, rows, rows, kernel.dtype)


matmul.defvjp(lambda x, kernel, inputs: (matmul(x, kernel, inputs), (x, kernel)), _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(
    x: jax.Array, kernel: dict, into: tuple[int, ...], out: tuple[int, ...]
) -> jax.Array:
    """[..., *in] x a quantized kernel -> [..., *out]; `kernel` is a dict as in quantization.py.

    The kernel gets no gradient. The backward pass makes its weights anew: only integers are kept.
    """
    if "kernel_order" in kernel:  # of the inputs, so that no weight has to move
        flat = x.reshape(*x.shape[: x.ndim - len(into)], -1)
        x = jnp.take(flat, kernel["kernel_order"], axis=-1).reshape(x.shape)
    weights, scale = _operand(kernel, x.dtype)
    rows = x.ndim - len(into)
    inputs = tuple(range(rows, x.ndim)), tuple(range(len(into)))
    y = product(x, weights.reshape(*into, *out), *inputs, jnp.float32)
    if "kernel_zero" in kernel:
        # What zeros add is a product of its own, with sums over groups: TPUs spend 17 times as long
        # on weights from which zeros were subtracted.
        zeros = _weights_of_zeros(kernel)  # [groups, out]
        sums = x.astype(jnp.float32).reshape(*x.shape[:rows], len(zeros), -1).sum(-1)
        y -= jnp.matmul(sums, zeros, precision="highest").reshape(y.shape)
    return (y if scale is None else y * scale.reshape(out)).astype(x.dtype)


def _operand(kernel: dict, dtype) -> tuple[jax.Array, jax.Array | None]:
    """(weights [in, out] as if zeros were 0, in the kernel's order; the scale of columns to come).

    Where all inputs share a scale it multiplies the result, which has fewer numbers.
    """
    scale = kernel["kernel_scale"]
    if len(scale) == 1 and "kernel_zero" not in kernel:
        return kernel["kernel"].astype(product_dtype(dtype)), scale[0]
    scaled = {name: kernel[name] for name in ("kernel", "kernel_scale")}
    return dequantized(scaled).astype(product_dtype(dtype)), None


def _weights_of_zeros(kernel: dict) -> jax.Array:
    return kernel["kernel_zero"].astype(jnp.float32) * kernel["kernel_scale"].astype(jnp.float32)


def _quantized_backward(into, out, kernel, dy):
    weights, scale = _operand(kernel, dy.dtype)
    if scale is not None:
        dy = (dy.astype(jnp.float32) * scale.reshape(out)).astype(dy.dtype)
    rows, inputs = dy.ndim - len(out), len(into)
    outputs = tuple(range(rows, dy.ndim)), tuple(range(inputs, inputs + len(out)))
    dx = product(dy, weights.reshape(*into, *out), *outputs, jnp.float32)
    shape, dx = dx.shape, dx.reshape(*dy.shape[:rows], -1)
    if "kernel_zero" in kernel:
        zeros = _weights_of_zeros(kernel)
        flat = dy.astype(jnp.float32).reshape(*dy.shape[:rows], -1)
        of_groups = jnp.matmul(flat, zeros.T, precision="highest")
        dx -= jnp.repeat(of_groups, dx.shape[-1] // len(zeros), axis=-1)
    if "kernel_order" in kernel:
        dx = jnp.take(dx, jnp.argsort(kernel["kernel_order"]), axis=-1)
    return dx.reshape(shape).astype(dy.dtype), None


quantized_matmul.defvjp(
    lambda x, kernel, into, out: (quantized_matmul(x, kernel, into, out), kernel),
    _quantized_backward,
)


def dropout(x: jax.Array, rate: jax.Array, keys: jax.Array) -> jax.Array:
    """x with a share `rate` of its numbers set to zero and the rest times 1 / (1 - rate).

    The numbers dropped depend on the key of a row alone, not on how rows are cut into microbatches
    or spread over devices.

    Args:
      x: [rows, ...].
      keys: uint32[rows, 2], the data of JAX keys.
    """
    # A hash of key and position, fused into a product. Threefry, JAX's generator, takes a hundred
    # operations for each number: a fifth of LoRA's work on a TPU.
    bits, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in range(x.ndim - 1, 0, -1):  # the position in the row
        bits += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        stride *= x.shape[axis]
    for word in range(2):
        bits = _mixed(bits ^ keys[:, word].reshape(-1, *[1] * (x.ndim - 1)))
    kept = bits >= jnp.round(rate * 2.0**32).astype(jnp.uint32)
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)


def _mixed(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, one to one; every bit of the result depends on every bit of x.

    Constants of `lowbias32` by Chris Wellons, which a search for the least bias found.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


class Linear(nn.Module):
    """[..., *in] -> [..., *out], with a low-rank update if the parameters hold one (lora.py).

    Attributes:
      features: sizes of `out`. The heads of attention get their axis here, not by a reshape of the
        result: TPUs store heads in another order and would copy the result twice.
      axes: logical axis names of the kernel, which is stored as a matrix [in, out].
      dtype: of the result; operands are rounded to its `product_dtype`.
      inputs: number of axes of `in`.
    """

    features: int | tuple[int, ...]
    axes: tuple[str, str]
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = (self.features,) if isinstance(self.features, int) else self.features
        into = x.shape[-self.inputs :]
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (math.prod(into), math.prod(out)))
        x = x.astype(self.dtype)
        if kernel.dtype == jnp.uint16:  # the bits of bfloat16: see `pack_kernels`
            kernel = jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
        held = [name for name in PARTS if self.has_variable("params", name)]
        if held:  # put there by `quantize_kernels`, or read from a quantized checkpoint
            parts = {name: self.get_variable("params", name) for name in held}
            y = quantized_matmul(x, {"kernel": kernel, **parts}, into, out)
        else:
            y = matmul(x, kernel.reshape(*into, *out), self.inputs)
        y = checkpoint_name(y, LINEAR_OUT)
        if self.has_variable("params", "lora_a"):  # put there by `attach_lora`
            # Separate kernels: fused with the product above or its gradient, XLA would draw the
            # dropout's bits again for each of their tiles.
            apart = jax.lax.optimization_barrier
            y += apart(self._update(apart(x), out))
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[1:])
            y += self.param("bias", bias_init, (math.prod(out),)).reshape(out).astype(y.dtype)
        return y

    def _update(self, x: jax.Array, out: tuple[int, ...]) -> jax.Array:
        """[..., *in] -> [..., *out]: what the low-rank update adds."""
        a, b = (self.get_variable("params", f"lora_{name}") for name in "ab")
        if self.has_variable("params", "lora_keys"):
            keys, rate = (self.get_variable("params", f"lora_{n}") for n in ("keys", "dropout"))
            by_row = x.reshape(len(keys), -1, *x.shape[1:])  # images of a row, too
            x = dropout(by_row, rate, keys).reshape(x.shape)
        a = a.reshape(*x.shape[-self.inputs :], -1)
        return matmul(matmul(x, a, self.inputs), b.reshape(-1, *out))
