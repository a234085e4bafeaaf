"""Four bits by GPTQ: what a block's kernels get, and rounding that looks at it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.decoder import Decoder
from llava_jax.models.gptq import read_block, relative_error, round_by_inputs
from llava_jax.models.quantization import dequantized, rounded
from tests.models.test_decoder import packed_row
from tests.tiny_model import config_with, random_params

GROUP = 32


def correlated(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Inputs [rows, inputs] that a quarter as many numbers decide, but for some noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(inputs // 4, inputs))
    noise = 0.1 * rng.normal(size=(rows, inputs))
    return (rng.normal(size=(rows, inputs // 4)) @ mixing + noise).astype(np.float32)


def weights_of(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return dequantized({"kernel": values, "kernel_scale": scales}, np)


@pytest.mark.parametrize("inputs", [64, 160])  # within a block of inputs, and over two
def test_products_with_inputs_never_seen_change_less_than_by_rounding_to_nearest(inputs):
    kernel = np.random.default_rng(1).normal(size=(inputs, 24)).astype(np.float32)
    seen, others = correlated(2000, inputs), correlated(500, inputs, seed=1)
    values, scales = round_by_inputs(kernel, seen.T @ seen, GROUP)
    assert values.dtype == np.int8 and values.min() >= -8 and values.max() <= 7
    assert scales.dtype == np.float16 and scales.shape == (inputs // GROUP, 24)
    nearest = weights_of(*rounded(kernel, np.dtype(jnp.int4), GROUP, np))
    changes = [
        np.sum((others @ (kernel - weights)) ** 2)
        for weights in (weights_of(values, scales), nearest)
    ]
    assert changes[0] < 0.3 * changes[1]
    gram = others.T @ others
    error = relative_error(kernel, nearest, gram)
    assert error == pytest.approx(changes[1] / np.sum((others @ kernel) ** 2), rel=1e-3)


def test_inputs_that_do_not_vary_together_are_rounded_to_nearest_and_so_are_those_not_seen():
    kernel = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    counts = np.r_[np.full(40, 3.0), np.zeros(24)]
    values, scales = round_by_inputs(kernel, np.diag(counts), GROUP)
    of_rows = np.repeat(scales.astype(np.float32), GROUP, axis=0)
    np.testing.assert_array_equal(values, np.clip(np.rint(kernel / of_rows), -8, 7))
    values, scales = round_by_inputs(kernel * 0, np.zeros((64, 64)), GROUP)
    assert not values.any() and np.isfinite(scales).all()


def test_a_block_gives_what_the_decoder_gives_and_the_inputs_of_its_kernels():
    config = config_with(num_layers=2)
    params = random_params(config)["decoder"]
    ids, positions, segments = packed_row()
    decoder = Decoder(config.decoder)
    run = lambda decoder, ids: decoder(decoder.embed(ids), positions, segments)
    wanted = decoder.apply({"params": params}, ids, method=run)
    x = start = decoder.apply({"params": params}, ids, method=Decoder.embed)
    for layer in range(2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x, grams = read_block(config.decoder, own, x, positions, segments)
        if not layer:
            first, scale = grams, own["input_layernorm"]["scale"]
    rms = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms(x) * params["norm"]["scale"], wanted, atol=1e-4)
    together = {("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")}
    together |= {("self_attn/o_proj",), ("mlp/gate_proj", "mlp/up_proj"), ("mlp/down_proj",)}
    assert {*first} == together
    inputs = (rms(start) * scale)[segments > 0]  # 18 of 20 tokens
    (of_queries,) = [gram for found, gram in first.items() if "self_attn/q_proj" in found]
    np.testing.assert_allclose(of_queries, inputs.T @ inputs, rtol=1e-3, atol=1e-4)
