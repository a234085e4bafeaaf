"""`llava-jax convert` compared with `cp` of the same bytes, alternately: seconds and peak memory.

python -m bench.convert --folder=DIR [--preset=llava-1.5-7b] [--rounds=2]

Each command starts with an empty page cache, if root runs this, and ends when its bytes are on the
disk (sync).

DIR gets a checkpoint of random bfloat16 weights (13.5 GB for 7B) under the tensor names that
transformers uses in memory, so that every name is changed; it needs room for twice as much more.
Everything but this source is removed at the end; a later run uses it again.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llava_jax import command
from llava_jax.files import write_json
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.presets import PRESETS, preset
from llava_jax.weights.families import families_of
from llava_jax.weights.formats.safetensors_files import TensorToWrite, write_checkpoint_files
from llava_jax.weights.name_tables import STACKED
from llava_jax.weights.read.llava_folder import components
from llava_jax.weights.write import huggingface as hf_form
from llava_jax.weights.write.save import whole_folder

FOLDER = flags.DEFINE_string("folder", None, "on the disk to measure")
PRESET = flags.DEFINE_enum("preset", "llava-1.5-7b", list(PRESETS), "whose shape")
ROUNDS = flags.DEFINE_integer("rounds", 2, "of each, in turns")

IN_MEMORY_ROOTS = {
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "decoder": "",
}


def random_values(shape: tuple[int, ...]) -> np.ndarray:
    """Normal bfloat16 numbers, a short stretch of them over and over: drawing more takes longer."""
    stretch = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    return np.resize(stretch.astype(ml_dtypes.bfloat16), math.prod(shape)).reshape(shape)


def tensors(config: LlavaConfig) -> list[TensorToWrite]:
    made = []
    for part, (table, sub_config, _) in components(config, families_of(config)).items():
        sizes = table.sizes(sub_config)
        for parameter in (*table.parameters, *table.idle):
            shape = tuple(sizes[letter] for letter in parameter.stored_shape.split())
            layers = sub_config.num_layers if parameter.path.startswith(STACKED) else 1
            for layer in range(layers if parameter.used_by(sub_config) else 0):
                key = parameter.keys[0].format(layer=layer)
                if part == "decoder" and key.startswith("model."):
                    key = f"model.language_model.{key.removeprefix('model.')}"
                name, values = IN_MEMORY_ROOTS[part] + key, partial(random_values, shape)
                made.append(TensorToWrite(name, shape, np.dtype(ml_dtypes.bfloat16), values))
    return made


def make_source(folder: Path, config: LlavaConfig) -> None:
    with whole_folder(folder) as partial_folder:
        write_json(partial_folder / "config.json", hf_form.config_json(config, {}, "bfloat16"))
        images = hf_form.preprocessor_config_json(config)
        write_json(partial_folder / "preprocessor_config.json", images)
        write_checkpoint_files(partial_folder, tensors(config))
        core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.image_token_id)}, "t0"))
        core.add_special_tokens(["<image>"])
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(partial_folder)
    (folder / "checksums.json").unlink()  # as in a checkpoint of another program


def measured(arguments: list[str]) -> tuple[float, float]:
    """(seconds until all is on the disk, peak resident GB) of a command that must end well."""
    empty_page_cache()
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Not the figure of wait4, which starts with the memory of the parent process.
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+)", status)
        peak = max(peak, int(found.group(1)) if found else 0)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"error: {' '.join(arguments)} ended with {process.returncode}")
    os.sync()
    return time.perf_counter() - began, peak / 1e6


def empty_page_cache() -> None:
    """So that all begin alike; what the system keeps in memory stays where this is not allowed."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def removed_after(path: Path, run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    try:
        return run()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    folder = Path(FOLDER.value)
    source, copy, out = (folder / name for name in ("source", "copy", "converted"))
    if not source.exists():
        config = hf_form.with_placeholders(preset(PRESET.value), 32000)
        make_source(source, config)
    size = sum(path.stat().st_size for path in source.iterdir())
    llava_jax = [sys.executable, "-m", "llava_jax.cli"]
    imports = "import llava_jax.weights.convert"
    interpreter = measured([sys.executable, "-c", imports])[1]
    print(f"{size / 1e9:.2f} GB; the interpreter with all imports: {interpreter:.2f} GB resident")
    for _ in range(ROUNDS.value):
        copied = removed_after(copy, partial(measured, ["cp", "-r", str(source), str(copy)]))
        convert = [*llava_jax, "convert", str(source), "--out", str(out)]
        converted = removed_after(out, partial(measured, convert))
        rates = [f"{s:.1f} s ({size / 1e9 / s:.2f} GB/s)" for s in (copied[0], converted[0])]
        print(f"cp {rates[0]}; convert {rates[1]}, {converted[0] / copied[0]:.2f} times cp")
        print(f"peak {converted[1]:.2f} GB, {converted[1] - interpreter:.2f} above the interpreter")


if __name__ == "__main__":
    command.run(main, required=("folder",))
