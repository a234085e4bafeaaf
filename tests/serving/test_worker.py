"""The engine's thread and the event loop: nothing lost between them."""

import asyncio
import threading
import time

import pytest

from llava_jax.inference.sampling import SamplingParams
from llava_jax.serving.api import ApiError
from llava_jax.serving.metrics import Metrics
from llava_jax.serving.worker import Mailbox, Piece, Ticket, Worker, engine_failed
from tests.tiny_model import tiny_llava


class SlowList(list):
    """One that another thread can look at while something is appended."""

    def append(self, item) -> None:
        self.appending.set()
        time.sleep(0.2)
        super().append(item)


def test_a_piece_that_arrives_while_others_are_delivered_wakes_the_loop():
    async def run() -> None:
        arrived = asyncio.Queue()
        mail = Mailbox(asyncio.get_running_loop())
        ticket = Ticket([], arrived.put_nowait)
        mail.put(ticket, Piece(0))  # wakes the loop, which is busy here
        mail._pieces = SlowList(mail._pieces)
        mail._pieces.appending = threading.Event()
        thread = threading.Thread(target=mail.put, args=(ticket, Piece(1)))
        thread.start()
        mail._pieces.appending.wait(10)
        for i in range(2):
            assert (await asyncio.wait_for(arrived.get(), 10)).index == i
        await asyncio.to_thread(thread.join)

    asyncio.run(run())


def test_a_piece_for_a_closed_loop_is_dropped():
    loop = asyncio.new_event_loop()
    loop.close()
    Mailbox(loop).put(Ticket([], print), Piece(0))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture
def worker(model):
    """One whose thread does not run."""
    loop = asyncio.new_event_loop()
    yield Worker(model.engine, 2, loop, Metrics("tiny"))
    loop.close()


def ticket(model, n: int = 2) -> Ticket:
    return Ticket(model.jobs(model.request("a?", [], SamplingParams(4, n=n))), print)


def test_a_request_for_an_engine_that_was_given_up_is_refused(worker, model):
    """Also if it was given up between a check of that and the request."""
    worker.submit(ticket(model))
    worker.fail_all(engine_failed, dead=True)
    with pytest.raises(ApiError) as caught:
        worker.submit(ticket(model))
    assert caught.value.status == 500 and worker.live == 0


def test_cancelling_counts_each_answer_once(worker, model):
    one = ticket(model, n=3)
    worker.submit(one)
    assert worker.live == 3
    worker.cancel(one)
    worker.cancel(one)
    assert worker.live == 0 and all(job.answer.cancelled for job in one.jobs)


def test_the_gauge_of_the_cache_is_the_share_of_its_pages(worker, model):
    one, shares = ticket(model), []
    worker.submit(one)
    worker.close()
    for _ in model.engine.run(worker._source, 2):
        worker.measure()
        label = {"model_name": "tiny"}
        value = lambda name: worker._metrics.registry.get_sample_value(f"vllm:{name}", label)  # noqa: B023
        held = {page for job in one.jobs for page in job.pages}
        shares.append(value("kv_cache_usage_perc"))
        assert shares[-1] == pytest.approx(len(held) / model.engine.device.pages)
        assert value("num_requests_running") == sum(bool(job.pages) for job in one.jobs)
    assert 0 < max(shares) < 1 and shares[-1] == 0 and value("num_preemptions_total") == 0


def test_an_engine_that_was_idle_for_long_is_not_stuck(worker, model):
    worker._last_sign -= 1000
    assert not worker.stuck(300)
    worker.submit(ticket(model))
    assert not worker.stuck(300)
    worker._last_sign -= 1000
    assert worker.stuck(300)
