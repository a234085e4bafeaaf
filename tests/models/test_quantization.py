"""Kernels as integers: rounding, the products with them and their gradients, bytes, devices."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.inference.placement import copy_params
from llava_jax.models.decoder import separate_layers
from llava_jax.models.linear import Linear, quantized_matmul
from llava_jax.models.llava import LlavaModel, abstract_params
from llava_jax.models.quantization import (
    GROUP,
    copies_of_groups,
    cut_groups,
    dequantized,
    kernel_form,
    quantize_kernels,
    rounded,
    stored_bytes,
)
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import (
    param_shardings,
    quantized_shardings,
    shards_of_inputs,
)
from tests.tiny_model import config_with, random_params

INT4, RNG = np.dtype(ml_dtypes.int4), np.random.default_rng(0)
CONFIG = config_with(hidden_size=64, head_dim=16, intermediate_size=224)  # 2 and 7 groups


def test_the_weights_of_the_drawn_example():
    kernel = {
        "kernel": jnp.asarray([[1, -3], [2, 5], [1, 7], [-8, 0]], jnp.int4),
        "kernel_scale": jnp.asarray([[0.1, 0.5], [0.2, 1]]),
        "kernel_zero": jnp.asarray([[0, 1], [0, 2]], jnp.int8),
    }
    wanted = [[0.1, -2], [0.2, 2], [0.2, 5], [-1.6, -2]]
    np.testing.assert_allclose(dequantized(kernel), wanted, rtol=1e-6)
    kernel["kernel_order"] = jnp.asarray([2, 0, 3, 1])
    moved = np.zeros((4, 2))
    moved[[2, 0, 3, 1]] = wanted
    np.testing.assert_allclose(dequantized(kernel), moved, rtol=1e-6)


@pytest.mark.parametrize("dtype, group", [(INT4, 32), (INT4, 64), (np.dtype(np.int8), 128)])
def test_numbers_are_rounded_to_the_nearest_on_the_host_as_on_a_device(dtype, group):
    x = RNG.normal(size=(2, 128, 6)).astype(np.float32)
    x[0, :group, 0] = 0
    values, scale = rounded(x, dtype, group, np)
    assert values.dtype == dtype and values.shape == x.shape and scale.shape == (2, 128 // group, 6)
    on_device = jax.jit(rounded, static_argnums=(1, 2))(x, dtype, group)
    for host, device in zip((values, scale), on_device, strict=True):
        assert device.dtype == host.dtype
        np.testing.assert_array_equal(np.asarray(device), host)
    weights = dequantized({"kernel": values, "kernel_scale": scale}, np)
    step = np.repeat(abs(scale.astype(np.float32)), group, axis=1)
    # What lies opposite the largest may be a step away: there is no integer 8.
    assert (abs(weights - x) <= step * (0.501 if dtype == np.int8 else 1.01)).all()
    assert (abs(weights - x) <= 0.51 * step).mean() > 0.97 and not weights[0, :group, 0].any()
    if dtype == INT4:
        assert scale.dtype == ml_dtypes.bfloat16 and values.astype(int).min() == -8


def test_which_kernels_have_four_bits():
    layer = ("decoder", "layers", "mlp", "up_proj", "kernel")
    assert kernel_form(layer, 96, "int4") == (INT4, GROUP)
    assert kernel_form(layer, 100, "int4") == (np.int8, 100)
    assert kernel_form(layer, 96, "int8") == (np.int8, 96)
    assert kernel_form(("decoder", "lm_head", "kernel"), 96, "int4") == (np.int8, 96)


def kernel_of(kind: str) -> dict:
    """A random quantized kernel [96, 20]."""
    if kind == "int8":
        values, scale = rounded(RNG.normal(size=(96, 20)), np.dtype(np.int8), 96)
        return {"kernel": values, "kernel_scale": scale}
    kernel = {
        "kernel": jnp.asarray(RNG.integers(-8, 8, (96, 20)), jnp.int4),
        "kernel_scale": jnp.asarray(RNG.uniform(0.1, 0.2, (3, 20)), jnp.float32),
    }
    if kind != "int4":
        kernel["kernel_zero"] = jnp.asarray(RNG.integers(-8, 8, (3, 20)), jnp.int8)
    if kind == "ordered":
        kernel["kernel_order"] = jnp.asarray(RNG.permutation(96), jnp.int32)
    return kernel


@pytest.mark.parametrize("kind", ["int8", "int4", "zeros", "ordered"])
@pytest.mark.parametrize("into, out", [((96,), (20,)), ((96,), (4, 5)), ((8, 12), (20,))])
def test_a_layer_and_its_gradient_are_those_of_the_weights(kind, into, out):
    kernel = kernel_of(kind)
    layer = Linear(out, ("embed", "mlp"), jnp.float32, use_bias=False, inputs=len(into))
    x = jnp.asarray(RNG.normal(size=(2, 3, *into)), jnp.float32)
    far = jnp.asarray(RNG.normal(size=(2, 3, *out)), jnp.float32)

    def total(x, params):
        y = layer.apply({"params": params}, x)
        return jnp.sum(y * far), y

    (dx, y) = jax.jit(jax.grad(total, has_aux=True))(x, kernel)
    wanted_dx, wanted = jax.grad(total, has_aux=True)(x, {"kernel": dequantized(kernel)})
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-4, atol=1e-4)


def test_a_backward_pass_keeps_integers_alone():
    kernel, x = kernel_of("zeros"), jnp.ones((5, 96))
    _, vjp = jax.vjp(lambda x: quantized_matmul(x, kernel, (96,), (20,)), x)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "shape", ()) == (96, 20)]
    assert all(leaf.dtype == jnp.int4 for leaf in kept)


def test_four_bits_take_half_a_byte():
    kernel = jax.ShapeDtypeStruct((256, 512), jnp.int4)
    x = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    scale = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    product = lambda x, k, s: quantized_matmul(x, {"kernel": k, "kernel_scale": s}, (256,), (512,))
    compiled = jax.jit(product).lower(x, kernel, scale).compile()
    sizes = [stored_bytes(leaf.shape, leaf.dtype) for leaf in (x, kernel, scale)]
    assert sizes == [2048, 256 * 512 // 2, 8192]
    assert compiled.memory_analysis().argument_size_in_bytes == sum(sizes)


def test_stacked_layers_are_separate_layers():
    params = quantize_kernels(random_params(CONFIG), "int4")
    up = params["decoder"]["layers"]["mlp"]["up_proj"]
    assert (up["kernel"].dtype, up["kernel_scale"].shape[1]) == (jnp.int4, 2)
    assert params["decoder"]["lm_head"]["kernel"].dtype == jnp.int8
    assert params["vision"]["layers"]["mlp"]["fc1"]["kernel"].dtype == jnp.float32
    weights = flatten_dict(params)
    for path in [path for path in weights if path[-1] == "kernel_scale"]:
        kernel = {"kernel": weights[*path[:-1], "kernel"], "kernel_scale": weights.pop(path)}
        weights[*path[:-1], "kernel"] = dequantized(kernel)
    separate = {**params, "decoder": separate_layers(params["decoder"])}
    logits = [logits_of(tree) for tree in (params, separate, unflatten_dict(weights))]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[0], logits[2], rtol=1e-3, atol=1e-3)


def logits_of(params: dict, config=CONFIG) -> np.ndarray:
    """float32 [1, 7, V] of a text."""
    model = LlavaModel(config, stacked="0" not in params["decoder"]["layers"])
    ids = jnp.arange(7)[None] + 20

    @jax.jit
    def read(params):
        decode = lambda model: model.decoder.attend(
            model.decoder(model.decoder.embed(ids), jnp.arange(7)[None], jnp.ones_like(ids))
        )
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, method=decode)

    return np.asarray(read(params))


def test_how_many_parts_a_group_is_cut_into():
    assert [copies_of_groups(86, shards) for shards in (1, 2, 4, 8, 16)] == [1, 1, 2, 4, 8]
    assert copies_of_groups(1, 8) == 1


def test_groups_are_not_cut_by_devices_and_the_answer_is_that_of_one(tensor=4):
    params = random_params(CONFIG)
    wanted = logits_of(quantize_kernels(params, "int4"))
    mesh = make_mesh(1, 1, tensor, jax.devices()[:tensor])
    placed = copy_params(CONFIG, params, "int4", mesh)
    np.testing.assert_allclose(logits_of(placed), wanted, rtol=1e-4, atol=1e-4)
    for path, leaf in flatten_dict(placed["decoder"]).items():
        if path[-1] == "kernel_scale" and path[-2] in ("o_proj", "down_proj"):
            kernel = flatten_dict(placed["decoder"])[*path[:-1], "kernel"]
            rows = [a.sharding.shard_shape(a.shape)[-2] for a in (kernel, leaf)]
            assert kernel.shape[-2] // rows[0] == tensor
            assert rows[0] % rows[1] == 0 and rows[0] // rows[1] <= GROUP, path
    # 7 groups of 32: on 2 devices 14 of 16, on 4 28 of 8.
    down = placed["decoder"]["layers"]["mlp"]["down_proj"]["kernel_scale"]
    assert down.shape[1] == 7 * tensor


def test_the_shardings_of_what_stands_next_to_a_kernel():
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    shardings = param_shardings(mesh, abstract_params(CONFIG))
    shards = shards_of_inputs(shardings)
    path = ("decoder", "layers", "mlp", "down_proj")
    assert shards[*path, "kernel"] == 2
    params = quantize_kernels(random_params(CONFIG), "int4")
    cut = cut_groups(params, shards)
    order = {(*path, "kernel_order"): jnp.zeros((2, 224), jnp.int32)}
    places = flatten_dict(quantized_shardings(shardings, unflatten_dict(flatten_dict(cut) | order)))
    assert places[*path, "kernel_scale"].spec == places[*path, "kernel"].spec
    assert set(places[*path, "kernel_order"].spec) == {None}
    whole = flatten_dict(quantized_shardings(shardings, params))
    assert whole[*path, "kernel_scale"].spec[1] is None  # 7 groups on 2 devices
