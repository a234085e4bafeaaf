"""Checkpoint folders in Hugging Face's layout -> our parameter trees, one tensor at a time.

Everything is checked on the files' headers before the first value is read, and every tensor of a
checkpoint is used, known to be unneeded, or an error.
"""

import dataclasses
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import ViTConfig, num_blocks
from llava_jax.weights import hf_config
from llava_jax.weights.name_tables import (
    DECODERS,
    LLAVA_HEAD,
    LLAVA_ROOTS,
    STACKED,
    VISION_ENCODERS,
    NameTable,
    Parameter,
    projector_table,
)
from llava_jax.weights.safetensors_files import DTYPES, StoredTensor, open_folder

PARAMETER_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_NAMES_IN_MESSAGE = 5


def load_decoder(
    folder: str | Path, config: DecoderConfig | None = None, dtype: str = "float32"
) -> tuple[DecoderConfig, dict]:
    """Reads a Llama-family language model.

    Args:
      folder: `config.json` and safetensors as `LlamaForCausalLM.save_pretrained` writes them.
      config: what the caller expects; a folder that differs is an error.
      dtype: of the parameters returned: float32, bfloat16 or float16.
    Returns:
      The config and the tree of numpy arrays that `Decoder` takes.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    values = hf_config.read_json(folder / "config.json")
    found = hf_config.decoder_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    table = DECODERS[values.get("model_type", "llama")]
    plan = _Plan(folder, _dtype(dtype))
    params = plan.add(table, found, found.num_layers, open_folder(folder))
    plan.read()
    return found, params


def load_vision(
    folder: str | Path,
    num_blocks: int | None = None,
    config: ViTConfig | None = None,
    dtype: str = "float32",
) -> tuple[ViTConfig, dict]:
    """Reads the first `num_blocks` blocks (default: all) of a CLIP, SigLIP or DINOv2 encoder.

    Arguments, result and errors as in `load_decoder`; the tree is the one that `ViT` takes.
    """
    folder = Path(folder)
    values = hf_config.read_json(folder / "config.json")
    found = hf_config.vision_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    blocks = found.num_layers if num_blocks is None else num_blocks
    if not 0 <= blocks <= found.num_layers:
        raise LlavaError(f"{folder} has {found.num_layers} blocks, not {blocks}.")
    table = VISION_ENCODERS[values.get("model_type", "clip_vision_model")]
    plan = _Plan(folder, _dtype(dtype))
    params = plan.add(table, found, blocks, open_folder(folder))
    plan.read()
    return found, params


def load_llava(folder: str | Path, dtype: str = "float32") -> tuple[LlavaConfig, dict]:
    """Reads a LLaVA in Hugging Face form, whichever transformers version wrote its names.

    Arguments and errors as in `load_decoder`. The tree has `vision`, `projector` and `decoder`;
    blocks past the feature layer are left out.
    """
    folder = Path(folder)
    config = hf_config.llava_config(folder)
    values = hf_config.read_json(folder / "config.json")
    parts = _split_llava(folder, open_folder(folder))
    config = _settle_tying(config, values, parts["decoder"])
    try:
        blocks = num_blocks(config.vision, config.feature_layer)
    except ValueError as error:
        raise LlavaError(f"{folder / 'config.json'}: {error}") from error
    vision_family = (values.get("vision_config") or {}).get("model_type", "clip_vision_model")
    text_family = (values["text_config"] or {}).get("model_type", "llama")
    projector = projector_table(
        config.projector,
        config.projector_bias,
        config.vision.hidden_size,
        config.decoder.hidden_size,
    )
    plan = _Plan(folder, _dtype(dtype))
    params = {
        "vision": plan.add(VISION_ENCODERS[vision_family], config.vision, blocks, parts["vision"]),
        "projector": plan.add(projector, config, 0, parts["projector"]),
        "decoder": plan.add(
            DECODERS[text_family], config.decoder, config.decoder.num_layers, parts["decoder"]
        ),
    }
    plan.read()
    return config, params


def _dtype(name: str) -> np.dtype:
    if name not in PARAMETER_DTYPES:
        raise LlavaError(f"unknown dtype {name!r}: choose {', '.join(PARAMETER_DTYPES)}.")
    return PARAMETER_DTYPES[name]


def _check_expected(folder: Path, found: object, expected: object | None) -> None:
    if expected is None or found == expected:
        return
    differing = [
        f"{field.name} is {getattr(found, field.name)!r} and not {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(found)
        if getattr(found, field.name) != getattr(expected, field.name)
    ]
    raise LlavaError(f"{folder} is not the model asked for: {'; '.join(differing)}.")


def _split_llava(
    folder: Path, tensors: dict[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by component, under the names that a folder of the component alone would have."""
    parts = {"vision": {}, "projector": {}, "decoder": {}}
    for name, tensor in tensors.items():
        root, part = next(
            ((root, part) for root, part in LLAVA_ROOTS if name.startswith(root)), ("", None)
        )
        if part is None:
            if not name.startswith(LLAVA_HEAD):
                raise LlavaError(
                    f"{tensor.path} holds the tensor {name!r}, which is no part of a LLaVA model."
                )
            part = "decoder"
        short = name.removeprefix(root)
        if short in parts[part]:
            raise _twice(parts[part][short], tensor)
        parts[part][short] = tensor
    empty = [part for part, held in parts.items() if not held]
    if empty:
        raise LlavaError(f"{folder} holds no tensor of the {' and the '.join(empty)}.")
    return parts


