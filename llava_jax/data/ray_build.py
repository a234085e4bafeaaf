"""`llava-jax build --ray`: the parts of a build on the machines of a Ray cluster.

Ray Data gives each task one part, and gives the part of a killed worker to another. Results are
given back in the order of the parts, so the set is the one that a single process writes.
"""

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence

from llava_jax import imports
from llava_jax.data.collection import Records
from llava_jax.errors import LlavaError


class Cluster:
    """The workers of a Ray cluster.

    Each opens the records itself, once: they, their files and the set must have the same paths on
    all machines.

    Args:
      address: of the cluster, as `ray.init` takes it; without one already, `local` starts one here.
    """

    def __init__(self, address: str):
        self._ray = imports.ray()
        if not self._ray.is_initialized():
            try:
                self._ray.init(address, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise LlavaError(f"--ray {address}: there is no such cluster: {error}") from None

    def __call__(self, function: Callable, records: Records, parts: Sequence) -> Iterator:
        """function(records, part) for each part, in their order.

        Raises:
          LlavaError, OSError: of the first part that fails.
        """
        work = _Work(self._ray.put((function, records, list(parts))))
        numbers = self._ray.data.range(len(parts), override_num_blocks=len(parts))
        done, following = {}, 0
        for row in numbers.map(work).iter_rows():  # as they are done
            done[row["id"]] = pickle.loads(row["result"])
            while following in done:
                result = done.pop(following)
                if isinstance(result, Exception):
                    raise result
                yield result
                following += 1


class _Work:
    """What a task does with its number. Results are pickled, as tables know no ranges or hashes.

    Args:
      shared: a reference to (function, records, parts).
    """

    def __init__(self, shared):
        self._shared = shared

    def __call__(self, row: dict) -> dict:
        function, records, parts = _fetch(self._shared)
        try:
            result = function(records, parts[row["id"]])
        except (LlavaError, OSError) as error:  # faults of the data and of the disk, not of workers
            result = error
        return {"id": row["id"], "result": pickle.dumps(result)}


@functools.lru_cache(maxsize=1)
def _fetch(shared) -> tuple:
    """What a reference stands for; a process asks once, as its records take long to open."""
    return imports.ray().get(shared)
