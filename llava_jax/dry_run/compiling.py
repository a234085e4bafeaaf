"""The training step of a stage through the real compiler of its devices, and what that reports.

Nothing of a model is computed or read.
"""

import dataclasses
import re
import time

import jax
import jaxlib

from llava_jax.dry_run.chips import GIB
from llava_jax.dry_run.collectives import Collective, read_collectives
from llava_jax.dry_run.gpu import cudnn_workspace
from llava_jax.dry_run.program import kernel_cycles
from llava_jax.errors import LlavaError
from llava_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as the compiler made it.

    Attributes:
      memory: bytes on a device by kind; None if it ran out of memory. Kinds that live at
        different times share room, so they add up to more than is needed.
      needed: bytes on a device at the peak, as far as the compiler reports them, and on GPUs
        cuDNN's workspace.
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
            frozen = stage.of_steps(stage.frozen)
            program = stage.compile_step(optimizer, stage.state, frozen, stage.batch_spec())
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
    needed = m.peak_memory_in_bytes
    text = _text_of(program)
    if stage.platform == "gpu":
        capability = stage.mesh.devices.flat[0].compute_capability
        memory["cudnn_workspace"] = cudnn_workspace(text, capability)
        needed += memory["cudnn_workspace"]
    collectives = read_collectives(text, stage.mesh.size)
    return Compiled(memory, needed, collectives, kernel_cycles(text), seconds)


def _text_of(program: jax.stages.Compiled) -> str:
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise LlavaError(
            f"jaxlib {jaxlib.__version__} cannot read back what its compiler wrote, as with libtpu "
            f"0.0.52 for TPU7x: install the libtpu that this jax asks for, with pip install "
            f"'jax[tpu]=={jax.__version__}' ({str(error).splitlines()[0]})"
        ) from None


def needed_by(message: str) -> int:
    """Bytes that a program needs, read from the compiler's error that there are too few."""
    found = re.search(r"\(([\d.]+)([GT])\)|[Uu]sed ([\d.]+)([GT]) of", message)
    if not found:
        return 0
    number, unit = filter(None, found.groups())
    return int(float(number) * GIB * {"G": 1, "T": 1024}[unit])
