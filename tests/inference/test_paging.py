"""The pages of the cache: who uses them, what they are known for, and what happens without any."""

import gc
import random
import resource

import jax
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import LiveJobs
from llava_jax.inference.model import Llava
from llava_jax.inference.paging import Pages
from llava_jax.inference.prefill import pool_pages
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

TEMPLATE, SIZE = "mistral_instruct", 64
A, B = np.arange(PAGE), np.arange(PAGE) + 1000  # contents of a page


def contents(*pages) -> np.ndarray:
    return np.concatenate(pages)


def test_a_page_is_found_by_all_that_comes_before_it_and_is_freed_by_its_last_user():
    pages = Pages(6)
    first = pages.take(3)
    pages.know(contents(A, B, [7]), first)
    assert pages.find(contents(A, B)) == first[:1]  # its last token is to be read
    assert pages.find(contents(A, B, [8])) == first[:2]
    assert pages.find(contents(B, A, [8])) == pages.find(contents(B, B)) == []
    pages.use(first[:2])
    second = first[:2] + pages.take(1)
    assert len({*first, *second}) == 4 and pages.unused == 2
    pages.drop(first)
    assert pages.unused == 3  # the page that only the first used
    assert pages.find(contents(A, B, [8])) == first[:2]
    pages.drop(second)
    assert pages.unused == 6 and pages.find(contents(A, B, [8])) == first[:2]


def test_what_is_known_makes_room_from_its_end_the_longest_unused_first():
    pages = Pages(4)
    first, second = pages.take(2), pages.take(2)
    pages.know(contents(A, B), first)
    pages.know(contents(B, A), second)
    pages.drop(first)
    pages.drop(second)
    assert pages.take(5) is None and pages.unused == 4
    (taken,) = pages.take(1)
    assert taken == first[1] and pages.find(contents(A, B, [0])) == first[:1]
    assert pages.find(contents(B, A, [0])) == second
    pages.take(3)
    assert pages.find(contents(B, A, [0])) == [] == pages.find(contents(A, B, [0]))


def test_a_page_behind_one_that_was_forgotten_is_not_found_behind_another():
    """Page numbers come again; what stands before a page must not be taken for what stood."""
    pages = Pages(2)
    first = pages.take(2)
    pages.know(contents(A, B), first)
    pages.forget(first[:1])
    pages.know(contents(B), first[:1])
    assert pages.find(contents(B, B, [0])) == first[:1]
    assert pages.find(contents(A, B, [0])) == []


def test_equal_contents_that_were_read_twice_are_one_chain():
    pages = Pages(4)
    first, second = pages.take(2), pages.take(2)
    pages.know(contents(A), first)
    pages.know(contents(A, B), second)  # its first page is known already
    assert pages.find(contents(A, B, [0])) == [first[0], second[1]]
    pages.drop(second)
    assert pages.unused == 2 and pages.find(contents(A, B, [0])) == [first[0], second[1]]


@pytest.fixture(scope="module")
def llava():
    """Four rows of up to 64 tokens, with pages for all of them."""
    return warm(None)


@pytest.fixture(scope="module")
def small():
    """The same with pages for two of the rows."""
    return warm(2 * SIZE)


def warm(cache_tokens: int | None, **options) -> Llava:
    model = Llava(
        CONFIG, random_params(CONFIG), byte_tokenizer(), TEMPLATE,
        cache_tokens=cache_tokens, **options,
    )  # fmt: skip
    model.engine.warm_up(4, SIZE, few=True, contrast=True)
    return model


def unused(model) -> tuple[int, int]:
    pages = model.engine._admission.pages
    return pages.unused, pages.count


def mixed(model, count: int, seed: int, longest: int = 30, **settings) -> list:
    """Jobs with and without pictures, greedy and drawn, in pairs too; short answers."""
    rng, jobs = random.Random(seed), []
    pictures = [random_image(i) for i in range(3)]
    for i in range(count):
        some = rng.sample(pictures, rng.choice([0, 1, 1]))
        params = SamplingParams(
            rng.randint(1, longest), ignore_eos=True, temperature=rng.choice([0, 1.0]), seed=i,
            repetition_penalty=rng.choice([1.0, 1.3]), logprobs=rng.choice([None, 1]),
            contrast="blur" if some and rng.random() < 0.3 else None,
            prompt_logprobs=rng.choice([None, None, 1]), **settings,
        )  # fmt: skip
        prompt = "".join(rng.choices("ab ", k=rng.randint(1, 6))) + "?"
        jobs += model.jobs(model.request(prompt, some, params))
    assert max(reading.most for job in jobs for reading in job.readings) <= SIZE
    return jobs


