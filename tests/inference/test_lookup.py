"""Prompt look-up: what is guessed, and answers that are those without guesses in any batch."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.counts import Counts
from llava_jax.inference.decoding import NO_TOKEN
from llava_jax.inference.jobs import LiveJobs
from llava_jax.inference.lookup import LONGEST, SHORTEST, guess
from llava_jax.inference.model import Llava
from llava_jax.inference.replicas import Replicas
from llava_jax.inference.sampling import CONTRASTS, SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.models.decoder import separate_layers
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params

SIZE, K = 64, 3  # prompt and answer of every request here: one cache size, few compilations
TOKENS = 20
TEMPLATE = "mistral_instruct"  # short


def params_that_repeat(seed: int = 0) -> dict:
    """Of a model that says eight tokens, others only if it draws them: some guesses are right."""
    params = random_params(CONFIG, seed)
    head = params["decoder"]["lm_head"]
    head["kernel"] = head["kernel"].at[:, 8:].set(0)
    return params


def make(lookup: int, **options) -> Llava:
    params = options.pop("params", None) or params_that_repeat()
    return Llava(CONFIG, params, byte_tokenizer(), TEMPLATE, lookup=lookup, **options)


def warm(model: Llava) -> Llava:
    model.engine.warm_up(batch_size=4, size=SIZE, few=True)
    return model


@pytest.fixture(scope="module")
def plain():
    return warm(make(0))


@pytest.fixture(scope="module")
def guessing():
    return warm(make(K))


def mixed(llava, seed: int, count: int = 12, **settings) -> list:
    """Requests with and without pictures, of all lengths, that stop and are drawn in all ways."""
    rng = random.Random(seed)
    pictures, requests = [random_image(i) for i in range(3)], []
    for i in range(count):
        prompt = "".join(rng.choices("ab ", k=rng.randint(1, 12))) + "?"
        own = {
            "max_tokens": rng.randint(1, TOKENS),
            "ignore_eos": True,
            "seed": i,
            "temperature": rng.choice([0, 0, 0.3]),
            "repetition_penalty": rng.choice([1, 1, 1.1]),
            "stop_token_ids": rng.sample(range(300), rng.choice([0, 20])),
            "logprobs": rng.choice([None, 2]),
        }
        own["min_tokens"] = rng.randint(0, own["max_tokens"])
        shown = rng.sample(pictures, rng.choice([0, 1, 2]))
        requests.append(llava.request(prompt, shown, SamplingParams(**own | settings)))
    return requests


def answers(llava, requests, batch_size: int = 4) -> list:
    """Each answer. Not by `Llava.answers`: it may take smaller batches."""
    jobs = [llava.jobs(request)[0] for request in requests]
    for _ in llava.engine.run(jobs, batch_size):
        pass
    return [job.answer for job in jobs]


def same(found: list, expected: list) -> None:
    """Both are the same answers, with the same log probabilities."""
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert [a.finish_reason for a in found] == [a.finish_reason for a in expected]
    for one, other in zip(found, expected, strict=True):
        values = [[entry.logprob for entry in answer.logprobs] for answer in (one, other)]
        np.testing.assert_allclose(*values, atol=1e-4)
        ranked = [[entry.top.keys() for entry in answer.logprobs] for answer in (one, other)]
        assert ranked[0] == ranked[1]


def since(llava, before: Counts) -> Counts:
    """What the counts of an engine grew by."""
    both = zip(dataclasses.astuple(llava.engine.counts), dataclasses.astuple(before), strict=True)
    return Counts(*(now - then for now, then in both))


def followers(row: list[int], count: int) -> list[int]:
    """What `guess` gives, looked up one place after the other."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        latest = row[len(row) - size :]
        if len(latest) < size or min(latest) < 0:
            continue
        for end in range(len(row) - 1, size - 1, -1):
            if row[end - size : end] == latest:
                found = (row[end:] * count)[:count]
                known = next((i for i, token in enumerate(found) if token < 0), count)
                return found[:known] + [NO_TOKEN] * (count - known)
    return [NO_TOKEN] * count


def test_guesses_are_those_of_the_drawn_example():
    row = [NO_TOKEN if c == "#" else ord(c) for c in "##the_cat.#the_dog._the????"]
    for length, expected in ((23, "_dog"), (9, None), (15, "cat.")):
        (found,) = guess(np.array([row]), np.array([length - 1]), 4).tolist()
        assert found == ([NO_TOKEN] * 4 if expected is None else list(map(ord, expected)))
    ring = np.array([[NO_TOKEN, *b"abab"]])
    assert bytes(guess(ring, np.array([4]), 5)[0].tolist()) == b"ababa"


