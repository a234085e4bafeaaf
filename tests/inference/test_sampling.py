"""The choice of a token: settings, their names, and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.sampling import (
    MAX_LOGPROBS,
    Sampling,
    SamplingParams,
    keep_likely,
    logprobs_of,
    sample,
)

draw = jax.jit(sample)


def settings(rows: int, **values) -> Sampling:
    return Sampling.zeros(rows).replace(
        **{name: np.asarray(value, np.float32) for name, value in values.items()}
    )


def nothing_seen(logits):
    return jnp.zeros(logits.shape, bool)


def test_greedy_rows_stay_greedy_next_to_drawn_ones():
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    sampling = settings(4, temperature=[0.0, 1.0, 0.0, 2.0]).replace(seed=np.arange(4, dtype="u4"))
    tokens = np.array(
        [draw(logits, sampling, jnp.full(4, p), nothing_seen(logits)) for p in range(20)]
    )
    best = logits.argmax(-1)
    assert (tokens[:, 0] == best[0]).all() and (tokens[:, 2] == best[2]).all()
    assert len(set(tokens[:, 1])) > 5 and len(set(tokens[:, 3])) > 5


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (1, 50)), (3, 1))
    sampling = settings(3, temperature=np.ones(3)).replace(seed=np.array([5, 6, 5], np.uint32))
    seen = nothing_seen(logits)
    together = np.array([draw(logits, sampling, jnp.full(3, p), seen) for p in range(12)])
    np.testing.assert_array_equal(together[:, 0], together[:, 2])
    assert (together[:, 0] != together[:, 1]).any()
    one = jax.tree.map(lambda x: x[1:2], sampling)
    alone = np.array([draw(logits[:1], one, jnp.full(1, p), seen[:1]) for p in range(12)])
    np.testing.assert_array_equal(alone[:, 0], together[:, 1])


def test_draws_follow_the_probabilities_within_the_limits():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.tile(probabilities, (4000, 1)))
    seeds = np.arange(4000, dtype=np.uint32)

    def shares(**values):
        values = {name: np.full(4000, value) for name, value in values.items()}
        top_k = values.pop("top_k", np.zeros(4000)).astype(np.int32)
        sampling = settings(4000, **{"temperature": np.ones(4000), **values})
        sampling = sampling.replace(seed=seeds, top_k=top_k)
        tokens = draw(logits, sampling, jnp.zeros(4000, int), nothing_seen(logits))
        return np.bincount(tokens, minlength=4) / 4000

    np.testing.assert_allclose(shares(), probabilities, atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_k=1), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(top_k=3), probabilities * [1, 1, 1, 0] / 0.95, atol=0.03)
    np.testing.assert_allclose(shares(min_p=0.5), [0.625, 0.375, 0, 0], atol=0.03)
    hot = probabilities**0.5
    np.testing.assert_allclose(shares(temperature=2.0), hot / hot.sum(), atol=0.03)


def test_limits_keep_what_huggingface_keeps():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 3
    top_k, top_p, min_p = [0, 5, 0, 7, 1, 0], [1.0, 1.0, 0.7, 0.8, 1.0, 1.0], [0, 0, 0, 0, 0, 0.1]
    ours = np.isfinite(keep_likely(logits, *map(jnp.array, (top_k, top_p, min_p))))
    for row in range(6):
        scores = torch.tensor(logits[row : row + 1])
        if min_p[row]:
            scores = transformers.MinPLogitsWarper(min_p[row])(None, scores)
        if top_k[row]:
            scores = transformers.TopKLogitsWarper(top_k[row])(None, scores)
        if top_p[row] < 1:
            scores = transformers.TopPLogitsWarper(top_p[row])(None, scores)
        np.testing.assert_array_equal(ours[row], np.isfinite(scores[0].numpy()))


def test_the_likeliest_token_can_always_be_drawn():
    logits = jnp.array([[0.0, 2.0, 1.0]])
    for top_p in (1e-7, 1e-50):  # the latter is 0 in float32
        kept = keep_likely(logits, jnp.array([0]), jnp.array([top_p]), jnp.array([0.0]))
        np.testing.assert_array_equal(np.isfinite(kept), [[False, True, False]])


def test_repetition_penalty_is_huggingfaces():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :4]  # the likeliest were seen
    seen = np.zeros((5, 40), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    scores = transformers.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor(ids), torch.tensor(logits)
    )
    sampling = settings(5, repetition_penalty=np.full(5, 1.7))
    tokens = draw(logits, sampling, jnp.zeros(5, int), seen)
    np.testing.assert_array_equal(tokens, scores.numpy().argmax(1))
    assert (tokens != logits.argmax(1)).any()


def test_an_end_cannot_be_chosen_before_its_first_position():
    logits = jnp.array([[0.0, 5.0, 4.0, 3.0]] * 2)
    sampling = Sampling.zeros(2)
    sampling.stop_ids[:, :2] = [1, 2]
    sampling.first_end[:] = 7
    for position, expected in ((6, 3), (7, 1)):
        tokens = draw(logits, sampling, jnp.full(2, position), nothing_seen(logits))
        np.testing.assert_array_equal(tokens, [expected] * 2)


def test_logprobs_are_the_log_softmax():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    found = logprobs_of(logits, jnp.array([4, 0, 49]))
    expected = np.array(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.chosen, expected[[0, 1, 2], [4, 0, 49]], rtol=1e-6)
    order = np.argsort(-expected, axis=1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, 1), rtol=1e-6)
    few = logprobs_of(logits[:, :5], jnp.array([4, 0, 2]))
    assert few.top.shape == (3, MAX_LOGPROBS) and np.isfinite(few.top).sum() == 15


@pytest.mark.parametrize(
    "names, expected",
    [
        ({"max_new_tokens": 5, "min_new_tokens": 2}, {"max_tokens": 5, "min_tokens": 2}),
        ({"num_return_sequences": 3, "stop_strings": "a"}, {"n": 3, "stop": ("a",)}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 1e-40}, {"temperature": 0.0}),
        ({"top_k": -1, "stop": None, "stop_token_ids": [3]}, {"top_k": -1, "stop_token_ids": (3,)}),
    ],
)
def test_names_of_vllm_and_huggingface(names, expected):
    params = SamplingParams.from_names(names)
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    "names, message",
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature': did you mean temperature"),
        ({"xyz": 1}, "unknown sampling parameter 'xyz': known are max_tokens"),
        ({"max_tokens": 1, "max_new_tokens": 1}, "mean the same"),
        ({"do_sample": True, "temperature": 0}, "do_sample is true but temperature is 0"),
        ({"do_sample": 1}, "do_sample must be true or false"),
        ({"max_tokens": True}, "max_tokens must be a whole number from 1"),
        ({"top_k": -2}, "top_k must be a whole number from -1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100"),
        ({"temperature": 1e300}, "temperature must be a number from 0 to 1000"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 1000"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens must be a whole number from 0 to 3"),
        ({"stop": [""]}, "stop must be texts"),
        ({"stop": 5}, "stop must be a list, not 5"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, not 5"),
        ({"stop_token_ids": ["a"]}, "each of stop_token_ids must be a whole number"),
        ({"stop_token_ids": [10**12]}, "each of stop_token_ids must be a whole number"),
        ({"top_k": 10**12}, "top_k must be a whole number"),
        ({"max_tokens": 10**12}, "max_tokens must be a whole number from 1"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"n": 0}, "n must be a whole number from 1 to 16384"),
        ({"n": 10**7}, "n must be a whole number from 1 to 16384"),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false"),
    ],
)
def test_wrong_settings_are_refused(names, message):
    with pytest.raises(LlavaError, match=message):
        SamplingParams.from_names(names)
