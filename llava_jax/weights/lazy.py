"""Our parameters while they are still on disk: matched with a checkpoint's tensors, then read.

Matching looks at names and shapes alone and tells every fault before the first value is read; every
tensor of a checkpoint is used, known to be unneeded, or an error. Reading takes one tensor at a
time.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.weights.formats.safetensors_files import DTYPES, StoredTensor
from llava_jax.weights.name_tables import STACKED, NameTable, Parameter

PARAMETER_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_NAMES_IN_MESSAGE = 5


@dataclasses.dataclass(frozen=True)
class LazyParameter:
    """One of our parameters and the tensors it is made of.

    Attributes:
      parameter: its line of the name table.
      shape: ours; where stacked, blocks on axis 0.
      tensors: one for each block where stacked, else one.
    """

    parameter: Parameter
    shape: tuple[int, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def stacked(self) -> bool:
        return self.parameter.path.startswith(STACKED)

    def dtype(self, block: int = 0) -> np.dtype:
        """As one of `tensors` is stored."""
        return self.tensors[block].value_dtype

    def place(self, block: int = 0) -> str:
        """Name and file of one of `tensors`, for errors."""
        return self.tensors[block].place

    def read(self, block: int = 0) -> np.ndarray:
        """The values of one of `tensors` in our layout and the stored dtype, without block axis."""
        return self._in_our_layout(self.tensors[block].read())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at one slice an axis, in the stored dtype; no others are read."""
        if not self.stacked:
            return _copied(self._in_our_layout(self.tensors[0].map())[index])
        tensors = self.tensors[index[0]]
        return np.stack([_copied(self._in_our_layout(t.map())[index[1:]]) for t in tensors])

    def _in_our_layout(self, values: np.ndarray) -> np.ndarray:
        return from_stored(values, self.parameter, self.shape[1:] if self.stacked else self.shape)


def match(
    table: NameTable,
    config: object,
    blocks: int,
    tensors: Mapping[str, StoredTensor],
    where: object,
) -> dict[str, LazyParameter]:
    """The parameters of a component, by our path in it.

    Args:
      config: the component's, which decides sizes and which parameters there are.
      blocks: how many of the encoder's or decoder's blocks are wanted, from the first.
      tensors: of this component alone, by the names that a checkpoint of it alone would have.
      where: what an error calls the checkpoint.
    Raises:
      LlavaError: a tensor is missing, not expected, misshapen or there twice.
    """
    by_key = standard_names(table, tensors)
    sizes = table.sizes(config)
    found: dict[str, LazyParameter] = {}
    faults = _Faults(where, by_key)
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
        if tensor not in used and not _unneeded(table, config, blocks, key):
            faults.extra.append(faults.place(tensor))
    faults.report()
    return found


class _Faults:
    """What is wrong with the tensors of a component, gathered to be told in one sentence."""

    def __init__(self, where: object, by_key: dict[str, StoredTensor]):
        files = {tensor.path for tensor in by_key.values()}
        self.one_file = len(files) == 1
        self.where, self.by_key = files.pop() if self.one_file else where, by_key
        # What the names on disk have before the table's.
        roots = (t.name.removesuffix(k) for k, t in by_key.items() if t.name.endswith(k))
        self.root = next(roots, "")
        self.missing, self.extra, self.misshapen = [], [], []

    def place(self, tensor: StoredTensor) -> str:
        return tensor.name if self.one_file else f"{tensor.name} (in {tensor.path.name})"

    def tensor(
        self, parameter: Parameter, layer: int, stored_shape: tuple[int, ...]
    ) -> StoredTensor | None:
        """The tensor of one block's parameter; None, with a fault noted, where there is none."""
        names = [key.format(layer=layer) for key in parameter.keys]
        held = [self.by_key[name] for name in names if name in self.by_key]
        if not held:
            self.missing.append(self.root + names[0])
            return None
        if len(held) > 1:
            raise twice(*held[:2])
        _ = held[0].value_dtype  # LlavaError for one that no parameter has
        if held[0].shape != stored_shape:
            shapes = f"is {list(held[0].shape)} and not {list(stored_shape)}"
            self.misshapen.append(f"{self.place(held[0])} {shapes}")
        return held[0]

    def report(self) -> None:
        """Raises LlavaError where there are faults."""
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
    """Tensors under the table's spelling, without those that no model of ours needs."""
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
    """True for blocks past the last one that runs, and for the head that tied weights replace."""
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


def idle_tensors(
    table: NameTable, config: object, blocks: int, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """What `match` leaves aside and a model of the same class in transformers holds, by its name.

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


def read_tree(params: Mapping[str, LazyParameter], dtype: str, name: str) -> dict:
    """Path -> parameter into a nested dict of numpy arrays of `dtype`, in the files' order.

    A progress bar called `name` counts bytes when it takes more than a moment.
    """
    check_dtype(dtype)
    tree: dict = {}
    reads = []
    for path, lazy in params.items():
        target = np.empty(lazy.shape, PARAMETER_DTYPES[dtype])
        _put(tree, path, target)
        targets = target if lazy.stacked else [target]
        reads += [(lazy, block, part) for block, part in enumerate(targets)]
    reads.sort(
        key=lambda read: (str(read[0].tensors[read[1]].path), read[0].tensors[read[1]].offset)
    )
    total = sum(stored_bytes(lazy.tensors) for lazy in params.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {name}", delay=2) as progress:
        for lazy, block, target in reads:
            values = lazy.read(block)
            with np.errstate(over="ignore"):  # told below, with the tensor's name
                _copy(values, target)
            if dtype == "float16":
                _check_overflow(lazy.tensors[block], values, target)
            progress.update(stored_bytes([lazy.tensors[block]]))
    return tree


def check_dtype(name: str) -> None:
    if name not in PARAMETER_DTYPES:
        raise LlavaError(f"unknown dtype {name!r}: choose {', '.join(PARAMETER_DTYPES)}")


def stored_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes that tensors take in their files."""
    item = lambda tensor: DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 1
    return sum(int(np.prod(tensor.shape)) * item(tensor) for tensor in tensors)


def from_stored(values: np.ndarray, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """A Hugging Face tensor in our layout."""
    if parameter.transform == "transpose":
        return values.T
    if parameter.transform == "patches":  # [D, 3, p, p] -> [p * p * 3, D]
        return values.transpose(2, 3, 1, 0).reshape(shape)
    return values.reshape(shape)


def _copied(values: np.ndarray) -> np.ndarray:
    target = np.empty(values.shape, values.dtype)
    _copy(values, target)
    return target


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """target[...] = values; a transposed matrix in strips that fit the cache, six times as fast."""
    if values.ndim != 2 or values.flags.c_contiguous:
        target[...] = values
        return
    strip = 16  # rows as stored: 64 bytes of float32 of each row of the target
    for start in range(0, values.shape[1], strip):
        target[:, start : start + strip] = values[:, start : start + strip]


def _put(tree: dict, path: str, leaf: np.ndarray) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def _check_overflow(tensor: StoredTensor, values: np.ndarray, target: np.ndarray) -> None:
    if np.isinf(target).any() and not np.isinf(values).any():
        raise LlavaError(
            f"tensor {tensor.name!r} in {tensor.path} has values that float16 cannot hold: load it "
            "as bfloat16 or float32"
        )


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
