"""Copies of a model that share requests: the answers of one, whoever gives them."""

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.engine import Grown
from llava_jax.inference.jobs import END, Job, Listed, Picture, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.replicas import Replicas, Router
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.decoder import separate_layers
from llava_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import SIZE, TEMPLATE, ask, mixed_requests
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava


@pytest.fixture(scope="module")
def one():
    return tiny_llava(template=TEMPLATE)


def spread(tensor: int, params: dict) -> Llava:
    mesh = make_mesh(data=2, fsdp=1, tensor=tensor, devices=jax.devices()[: 2 * tensor])
    return Llava(CONFIG, params, byte_tokenizer(), TEMPLATE, mesh=mesh)


@pytest.fixture(scope="module")
def two():
    """A device each, warmed up; layers for themselves, as on CPUs."""
    params = random_params(CONFIG)
    model = spread(1, {**params, "decoder": separate_layers(params["decoder"])})
    model.engine.warm_up(batch_size=4, size=SIZE, few=True)
    return model


def test_two_copies_answer_as_one_and_compile_nothing_after_warm_up(one, two):
    requests = mixed_requests(20, seed=0)
    before = two.engine.counts.compilations
    assert ask(two, *requests, 4) == ask(one, *requests, 4)
    assert two.engine.counts.compilations == before and two.engine.rows == 4
    shares = [engine.counts.requests for engine in two.engine.engines]
    assert min(shares) >= 4 and sum(shares) == two.engine.counts.requests == 20
    places = [
        {d for leaf in jax.tree.leaves((e.params, e.device.state)) for d in leaf.devices()}
        for e in two.engine.engines
    ]
    assert places == [{device} for device in jax.devices()[:2]]


@pytest.mark.slow
def test_two_copies_of_two_devices_each(one):
    model = spread(2, random_params(CONFIG))
    model.engine.warm_up(batch_size=4, size=SIZE)
    requests, wanted = mixed_requests(10, seed=6), ask(one, *mixed_requests(10, seed=6), 4)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    assert ask(model, *requests, 4) == wanted
    assert compiled == []  # what was compiled without running is what runs
    for engine in model.engine.engines:
        keys = engine.device.state.cache.keys
        assert keys.addressable_shards[0].data.size == keys.size // 2


def test_the_questions_about_a_picture_go_to_one_copy(two):
    two.engine.forget()
    before = two.engine.counts.encoded_images
    pictures = [random_image(20 + i) for i in range(6)]
    two.generate([f"{c}?" for c in "abcdef" for _ in range(3)],
                 [p for p in pictures for _ in range(3)], 4, max_tokens=2)  # fmt: skip
    assert two.engine.counts.encoded_images == before + 6


def test_one_who_has_enough_half_way_costs_the_next_nothing(one, two):
    requests = mixed_requests(12, seed=3)
    wanted = ask(one, *requests, 4)
    for enough in (1, 3, 7, 15):
        jobs = [
            two.jobs(two.request(p, i, SamplingParams(t, ignore_eos=True)))[0]
            for p, i, t in zip(*requests, strict=True)
        ]
        answers = two.engine.run(jobs, 4)
        for _ in range(enough):
            next(answers)
        answers.close()
        assert ask(two, *requests, 4) == wanted


def test_prompts_that_were_left_while_the_device_read_them_are_known_to_be_in_their_rows(two):
    """Else the next prompt would take what it shares with their rows' earlier contents."""
    engine = two.engine.engines[0]
    engine.forget()
    job = lambda text: two.jobs(two.request(text, None, SamplingParams(4, ignore_eos=True)))[0]

    def ask_engine(texts):
        jobs = [job(text) for text in texts]
        assert all(engine.run(jobs, 2))
        return [job.answer.tokens for job in jobs]

    earlier = ["abcdefgh one?", "abcdefgh two?"]  # in both rows
    wanted = ask_engine(earlier)
    work = engine.steps(Listed([job("zyx other?"), job("zyx another?")]), 2)
    while isinstance(next(work), Grown):
        pass
    work.close()
    assert ask_engine(earlier) == wanted


def test_a_failure_of_one_copy_is_raised_and_the_next_run_is_whole(one, two, monkeypatch):
    requests = mixed_requests(8, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(two.engine.engines[1].device, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(two, *requests, 4)
    assert ask(two, *requests, 4) == ask(one, *requests, 4)


def test_a_wrong_request_spares_the_others(two):
    jobs = [two.jobs(two.request(f"{i}?", None, SamplingParams(2)))[0] for i in range(4)]
    ids = jobs[0].request.input_ids
    broken = Picture(CONFIG.layouts([(8, 8)])[0], unreadable, "broken")
    (failed,) = two.jobs(Request(ids, (broken,), SamplingParams(2)))
    for _ in two.engine.run([*jobs[:2], failed, *jobs[2:]], 4):
        pass
    assert "no picture" in str(failed.answer.error)
    assert all(job.answer.done and job.answer.error is None for job in jobs)


def unreadable():
    raise LlavaError("no picture")


def test_a_router_gives_every_request_once_and_pictures_to_one_engine():
    def job(number, *keys):
        pictures = tuple(Picture(None, None, key) for key in keys)
        return Job(Request(None, pictures, None), number, (), 0)

    stream = [job(0, "a"), job(1, "a"), job(2, "b"), job(3, "b"), job(4)]
    stream += [job(5), *(job(i, "c") for i in range(6, 11))]
    router = Router(Listed(stream), 2, most=2)
    first, second = router.source(0), router.source(1)
    numbers = lambda source, count: [source.poll().answer for _ in range(count)]
    assert numbers(first, 1) == [0]
    assert numbers(second, 2) == [2, 3]  # 1 is kept for the first
    assert numbers(first, 2) == [1, 4]
    assert numbers(second, 2) == [5, 6]
    # 7 and 8 wait for the second: more about c would keep the first from working.
    assert numbers(first, 2) == [9, 10]
    assert numbers(second, 2) == [7, 8]
    assert first.poll() is second.poll() is END


def test_one_place_on_the_data_axis_is_an_engine_and_several_are_replicas(one, two):
    assert not isinstance(one.engine, Replicas) and isinstance(two.engine, Replicas)
