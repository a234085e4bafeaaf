"""Saving and resuming: the trainable tree and the optimizer state as separate Orbax items."""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.training.step import TrainState
from llava_jax.weights.run_directory import check_complete, check_params, saved_params

ITEMS = ("params", "opt_state")


class Checkpoints:
    """Asynchronous checkpoints of a run, the newest `keep` of them.

    A step folder appears by one rename when it is whole, so a kill at any moment leaves the
    earlier ones as they were.
    """

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        folder = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def newest_before(self, step: int) -> int | None:
        """The newest checkpoint of an earlier step, or None; waits until all are on disk."""
        self._manager.wait_until_finished()
        return max((s for s in self._manager.all_steps() if s < step), default=None)

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state off the devices and writes it in the background."""
        items = {"params": state.params, "opt_state": state.opt_state}
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step.

        Args:
          like: arrays or ShapeDtypeStructs with the shapes and shardings wanted.

        Raises:
          LlavaError: it holds other parameters than `like`, or cannot be read.
        """
        folder = Path(self._manager.directory) / str(step)
        saved, wanted = flatten_dict(saved_params(folder)), flatten_dict(like.params)
        check_params(str(folder), saved, wanted)
        check_complete(str(folder), saved, wanted, list(like.params))
        targets = {"params": like.params, "opt_state": like.opt_state}
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), targets
        )
        restores = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**restores))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise LlavaError(
                f"{folder} is damaged: {str(error).splitlines()[0]}; delete it to go on from the "
                "checkpoint before it"
            ) from None
        return TrainState(jnp.int32(step), items["params"], items["opt_state"])

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
