"""The decoder over packed rows, under remat, and its output projection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import decoder as decoder_module
from llava_jax.models.attention import attention_mask
from llava_jax.models.decoder import Decoder, output_embedding, separate_layers
from llava_jax.models.remat import REMAT_POLICIES
from tests.tiny_model import config_with, random_params

LENGTHS = (9, 6, 3)  # of the conversations in a packed row of 20
IDS = np.random.default_rng(0).integers(0, 290, 20)


@functools.partial(jax.jit, static_argnames=("config", "remat_policy", "dtype"))
def hidden_states(params, ids, positions, segments, config, remat_policy="none", dtype=jnp.float32):
    def run(decoder, ids):
        return decoder(decoder.embed(ids), positions, segments)

    return Decoder(config, dtype, remat_policy).apply({"params": params}, ids, method=run)


def packed_row():
    """ids, positions and segments [1, 20] of three conversations and two tokens of padding."""
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 2)])
    segments = np.repeat([1, 2, 3, 0], (*LENGTHS, 2))
    return IDS[None], positions[None], segments[None]


@pytest.mark.parametrize("window", [None, 4])
def test_a_packed_row_holds_what_each_conversation_is_alone(window):
    config = config_with(sliding_window=window).decoder
    params = random_params(config_with(sliding_window=window))["decoder"]
    packed = hidden_states(params, *packed_row(), config)
    start = 0
    for length in LENGTHS:
        here = slice(start, start + length)
        alone = (IDS[None, here], np.arange(length)[None], np.ones((1, length), int))
        np.testing.assert_allclose(
            packed[:, here], hidden_states(params, *alone, config), rtol=1e-5, atol=1e-5
        )
        start += length
    assert np.isfinite(packed).all()


def test_a_token_reaches_its_own_conversation_alone_and_never_the_past():
    config, (ids, positions, segments) = config_with().decoder, packed_row()
    params = random_params(config_with())["decoder"]
    before = hidden_states(params, ids, positions, segments, config)
    changed = ids.copy()
    changed[0, 11] += 1  # in the middle of the second conversation, tokens 9 to 14
    after = hidden_states(params, changed, positions, segments, config)
    moved = np.flatnonzero(abs(np.asarray(after - before)).max(-1)[0])
    np.testing.assert_array_equal(moved, [11, 12, 13, 14])


def test_a_sliding_window_sees_itself_and_the_tokens_before_it():
    positions, segments = np.arange(6)[None], np.ones((1, 6), int)
    mask = attention_mask(positions, positions, segments, segments, sliding_window=3)
    wanted = [[i - 3 < j <= i for j in range(6)] for i in range(6)]
    np.testing.assert_array_equal(mask[0, 0], wanted)


def test_remat_changes_memory_and_no_gradient():
    config, row = config_with().decoder, packed_row()
    params = random_params(config_with())["decoder"]

    @functools.partial(jax.jit, static_argnames="policy")
    def grads(params, policy):
        total = lambda p: jnp.sum(hidden_states(p, *row, config, policy)[:, :18] ** 2)
        return jax.grad(total)(params)

    plain = grads(params, "none")
    for policy in set(REMAT_POLICIES) - {"none"}:
        assert "remat" in str(jax.make_jaxpr(lambda p, k=policy: grads(p, k))(params)), policy
        for a, b in zip(
            jax.tree.leaves(grads(params, policy)), jax.tree.leaves(plain), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(b).max()))


def test_remat_computes_again_what_its_name_says():
    """Products of one layer in the gradient: 9 forward, 18 backward, and those computed again."""
    config, row = config_with().decoder, packed_row()
    params = random_params(config_with())["decoder"]

    def products(policy):
        total = lambda p: jnp.sum(hidden_states(p, *row, config, policy))
        return jax.jit(jax.grad(total)).lower(params).as_text().count("stablehlo.dot_general ")

    again = {policy: products(policy) - products("none") for policy in REMAT_POLICIES}
    assert products("none") == 27
    # Scores; with them all linear layers but the last of seven; and the sums of attention.
    assert again == {"none": 0, "linear": 1, "attention": 7, "full": 8}


def test_bfloat16_products_are_close_to_float32():
    config, row = config_with().decoder, packed_row()
    params = random_params(config_with())["decoder"]
    exact = hidden_states(params, *row, config)
    with jax.default_matmul_precision("bfloat16"):
        mixed = hidden_states(params, *row, config)
    low = hidden_states(params, *row, config, dtype=jnp.bfloat16)
    assert mixed.dtype == jnp.float32 and low.dtype == jnp.bfloat16
    scale = float(abs(exact).max())
    error = [float(abs(x.astype(jnp.float32) - exact).mean()) / scale for x in (mixed, low)]
    assert 1e-5 < error[0] < 0.01 and 1e-5 < error[1] < 0.02


def test_one_layer_is_traced_and_each_computes_with_its_own_parameters(monkeypatch):
    """What a start costs: thirty layers of one shape are traced and lowered as one."""
    traced, swiglu = [], decoder_module.swiglu
    monkeypatch.setattr(
        decoder_module, "swiglu", lambda *inputs: traced.append(1) or swiglu(*inputs)
    )
    config = config_with(num_layers=5)
    params = random_params(config)["decoder"]
    traced.clear()
    stacked = hidden_states(params, *packed_row(), config.decoder)
    assert len(traced) == 1
    traced.clear()

    @jax.jit
    def separate(params, ids, positions, segments):
        run = lambda decoder, ids: decoder(decoder.embed(ids), positions, segments)
        return Decoder(config.decoder, stacked=False).apply({"params": params}, ids, method=run)

    np.testing.assert_allclose(separate(separate_layers(params), *packed_row()), stacked, atol=1e-5)
    assert len(traced) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_embedding_is_what_attend_multiplies_by(tied):
    whole = config_with(tie_word_embeddings=tied)
    params = random_params(whole)["decoder"]
    assert ("lm_head" in params) != tied
    hidden = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    logits = Decoder(whole.decoder).apply({"params": params}, hidden, method=Decoder.attend)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ output_embedding(params).T, rtol=1e-5, atol=1e-5)


def test_the_embedding_s_gradient_is_added_up_in_float32():
    """A token that is everywhere: a sum in bfloat16 stands still at 256 ones."""
    config = config_with()
    params = random_params(config)["decoder"]
    model = Decoder(config.decoder, jnp.bfloat16)
    ids = jnp.full((2, 500), 7)
    embedded = lambda p: model.apply({"params": p}, ids, method=Decoder.embed)
    assert embedded(params).dtype == jnp.bfloat16
    grads = jax.grad(lambda p: jnp.sum(embedded(p).astype(jnp.float32)))(params)
    table = grads["embed_tokens"]["embedding"]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table[7], 1000)
