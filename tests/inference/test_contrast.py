"""Contrastive decoding: the formula, pairs of rows in any batch, and the worse pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference import prefill
from llava_jax.inference.distortion import DISTORTIONS, kept_signal
from llava_jax.inference.jobs import LiveJobs, Picture, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.prompts import check_request
from llava_jax.inference.sampling import CONTRASTS, Sampling, SamplingParams, sample
from llava_jax.models.cache import NO_PAGE, PAGE
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

TOKENS = 10
SIZE = 64
TEMPLATE = "mistral_instruct"  # short


@pytest.fixture(scope="module")
def llava():
    model = tiny_llava(template=TEMPLATE)
    model.engine.warm_up(batch_size=4, size=SIZE, few=True, contrast=True)
    return model


def request(llava, prompt, images, **settings):
    return llava.request(prompt, images, SamplingParams(TOKENS, ignore_eos=True, **settings))


def ask(llava, requests, batch_size=4):
    """Tokens of each answer. Not by `Llava.answers`: it may take smaller batches."""
    jobs = [llava.jobs(request)[0] for request in requests]
    for _ in llava.engine.run(jobs, batch_size):
        pass
    return [job.answer.tokens for job in jobs]


def mixed(llava, seed=0, count=10, **settings):
    """Requests with and without pictures, plain and with every kind of contrast, in any order."""
    rng = np.random.default_rng(seed)
    pictures = [random_image(i) for i in range(3)]
    requests = []
    for i in range(count):
        prompt = "".join(rng.choice(list("abc "), rng.integers(1, 9))) + "?"
        shown = [pictures[j] for j in rng.choice(3, rng.integers(0, 3), replace=False)]
        kind = (None, *CONTRASTS)[i % 4] if shown else None
        requests.append(request(llava, prompt, shown, contrast=kind, seed=i, **settings))
    return requests


def last_logits(llava, ids, tiles):
    """Logits of the token that follows, by a full forward pass."""
    ids = np.array(ids)[None]
    is_image = ids == CONFIG.image_token_id
    features = np.where(is_image, np.cumsum(is_image) - 1, -1)
    tiles = None if not len(tiles) else tiles
    return np.array(llava.engine.logits(ids, tiles, features, np.ones_like(ids)))[0, -1]


@pytest.mark.parametrize("kind", CONTRASTS)
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.3, "top_k": 30}])
def test_the_tokens_are_those_of_the_formula_on_two_full_passes(llava, kind, drawn):
    alpha, beta, picture = 1.5, 0.05, random_image(3)
    settings = {"contrast": kind, "contrast_alpha": alpha, "contrast_beta": beta, **drawn}
    plain = request(llava, "ab?", picture, seed=7, **drawn)
    (tokens,) = ask(llava, [request(llava, "ab?", picture, seed=7, **settings)])
    tiles = plain.pictures[0].load()
    ids = list(plain.input_ids)
    if kind == "absent":
        worse_ids, worse_tiles = [i for i in ids if i != CONFIG.image_token_id], tiles[:0]
    else:
        worse_ids, worse_tiles = ids, DISTORTIONS[kind](tiles, CONFIG.image)
    one = Sampling.zeros(1)
    one.fill(0, SamplingParams(TOKENS, seed=7, **drawn), (), len(ids))
    for token in tokens:
        logits = last_logits(llava, ids, tiles)
        worse = last_logits(llava, worse_ids, worse_tiles)
        probability = np.exp(logits - logits.max())
        contrasted = (1 + alpha) * logits - alpha * worse
        contrasted[probability < beta] = -np.inf
        seen = np.zeros((1, len(logits)), bool)
        expected = sample(jnp.array(contrasted[None]), one, jnp.array([len(ids)]), seen)
        assert token == int(expected[0])
        ids, worse_ids = [*ids, token], [*worse_ids, token]
    assert tokens != ask(llava, [plain])[0]


def test_a_request_alone_in_any_batch_and_after_others_has_the_same_tokens(llava):
    for settings in ({}, {"temperature": 1.0, "repetition_penalty": 1.3, "min_tokens": 3}):
        requests = mixed(llava, **settings)
        together = ask(llava, requests)
        assert ask(llava, requests[::-1], 3)[::-1] == together  # what is shared is another
        assert ask(llava, requests, 2) == together
        for one, expected in zip(requests, together, strict=True):
            llava.engine.forget()
            assert ask(llava, [one]) == [expected]


def test_a_batch_of_one_makes_room_for_the_twin(llava):
    asked = [request(llava, "ab?", random_image(1), contrast=kind) for kind in ("blur", None)]
    expected = ask(llava, asked)
    assert ask(llava, asked * 2, 1) == expected * 2
    settings = {"max_tokens": TOKENS, "ignore_eos": True, "contrast": "blur"}
    text = llava.chat("ab?", random_image(1), **settings)
    assert text == llava.generate("ab?", random_image(1), **settings)


def test_without_weight_and_limit_a_contrast_changes_nothing(llava):
    picture = random_image(1)
    for settings in ({}, {"temperature": 1.0}):
        plain = ask(llava, [request(llava, "a?", picture, **settings)])
        for kind in CONTRASTS:
            off = {"contrast": kind, "contrast_alpha": 0.0, "contrast_beta": 0.0}
            assert ask(llava, [request(llava, "a?", picture, **settings, **off)]) == plain


def test_nothing_compiles_after_warm_up(llava):
    before = llava.engine.counts.compilations
    for seed, batch_size in ((2, 4), (3, 3), (4, 4)):
        llava.engine.forget()
        ask(llava, mixed(llava, seed), batch_size)
        ask(llava, mixed(llava, seed, temperature=0.5, logprobs=2), batch_size)
    assert llava.engine.counts.compilations == before


def test_requests_without_contrast_run_the_plain_programs(llava, monkeypatch):
    device, seen = llava.engine.device, []
    read, decode = device.prefill, device.decode
    monkeypatch.setattr(
        device, "prefill", lambda prompts: seen.append(prompts.contrast) or read(prompts)
    )
    monkeypatch.setattr(device, "decode", lambda *to: seen.append(to[3]) or decode(*to))
    requests = mixed(llava, seed=9)
    ask(llava, [one for one in requests if one.params.contrast is None])
    assert seen and all(contrast is None for contrast in seen)
    seen.clear()
    ask(llava, requests)
    assert any(contrast is not None for contrast in seen)


def test_a_stream_is_the_whole_answer_and_n_answers_those_of_their_seeds(llava):
    prompts, images = ["a?", "b?", "c?"], [random_image(i) for i in range(3)]
    settings = {"max_tokens": TOKENS, "contrast": "noise", "temperature": 1.0}
    texts = [""] * 3
    for number, piece in llava.stream(prompts, images, 4, **settings):
        texts[number] += piece
    assert texts == llava.generate(prompts, images, 4, **settings)
    several = llava.generate(["a?"], images[:1], 4, n=3, seed=5, **settings)
    assert several == [
        [llava.generate("a?", images[0], 4, seed=5 + i, **settings) for i in range(3)]
    ]


def test_a_cancelled_request_frees_both_rows(llava):
    llava.engine.forget()
    source, long = LiveJobs(), {"max_tokens": 40, "ignore_eos": True, "contrast": "absent"}
    first, second = (
        llava.jobs(llava.request("a?", random_image(i), SamplingParams(**long)))[0] for i in (0, 1)
    )
    source.put(first, second)
    after = mixed(llava, seed=5, count=6)
    rest, grown = [llava.jobs(one)[0] for one in after], 0
    for answer in llava.engine.run(source, 4):
        grown += answer is second.answer
        if answer is first.answer and not answer.cancelled:
            answer.cancel()
            source.put(*rest)
            source.close()
    assert first.answer.finish_reason == "cancelled" and len(first.answer.tokens) < 40
    assert second.answer.finish_reason == "length" and grown > 1
    assert [job.answer.tokens for job in rest] == ask(llava, after)


def test_pairs_are_read_in_one_call_and_long_ones_in_parts(llava, monkeypatch):
    llava.engine.forget()
    requests = mixed(llava, seed=6, count=8)
    long = [request(llava, "abc" * 9 + "?", random_image(0), contrast=kind) for kind in CONTRASTS]
    expected = ask(llava, [*long, *requests])
    monkeypatch.setattr(prefill, "TOKENS_AT_A_TIME", 32)
    before, tokens = llava.engine.counts.compilations, []
    run = llava.engine.device.prefill
    monkeypatch.setattr(
        llava.engine.device, "prefill", lambda p: tokens.append(len(p.input_ids)) or run(p)
    )
    llava.engine.forget()
    assert ask(llava, [*long, *requests]) == expected
    llava.engine.forget()
    assert ask(llava, [*requests, *long][::-1], 3)[::-1] == [*expected[3:], *expected[:3]]
    assert llava.engine.counts.compilations == before
    assert max(tokens) <= 64  # a pair of 32 takes three chunks of 16, which few tokens have


def test_what_a_pair_shares_is_read_once(llava):
    """The words before the picture; the distorted picture of another question about it."""
    picture = random_image(5)

    def asked(letter, **settings):  # with more than a page of words before the picture
        one = request(llava, f"abc: {letter}?", picture, **settings)
        return dataclasses.replace(one, input_ids=np.insert(one.input_ids, 1, range(5, 20)))

    llava.engine.forget()
    device, read = llava.engine.device, []
    run = device.prefill

    def counted(prompts):
        read.append(int((prompts.chunks.pages < NO_PAGE).sum()))
        return run(prompts)

    device.prefill = counted
    try:
        for letter in "ab":
            ask(llava, [asked(letter, contrast="noise")])
    finally:
        device.prefill = run
    ids = list(asked("a").input_ids)
    words = ids.index(CONFIG.image_token_id)
    common = ids.index(ord("a") - 33, words + 4 + len("\nabc: "))
    full = lambda tokens: tokens // PAGE * PAGE  # what is shared is whole pages
    assert full(words) and read[0] == 2 * len(ids) - full(words)
    assert read[1] == 2 * (len(ids) - full(common))


def test_an_end_that_is_forbidden_leaves_a_token_to_choose(llava):
    """The likeliest token is an end, ten times as likely as all others, and is not allowed yet."""
    picture = random_image(2)
    free = llava.complete(["a?"], [picture], 4, max_tokens=4, ignore_eos=True, contrast="blur")
    (first, *_) = free[0][0].tokens
    settings = {"max_tokens": 4, "contrast": "blur", "contrast_beta": 1.0, "logprobs": 2}
    ((answer,),) = llava.complete(
        ["a?"], [picture], 4, stop_token_ids=[first], min_tokens=2, ignore_eos=True, **settings
    )
    logits = last_logits(llava, request(llava, "a?", picture).input_ids, tiles_of(picture, llava))
    logits[first] = -np.inf
    assert answer.tokens[0] == logits.argmax() != first


def tiles_of(picture, llava):
    return request(llava, "a?", picture).pictures[0].load()


def test_logprobs_are_those_of_the_contrasted_logits(llava):
    picture, settings = random_image(2), {"contrast": "blur", "logprobs": 20, "max_tokens": 1}
    ((answer,),) = llava.complete(["a?"], [picture], 4, ignore_eos=True, **settings)
    ids, tiles = request(llava, "a?", picture).input_ids, tiles_of(picture, llava)
    logits = last_logits(llava, ids, tiles)
    contrasted = 2 * logits - last_logits(llava, ids, DISTORTIONS["blur"](tiles, CONFIG.image))
    contrasted[np.exp(logits - logits.max()) < 0.1] = -np.inf
    expected = np.array(jax.nn.log_softmax(contrasted))
    (entry,) = answer.logprobs
    assert 0 < len(entry.top) == min(20, np.isfinite(contrasted).sum())
    for token, value in [(entry.token, entry.logprob), *entry.top.items()]:
        assert value == pytest.approx(expected[token], abs=1e-4)


def test_log_probabilities_of_a_plain_request_do_not_depend_on_others_contrast(llava):
    """Ends that are not allowed yet have their share, as in a batch without contrast."""
    settings = {"logprobs": 20, "min_tokens": TOKENS, "stop_token_ids": list(range(40, 60))}
    asked = [request(llava, "ab?", random_image(1), **settings)]
    asked.append(request(llava, "b?", random_image(2), contrast="blur"))
    found = []
    for together in (asked[:1], asked):
        jobs = [llava.jobs(one)[0] for one in together]
        list(llava.engine.run(jobs, 4))
        found.append([entry.logprob for entry in jobs[0].answer.logprobs])
    assert len(found[0]) == TOKENS
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.slow
def test_copies_and_a_mesh_give_the_same_tokens(llava):
    expected = ask(llava, mixed(llava, seed=8, count=5))
    mesh = make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    spread = Llava(CONFIG, random_params(CONFIG), byte_tokenizer(), TEMPLATE, mesh=mesh)
    assert ask(spread, mixed(spread, seed=8, count=5)) == expected


def test_noise_is_that_of_the_authors_and_the_same_each_time():
    """Their schedule in float64; the variance that a flat picture gets from it."""
    rates = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    assert kept_signal(500) == pytest.approx(np.cumprod(1 - rates)[500], rel=1e-6)
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    noisy = DISTORTIONS["noise"](grey, CONFIG.image)
    np.testing.assert_array_equal(noisy, DISTORTIONS["noise"](grey, CONFIG.image))
    assert (noisy[0] != noisy[1]).any() and noisy.dtype == np.uint8
    deviation = 255 * np.array(CONFIG.image.std) * np.sqrt(1 - kept_signal(500))
    np.testing.assert_allclose(noisy.std((0, 1, 2)), deviation, rtol=0.03)


def test_a_blur_keeps_the_mean_and_loses_what_is_small():
    board = np.indices((64, 64)).sum(0) % 2 * 200  # squares of one pixel
    tiles = np.repeat(board[None, ..., None], 3, -1).astype(np.uint8)
    spec = type(CONFIG.image)(64)
    flat = DISTORTIONS["blur"](tiles, spec)
    assert flat.shape == tiles.shape and flat.std() < 3 and abs(flat.mean() - 100) < 3


@pytest.mark.parametrize(
    "images, settings, message",
    [
        (None, {"contrast": "blur"}, "contrast is 'blur', but the prompt has no picture"),
        (1, {"contrast": "dark"}, "contrast must be one of blur, noise, absent, not 'dark'"),
        (1, {"contrast": "blur", "contrast_alpha": -1}, "contrast_alpha must be from 0 to 100"),
        (1, {"contrast": "blur", "contrast_beta": 1.1}, "contrast_beta must be from 0 to 1"),
        (1, {"contrast_beta": 0.2}, "contrast_beta is without effect: give contrast too"),
        (40, {"contrast": "noise"}, "has 40 tiles .*at most 32, or contrast 'absent'"),
    ],
)
def test_wrong_contrasts_are_refused(llava, images, settings, message):
    pictures = images and [random_image(i) for i in range(images)]
    with pytest.raises(LlavaError, match=message):
        llava.generate("a?", pictures, **settings)


def test_a_prompt_of_pictures_alone_has_nothing_without_them(llava):
    (picture,) = request(llava, "a?", random_image(0)).pictures
    ids = np.full(len(picture.layout), CONFIG.image_token_id, np.int32)
    check_request(Request(ids, (picture,), SamplingParams(contrast="blur")), CONFIG, ())
    alone = Request(ids, (picture,), SamplingParams(contrast="absent"))
    with pytest.raises(LlavaError, match="the prompt has pictures alone: give it a text"):
        check_request(alone, CONFIG, ())


def test_an_unreadable_picture_fails_its_request_alone(llava):
    def fail():
        raise LlavaError("damaged")

    good = request(llava, "a?", random_image(0), contrast="blur")
    bad = Request(good.input_ids, (Picture(good.pictures[0].layout, fail),), good.params)
    jobs = [llava.jobs(one)[0] for one in (good, bad, good)]
    for _ in llava.engine.run(jobs, 4):
        pass
    assert str(jobs[1].answer.error) == "damaged"
    assert jobs[0].answer.tokens == jobs[2].answer.tokens == ask(llava, [good])[0]
