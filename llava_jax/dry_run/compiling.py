"""The training step of a stage through the real compiler of its devices, and what that reports.

Nothing of a model is computed or read.
"""

import dataclasses
import re
import time

import jax

from llava_jax.dry_run.collectives import Collective, read_collectives
from llava_jax.dry_run.program import kernel_cycles
from llava_jax.dry_run.topology import GIB
from llava_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as the compiler made it.

    Attributes:
      memory: bytes on a device by kind; None if it ran out of memory. Kinds that live at
        different times share room, so they add up to more than is needed.
      needed: bytes on a device at the peak, as far as the compiler reports them.
      kernel_cycles: see `program.kernel_cycles`.
      seconds: time to compile.
    """

    memory: dict[str, int] | None
    needed: int
    collectives: list[Collective]
    kernel_cycles: int
    seconds: float


def compile_stage(stage: Stage) -> Compiled:
    """Compiles the training step for the shapes and shardings of the stage."""
    optimizer = stage.optimizer(stage.schedule(stage.config.steps or 1000))
    began = time.perf_counter()
    with stage.scope():
        try:
            program = stage.compile_step(optimizer, stage.state, stage.frozen, stage.batch_spec())
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
    collectives = read_collectives(text, stage.mesh.size)
    return Compiled(memory, m.peak_memory_in_bytes, collectives, kernel_cycles(text), seconds)


def needed_by(message: str) -> int:
    """Bytes that a program needs, read from the compiler's error that there are too few."""
    found = re.search(r"\(([\d.]+)G\)|[Uu]sed ([\d.]+)G of", message)
    return int(float(found[1] or found[2]) * GIB) if found else 0
