"""The device side: prefill + decode equal to a full forward pass, over the decoder's variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.inference import decoding, jobs, scoring
from llava_jax.inference import prefill as prefilling
from llava_jax.inference.decoding import NO_TOKEN, TOKENS_PER_CALL, DecodeState
from llava_jax.inference.jobs import Job, Request
from llava_jax.inference.prefill import PrefillShape, pack_prompts
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models import cache
from llava_jax.models.cache import NO_PAGE, PAGE, Chunks, empty_cache
from llava_jax.models.decoder import RopeScaling
from llava_jax.models.llava import LlavaModel
from tests.tiny_model import CONFIG, config_with, random_params

encode = jax.jit(decoding.encode, static_argnames="model")
prefill = jax.jit(decoding.prefill, static_argnames="model")
decode = jax.jit(decoding.decode, static_argnames="model")
whole = jax.jit(scoring.all_logits, static_argnames="model")


def all_logits(model, params, ids, images, mask):
    """Logits of whole rows, whose tiles [B, K, S, S, 3] are shown in turn."""
    places = feature_places(np.array(ids), images.shape[1])
    return whole(model, params, ids, images.reshape(-1, 8, 8, 3), places, None, mask)


VARIANTS = {
    "llama": {},  # two query heads to a kv head
    "qwen3": {"qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "window": {"sliding_window": 5, "rope_scaling": RopeScaling("linear", 2.0)},
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)},
}


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
    store = jnp.zeros((4, 4, config.decoder.hidden_size))
    store = encode(model, params, store, images.reshape(-1, 8, 8, 3), jnp.arange(4))
    places = feature_places(np.array(ids), images.shape[1])

    @jax.jit
    def advance(ids, places, chunks, cache):
        def read(model):
            features = store.reshape(-1, store.shape[-1])
            return model.decoder.read(model.embed(ids, features, places), cache, chunks)

        hidden, cache = model.apply({"params": params}, method=read)
        return model.apply({"params": params}, hidden, method=LlavaModel.attend), cache

    def chunks_of(first, last):  # of both rows, the tokens from `first` to `last`
        length = last - first
        tokens = np.arange(2 * length).reshape(2, length)
        slots, tables = np.tile(np.arange(first, last), 2), np.array([[3, 0], [1, 2]])
        pages = tables[np.repeat([0, 1], length), slots // PAGE]
        return Chunks(slots, pages, tokens, tokens.ravel(), tables)

    kept, pieces = empty_cache(config.decoder, 4, jnp.float32), []
    for first, last in [(0, 13), *((t, t + 1) for t in range(13, 20))]:
        part = np.s_[:, first:last]
        chunks = chunks_of(first, last)
        logits, kept = advance(ids[part].ravel(), places[part].ravel(), chunks, kept)
        pieces.append(logits.reshape(2, last - first, -1))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, rtol=1e-5, atol=2e-5)


def feature_places(ids, images):
    """Which feature of the store stands for each token, `images` of 4 tokens to a row."""
    is_image = ids == CONFIG.image_token_id
    places = np.cumsum(is_image, axis=1) - 1 + np.arange(len(ids))[:, None] * images * 4
    return np.where(is_image, places, NO_TOKEN)


TABLES = np.array([[4, 1], [2, 5], [0, 3]])  # the pages of each row


def read(model, params, ids, lengths, images, budget, stop_ids=(), kv_dtype="float32"):
    """First tokens and state of right-padded prompts, each in the row of its number."""
    rows, pictures = len(ids), images.reshape(-1, 8, 8, 3)
    store = jnp.zeros((len(pictures), 4, model.config.decoder.hidden_size))
    store = encode(model, params, store, pictures, jnp.arange(len(pictures)))
    places = feature_places(np.array(ids), images.shape[1])
    waiting = []
    for row, length in enumerate(np.array(lengths)):
        request = Request(np.array(ids[row, :length]), (), SamplingParams())
        job = Job(request, None, tuple(stop_ids), budget[row])
        job.feature_ids, job.row, job.pages = places[row, :length], row, TABLES[row].tolist()
        waiting.append(job)
    prompts = pack_prompts(waiting, PrefillShape(64, 8, 32), rows)  # in chunks of eight
    state = DecodeState.empty(model, rows, TABLES.size, jnp.dtype(kv_dtype))
    tokens, _, state = prefill(model, params, state, store, prompts)
    return tokens[np.array([list(prompts.rows).index(row) for row in range(rows)])], state


def test_generated_tokens_are_the_argmax_of_full_passes():
    config = config_with(qk_norm=True, sliding_window=5)
    params, model = random_params(config), LlavaModel(config)
    ids, lengths, images = prompts([9, 17], [1, 2])
    first, state = read(model, params, ids, lengths, images, [50, 50])
    later, _, _ = decode(model, params, state, jnp.ones(2, bool), 1, TABLES[:2])
    answers = np.concatenate([first[:, None], later], axis=1)
    assert answers.shape == (2, 1 + TOKENS_PER_CALL)
    tokens = np.zeros((2, 17 + answers.shape[1]), int)
    for row, length in enumerate(lengths):
        tokens[row, :length] = ids[row, :length]
        tokens[row, length : length + answers.shape[1]] = answers[row]
    mask = np.arange(tokens.shape[1]) < np.array(lengths)[:, None] + answers.shape[1]
    best = all_logits(model, params, tokens, images, mask.astype(int)).argmax(-1)
    for row, length in enumerate(lengths):
        expected = best[row, length - 1 : length - 1 + answers.shape[1]]
        np.testing.assert_array_equal(expected, answers[row])


def test_a_row_ends_at_its_budget_at_a_stop_id_and_when_the_host_says_so():
    params, model = random_params(CONFIG), LlavaModel(CONFIG)
    ids, lengths, images = prompts([9, 9, 9], [0, 0, 1])
    ids = ids.at[1].set(ids[0])  # rows 0 and 1 would say the same

    def answers(budget, stop_ids=(), running=(True, True, True), fewest=1):
        first, state = read(model, params, ids, lengths, images, budget, stop_ids)
        before = state.lengths
        tokens, _, state = decode(model, params, state, jnp.array(running), fewest, TABLES)
        return np.concatenate([first[:, None], tokens], 1), state.lengths - before

    free, _ = answers([9, 9, 9])
    assert (free >= 0).all()
    short, written = answers([9, 3, 0])
    np.testing.assert_array_equal(short[0], free[0])
    np.testing.assert_array_equal(short[1], [*free[1, :3], *[-1] * 6])
    assert (short[2] == -1).all()
    np.testing.assert_array_equal(written, [8, 2, 0])  # the last token is never read
    place = 4
    stopped, _ = answers([9, 9, 9], [free[0, place]])
    place = list(free[0]).index(free[0, place])
    np.testing.assert_array_equal(stopped[0], [*free[0, : place + 1], *[-1] * (8 - place)])
    halted, _ = answers([9, 9, 9], running=[False, True, True])
    assert (halted[0, 1:] == -1).all()
    np.testing.assert_array_equal(halted[1], free[1])
    early, written = answers([9, 3, 9], fewest=3)  # ends as soon as row 1 does
    np.testing.assert_array_equal(written, [2, 2, 2])
    np.testing.assert_array_equal(early[0], [*free[0, :3], *[-1] * 6])


def test_an_int8_cache_is_near_the_exact_one():
    params, model = random_params(CONFIG), LlavaModel(CONFIG)
    ids, lengths, images = prompts([20, 17], [1, 2])
    states = [
        read(model, params, ids, lengths, images, [9, 9], kv_dtype=dtype)[1]
        for dtype in ("float32", "int8")
    ]
    exact, low = (state.cache for state in states)
    assert low.keys.dtype == low.values.dtype == jnp.int8
    for name, scales in (("keys", low.scales[0]), ("values", low.scales[1])):
        stored = getattr(low, name) * scales[..., None]
        page = TABLES[0, 0]  # it is full
        # the first layer's inputs are exact: only the rounding itself is left
        error = abs(stored - getattr(exact, name))[0, page]
        assert 0 < error.max() <= 0.51 * scales[0, page].max()
        np.testing.assert_allclose(
            stored[:, page], getattr(exact, name)[:, page], atol=0.1 * abs(stored).max()
        )


def test_full_pass_takes_padding_on_either_side():
    params, model = random_params(CONFIG), LlavaModel(CONFIG)
    ids, _, images = prompts([12], [1])

    def logits(ids, mask):
        return all_logits(model, params, ids, images, mask)

    alone = logits(ids, jnp.ones_like(ids))
    for left, right in ((5, 0), (0, 5)):
        pad = ((0, 0), (left, right))
        padded = logits(jnp.pad(ids, pad), jnp.pad(ids * 0 + 1, pad))
        np.testing.assert_allclose(padded[:, left : left + 12], alone, rtol=1e-5, atol=2e-5)
        assert np.isfinite(padded).all()


def test_the_drawn_example_of_chunks_is_what_prompts_are_packed_into(monkeypatch):
    for module in (cache, jobs, prefilling):
        monkeypatch.setattr(module, "PAGE", 2)
    waiting = []
    for text, row, shared, pages in (
        ("abcdef", 2, 0, [5, 1, 2]),
        ("abxyz", 0, 2, [5, 0, 3]),
        ("z", 3, 0, [4, 6]),  # with room for what follows
    ):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        job = Job(Request(ids, (), SamplingParams()), None, (), 1)
        job.row, job.shared, job.read, job.pages = row, shared, shared, pages
        job.feature_ids = np.full(len(ids), NO_TOKEN)
        waiting.append(job)
    packed = pack_prompts(waiting, PrefillShape(tokens=16, chunk=4, window=8), rows=4)
    chunks = packed.chunks
    assert bytes(packed.input_ids[:10].tolist()) == b"abcdefxyzz"
    assert chunks.slots[:10].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 0]
    assert chunks.pages[:11].tolist() == [5, 5, 1, 1, 2, 2, 0, 0, 3, 4, NO_PAGE]
    read_ = [chunks.tokens[i, :n].tolist() for i, n in enumerate((4, 2, 3, 1))]
    assert read_ == [[0, 1, 2, 3], [4, 5], [6, 7, 8], [9]]
    assert chunks.places[:10].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 12]
    tables = [chunks.tables[i, :n].tolist() for i, n in enumerate((3, 3, 3, 1))]
    assert tables == [[5, 1, 2], [5, 1, 2], [5, 0, 3], [4]] and chunks.tables.shape == (5, 4)
    assert packed.rows.tolist() == [2, 4, 0, 3, 4]
