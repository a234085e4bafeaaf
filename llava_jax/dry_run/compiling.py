"""A config as the shapes its training step takes, and that step through the real compiler.

Nothing of a model is computed or read.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.data.rows import batch_spec
from llava_jax.dry_run.collectives import Collective, read_collectives
from llava_jax.dry_run.program import kernel_cycles
from llava_jax.dry_run.topology import GIB, Topology
from llava_jax.models.llava import LlavaConfig, LlavaModel
from llava_jax.models.precision import compute_precision
from llava_jax.parallel.mesh import BATCH_AXES, make_mesh, microbatches
from llava_jax.parallel.sharding import RULES, batch_sharding
from llava_jax.training import recipe
from llava_jax.training.optimizer import adamw, warmup_cosine
from llava_jax.training.state import abstract_model, abstract_state, joined
from llava_jax.training.step import TrainState, compile_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """A config as the shapes that a step is compiled from."""

    config: ConfigDict
    where: Topology
    mesh: Mesh
    model: LlavaModel
    optimizer: object
    join: Callable
    state: TrainState
    frozen: dict
    batch: dict

    @property
    def batch_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


def make_stage(config: ConfigDict, where: Topology) -> Stage:
    """The shapes and shardings of everything that a step takes; checks the config on the way."""
    recipe.check_config(config)
    model_config = recipe.model_config(config)
    lora = recipe.lora_config(config, model_config)
    mesh = make_mesh(**config.mesh, devices=list(where.devices))
    config = ConfigDict(config.to_dict())
    config.accumulation = microbatches(mesh, config.batch_size, config.accumulation)
    model = recipe.training_model(config, model_config, mesh)
    groups = config.trainable.to_dict()
    schedule = warmup_cosine(config.steps or 1000, config.optimizer.warmup_ratio)
    optimizer = adamw(groups, schedule, **recipe.optimizer_options(config))
    state, frozen = abstract_state(
        mesh, abstract_model(model_config, lora), groups, optimizer, model.dtype
    )
    batch = abstract_batch(config, model_config, mesh)
    return Stage(config, where, mesh, model, optimizer, joined(lora), state, frozen, batch)


def abstract_batch(config: ConfigDict, model_config: LlavaConfig, mesh: Mesh) -> dict:
    """Shapes of what `TrainingData` yields, on the mesh."""
    spec = batch_spec(recipe.row_format(config, model_config), config.batch_size)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    return {name: place(array.shape, array.dtype) for name, array in spec.items()}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said.

    Attributes:
      memory: bytes on a device by kind; None where it ran out of memory. Kinds that live at
        different times share room, so they add up to more than is needed.
      needed: bytes on a device at the peak, as far as the compiler tells.
      kernel_cycles: see `program.kernel_cycles`.
      seconds: it took.
    """

    memory: dict[str, int] | None
    needed: int
    collectives: list[Collective]
    kernel_cycles: int
    seconds: float


def compile_stage(stage: Stage) -> Compiled:
    """The training step through the real compiler of the stage's devices."""
    _, precision = compute_precision(stage.config.model.dtype, stage.where.devices[0].platform)
    began = time.perf_counter()
    with (
        jax.set_mesh(stage.mesh),
        nn.logical_axis_rules(RULES),
        jax.default_matmul_precision(precision),
    ):
        try:
            program = compile_step(
                stage.config, stage.model, stage.optimizer, stage.join,
                stage.state, stage.frozen, stage.batch,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(None, needed_by(str(error)), [], 0, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    m = program.memory_analysis()
    memory = {
        "arguments": m.argument_size_in_bytes,
        "output": m.output_size_in_bytes - m.alias_size_in_bytes,
        "temporary": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    text = program.as_text()
    collectives = read_collectives(text, len(stage.where.devices))
    return Compiled(memory, m.peak_memory_in_bytes, collectives, kernel_cycles(text), seconds)


def needed_by(message: str) -> int:
    """Bytes that a program needs, from the compiler's complaint that there are too few."""
    found = re.search(r"\(([\d.]+)G\)|[Uu]sed ([\d.]+)G of", message)
    return int(float(found[1] or found[2]) * GIB) if found else 0
