"""Shares of requests, and hosts that meet in a folder: who is alive, who is lost, who differs."""

import collections
import json
import threading
import time

import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel import shares
from llava_jax.parallel.shares import Meeting, Shard

FACTS = {"code": "abc", "arguments": ["--batch_size=4"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.02, "START": 20, "SILENCE": 20, "LATE": 0.05}.items():
        monkeypatch.setattr(shares, name, seconds)


def host(folder, index: int, count: int = 2, facts=FACTS) -> Meeting:
    return Meeting(folder, Shard(index, count), facts)


def together(*actions) -> list:
    """Runs each in a thread of its own; gives what each returns, or its LlavaError."""
    results = [None] * len(actions)

    def run(i, action):
        try:
            results[i] = action()
        except LlavaError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def kill(meeting: Meeting) -> None:
    """What kill -9 does to a host: no more signs of life, no last word, its lock is gone."""
    meeting._ended.set()
    meeting._thread.join()
    meeting._exit.close()


def test_every_request_is_in_one_shard():
    questions = list(range(11))
    for count in (1, 2, 4, 11, 13):
        parts = [Shard.parse(f"{i}/{count}").of(questions) for i in range(1, count + 1)]
        assert sum(parts, []) == questions
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(LlavaError, match="--shard must be i/n"):
            Shard.parse(text)


def test_a_share_says_what_it_is():
    assert Shard(2, 4).describe(100, "requests") == "host 2 of 4 answers requests 26 to 50 of 100"
    assert Shard(1, 4).describe(2, "requests") == "host 1 of 4 answers requests none of 2"


def test_hosts_wait_for_the_first_and_the_first_for_all(tmp_path):
    folder, order = tmp_path / "out" / "hosts", []

    def work(index):
        with host(folder, index, 3) as meeting:
            meeting.first_alone(lambda: time.sleep(0.1) or order.append("first alone"))
            time.sleep(0.05 * index)
            order.append(index)
            if meeting.is_first:
                meeting.collect(lambda: [])
                order.append("collected")
        return meeting.is_first

    assert together(*(lambda i=i: work(i) for i in (1, 2, 3))) == [True, False, False]
    assert order[0] == "first alone" and order[-1] == "collected"
    assert sorted(order[1:-1]) == [1, 2, 3]
    assert not folder.exists()


def test_a_process_by_itself_meets_nobody_and_leaves_nothing(tmp_path):
    with Meeting(tmp_path / "hosts", None, {}) as meeting:
        meeting.first_alone(lambda: None)
        meeting.collect(lambda: [])
        assert meeting.is_first
    assert not list(tmp_path.iterdir())


def test_a_host_that_does_not_come_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shares, "START", 0.3)
    monkeypatch.setattr(shares, "NOTICE", 0.1)
    first, second = together(*(lambda i=i: host(tmp_path, i, 4).__enter__() for i in (1, 2)))
    assert f"host 3, 4 of 4 left no sign in {tmp_path} within 0 s" in str(first)
    assert "the same command on every host" in str(first)
    assert (
        capsys.readouterr().err.count(f"waiting for host 3, 4 of 4 in {tmp_path}: they must") == 1
    )
    kill(second)


def test_a_folder_that_is_not_shared_is_found_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "START", 0.3)
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:  # of an earlier run on hosts that shared it
        folder.mkdir()
        for index in (1, 2):
            old = {"token": "old", "beat": 3, "heard": {"2": "old"}, "state": "done", "ready": True}
            (folder / f"host-{index}.json").write_text(json.dumps(old | {"facts": FACTS}))
    results = together(*(lambda i=i: host(folders[i - 1], i).__enter__() for i in (1, 2)))
    assert f"host 2 of 2 left no sign in {folders[0]}" in str(results[0])
    assert f"host 1 of 2 left no sign in {folders[1]}" in str(results[1])
    assert all("with an output in a folder that all see" in str(error) for error in results)


def test_hosts_with_other_arguments_or_code_refuse_to_start(tmp_path):
    other = FACTS | {"arguments": ["--batch_size=8"]}
    results = together(
        lambda: host(tmp_path, 1).__enter__(), lambda: host(tmp_path, 2, facts=other).__enter__()
    )
    for error in results:
        assert "host 2 of 2" in str(error) and "['--batch_size=8'] and not" in str(error)