def test_guesses_are_those_of_looking_one_place_after_the_other():
    rng = np.random.default_rng(0)
    history = rng.integers(-1, 4, (300, 24)).astype(np.int32)
    lengths = rng.integers(0, 24, 300)
    found = guess(history, lengths, 5)
    expected = [
        followers(row[: n + 1].tolist(), 5) for row, n in zip(history, lengths, strict=True)
    ]
    assert found.tolist() == expected
    known = (np.array(expected) >= 0).sum(axis=1)
    assert set(known) == set(range(6))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0, "stop_token_ids": ()}])
def test_answers_are_those_without_guesses_in_any_batch(plain, guessing, settings):
    expected = answers(plain, mixed(plain, 1, **settings))
    requests = mixed(guessing, 1, **settings)
    before = guessing.engine.counts
    same(answers(guessing, requests), expected)
    new = since(guessing, before)
    assert 0 < new.accepted_tokens < new.draft_tokens
    assert new.drafts <= new.draft_tokens <= K * new.drafts
    assert new.answer_tokens > new.accepted_tokens + new.requests
    same(answers(guessing, requests[::-1], 3)[::-1], expected)  # what is shared is another
    for one, other in zip(requests[:4], expected, strict=False):
        guessing.engine.forget()
        same(answers(guessing, [one]), [other])


def test_budgets_end_at_every_place_of_a_draft(plain, guessing):
    asked = [SamplingParams(n, ignore_eos=True) for n in range(1, 41)]
    requests = [guessing.request("a?", None, params) for params in asked]
    ((whole,),) = plain.complete(["a?"], None, 4, max_tokens=40, ignore_eos=True)
    found = answers(guessing, requests)
    assert [a.tokens for a in found] == [whole.tokens[:n] for n in range(1, 41)]
    before = guessing.engine.counts
    answers(guessing, requests[-1:])
    new = since(guessing, before)
    assert new.accepted_tokens >= 5 and new.answer_tokens == 40


def test_a_stop_inside_a_draft_ends_the_answer_there(plain, guessing):
    settings = {"max_tokens": 40, "ignore_eos": True}
    ((whole,),) = plain.complete(["a?"], None, 4, **settings)
    last = sorted(set(whole.tokens), key=whole.tokens.index)
    for stop in last:
        for least in (0, 20, 30, 31, 32):
            stops = {"stop_token_ids": [stop], "min_tokens": least, **settings}
            params = SamplingParams(**stops)
            found, expected = (
                answers(model, [model.request("a?", None, params)] * 2)
                for model in (guessing, plain)
            )
            same(found, expected)


def test_a_stop_text_inside_a_draft_ends_the_answer_there(plain, guessing):
    settings = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.3}
    asked = [SamplingParams(seed=seed, **settings) for seed in range(4)]
    whole = answers(plain, [plain.request("ab?", None, params) for params in asked])
    stops = [
        dataclasses.replace(params, stop=answer.text[at : at + 2])
        for params, answer in zip(asked, whole, strict=True)
        for at in range(len(answer.text))
    ]
    found, expected = (
        answers(model, [model.request("ab?", None, params) for params in stops])
        for model in (guessing, plain)
    )
    same(found, expected)
    assert [a.text for a in found] == [a.text for a in expected]


def test_an_answer_may_fill_its_row_to_the_end(plain, guessing):
    found = []
    for model in (plain, guessing):
        model.engine.forget()
        length = len(model.request("a?", None, SamplingParams()).input_ids)
        params = SamplingParams(SIZE - length, ignore_eos=True)
        found.append(answers(model, [model.request(p, None, params) for p in ("a?", "b?")] * 3))
        assert model.engine.device.size == SIZE
    same(found[1], found[0])
    assert len(found[1][0].tokens) == SIZE - length


def test_rows_that_ended_keep_what_others_begin_with(guessing):
    """Guesses that failed are behind it: prompts that go on with an answer copy nothing of them.

    The answers differ in length, so that they end at every place of a draft.
    """
    picture = random_image(1)
    for length in range(1, 13):
        guessing.engine.forget()
        params = SamplingParams(length, ignore_eos=True, temperature=0.3, seed=length)
        first = [guessing.request(f"{c}?", picture, params) for c in "ab"]
        longer = []
        for request, answer in zip(first, answers(guessing, first), strict=True):
            ids = np.concatenate([request.input_ids, answer.tokens, [70, 71]])
            longer.append(dataclasses.replace(request, input_ids=ids.astype(np.int32)))
        before = guessing.engine.counts
        found = answers(guessing, longer * 2)
        # All full pages, without an answer's last token, which was never read.
        assert since(guessing, before).shared_tokens >= sum(
            (len(one.input_ids) - 3) // PAGE * PAGE for one in longer
        )
        for one, expected in zip(longer, found, strict=False):
            guessing.engine.forget()
            same(answers(guessing, [one]), [expected])


