"""Opens the tensors of a checkpoint folder: one file or shards, of safetensors or of PyTorch."""

from collections.abc import Mapping
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.checksums import inside_folder, verify_checksums
from llava_jax.weights.formats.packed import unpacked
from llava_jax.weights.formats.pickle_files import PICKLE_FILE, PICKLE_INDEX, open_pickle
from llava_jax.weights.formats.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    parse_json,
    read_header,
)
from llava_jax.weights.tensors import StoredTensor

# Files next to the weights that also end in .bin or .pt but hold no model.
_NOT_A_MODEL = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


def open_weights(folder: str | Path, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name: from safetensors if there are any, else PyTorch.

    Packed kernels are there as what they stand for; see packed.py.

    Raises:
      LlavaError: as in `open_folder`, for PyTorch files without `allow_pickle`, or for kernels that
        are packed in a way that cannot be read.
    """
    return unpacked(Path(folder), _stored(Path(folder), allow_pickle))


def _stored(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    if (folder / INDEX_FILE).exists() or (folder / SINGLE_FILE).exists():
        return open_folder(folder)
    index = None
    if (folder / PICKLE_INDEX).exists():
        index = read_index(folder / PICKLE_INDEX, ".bin")
    pickles = _alone(folder) if index is None else [folder / n for n in sorted({*index.values()})]
    if not pickles:
        return open_folder(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in pickles:
        for name, tensor in open_pickle(path, allow_pickle).items():
            if name in tensors:
                raise LlavaError(
                    f"tensor {name!r} is in both {tensors[name].path} and {path}: a checkpoint "
                    "holds each tensor once"
                )
            tensors[name] = tensor
    if index is not None:
        check_index(folder / PICKLE_INDEX, index, tensors)
    return tensors


def _alone(folder: Path) -> list[Path]:
    """The PyTorch file that holds a folder's model by itself, or none."""
    found = [p for end in ("*.bin", "*.pth", "*.pt") for p in sorted(folder.glob(end))]
    found = [p for p in found if p.name not in _NOT_A_MODEL]
    named = [p for p in found if p.name == PICKLE_FILE]
    if len(found) > 1 and not named:
        raise LlavaError(
            f"{folder} holds {', '.join(p.name for p in found)}: name the model {PICKLE_FILE}"
        )
    return named or found


def open_folder(folder: str | Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint folder, single-file or sharded, without reading values.

    Verifies `checksums.json` if the folder has one. Pickled weights (`.bin`, `.pth`) are refused,
    because they can run code.

    Raises:
      LlavaError: no weights; a missing, truncated or damaged file; a changed checksum; a shard
        path that leaves the folder; a tensor in two shards, or not where the index says it is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LlavaError(f"{folder} is not a folder: give the folder of a checkpoint")
    covered = verify_checksums(folder)
    if (folder / INDEX_FILE).exists():
        index = read_index(folder / INDEX_FILE, ".safetensors")
        names = sorted(set(index.values()))
    elif (folder / SINGLE_FILE).exists():
        index, names = None, [SINGLE_FILE]
    else:
        raise LlavaError(_no_weights(folder))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if covered is not None and name not in covered:
            raise LlavaError(f"{folder / name} is not listed in the folder's checksums.json")
        for tensor in read_header(folder / name):
            if tensor.name in tensors:
                raise LlavaError(
                    f"tensor {tensor.name!r} is in both {tensors[tensor.name].path} and "
                    f"{tensor.path}: a checkpoint holds each tensor once"
                )
            tensors[tensor.name] = tensor
    if index is not None:
        check_index(folder / INDEX_FILE, index, tensors)
    return tensors


def read_index(path: Path, end: str) -> dict[str, str]:
    """Tensor -> file name, from an index; the files exist but are not read.

    Args:
      end: the required suffix of the file names.
    Raises:
      LlavaError: the index is damaged, or a file is missing or outside the folder.
    """
    try:
        index = parse_json(path, path.read_bytes()).get("weight_map")
    except OSError as error:
        raise LlavaError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(index, dict) or not index:
        raise LlavaError(f"{path} is damaged: it has no weight_map from tensors to files")
    for tensor, shard in index.items():
        if not inside_folder(shard) or "/" in shard or not shard.endswith(end):
            raise LlavaError(
                f"{path} puts tensor {tensor!r} in {shard!r}: a shard must be a {end} file in the "
                "same folder"
            )
        if not (path.parent / shard).is_file():
            raise LlavaError(f"{path.parent / shard} is missing, although {path} names it")
    return index


def check_index(path: Path, index: dict[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises LlavaError if an index and the tensors of its files differ."""
    for name, shard in index.items():
        if name not in tensors or tensors[name].path != path.parent / shard:
            raise LlavaError(f"{path} says tensor {name!r} is in {shard}, where it is not")
    extra = sorted(set(tensors) - set(index))
    if extra:
        raise LlavaError(
            f"tensor {extra[0]!r} is in {tensors[extra[0]].path} and not in {path}: the index and "
            "the shards belong to different checkpoints"
        )


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for e in ("*.bin", "*.pth", "*.pt") for p in folder.glob(e))
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}), which can run code: save them as "
            "safetensors"
        )
    return f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}"
