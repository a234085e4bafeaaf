"""Saving and resuming: the trainable tree and the optimizer state as separate Orbax items.

The sum of the bits of every array is stored with them, so that a change on disk is found.
"""

import contextlib
import logging
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.parallel import hosts
from llava_jax.parallel.sharding import put
from llava_jax.training.step import TrainState
from llava_jax.weights.run_directory import (
    check_complete,
    check_params,
    first_line,
    saved_params,
)

ITEMS = ("params", "opt_state", "bit_sums")


def not_raised_later(record: logging.LogRecord) -> bool:
    """Log filter that drops Orbax's traceback for errors it also raises."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def show_unraisable(unraisable) -> None:
    """Unraisable hook that drops writes of TensorStore that an error has cut off.

    Their tracebacks would be the last lines of a run that a full disk ends.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@jax.jit
def _bit_sums(tree):
    """The sum of each array's words modulo 2^32, which is the same on every mesh."""

    def add(x):
        unsigned = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    return jax.tree.map(add, tree)


def bit_sums(tree) -> dict[str, int]:
    """The sum of the bits of every array of a tree, by its path."""
    sums = jax.tree_util.tree_leaves_with_path(_bit_sums(tree))
    return {jax.tree_util.keystr(path): int(total) for path, total in sums}


class Checkpoints:
    """Asynchronous checkpoints of a run, the newest `keep` of them.

    A step folder appears by one rename when it is whole, and an older one is removed only after
    that, so a kill or a full disk at any moment leaves the earlier ones as they were. An error of
    writing in the background is raised as a LlavaError by a later call.
    """

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._folder = (workdir / "checkpoints").resolve()
        logging.getLogger("absl").addFilter(not_raised_later)
        logging.getLogger("asyncio").setLevel(
            logging.CRITICAL
        )  # it repeats the error for each of its futures
        sys.unraisablehook = show_unraisable
        with self._write_errors():
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def newest_before(self, step: int) -> int | None:
        """The newest checkpoint of an earlier step, or None; waits until all are on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()
        return max((s for s in self._manager.all_steps() if s < step), default=None)

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state off the devices and writes it in the background."""
        items = {"params": state.params, "opt_state": state.opt_state}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        saves["bit_sums"] = ocp.args.JsonSave(bit_sums(items))
        taken = self._folder / str(step)
        if hosts.is_first() and taken.is_file():  # nothing of this run has that name
            taken.rename(taken.with_name(f"{step}.file"))
            hosts.report(f"{taken} is a file: renamed to {step}.file to make room for a checkpoint")
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(**saves))

    def check(self) -> None:
        """Raises an error of writing in the background since the last call."""
        with self._write_errors():
            self._manager.check_for_errors()

    def restore_newest(self, like: TrainState) -> TrainState | None:
        """The state of the newest checkpoint that can be read; None if there is no checkpoint.

        A damaged one is reported and renamed to STEP.damaged.

        Args:
          like: arrays or ShapeDtypeStructs with the shapes and shardings of the result.

        Raises:
          LlavaError: it holds other parameters than `like`, or none can be read.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, damage = self._try_to_restore(step, like)
            if hosts.all_true(state is not None):
                self._put_aside(damaged)
                return state
            damaged[step] = damage or f"{self._folder / str(step)} fails in another process"
        if damaged:
            raise LlavaError(
                f"{next(iter(damaged.values()))}, and there is none before it that can be read: "
                f"choose another config.workdir, or delete {self._folder} to start again"
            )
        return None

    def _try_to_restore(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """The state of a step, or None and the fault of its files."""
        folder = self._folder / str(step)
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"params": like.params, "opt_state": like.opt_state},
        )
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        restores["bit_sums"] = ocp.args.JsonRestore()
        try:
            saved, wanted = flatten_dict(saved_params(folder)), flatten_dict(like.params)
        except LlavaError as error:
            return None, str(error)
        check_params(str(folder), saved, wanted)
        check_complete(str(folder), saved, wanted, list(like.params))
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**restores))
            sums = dict(items["bit_sums"])
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # no room for it: its files may be sound
        except Exception as error:  # Orbax and TensorStore raise many kinds, a bare one for arrays
            return None, f"{folder} is damaged: {first_line(error)}"
        found = bit_sums({name: items[name] for name in targets})
        if changed := [path for path, total in found.items() if sums.get(path) != total]:
            return None, f"{folder} is damaged: the bits of {changed[0]} have changed"
        return TrainState(
            put(step, like.step.sharding, jnp.int32), items["params"], items["opt_state"]
        ), ""

    def _put_aside(self, damaged: dict[int, str]) -> None:
        """Renames step folders and reports the fault of each."""
        for step, damage in damaged.items():
            folder = self._folder / str(step)
            if hosts.is_first():
                folder.rename(folder.with_name(f"{step}.damaged"))
            hosts.report(f"{damage}; put aside as {step}.damaged")
        if damaged:
            hosts.wait("damaged checkpoints put aside")
            self._manager.reload()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise LlavaError(
                f"a checkpoint could not be written to {self._folder}: "
                f"{first_line(error)}. Earlier ones are whole: make room, and start again to "
                "continue from the newest"
            ) from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()
            self._manager.close()