def answers(model, jobs, batch_size: int = 4) -> list:
    for _ in model.engine.run(jobs, batch_size):
        pass
    return [(job.answer.tokens, job.answer.finish_reason) for job in jobs]


def test_in_a_full_cache_answers_wait_or_give_way_and_none_is_other_than_alone(llava, small):
    expected = answers(llava, mixed(llava, 24, seed=0))
    compiled, before = small.engine.counts.compilations, small.engine.counts
    jobs = mixed(small, 24, seed=0)
    assert answers(small, jobs) == expected
    counts = small.engine.counts
    assert counts.put_back - before.put_back >= 3 and llava.engine.counts.put_back == 0
    assert counts.requests - before.requests == 24
    assert counts.prompt_tokens - before.prompt_tokens == sum(job.length for job in jobs)
    for job, (tokens, _) in zip(jobs, expected, strict=True):
        if job.request.params.logprobs:
            assert [entry.token for entry in job.answer.logprobs] == tokens
        if job.request.params.prompt_logprobs:
            assert len(job.answer.prompt_logprobs) == job.length - 1
    prompt_logprobs = [job for job in jobs if job.request.params.prompt_logprobs]
    assert counts.compilations - compiled <= bool(prompt_logprobs)  # warm-up leaves those out
    assert unused(small) == (8, 8) and unused(llava) == (16, 16)


def test_rows_take_pages_as_they_grow_and_share_those_of_their_prompt(llava):
    llava.engine.forget()
    request = llava.request("a long question about it?", None, SamplingParams(20, n=4, seed=1,
                            temperature=1.0, ignore_eos=True))  # fmt: skip
    jobs, seen = llava.jobs(request), []
    for _ in llava.engine.run(jobs, 4):
        seen.append([list(job.pages) for job in jobs if job.pages])
    full, need = jobs[0].length // PAGE, -(-(jobs[0].length + 20) // PAGE)
    together = [pages for pages in seen if len(pages) == 4]
    assert full and need > 2 and together
    for pages in together:
        assert len({tuple(own[:full]) for own in pages}) == 1
        rest = [page for own in pages for page in own[full:]]
        assert len(set(rest)) == len(rest)
    assert max(len(own) for own in together[0]) < need  # the rest comes later
    assert max(len(own) for pages in seen for own in pages) == need
    assert unused(llava) == (16, 16)


def test_the_latest_gives_way_and_waits_until_another_has_ended(small):
    jobs, order = [], []
    for i in range(3):  # of two pages at first and four at last: eight are too few
        params = SamplingParams(30 - 10 * (i == 0), ignore_eos=True)
        jobs += small.jobs(small.request(f"{'abc'[i]}bcd?", None, params))
    small.engine.forget()
    before = small.engine.counts.put_back
    for answer in small.engine.run(jobs, 4):
        if answer.done:
            order.append([job.answer for job in jobs].index(answer))
    assert small.engine.counts.put_back - before >= 1 and order == [0, 1, 2]


def test_a_cancelled_row_and_a_stream_left_early_give_their_pages_back(small):
    source, long = LiveJobs(), SamplingParams(40, ignore_eos=True)
    jobs = [small.jobs(small.request(f"{c}?", None, long))[0] for c in "abcdef"]
    source.put(*jobs)
    source.close()
    for answer in small.engine.run(source, 4):
        if len(answer.tokens) > 5:
            answer.cancel()
    assert {job.answer.finish_reason for job in jobs} == {"cancelled"}
    assert unused(small) == (8, 8)
    for steps in range(1, 6):
        run = small.engine.run(mixed(small, 8, seed=steps), 4)
        for _ in range(steps):
            next(run)
        run.close()
        gc.collect()
        assert unused(small) == (8, 8)


def test_a_pair_that_finds_pages_for_one_alone_waits_and_its_picture_is_encoded(small):
    """Two answers have three of the eight pages each when the pair asks for two and two."""
    small.engine.forget()
    template = small.request("?", None, SamplingParams()).input_ids
    question = "a" * (25 - len(template)) + "?"
    running = [
        *small.jobs(small.request(question, None, SamplingParams(23, ignore_eos=True))),
        *small.jobs(small.request(question.upper(), None, SamplingParams(23, ignore_eos=True))),
    ]
    contrast = SamplingParams(6, contrast="blur", ignore_eos=True)
    pair, alone = (small.jobs(small.request("a?", [random_image(7)], contrast))[0] for _ in "ab")
    source, held = LiveJobs(), []
    source.put(*running)
    for answer in small.engine.run(source, 4):
        if not held:
            source.put(pair)
            source.close()
        while not pair.loaded:
            pass
        held.append(sum(len(job.pages) for job in running))
        assert not pair.produced or all(job.answer.done for job in running) or answer.done
    assert max(held) == 6 and len(pair.produced) == 6 and unused(small) == (8, 8)
    small.engine.forget()
    assert answers(small, [alone]) == [(pair.answer.tokens, "length")]


