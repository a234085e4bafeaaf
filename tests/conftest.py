"""Eight simulated devices, for the sharding tests, quick compilation, and a tiny trained run."""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    # XLA's former emitters of code, which later versions have no more: half the time to compile.
    # Cut into 32 parts, as it is for many cores, the code of a small function takes longer.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What one test compiled, all others read: of this process, of its scripts and of xdist's workers,
# which inherit the folder. It ends with the process that made it: another machine's code may crash.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with parts/ and data/, to be read only."""
    from tests import tiny_run

    folder = tmp_path_factory.mktemp("world")
    tiny_run.write_parts(folder / "parts")
    tiny_run.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def run():
    """run(values, devices=1): `train.run` in this process; far quicker than a script."""
    import jax

    from tests import tiny_run

    train = tiny_run.train_module()

    def run(values: dict, devices: int = 1) -> None:
        train.run(tiny_run.recipe({}, values), jax.devices()[:devices])

    return run


@pytest.fixture(scope="session")
def aligned(world, run, tmp_path_factory) -> Path:
    """The run directory of a finished stage 1, to be read only."""
    from tests import tiny_run

    workdir = tmp_path_factory.mktemp("aligned") / "align"
    run(tiny_run.align(world, workdir))
    return workdir


@pytest.fixture
def aligned_copy(aligned, world, tmp_path) -> Path:
    """It together with the parts it stands on, to be damaged: tmp_path/align, tmp_path/parts."""
    shutil.copytree(world / "parts", tmp_path / "parts")
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.copytree(aligned, tmp_path / "align")
    path = tmp_path / "align/model.json"
    values = json.loads(path.read_text())
    for name, source in values["sources"].items():
        source |= {"path": str(tmp_path / "parts" / name), "relative": f"../parts/{name}"}
    path.write_text(json.dumps(values))
    return tmp_path / "align"
