"""Tensors computed from others when they are read: delta weights and grown vocabularies.

Everything is computed in float32, one tensor at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.weights.tensors import StoredTensor


@dataclasses.dataclass(frozen=True)
class ComputedTensor(StoredTensor):
    """A tensor that no file holds; `path` and `offset` are those of its main source."""

    values: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        return self.values()

    map = read


def computed(
    tensor: StoredTensor, values: Callable[[], np.ndarray], shape: tuple[int, ...] | None = None
) -> ComputedTensor:
    """A float32 tensor that replaces another, with its shape or a new one."""
    return ComputedTensor(
        tensor.name, tensor.path, "F32", shape or tensor.shape, tensor.offset, values
    )


def float32(tensor: StoredTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def grow_rows(tensor: StoredTensor, rows: int, last: StoredTensor | None = None) -> StoredTensor:
    """A table [V, D] grown to `rows` rows.

    New rows are the mean of the old ones, with which the original LLaVA starts them; the last rows
    are those of `last`, if given.
    """
    for table in (tensor, last or tensor):
        if len(table.shape) != 2 or table.shape[1] != tensor.shape[1]:
            raise LlavaError(
                f"tensor {table.name!r} in {table.path} has shape {list(table.shape)}: it must be "
                "a table with a row a token"
            )
    old, width = tensor.shape
    known = 0 if last is None else last.shape[0]
    if old > rows or known > rows:
        raise LlavaError(
            f"tensor {tensor.name!r} in {tensor.path} has {old} rows: more than the {rows} of "
            "config.json's vocab_size"
        )
    if old == rows and last is None:
        return tensor

    def values() -> np.ndarray:
        table = float32(tensor)
        mean = np.broadcast_to(table.mean(axis=0), (rows - old, width))
        table = np.concatenate([table, mean])
        if last is not None:
            table[rows - known :] = float32(last)
        return table

    return computed(tensor, values, (rows, width))


def add_delta(
    base: Mapping[str, StoredTensor], delta: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The sum of LLaVA v0's delta weights and the LLaMA that they were computed from.

    A tensor with more rows than that of the base (added tokens) keeps its extra rows. Only the
    projector is absent from the base.

    Raises:
      LlavaError: the base is another model.
    """
    summed = {}
    for name, tensor in delta.items():
        if name not in base:
            if "mm_projector" not in name and "vision_tower" not in name:
                raise LlavaError(
                    f"{tensor.path} holds the delta of {name!r}, which the base does not have: "
                    "give the LLaMA that the delta was made for"
                )
            summed[name] = tensor
            continue
        grown = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        rows = min(tensor.shape[:1], base[name].shape[:1]) if grown else tensor.shape[:1]
        if base[name].shape != (*rows, *tensor.shape[1:]):
            raise LlavaError(
                f"{name!r} is {list(tensor.shape)} in {tensor.path} and "
                f"{list(base[name].shape)} in {base[name].path}: the delta is of another base"
            )
        summed[name] = computed(tensor, _sum_of(base[name], tensor))
    missing = sorted(set(base) - set(delta))
    missing = [name for name in missing if "rotary_emb" not in name]
    if missing:
        raise LlavaError(f"the delta of {missing[0]!r} of {base[missing[0]].path} is missing")
    return summed


def _sum_of(base: StoredTensor, delta: StoredTensor) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        total = float32(delta)
        total[tuple(slice(size) for size in base.shape)] += float32(base)
        return total

    return values
