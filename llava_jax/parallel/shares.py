"""Requests shared by several hosts: the share of each, and the folder where the hosts meet.

Hosts that answer requests need nothing of each other, so they are not joined by JAX, which ends
every process of a run when one of them dies. They meet in the folder of the results, which all of
them see. A share is a function of the number of hosts alone: who takes what needs no locks, which
a bucket that is mounted as a folder does not have.
"""

import contextlib
import dataclasses
import json
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.files import locked

BEAT = 2.0  # seconds between two signs of life
NOTICE = 30.0  # seconds until a host that waits says for whom
START = 300.0  # seconds for all hosts to come
SILENCE = 180.0  # seconds without a sign of life, until a host is taken for lost
LATE = 90.0  # seconds after which files of other hosts are seen; gcsfuse looks again after 60


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of a list of requests, `index` from 1.

    10 requests of 3 hosts:  0 1 2 | 3 4 5 | 6 7 8 9
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/8` -> the second of eight."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise LlavaError(f"--shard must be i/n with i from 1 to n, such as 1/4, not {text!r}")
        return cls(int(index), int(count))

    def of(self, requests: Sequence) -> Sequence:
        """This part of the requests; neighbours, often about one picture, stay together."""
        start, end = ((len(requests) * i) // self.count for i in (self.index - 1, self.index))
        return requests[start:end]

    @property
    def folder(self) -> str:
        return f"shard-{self.index}-of-{self.count}"

    def describe(self, total: int, what: str) -> str:
        """A line for the log: "host 2 of 4 answers questions 26 to 50 of 100"."""
        part = self.of(range(1, total + 1))
        which = f"{part[0]} to {part[-1]} of {total}" if part else f"none of {total}"
        return f"host {self.index} of {self.count} answers {what} {which}"


class Meeting:
    """The hosts of one command, from their start to their end, in a folder that all see.

    Each keeps a file there, `host-2.json`, and writes it anew every few seconds while it lives:

        {"token": "5f0c", "beat": 17, "heard": {"1": "91be"}, "state": "working", "facts": {...}}

    What has changed since one looked is alive; no clocks are compared, and a file that an earlier
    run has left does not change. A host is met when the first has written its token, drawn at the
    start, among those that it has heard: so both see the same folder.

        with Meeting(folder, Shard(2, 4), facts) as meeting:  # waits for all
            meeting.first_alone(prepare)  # the others wait for that
            ...  # its share
            if meeting.is_first:
                meeting.collect(missing)  # waits for the others

    Args:
      folder: made if it is not there.
      place: this host, as its share; None for a process by itself, which meets nobody.
      facts: name -> JSON value, for all that must be the same on every host.

    Raises:
      LlavaError: when it is entered: a host has not come, or differs from the first in `facts`.
    """

    def __init__(self, folder: Path, place: Shard | None, facts: Mapping[str, object]):
        self.place = place
        self._folder = folder
        self._own = {
            "token": secrets.token_hex(8),
            "beat": 0,
            "heard": {},
            "state": "working",
            "ready": False,
            "facts": dict(facts),
        }
        self._others = {} if place is None else self._watched(place)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._exit = contextlib.ExitStack()

    def _watched(self, place: Shard) -> dict[int, "_Seen"]:
        """Those that this host looks at: the first at all, the others at the first."""
        indices = range(2, place.count + 1) if place.index == 1 else [1]
        return {index: _Seen(self._path(index)) for index in indices}

    def _path(self, index: int) -> Path:
        return self._folder / f"host-{index}.json"

    @property
    def is_first(self) -> bool:
        """True in the one host that collects the results and reports them."""
        return self.place is None or self.place.index == 1

    def __enter__(self) -> "Meeting":
        if self.place is None:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.place.index)
        busy = f"{self._name(self.place.index)} is still running in {self._folder}: wait or stop it"
        self._exit.enter_context(locked(path, busy))
        try:
            self._thread.start()
            self._wait_until(self._met, START, "they must be started, and see this folder")
            for index, seen in self._others.items():
                self._refuse_difference(index, seen.last["facts"])
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.place is None:
            return
        self._ended.set()
        self._thread.join()
        self._own["state"] = f"failed: {str(error)[:300] or kind.__name__}" if kind else "done"
        with contextlib.suppress(OSError):
            self._write()
        self._exit.close()
        all_done = not kind and all(seen.state == "done" for seen in self._others.values())
        if self.is_first and all_done:
            for index in (1, *self._others):
                self._path(index).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # files of more hosts, at an earlier time
                self._folder.rmdir()

    def first_alone(self, action: Callable[[], object]) -> None:
        """Runs `action` on the first host; the others wait until it has returned there.

        Raises:
          LlavaError: on the others: the first has failed, or shows no sign of life.
        """
        if self.is_first:
            action()
            self._own["ready"] = True
            return
        ready = lambda index: self._others[index].last["ready"]
        self._wait_until(ready, None, "it loads the model")

    def collect(self, missing: Callable[[], Sequence[str]]) -> None:
        """Waits on the first host until each other one has finished or is lost.

        Args:
          missing: what has no answer yet, as in "7 of 100 questions of pope".

        Raises:
          LlavaError: something is missing in the end; it names the hosts and the command to type.
        """
        began, gone = time.monotonic(), {}  # host -> what is known of it
        while left := [i for i, s in self._others.items() if s.state != "done" and i not in gone]:
            gone |= {index: why for index in left if (why := self._fault(index))}
            began = self._notice(began, left, "they still answer")
            time.sleep(min(BEAT, 0.1))
        last = time.monotonic() + (0 if gone else LATE)
        while gaps := missing():
            if time.monotonic() >= last:
                unseen = f"what the others wrote to {self._folder.parent} is not seen here"
                raise LlavaError(
                    f"no answer yet to {', '.join(gaps)} ({'; '.join(gone.values()) or unseen}): "
                    "start the same command again, on as many hosts or fewer, and it asks these "
                    f"alone: {_command()}"
                )
            time.sleep(BEAT)

    def _met(self, index: int) -> bool:
        """Whether that host and this one have seen each other's files of now."""
        seen = self._others[index]
        if not self.is_first:
            return seen.last.get("heard", {}).get(str(self.place.index)) == self._own["token"]
        return str(index) in self._own["heard"]

    def _wait_until(self, true: Callable[[int], bool], most: float | None, hint: str) -> None:
        """Waits until `true` of every host that is watched; LlavaError if one fails meanwhile."""
        start = began = time.monotonic()
        while left := [index for index in self._others if not true(index)]:
            for index in left:
                if self._others[index].changes and (fault := self._fault(index)):
                    raise LlavaError(fault)
            if most is not None and time.monotonic() - start > most:
                raise LlavaError(
                    f"{self._names(left)} left no sign in {self._folder} within {most:.0f} s: "
                    "start the same command on every host, with an output in a folder that all see"
                )
            began = self._notice(began, left, hint)
            time.sleep(min(BEAT, 0.1))

    def _notice(self, began: float, left: Sequence[int], hint: str) -> float:
        """Says once for whom this host waits; returns the time to count from."""
        if time.monotonic() - began < NOTICE:
            return began
        text = f"waiting for {self._names(left)} in {self._folder}: {hint}"
        print(text, file=sys.stderr, flush=True)
        return float("inf")

    def _fault(self, index: int) -> str:
        """Why nothing more is to come of a host; "" while it lives."""
        seen = self._others[index]
        if seen.state.startswith("failed"):
            return f"{self._name(index)} {seen.state}"
        if time.monotonic() - seen.since > SILENCE:
            return f"{self._name(index)} has shown no sign of life for {SILENCE:.0f} s"
        return ""

    def _name(self, index: int) -> str:
        return f"host {index} of {self.place.count}"

    def _names(self, indices: Sequence[int]) -> str:
        return f"host {', '.join(map(str, indices))} of {self.place.count}"

    def _refuse_difference(self, index: int, facts: Mapping[str, object]) -> None:
        own = self._own["facts"]
        first, other = (own, facts) if self.is_first else (facts, own)
        name = self._name(index if self.is_first else self.place.index)
        if difference := differences(other, first):
            raise LlavaError(
                f"{name} differs from host 1 in {difference}: start the same code with the same "
                "command on every host"
            )

    def _beat(self) -> None:
        """What a thread of its own does until the end."""
        while not self._ended.is_set():
            for index, seen in self._others.items():
                seen.look()
                if seen.changes:
                    self._own["heard"][str(index)] = seen.last["token"]
            with contextlib.suppress(OSError):  # of one beat; the next may succeed
                self._write()
            self._ended.wait(BEAT)

    def _write(self) -> None:
        self._own["beat"] += 1
        # In place: a file that replaces another has not its lock, and is seen later over NFS.
        self._path(self.place.index).write_text(json.dumps(self._own), encoding="utf-8")


class _Seen:
    """The file of another host.

    Attributes:
      last: what it held when it was last whole.
      changes: how often it changed while it was watched; at 0 it may be of an earlier run.
      since: when it changed last, on this host's clock.
    """

    def __init__(self, path: Path):
        self._path = path
        self.last = self._read()
        self.changes, self.since = 0, time.monotonic()

    @property
    def state(self) -> str:
        return self.last["state"] if self.changes else "working"

    def look(self) -> None:
        now = self._read()
        if now and now != self.last:
            self.last, self.since = now, time.monotonic()
            self.changes += 1

    def _read(self) -> dict:
        """Its content; {} if it is not there, or being written."""
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(value, dict) and "token" in value:
                return value
        return {}


def _command() -> str:
    """What was typed to start this program."""
    script = Path(sys.argv[0])
    begin = [Path(sys.executable).name, *sys.argv[:1]] if script.suffix else [script.name]
    return shlex.join([*begin, *sys.argv[1:]])


def differences(other: Mapping[str, object], first: Mapping[str, object]) -> str:
    """In what two hosts differ, as "KEY: 3 and not 0; ...", at most five; "" if in nothing."""
    keys = sorted(k for k in other.keys() | first.keys() if other.get(k) != first.get(k))
    return "; ".join(f"{k}: {other.get(k)!r} and not {first.get(k)!r}" for k in keys[:5])
