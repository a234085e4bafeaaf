"""Writes a run's LoRA as a PEFT adapter of the LLaVA, in transformers, that the run started from.

The folder holds `adapter_config.json` and `adapter_model.safetensors`. A projector that was trained
together with LoRA is written whole, as one of PEFT's `modules_to_save`. Modules have the names that
transformers 5 gives them in memory.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.files import write_json
from llava_jax.models.lora import LoraConfig
from llava_jax.parallel import hosts
from llava_jax.weights.families import families_of
from llava_jax.weights.formats.safetensors_files import TensorToWrite, write_file
from llava_jax.weights.name_tables import STACKED, Parameter
from llava_jax.weights.read.llava_folder import components, is_llava_folder
from llava_jax.weights.run_directory import RunModel, checkpoint_of, read_run_model, read_trained
from llava_jax.weights.tensors import PARAMETER_DTYPES
from llava_jax.weights.write.save import array_params, stored_tensors, whole_folder

IN_MEMORY_ROOTS = {
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "decoder": "model.language_model.",
}
PROJECTOR = "multi_modal_projector"


def write_adapter(path: str | Path, out: Path, dtype: str | None = None) -> None:
    """Writes the LoRA of a run, or of one of its steps.

    Raises:
      LlavaError: the run has no LoRA, or it also trained a whole encoder or language model.
    """
    if is_llava_folder(Path(path)):
        raise LlavaError(f"{path} is a whole model, without LoRA: choose --format hf or llava")
    step_folder = checkpoint_of(path)
    run = read_run_model(step_folder.parent.parent)
    if run.lora is None:
        raise LlavaError(f"{path} was trained without LoRA: choose --format hf or llava")
    tree = read_trained(step_folder, run)
    whole = sorted(tree.keys() - {"lora", "projector"})
    if whole:
        raise LlavaError(
            f"{path} trained the {' and the '.join(whole)} besides LoRA, which an adapter cannot "
            "hold: choose --format hf, with LoRA merged"
        )
    if "newline" in tree.get("projector", {}):
        raise LlavaError(
            f"{path} trained the newline of its pictures, which an adapter cannot hold: choose "
            "--format hf, with LoRA merged"
        )
    if run.quantize:
        hosts.report(
            f"{path} was trained on a base in {run.quantize}: with the base as it was before, the "
            "adapter is near what was trained and not equal to it; --format hf writes that"
        )
    target = PARAMETER_DTYPES[dtype or "float32"]
    pairs = list(_pairs(run, tree["lora"]))
    tensors = [tensor for _, *both in pairs for tensor in both]
    if tree.get("projector"):
        tensors += _projector(run, tree["projector"])
    prefixed = [_for_peft(tensor, target) for tensor in tensors]
    digests = {}
    with whole_folder(out, digests) as folder:
        modules = [module for module, *_ in pairs]
        write_json(folder / "adapter_config.json", _config(run.lora, modules, "projector" in tree))
        name = "adapter_model.safetensors"
        digests[name] = write_file(folder / name, prefixed)


def _pairs(run: RunModel, tree: dict) -> Iterator[tuple[str, TensorToWrite, TensorToWrite]]:
    """(module, its A [r, in], its B [out, r]) of each adapted layer."""
    flat = flatten_dict(tree, sep="/")
    for part, (table, _, _) in components(run.config, families_of(run.config)).items():
        for parameter in table.parameters:
            path = f"{part}/{parameter.path.removesuffix('/kernel')}"
            if f"{path}/lora_a" not in flat or not parameter.path.endswith("/kernel"):
                continue
            down, up = (np.asarray(flat[f"{path}/lora_{half}"]) for half in "ab")
            if not parameter.path.startswith(STACKED):
                down, up = down[None], up[None]
            for layer in range(len(down)):
                module = _module(part, parameter, layer)
                halves = (("lora_A", down[layer].T), ("lora_B", up[layer].T))
                yield module, *(_tensor(f"{module}.{n}.weight", values) for n, values in halves)


def _module(part: str, parameter: Parameter, layer: int) -> str:
    name = parameter.keys[-1].format(layer=layer).removesuffix(".weight")
    level = {"decoder": "model.", "vision": "vision_model."}.get(part, "")
    return IN_MEMORY_ROOTS[part] + name.removeprefix(level)


def _tensor(name: str, values: np.ndarray) -> TensorToWrite:
    return TensorToWrite(name, values.shape, values.dtype, lambda: values)


def _projector(run: RunModel, tree: dict) -> list[TensorToWrite]:
    table, config, _ = components(run.config, families_of(run.config))["projector"]
    root = IN_MEMORY_ROOTS["projector"]
    tensors = stored_tensors(table, config, array_params(tree))
    return [dataclasses.replace(tensor, name=root + tensor.name) for tensor in tensors]


def _for_peft(tensor: TensorToWrite, dtype: np.dtype) -> TensorToWrite:
    cast = lambda values: values().astype(dtype)
    return dataclasses.replace(
        tensor,
        name=f"base_model.model.{tensor.name}",
        dtype=dtype,
        values=partial(cast, tensor.values),
    )


def _config(lora: LoraConfig, modules: list[str], with_projector: bool) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "modules_to_save": [PROJECTOR] if with_projector else None,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
