"""`llava-jax quantize`: a model in four bits, rounded for the records of a recipe."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from llava_jax.data.rows import Batch
from llava_jax.errors import LlavaError
from llava_jax.files import write_json
from llava_jax.models.gptq import read_block, relative_error, round_by_inputs
from llava_jax.models.llava import LlavaModel
from llava_jax.models.quantization import GROUP, dequantized, rounded
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.training import recipe
from llava_jax.training.stage import Stage
from llava_jax.training.step import model_inputs
from llava_jax.weights import export
from llava_jax.weights.formats.packed import PACKING_KEY
from llava_jax.weights.name_tables import STACKED
from llava_jax.weights.quantized import packed_tensors
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.llava_folder import LlavaFolder
from llava_jax.weights.write.huggingface import fault
from llava_jax.weights.write.packed import OUTPUTS, gptq_values, packed_kernel
from llava_jax.weights.write.save import refuse_existing

ROWS_AT_A_TIME = 4
LAYERS = f"decoder/{STACKED}"


class RoundedKernel(NamedTuple):
    """A kernel of one layer in four bits.

    Attributes:
      values, scales: see `round_by_inputs`.
      error: see `relative_error`. nearest: the same of the kernel rounded to nearest.
    """

    values: np.ndarray
    scales: np.ndarray
    error: float
    nearest: float

    @property
    def weights(self) -> np.ndarray:
        """float32[in, out]."""
        return _weights(self.values, self.scales)


def add_arguments(parser) -> None:
    """The arguments of `llava-jax quantize`."""
    export.add_checkpoint_argument(parser, "a run of train.py, one of its checkpoints, or a LLaVA")
    parser.add_argument(
        "--config", required=True, metavar="FILE",
        help="recipe whose training data and template are read, such as configs/NAME.py; "
        "--config.key=value changes a value",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=int, default=128, metavar="N", help="rows of the recipe to read"
    )
    export.add_output_arguments(parser)


def main(args) -> int:
    """Runs `llava-jax quantize`; returns the exit code."""
    refuse_existing(args.out)
    if args.rows < 1:
        raise LlavaError(f"--rows must be at least 1, not {args.rows}")
    path = export.checkpoint_of_arguments(args)
    checkpoint = export.open_checkpoint(path)
    if any(packed_tensors(leaf) for leaf in checkpoint.params.values()):
        raise LlavaError(f"{path} is quantized already: give the model before it was")
    if why := fault(checkpoint.config):
        raise LlavaError(f"{path} cannot be quantized, for lack of a form to write it in: {why}")
    folder = export.hugging_face(checkpoint, args.dtype, args.template)
    with jax.default_matmul_precision("highest"):  # TPUs would round to bfloat16
        kernels = quantize_layers(checkpoint, read_rows(args.config, path, args.rows))
    if not kernels:
        raise LlavaError(
            f"no kernel of {path} can be quantized: inputs must come in groups of {GROUP}, and "
            f"outputs in groups of {OUTPUTS}"
        )
    mean = lambda name: np.mean([getattr(kernel, name) for kernel in kernels.values()])
    print(
        f"{len(kernels)} kernels: their outputs are off by {mean('error'):.2%} on average, and by "
        f"{mean('nearest'):.2%} if rounded to nearest (squares, on the rows read)",
        file=sys.stderr,
    )
    export.write_folder(packed_folder(folder, checkpoint, kernels), args.out)
    return 0


def read_rows(config, checkpoint: str, rows: int) -> Iterator[Batch]:
    """Batches of the training data of a recipe, as the model of a checkpoint reads them."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.preset, config.init.checkpoint = "", checkpoint  # its shape, its pictures
        for name in recipe.MODEL_OVERRIDES:
            config.model[name] = None
        for part in (config.model.tiling, config.model.video):
            part.update(dict.fromkeys(part))
        config.init.vision = config.init.decoder = config.init.tokenizer = ""
        config.mesh, config.model.attention = {"data": 1, "fsdp": 1, "tensor": 1}, "auto"
        config.batch_size, config.accumulation = ROWS_AT_A_TIME, 1
    stage = Stage.of(config, jax.devices()[:1])
    vocabulary = stage.model.config.decoder.vocab_size
    tokenizer = load_tokenizer(recipe.tokenizer_folder(config), vocabulary)
    steps = -(-rows // ROWS_AT_A_TIME)
    data = stage.training_data(tokenizer, epochs=None, steps=steps, workers=0)
    batches = data.batch_iterator()
    yield from islice(batches, steps)
    batches.close()


def quantize_layers(
    checkpoint: LlavaFolder, batches: Iterable[Batch]
) -> dict[tuple[str, int], RoundedKernel]:
    """The kernels of the language model's layers, layer by layer.

    Each layer is rounded for what the rounded layers before it give. One layer at a time is in
    memory, and the hidden states of all batches. A kernel whose inputs are no multiple of GROUP, or
    whose outputs are none of OUTPUTS, stays as it is.

    Returns:
      (path in a layer, layer) -> kernel.
    """
    config = checkpoint.config
    blocks = {
        path.removeprefix(LAYERS): leaf
        for path, leaf in checkpoint.params.items()
        if path.startswith(LAYERS)
    }
    block = jax.jit(read_block, static_argnums=0)
    inputs, kernels = list(_embedded(checkpoint, batches)), {}
    for layer in tqdm(range(config.decoder.num_layers), desc="quantizing", unit="layer"):
        params = {path: np.asarray(leaf.read(layer), np.float32) for path, leaf in blocks.items()}
        grams = {}
        for x, *rows in inputs:
            _, more = block(config.decoder, unflatten_dict(params, sep="/"), x, *rows)
            grams = {names: np.asarray(gram) + grams.get(names, 0) for names, gram in more.items()}
        for names, gram in grams.items():
            for name, kernel in _rounded(names, params, gram):
                kernels[name, layer], params[name] = kernel, kernel.weights
        inputs = [
            (block(config.decoder, unflatten_dict(params, sep="/"), *one)[0], *one[1:])
            for one in inputs
        ]
    return kernels


def _embedded(checkpoint: LlavaFolder, batches: Iterable[Batch]) -> Iterator[tuple]:
    """Of each batch the embeddings [B, T, D], positions, segments and turns, as of `read_block`."""
    params = {
        path: _whole(leaf)
        for path, leaf in checkpoint.params.items()
        if not path.startswith(LAYERS)
    }
    model, params = LlavaModel(checkpoint.config), unflatten_dict(params, sep="/")

    @jax.jit
    def embed(params, *inputs, **more):
        return model.apply({"params": params}, *inputs, **more, method=LlavaModel.embed_rows)

    for batch in batches:
        (*inputs, positions, segments), more = model_inputs(batch.arrays)
        turns = more.pop("turn_ids")
        yield embed(params, *inputs, **more), positions, segments, turns


def _whole(leaf) -> np.ndarray:
    """A parameter in float32, all its blocks if it is a stack."""
    values = [leaf.read(i) for i in range(leaf.shape[0])] if leaf.stacked else leaf.read()
    return np.asarray(values, np.float32)


def _rounded(
    layers: Iterable[str], params: dict[str, np.ndarray], gram: np.ndarray
) -> Iterator[tuple[str, RoundedKernel]]:
    """The kernels of linear layers with the same inputs, all at once."""
    names = [f"{layer}/kernel" for layer in layers]
    names = [name for name in names if not params[name].shape[1] % OUTPUTS]
    if not names or params[names[0]].shape[0] % GROUP:
        return
    joined = np.concatenate([params[name] for name in names], axis=1)
    cuts = np.cumsum([params[name].shape[1] for name in names])[:-1]
    found = (np.split(x, cuts, axis=1) for x in round_by_inputs(joined, gram, GROUP))
    for name, values, scales in zip(names, *found, strict=True):
        nearest = rounded(params[name], np.dtype(ml_dtypes.int4), GROUP, np)
        errors = (
            relative_error(params[name], _weights(*one), gram)
            for one in ((values, scales), nearest)
        )
        yield name, RoundedKernel(values, scales, *errors)


def _weights(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32[in, out] of a kernel's integers and scales."""
    return dequantized({"kernel": values, "kernel_scale": scales}, np)


def packed_folder(
    folder: export.FolderToWrite,
    checkpoint: LlavaFolder,
    kernels: dict[tuple[str, int], RoundedKernel],
) -> export.FolderToWrite:
    """A folder in Hugging Face form with packed kernels in place of floats."""
    names = {
        export.HF_ROOTS["decoder"] + parameter.keys[0].format(layer=layer): (path, layer)
        for parameter in checkpoint.families.decoder.names.parameters
        for path, layer in kernels
        if parameter.path == STACKED + path
    }
    tensors = []
    for tensor in folder.tensors:
        if tensor.name in names:
            kernel = kernels[names[tensor.name]]
            name = tensor.name.removesuffix(".weight")
            tensors += packed_kernel(name, kernel.values, kernel.scales)
        else:
            tensors.append(tensor)

    def write_side_files(out: Path) -> None:
        folder.write_side_files(out)
        config = out / "config.json"
        write_json(config, read_json(config) | {PACKING_KEY: gptq_values(GROUP)})

    readers = ("llava-jax", "perhaps in other programs that read GPTQ, which were not tried")
    return dataclasses.replace(
        folder, tensors=tensors, write_side_files=write_side_files, loaded_by=readers
    )
