"""A checkpoint's tensors matched with the parameters of each component, by names and shapes alone.

Every fault is reported before the first value is read: each tensor of a checkpoint is used, known
to be unneeded, or an error.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.formats.packed import PackedTensor
from llava_jax.weights.name_tables import (
    LLAVA_HEAD,
    LLAVA_ROOTS,
    NEWLINE,
    STACKED,
    NameTable,
    Parameter,
)
from llava_jax.weights.tensors import DTYPES, LazyParameter, StoredTensor

_NAMES_IN_MESSAGE = 5


def match(
    table: NameTable,
    config: object,
    blocks: int,
    tensors: Mapping[str, StoredTensor],
    where: object,
) -> dict[str, LazyParameter]:
    """The parameters of a component, by our path in it.

    Args:
      config: of the component; it decides the sizes and which parameters exist.
      blocks: how many of the encoder's or decoder's blocks are wanted, from the first.
      tensors: of this component, under the names that a checkpoint of it alone would have.
      where: the name of the checkpoint in an error.
    Raises:
      LlavaError: a tensor is missing, not expected, misshapen or there twice.
    """
    by_key = standard_names(table, tensors)
    found: dict[str, LazyParameter] = {}
    faults, sizes = _Faults(where, by_key), table.sizes(config)
    for parameter in table.parameters:
        stacked = parameter.path.startswith(STACKED)
        if not parameter.used_by(config) or (stacked and not blocks):
            continue
        shape, stored_shape = (
            tuple(sizes[letter] for letter in letters.split())
            for letters in (parameter.shape, parameter.stored_shape)
        )
        layers = range(blocks if stacked else 1)
        held = tuple(faults.tensor(parameter, layer, stored_shape) for layer in layers)
        shape = (blocks, *shape) if stacked else shape
        found[parameter.path] = LazyParameter(parameter, shape, held)
    used = {tensor for lazy in found.values() for tensor in lazy.tensors}
    for key, tensor in by_key.items():
        needed = tensor not in used and not _unneeded(table, config, blocks, key)
        if needed and not _is_zero_bias(key, tensor, by_key):
            faults.extra.append(faults.place(tensor))
    faults.report()
    return found


class _Faults:
    """Collects the faults of a component's tensors, to report them in one sentence."""

    def __init__(self, where: object, by_key: dict[str, StoredTensor]):
        files = {tensor.path for tensor in by_key.values()}
        self.one_file = len(files) == 1
        self.where, self.by_key = files.pop() if self.one_file else where, by_key
        # The prefix that names on disk have and the table does not.
        roots = (t.name.removesuffix(k) for k, t in by_key.items() if t.name.endswith(k))
        self.root = next(roots, "")
        self.missing, self.extra, self.misshapen = [], [], []

    def place(self, tensor: StoredTensor) -> str:
        return tensor.name if self.one_file else f"{tensor.name} (in {tensor.path.name})"

    def tensor(
        self, parameter: Parameter, layer: int, stored_shape: tuple[int, ...]
    ) -> StoredTensor | None:
        """The tensor of one block's parameter; None if it is missing, which is noted."""
        names = [key.format(layer=layer) for key in parameter.keys]
        held = [self.by_key[name] for name in names if name in self.by_key]
        if not held:
            self.missing.append(NEWLINE if names[0] == NEWLINE else self.root + names[0])
            return None
        if len(held) > 1:
            raise twice(*held[:2])
        if held[0].dtype not in DTYPES:
            _ = held[0].value_dtype  # raises LlavaError with the tensor's name
        if held[0].shape != stored_shape:
            shapes = f"is {list(held[0].shape)} and not {list(stored_shape)}"
            self.misshapen.append(f"{self.place(held[0])} {shapes}")
        return held[0]

    def report(self) -> None:
        """Raises LlavaError if there are faults."""
        kinds = {
            "missing": self.missing,
            "not expected": self.extra,
            "of the wrong shape": self.misshapen,
        }
        faults = [f"{word} {_some(names)}" for word, names in kinds.items() if names]
        if faults:
            raise LlavaError(
                f"the tensors of {self.where} do not fit its config.json: {'; '.join(faults)}"
            )