def test_what_the_cache_cannot_hold_is_refused_before_it_waits(small):
    fits = SamplingParams(1000, ignore_eos=True)
    (job,) = small.jobs(small.request("a?", None, fits))
    assert job.most == 2 * SIZE  # of the model's 512
    with pytest.raises(LlavaError, match=r"has 2\d\d tokens .* cache holds cache_tokens=128; "):
        small.generate("a" * 200 + "?")
    pair = SamplingParams(4, contrast="blur")
    with pytest.raises(LlavaError, match="with contrast it is read twice; shorten"):
        small.jobs(small.request("a" * 60 + "?", [random_image(0)], pair))
    with pytest.raises(LlavaError, match="cache_tokens must be a whole number from 16, not 8"):
        Llava(CONFIG, {}, byte_tokenizer(), TEMPLATE, cache_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lookup": 1}, {"kv_cache": "int8"}, {"mesh": (1, 2, 2)}])
def test_a_full_cache_with_guesses_eight_bits_and_a_mesh(options):
    if "mesh" in options:
        options = {"mesh": make_mesh(*options["mesh"], devices=jax.devices()[:4])}
    whole, small = warm(None, **options), warm(2 * SIZE, **options)
    expected = answers(whole, mixed(whole, 24, seed=6))
    compiled = small.engine.counts.compilations
    assert answers(small, mixed(small, 24, seed=6)) == expected
    assert small.engine.counts.put_back and unused(small) == (8, 8)
    assert small.engine.counts.compilations - compiled <= 1


def test_the_pool_is_for_the_longest_jobs_at_hand(llava):
    params = lambda tokens: SamplingParams(tokens, ignore_eos=True)
    jobs = [llava.jobs(llava.request("a?", None, params(n)))[0] for n in (400, 20, 30, 200)]
    each = sorted(-(-(job.length + job.budget) // PAGE) for job in jobs)
    wanted = sum(each[-2:])
    assert wanted <= pool_pages(jobs, 2, 0, None) <= 1.25 * wanted
    assert pool_pages(jobs, 2, 512, None) == 64 and pool_pages(jobs, 2, 512, 160) == 10


def test_longer_jobs_find_what_shorter_ones_left_in_the_pool():
    """It has half of the pages that they may need; one made anew for them would be empty."""
    model = tiny_llava()

    def ask(tokens: int, count: int) -> tuple[list[int], int]:
        params = SamplingParams(tokens, ignore_eos=True)
        request = model.request("one question of more than two pages about nothing?", None, params)
        jobs = [job for _ in range(count) for job in model.jobs(request)]
        return answers(model, jobs)[0][0], jobs[0].length // PAGE * PAGE

    ask(5, 4)
    device, shared = model.engine.device, model.engine.counts.shared_tokens
    pages, size = device.pages, device.size
    longer, full = ask(90, 3)
    assert device.pages == pages and device.size > size
    assert model.engine.counts.shared_tokens - shared == 3 * full > 0
    model.engine.forget()
    alone, _ = ask(90, 1)
    assert alone == longer and device.pages != pages


@pytest.mark.slow
def test_three_thousand_mixed_requests_lose_no_page_and_compile_nothing(small):
    answers(small, mixed(small, 50, seed=99))  # prompt_logprobs compile once a length
    small.engine.forget()
    compiled, peaks = small.engine.counts.compilations, []
    for seed in range(6):
        jobs = mixed(small, 500, seed)
        found = answers(small, jobs)
        assert [len(tokens) for tokens, _ in found] == [job.budget for job in jobs]
        assert unused(small) == (8, 8)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if seed % 3 == 0:
            small.engine.forget()
            (alone,) = answers(small, mixed(small, 500, seed)[7:8])
            assert alone == found[7]
    assert small.engine.counts.put_back > 150
    assert small.engine.counts.compilations == compiled
    assert peaks[-1] - peaks[2] < 30, f"MiB at the peak after each 500: {peaks}"