def _settle_tying(
    config: LlavaConfig, values: dict, decoder_tensors: dict[str, StoredTensor]
) -> LlavaConfig:
    """Decides whether the output head is the embedding table.

    `text_config` saying so settles it in every transformers version; the top level, true by default
    in the 4.x line whatever the model, counts only where there is no head.
    """
    top_level = bool(values.get("tie_word_embeddings")) and "lm_head.weight" not in decoder_tensors
    tied = config.decoder.tie_word_embeddings or top_level
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(config, decoder=decoder)


class _Plan:
    """The reads that fill preallocated trees: gathered, checked, then done in file order."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.reads: list[tuple[StoredTensor, Parameter, np.ndarray]] = []

    def add(
        self, table: NameTable, config: object, blocks: int, tensors: dict[str, StoredTensor]
    ) -> dict:
        """Matches a component's tensors with its table; returns the tree that `read` will fill."""
        by_key = _standard_names(table, tensors)
        sizes = table.sizes(config)
        tree: dict = {}
        missing, misshapen, used = [], [], set()
        for parameter in table.parameters:
            if not parameter.used_by(config):
                continue
            shape, stored_shape = (
                tuple(sizes[letter] for letter in letters.split())
                for letters in (parameter.shape, parameter.stored_shape)
            )
            stacked = parameter.path.startswith(STACKED)
            if stacked and not blocks:
                continue
            target = np.empty((blocks, *shape) if stacked else shape, self.dtype)
            _put(tree, parameter.path, target)
            for layer in range(blocks if stacked else 1):
                names = [key.format(layer=layer) for key in parameter.keys]
                tensor = next((by_key[n] for n in names if n in by_key), None)
                if tensor is None:
                    missing.append(names[0])
                    continue
                used.update(n for n in names if n in by_key)
                if tensor.shape != stored_shape:
                    misshapen.append(
                        f"{tensor.name} is {list(tensor.shape)} and not {list(stored_shape)}"
                    )
                self.reads.append((tensor, parameter, target[layer] if stacked else target))
        extra = [
            tensor.name
            for key, tensor in by_key.items()
            if key not in used and not _unneeded(table, config, blocks, key)
        ]
        self._report(missing, extra, misshapen)
        return tree

    def _report(self, missing: list[str], extra: list[str], misshapen: list[str]) -> None:
        faults = [
            f"{word} {_some(names)}"
            for word, names in (
                ("missing", missing),
                ("not expected", extra),
                ("of the wrong shape", misshapen),
            )
            if names
        ]
        if faults:
            raise LlavaError(
                f"the tensors of {self.folder} do not fit its config.json: {'; '.join(faults)}."
            )

    def read(self) -> None:
        """Fills the trees, with a progress bar in bytes when it takes more than a moment."""
        self.reads.sort(key=lambda read: (str(read[0].path), read[0].offset))
        total = sum(_bytes(tensor) for tensor, _, _ in self.reads)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=f"loading {self.folder.name}", delay=2
        ) as progress:
            for tensor, parameter, target in self.reads:
                values = from_stored(tensor.read(), parameter, target.shape)
                with np.errstate(over="ignore"):  # told below, with the tensor's name
                    _copy(values, target)
                if self.dtype == np.float16:
                    _check_overflow(tensor, values, target)
                progress.update(_bytes(tensor))


def _standard_names(table: NameTable, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the table's spelling, without those that no model of ours needs."""
    by_key: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in table.unused):
            continue
        old, new = next(pair for pair in table.prefixes if name.startswith(pair[0]))
        key = new + name.removeprefix(old)
        if key in by_key:
            raise _twice(by_key[key], tensor)
        by_key[key] = tensor
    return by_key


def _unneeded(table: NameTable, config: object, blocks: int, key: str) -> bool:
    """True for blocks past the last one that runs, and for the head that tied weights replace."""
    for parameter in table.parameters:
        if parameter.path.startswith(STACKED):
            for spelling in parameter.keys:
                pattern = re.escape(spelling).replace(re.escape("{layer}"), r"(\d+)")
                match = re.fullmatch(pattern, key)
                if match and blocks <= int(match.group(1)) < config.num_layers:
                    return True
        elif parameter.path == "lm_head/kernel" and key in parameter.keys:
            return config.tie_word_embeddings
    return False


def from_stored(values: np.ndarray, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    """A Hugging Face tensor in our layout."""
    if parameter.transform == "transpose":
        return values.T
    if parameter.transform == "patches":  # [D, 3, p, p] -> [p * p * 3, D]
        return values.transpose(2, 3, 1, 0).reshape(shape)
    return values.reshape(shape)


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


def _bytes(tensor: StoredTensor) -> int:
    item = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 1
    return int(np.prod(tensor.shape)) * item


def _check_overflow(tensor: StoredTensor, values: np.ndarray, target: np.ndarray) -> None:
    if np.isinf(target).any() and not np.isinf(values).any():
        raise LlavaError(
            f"tensor {tensor.name!r} in {tensor.path} has values that float16 cannot hold: load it "
            "as bfloat16 or float32."
        )


def _twice(first: StoredTensor, second: StoredTensor) -> LlavaError:
    return LlavaError(
        f"{first.name!r} in {first.path} and {second.name!r} in {second.path} are the same "
        "parameter: a checkpoint holds each once."
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    rest = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {rest} more" if rest > 0 else shown