def standard_names(
    table: NameTable, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Tensors under the spelling of the table, without those that our models never need."""
    by_key: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in table.unused):
            continue
        key = _standard_name(table, name)
        if key in by_key:
            raise twice(by_key[key], tensor)
        by_key[key] = tensor
    return by_key


def canonical_names(table: NameTable, config: object) -> Callable[[str], str]:
    """A name in any spelling of the table -> the spelling that is written."""
    spellings = {
        key.format(layer=layer): parameter.keys[0].format(layer=layer)
        for parameter in table.parameters
        for key in parameter.keys[1:]
        for layer in range(config.num_layers if parameter.path.startswith(STACKED) else 1)
    }

    def canonical(name: str) -> str:
        name = _standard_name(table, name)
        return spellings.get(name, name)

    return canonical


def _standard_name(table: NameTable, name: str) -> str:
    old, new = next(pair for pair in table.prefixes if name.startswith(pair[0]))
    return new + name.removeprefix(old)


def _unneeded(table: NameTable, config: object, blocks: int, key: str) -> bool:
    """True for blocks past the last one that runs, and for a head if the weights are tied."""
    for parameter in table.parameters:
        if parameter.path.startswith(STACKED):
            for spelling in parameter.keys:
                pattern = re.escape(spelling).replace(re.escape("{layer}"), r"(\d+)")
                found = re.fullmatch(pattern, key)
                if found and blocks <= int(found.group(1)) < config.num_layers:
                    return True
        elif parameter.path == "lm_head/kernel" and key in parameter.keys:
            return config.tie_word_embeddings
    return False


def _is_zero_bias(key: str, tensor: StoredTensor, by_key: Mapping[str, StoredTensor]) -> bool:
    """True for the zeros that AutoGPTQ stores as the bias of a packed kernel without one."""
    packed = isinstance(by_key.get(key.removesuffix("bias") + "weight"), PackedTensor)
    return packed and key.endswith(".bias") and not tensor.read().any()


def idle_tensors(
    table: NameTable, config: object, blocks: int, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Tensors `match` ignores but the transformers class expects, keyed by their names there.

    These are encoder blocks past the feature layer and what comes after the last.
    """
    names = {key: p.keys[0] for p in table.idle for key in p.keys}
    for p in table.parameters:
        if p.path.startswith(STACKED):
            for layer in range(blocks, config.num_layers):
                names |= {key.format(layer=layer): p.keys[0].format(layer=layer) for key in p.keys}
    found = {}
    for name, tensor in tensors.items():
        key = _standard_name(table, name)
        if key in names or any(re.fullmatch(pattern, key) for pattern in table.carried):
            found[names.get(key, key)] = tensor
    return found


def split_llava(
    folder: Path, tensors: dict[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by component, under the names that a folder of the component alone would have."""
    parts = {"vision": {}, "projector": {}, "decoder": {}}
    for name, tensor in tensors.items():
        part, short = component_of(name, tensor)
        if short in parts[part]:
            raise twice(parts[part][short], tensor)
        parts[part][short] = tensor
    empty = [part for part, held in parts.items() if not held]
    if empty:
        raise LlavaError(f"{folder} holds no tensor of the {' and the '.join(empty)}")
    return parts


def component_of(name: str, tensor: StoredTensor) -> tuple[str, str]:
    """The component that a tensor is of, and the name that a folder of it alone would have."""
    if name in (NEWLINE, f"model.{NEWLINE}"):
        return "projector", NEWLINE
    for root, part in LLAVA_ROOTS:
        if name.startswith(root):
            return part, name.removeprefix(root)
    if name.startswith(LLAVA_HEAD):
        return "decoder", name
    raise LlavaError(f"{tensor.path} holds the tensor {name!r}, which is no part of a LLaVA model")


def twice(first: StoredTensor, second: StoredTensor) -> LlavaError:
    """The error of one parameter under two names."""
    return LlavaError(
        f"{first.name!r} in {first.path} and {second.name!r} in {second.path} are the same "
        "parameter: a checkpoint holds each once"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    rest = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {rest} more" if rest > 0 else shown
