"""How long devices wait for data, and the one sentence about it."""

import time

import jax
import jax.numpy as jnp
import pytest

from llava_jax.data.pipeline import TrainingData
from llava_jax.training.feed import Feed, Shortage
from llava_jax.training.metrics import read_log
from tests import tiny_run


class Metric:
    """Stands for a result that is ready after some seconds, as `jax.block_until_ready` sees it."""

    def __init__(self, seconds):
        self._at = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0, self._at - time.perf_counter()))


def late(*seconds):
    for number, delay in enumerate(seconds):
        time.sleep(delay)
        yield number


def waited(feed, step_seconds):
    """Seconds waited for the batch after a step of so many."""
    feed.computing({"loss": Metric(step_seconds)})
    return feed.next()[1]


def test_only_the_time_without_a_step_counts():
    feed = Feed(late(0.2, 0.2, 0.5))
    batch, first = feed.next()
    assert batch == 0 and first > 0.19
    assert waited(feed, 3) == 0  # the host waits, the devices do not
    feed = Feed(late(0, 0.5, 0))
    feed.next()
    assert 0.1 < waited(feed, 0.2) < first + 0.5
    assert waited(feed, 0) < 0.2
    feed.close()


def test_a_step_on_a_device():
    feed = Feed(late(0, 0.2))
    feed.next()
    feed.computing({"loss": jax.jit(jnp.sum)(jnp.ones(3))})
    assert feed.next()[1] > 0.1
    feed.close()


def sentences(shortage, share, steps=30):
    said = []
    for _ in range(steps):
        shortage.add(2.0, 2.0 * share)
        said.append(shortage.sentence())
    return [sentence for sentence in said if sentence]


@pytest.mark.parametrize("workers, words", [
    (0, "--config.data.workers=8"), (2, "from 2 to 8"), (8, "llava-jax build"),
])  # fmt: skip
def test_it_is_said_once_what_to_turn(workers, words):
    (sentence,) = sentences(Shortage(workers, cpus=8), 0.34)
    assert "waited for data 34% of the last 10 steps" in sentence and words in sentence


def test_nothing_is_said_without_need():
    assert not sentences(Shortage(0, cpus=8), 0.09)
    one_late = Shortage(0, cpus=8)
    assert not sentences(one_late, 0.9, 1) and not sentences(one_late, 0, 29)


def test_a_run_with_slow_data_says_so(world, run, tmp_path, monkeypatch, capsys):
    whole = TrainingData.batch_iterator

    def slow(*arguments):
        for batch in whole(*arguments):
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(TrainingData, "batch_iterator", slow)
    values = {"steps": 12, "save_every": 12, "validate_every": 12, "log_every": 5}
    run(tiny_run.align(world, tmp_path / "run", values))
    said = [line for line in capsys.readouterr().err.splitlines() if "waited for data" in line]
    assert len(said) == 1 and said[0].startswith("step 10: the devices waited for data ")
    lines = read_log(tmp_path / "run/metrics.jsonl")
    assert any(line.get("data_wait_seconds", 0) > 0.05 for line in lines)