def test_a_cancelled_answer_leaves_nothing_to_those_that_follow(plain, guessing):
    source, long = LiveJobs(), SamplingParams(40, ignore_eos=True)
    first, second = (guessing.jobs(guessing.request("a?", None, long))[0] for _ in range(2))
    source.put(first, second)
    rest = [guessing.jobs(one)[0] for one in mixed(guessing, 5)]
    for answer in guessing.engine.run(source, 4):
        if answer is first.answer and not answer.cancelled:
            answer.cancel()
            source.put(*rest)
            source.close()
    assert first.answer.finish_reason == "cancelled" and len(first.answer.tokens) < 40
    assert len(second.answer.tokens) == 40
    same([job.answer for job in rest], answers(plain, mixed(plain, 5)))


def test_nothing_compiles_after_warm_up(guessing):
    before = guessing.engine.counts.compilations
    for seed in (2, 3):
        guessing.engine.forget()
        answers(guessing, mixed(guessing, seed), 3)
    assert guessing.engine.counts.compilations == before


def test_off_there_is_no_history_and_the_plain_program_runs(plain, guessing):
    answers(plain, mixed(plain, 0, 2))
    answers(guessing, mixed(guessing, 0, 2))
    kept = jax.tree.leaves(plain.engine.device.state)
    assert len(jax.tree.leaves(guessing.engine.device.state)) == len(kept) + 1
    assert plain.engine.device.state.history is None
    assert plain.engine.counts.draft_tokens == 0


def test_pictures_are_in_no_guess(guessing):
    guessing.engine.forget()
    request = guessing.request("ab?", random_image(0), SamplingParams(4, ignore_eos=True))
    (answer,) = answers(guessing, [request])
    (row,) = [row for row in np.array(guessing.engine.device.state.history) if row.max() >= 0]
    ids = np.where(request.input_ids == CONFIG.image_token_id, NO_TOKEN, request.input_ids)
    assert (ids == NO_TOKEN).sum() == 4
    assert row[: len(ids) + 4].tolist() == [*ids, *answer.tokens]


@pytest.mark.parametrize("kind", CONTRASTS)
def test_with_contrast_both_rows_of_a_pair_read_the_same_guesses(plain, guessing, kind):
    before, found = guessing.engine.counts, []
    for model in (plain, guessing):
        requests = [
            model.request(prompt, random_image(i), SamplingParams(TOKENS, **settings))
            for i, prompt in enumerate(["ab?", "ba a?", "b?"])
            for settings in (
                {"contrast": kind, "ignore_eos": True},
                {"contrast": kind, "temperature": 0.3, "logprobs": 2, "seed": i},
                {"ignore_eos": True},
            )
        ]
        found.append(answers(model, requests))
    same(*found)
    assert since(guessing, before).accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("eight_bits", [True, False])
def test_with_eight_bits_and_with_layers_apart_answers_are_those_without(eight_bits):
    params, options = params_that_repeat(), {}
    if eight_bits:
        options = {"quantize": "int8", "kv_cache": "int8"}
    else:
        params |= {"decoder": separate_layers(params["decoder"])}
    models = [make(count, params=params, **options) for count in (0, K)]
    same(*(answers(model, mixed(model, 7)) for model in models))
    assert models[1].engine.counts.accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
def test_a_mesh_and_copies_answer_as_one_device(guessing, copies):
    shape = (1, 2, 2) if copies == 1 else (2, 1, 1)
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    spread = warm(make(K, mesh=mesh))
    before = spread.engine.counts.compilations
    same(answers(spread, mixed(spread, 8)), answers(guessing, mixed(guessing, 8)))
    assert spread.engine.counts.compilations == before
    assert spread.engine.counts.accepted_tokens > 0
    assert isinstance(spread.engine, Replicas) == (copies == 2)


@pytest.mark.parametrize("count", [-1, 17, 1.5, True, "4"])
def test_a_wrong_number_is_refused_before_anything_is_loaded(count, tmp_path):
    with pytest.raises(LlavaError, match="lookup must be a whole number from 0"):
        Llava.from_pretrained(tmp_path / "none", lookup=count)