def test_what_a_lost_host_had_to_do_is_missing_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "SILENCE", 0.3)
    monkeypatch.setattr("sys.argv", ["eval.py", "--config=a b.py"])

    def first():
        with host(tmp_path, 1, 3) as meeting:
            meeting.collect(lambda: ["7 of 20 questions of pope"])

    def second():
        kill(host(tmp_path, 2, 3).__enter__())

    def third():
        with host(tmp_path, 3, 3):
            time.sleep(0.5)  # longer than SILENCE, and heard of all the time

    error, *others = together(first, second, third)
    assert others == [None, None]
    assert "no answer yet to 7 of 20 questions of pope (host 2 of 3 has shown no sign" in str(error)
    assert "on as many hosts or fewer" in str(error) and "eval.py '--config=a b.py'" in str(error)
    assert json.loads((tmp_path / "host-1.json").read_text())["state"].startswith("failed: no ans")


def test_a_host_lost_after_its_last_answer_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "SILENCE", 0.2)

    def first():
        with host(tmp_path, 1) as meeting:
            meeting.collect(lambda: [])

    assert together(first, lambda: kill(host(tmp_path, 2).__enter__())) == [None, None]


def test_why_a_host_failed_is_reported_by_the_first(tmp_path):
    def work(index):
        with host(tmp_path, index) as meeting:
            if not meeting.is_first:
                raise LlavaError("question 9: no image file 9.png")
            meeting.collect(lambda: ["1 of 2 requests"])

    error, _ = together(lambda: work(1), lambda: work(2))
    assert "(host 2 of 2 failed: question 9: no image file 9.png)" in str(error)


def test_others_end_when_the_first_fails_before_it_is_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "SILENCE", 0.3)

    def refuse():
        raise LlavaError("answers of another run")

    def work(index):
        with host(tmp_path, index) as meeting:
            meeting.first_alone(refuse)

    first, second = together(lambda: work(1), lambda: work(2))
    assert str(first) == "answers of another run"
    assert str(second) == "host 1 of 2 failed: answers of another run"
    killed = together(lambda: kill(host(tmp_path, 1).__enter__()), lambda: work(2))[1]
    assert "host 1 of 2 has shown no sign of life for" in str(killed)


def test_others_go_on_when_the_first_is_lost_later(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "SILENCE", 0.1)

    def second():
        with host(tmp_path, 2):
            time.sleep(0.4)

    assert together(lambda: kill(host(tmp_path, 1).__enter__()), second) == [None, None]


def test_a_lost_host_that_is_started_again_is_waited_for(tmp_path):
    done = []

    def first():
        with host(tmp_path, 1) as meeting:
            meeting.first_alone(lambda: None)
            meeting.collect(lambda: [] if done else ["1 of 2 requests"])

    def second():
        kill(host(tmp_path, 2).__enter__())
        with host(tmp_path, 2) as meeting:
            meeting.first_alone(lambda: None)
            done.append(2)

    assert together(first, second) == [None, None]


def test_two_processes_are_not_the_same_host(tmp_path):
    def first():
        with host(tmp_path, 1):
            with pytest.raises(LlavaError, match="host 1 of 2 is still running in .*wait or stop"):
                host(tmp_path, 1).__enter__()

    def second():
        with host(tmp_path, 2):
            pass

    assert together(first, second) == [None, None]


def test_answers_that_are_seen_late_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "LATE", 5)
    looks = iter([["3 of 4 requests"], ["1 of 4 requests"], []])

    def work(index):
        with host(tmp_path, index) as meeting:
            if meeting.is_first:
                meeting.collect(lambda: next(looks))

    assert together(lambda: work(1), lambda: work(2)) == [None, None]


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    """A full disk for a moment: of each host's beats every other one is lost."""
    beats, write = collections.Counter(), Meeting._write

    def fails_at_times(meeting):
        beats[meeting] += 1
        if beats[meeting] % 2:
            raise OSError(28, "No space left on device")
        write(meeting)

    monkeypatch.setattr(Meeting, "_write", fails_at_times)

    def work(index):
        with host(tmp_path, index):
            time.sleep(0.2)
            return "worked"

    assert together(lambda: work(1), lambda: work(2)) == ["worked", "worked"]
