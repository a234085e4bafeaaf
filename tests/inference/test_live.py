"""Jobs that come while others are answered: silent sources, cancelling, slow pictures."""

import random
import threading

import jax
import numpy as np
import pytest

from llava_jax.inference import engine
from llava_jax.inference.jobs import END, NOTHING_NOW, LiveJobs, Picture
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import SIZE, TEMPLATE, ask, mixed_requests
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava


@pytest.fixture(scope="module")
def llava():
    model = tiny_llava(template=TEMPLATE)
    model.engine.warm_up(batch_size=4, size=SIZE, few=True)
    return model


@pytest.fixture(scope="module")
def two():
    """Two copies, a device each."""
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    return Llava(CONFIG, random_params(CONFIG), byte_tokenizer(), TEMPLATE, mesh=mesh)


def job_of(llava, prompt="a?", images=None, tokens=12):
    params = SamplingParams(tokens, ignore_eos=True)
    return llava.jobs(llava.request(prompt, images, params))[0]


def until_done(answers, job) -> None:
    while not job.answer.done:
        next(answers)


class Scripted:
    """A live source that gives its jobs after silences of a few polls."""

    live = True

    def __init__(self, jobs, seed):
        self._jobs, self._random, self.waits = list(jobs), random.Random(seed), 0

    def poll(self):
        if not self._jobs:
            return END
        return self._jobs.pop(0) if self._random.random() < 0.4 else NOTHING_NOW

    def wait(self, seconds):
        self.waits += 1


@pytest.mark.parametrize("copies", ["llava", "two"])
def test_answers_come_while_the_source_is_open_and_silent(copies, request):
    model, source = request.getfixturevalue(copies), LiveJobs()
    answers = model.engine.run(source, 4)
    for prompt in ("a?", "b?"):
        job = job_of(model, prompt)
        source.put(job)
        until_done(answers, job)  # with a source that is waited for, this would never end
        assert len(job.answer.tokens) == 12 and not len(source)
    source.close()
    assert list(answers) == []


@pytest.mark.parametrize("copies", ["llava", "two"])
@pytest.mark.parametrize("seed", [0, 1])
def test_jobs_that_come_at_any_time_have_the_tokens_of_each_alone(copies, seed, request, llava):
    model = request.getfixturevalue(copies)
    prompts, images, tokens = mixed_requests(12, seed=seed)
    expected = ask(llava, prompts, images, tokens, 4)
    jobs = [job_of(model, *each) for each in zip(prompts, images, tokens, strict=True)]
    ended = [a for a in model.engine.run(Scripted(jobs, seed), 4) if a.done]
    assert [job.answer.tokens for job in jobs] == expected
    assert len(ended) == len({id(answer) for answer in ended}) == 12  # each ends once


def test_a_cancelled_answer_frees_its_row_within_two_calls(llava, monkeypatch):
    device, calls = llava.engine.device, []
    for name in ("prefill", "decode"):
        call = getattr(device, name)
        monkeypatch.setattr(device, name, lambda *a, call=call: calls.append(a) or call(*a))
    source, others = LiveJobs(), [job_of(llava, f"{c}?", tokens=40) for c in "abcd"]
    source.put(*others)
    answers = llava.engine.run(source, 4)
    while len(others[1].answer.tokens) < 5:
        next(answers)
    waiting = job_of(llava, "e?", tokens=4)
    source.put(waiting)
    before = len(calls)
    others[1].answer.cancel()
    while not waiting.answer.tokens:  # it has the row
        next(answers)
    assert len(calls) - before <= 2 + 1  # two calls, and the prefill of the next
    assert others[1].answer.finish_reason == "cancelled"
    assert 5 <= len(others[1].answer.tokens) < 40
    source.close()
    ended = [answer for answer in answers if answer.done]
    assert others[1].answer not in ended and waiting.answer.finish_reason == "length"
    alone = ask(llava, ["a?", "c?", "d?"], [[]] * 3, [40] * 3, 4)
    assert [others[i].answer.tokens for i in (0, 2, 3)] == alone


