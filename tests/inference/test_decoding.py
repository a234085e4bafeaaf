"""The device side: prefill + decode equal to a full forward pass, over the decoder's variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.inference import decoding
from llava_jax.inference.decoding import TOKENS_PER_CALL
from llava_jax.inference.sampling import Sampling, keep_top_p, sample
from llava_jax.models.decoder import KVCache, RopeScaling
from llava_jax.models.llava import LlavaModel
from tests.tiny_model import CONFIG, config_with, random_params

prefill = jax.jit(decoding.prefill, static_argnames=("model", "cache_size"))
decode = jax.jit(decoding.decode, static_argnames="model")
all_logits = jax.jit(decoding.all_logits, static_argnames="model")
draw = jax.jit(sample)

VARIANTS = {
    "llama": {},  # two query heads to a kv head
    "qwen3": {"qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "window": {"sliding_window": 5, "rope_scaling": RopeScaling("linear", 2.0)},
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)},
}


def greedy(rows: int) -> Sampling:
    return Sampling(jnp.zeros(rows), jnp.ones(rows), jnp.zeros(rows, jnp.uint32))


def prompts(lengths, images):
    """Right-padded random ids with the placeholders of `images` a row, and pictures."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 290, (len(lengths), max(lengths)))
    for row, (length, count) in enumerate(zip(lengths, images, strict=True)):
        ids[row, 1 : 1 + 4 * count] = CONFIG.image_token_id
        ids[row, length:] = 0
    pixels = rng.integers(0, 256, (len(lengths), max(images), 8, 8, 3)).astype(np.uint8)
    return jnp.array(ids), jnp.array(lengths), jnp.array(pixels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_single_tokens_give_the_logits_of_a_full_pass(variant):
    config = config_with(**VARIANTS[variant])
    params, model = random_params(config), LlavaModel(config)
    ids, _, images = prompts([20, 20], [1, 2])
    mask = jnp.ones_like(ids)
    full = all_logits(model, params, ids, images, mask)
    read, positions = 13, jnp.broadcast_to(jnp.arange(20), ids.shape)

    @jax.jit
    def advance(ids, images, positions, cache):
        ones = jnp.ones_like(ids)
        hidden, cache = model.apply({"params": params}, ids, images, positions, ones, cache)
        return model.apply({"params": params}, hidden, method=LlavaModel.attend), cache

    cache = KVCache.empty(config.decoder, 2, 32, jnp.float32)
    logits, cache = advance(ids[:, :read], images, positions[:, :read], cache)
    pieces = [logits]
    for t in range(read, 20):
        logits, cache = advance(ids[:, t : t + 1], None, positions[:, t : t + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, rtol=1e-5, atol=2e-5)


def test_generated_tokens_are_the_argmax_of_full_passes():
    config = config_with(qk_norm=True, sliding_window=5)
    params, model = random_params(config), LlavaModel(config)
    ids, lengths, images = prompts([9, 17], [1, 2])
    no_stop, budget = jnp.array([], jnp.int32), jnp.full(2, 50)
    first, state = prefill(
        model, params, ids, lengths, images, budget, greedy(2), no_stop, cache_size=48
    )
    tokens, _ = decode(model, params, state, jnp.zeros(2, bool), no_stop)
    answers = np.concatenate([first[:, None], tokens], axis=1)
    assert answers.shape == (2, 1 + TOKENS_PER_CALL)
    whole = np.zeros((2, 17 + answers.shape[1]), int)
    for row, length in enumerate(lengths):
        whole[row, :length] = ids[row, :length]
        whole[row, length : length + answers.shape[1]] = answers[row]
    mask = np.arange(whole.shape[1]) < np.array(lengths)[:, None] + answers.shape[1]
    best = all_logits(model, params, whole, images, mask.astype(int)).argmax(-1)
    for row, length in enumerate(lengths):
        expected = best[row, length - 1 : length - 1 + answers.shape[1]]
        np.testing.assert_array_equal(expected, answers[row])


def test_a_row_ends_at_its_budget_at_a_stop_id_and_when_the_host_says_so():
    params, model = random_params(CONFIG), LlavaModel(CONFIG)
    ids, lengths, images = prompts([9, 9, 9], [0, 0, 1])
    ids = ids.at[1].set(ids[0])  # rows 0 and 1 would say the same
    no_stop = jnp.array([], jnp.int32)

    def answers(budget, stop_ids, stopped):
        first, state = prefill(
            model, params, ids, lengths, images, jnp.array(budget), greedy(3), stop_ids, 32
        )
        before = state.cache.lengths
        tokens, state = decode(model, params, state, jnp.array(stopped), stop_ids)
        return np.concatenate([first[:, None], tokens], 1), state.cache.lengths - before

    free, _ = answers([9, 9, 9], no_stop, [False] * 3)
    assert (free >= 0).all()
    short, written = answers([9, 3, 0], no_stop, [False] * 3)
    np.testing.assert_array_equal(short[0], free[0])
    np.testing.assert_array_equal(short[1], [*free[1, :3], *[-1] * 6])
    assert (short[2] == -1).all()
    np.testing.assert_array_equal(written, [8, 2, 0])  # the last token is never read
    stop = free[0, 4]
    place = list(free[0]).index(stop)
    stopped, _ = answers([9, 9, 9], jnp.array([stop]), [False] * 3)
    np.testing.assert_array_equal(stopped[0], [*free[0, : place + 1], *[-1] * (8 - place)])
    told, _ = answers([9, 9, 9], no_stop, [True, False, False])
    assert (told[0, 1:] == -1).all()
    np.testing.assert_array_equal(told[1], free[1])


def test_full_pass_takes_padding_on_either_side():
    params, model = random_params(CONFIG), LlavaModel(CONFIG)
    ids, _, images = prompts([12], [1])
    alone = all_logits(model, params, ids, images, jnp.ones_like(ids))
    for left, right in ((5, 0), (0, 5)):
        pad = ((0, 0), (left, right))
        padded = all_logits(model, params, jnp.pad(ids, pad), images, jnp.pad(ids * 0 + 1, pad))
        np.testing.assert_allclose(padded[:, left : left + 12], alone, rtol=1e-5, atol=2e-5)
        assert np.isfinite(padded).all()


def test_greedy_rows_stay_greedy_beside_drawn_ones():
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    temperature = jnp.array([0.0, 1.0, 0.0, 2.0])
    sampling = Sampling(temperature, jnp.ones(4), jnp.arange(4, dtype=jnp.uint32))
    tokens = np.array([draw(logits, sampling, jnp.full(4, p)) for p in range(20)])
    best = logits.argmax(-1)
    assert (tokens[:, 0] == best[0]).all() and (tokens[:, 2] == best[2]).all()
    assert len(set(tokens[:, 1])) > 5 and len(set(tokens[:, 3])) > 5


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (1, 50)), (3, 1))
    sampling = Sampling(jnp.ones(3), jnp.ones(3), jnp.array([5, 6, 5], jnp.uint32))
    together = np.array([draw(logits, sampling, jnp.full(3, p)) for p in range(12)])
    np.testing.assert_array_equal(together[:, 0], together[:, 2])
    assert (together[:, 0] != together[:, 1]).any()
    one = jax.tree.map(lambda x: x[1:2], sampling)
    alone = np.array([draw(logits[:1], one, jnp.full(1, p)) for p in range(12)])
    np.testing.assert_array_equal(alone[:, 0], together[:, 1])


def test_draws_follow_the_probabilities_within_top_p():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.tile(probabilities, (4000, 1)))
    seeds = jnp.arange(4000, dtype=jnp.uint32)

    def shares(top_p):
        sampling = Sampling(jnp.ones(4000), jnp.full(4000, top_p), seeds)
        return np.bincount(draw(logits, sampling, jnp.zeros(4000, int)), minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(shares(0.6), [0.625, 0.375, 0, 0], atol=0.03)
    kept = keep_top_p(logits[:3], jnp.array([0.1, 0.81, 1.0]))
    np.testing.assert_array_equal(np.isfinite(kept).sum(1), [1, 3, 4])