def test_what_is_cancelled_before_its_turn_is_never_read(llava):
    source = LiveJobs()
    jobs = [job_of(llava, f"{c}?") for c in "abcdefg"]
    source.put(*jobs)
    source.close()
    for job in jobs[2:6]:
        job.answer.cancel()
    before = llava.engine.counts.prompt_tokens
    ended = [answer for answer in llava.engine.run(source, 4) if answer.done]
    assert {id(answer) for answer in ended} == {id(job.answer) for job in jobs}
    assert [job.answer.finish_reason for job in jobs] == ["length"] * 2 + ["cancelled"] * 4 + [
        "length"
    ]
    read = sum(job.length for job in (*jobs[:2], jobs[6]))
    assert llava.engine.counts.prompt_tokens - before == read
    assert not any(job.answer.tokens for job in jobs[2:6])


def slow_picture(job, gate):
    """The job with a picture that is read when the gate opens."""
    (picture,) = job.request.pictures

    def load():
        assert gate.wait(60)
        return picture.load()

    slow = Picture(picture.layout, load, picture.key)
    object.__setattr__(job.request, "pictures", (slow,))
    return job


def test_a_slow_picture_holds_nobody_else_up(llava):
    gate, source = threading.Event(), LiveJobs()
    slow = slow_picture(job_of(llava, "x?", [random_image(3)]), gate)
    quick = [job_of(llava, "a?"), job_of(llava, "b?", [random_image(4)])]
    source.put(slow, *quick)
    answers = llava.engine.run(source, 4)
    for job in quick:
        until_done(answers, job)
    assert not slow.answer.tokens
    gate.set()
    until_done(answers, slow)
    source.close()
    assert list(answers) == []
    prompts, images = ["x?", "a?", "b?"], [[random_image(3)], [], [random_image(4)]]
    expected = ask(llava, prompts, images, [12] * 3, 4)
    assert [job.answer.tokens for job in (slow, *quick)] == expected


def test_a_list_of_jobs_keeps_its_order_whatever_is_slow(llava, monkeypatch):
    """What runs together must not depend on the speed of a disk."""
    gate, calls, pack = threading.Event(), [], engine.pack_prompts
    monkeypatch.setattr(
        engine, "pack_prompts", lambda jobs, *to: calls.extend(jobs) or pack(jobs, *to)
    )
    slow = slow_picture(job_of(llava, "x?", [random_image(5)]), gate)
    threading.Timer(0.2, gate.set).start()
    jobs = [slow, job_of(llava, "a?"), job_of(llava, "b?")]
    assert all(llava.engine.run(jobs, 4))
    assert calls == jobs


def test_pictures_are_read_in_other_threads_and_once_for_the_answers_of_a_request(llava):
    request = llava.request("a?", [random_image(6)], SamplingParams(3, n=3, temperature=1.0))
    (picture,), threads = request.pictures, []

    def load():
        threads.append(threading.current_thread().name)
        return picture.load()

    object.__setattr__(request, "pictures", (Picture(picture.layout, load),))
    jobs = llava.jobs(request)
    assert all(llava.engine.run(jobs, 4))
    assert len(threads) == 3 and threading.current_thread().name not in threads
    tiles = [picture.load() for _ in range(2)]
    assert tiles[0] is tiles[1]  # kept for those that follow


def test_a_fault_while_a_picture_is_read_is_raised(llava):
    job = slow_picture(job_of(llava, "x?", [random_image(7)]), None)  # a bug: None has no wait
    with pytest.raises(AttributeError):
        list(llava.engine.run([job], 4))
    assert ask(llava, ["a?"], [[]], [3], 4) == ask(llava, ["a?"], [[]], [3], 4)


def test_a_picture_has_the_layout_of_its_size_before_it_is_read(llava):
    request = llava.request("a?", [random_image(8)], SamplingParams(3))
    (picture,) = request.pictures
    assert picture.layout.tiles == 1 and len(picture.layout) == 4
    assert (request.input_ids == CONFIG.image_token_id).sum() == 4
    assert picture.load().shape == (1, 8, 8, 3) and picture.load().dtype == np.uint8


def test_warm_up_reports_how_far_it_is():
    model, reports = tiny_llava(template=TEMPLATE), []
    model.engine.warm_up(2, SIZE, lambda *counts: reports.append(counts), few=True)
    total = reports[-1][1]
    assert reports == [(i, total) for i in range(total + 1)]
    assert model.engine.counts.compilations == total
