"""What a long run meets: SIGTERM, other machines after a restart, a full disk, damaged files."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of, latest_step
from tests.tiny_run import align, instruct, start_script


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_runs(a: Path, b: Path) -> None:
    """Losses and trained parameters equal to rounding."""
    first, second = losses(a), losses(b)
    assert first.keys() == second.keys()
    np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=1e-4)
    found, wanted = (flatten_dict(load_run(checkpoint_of(d))[1]) for d in (a, b))
    for path in wanted:
        np.testing.assert_allclose(
            found[path], wanted[path], rtol=1e-3, atol=2e-5, err_msg=str(path)
        )


def wait_for_lines(process: subprocess.Popen, log: Path, lines: int) -> None:
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


LONG = {"data.validation": "", "save_every": 100, "steps": 10}


def test_sigterm_saves_the_step_and_exits_0(world, run, aligned, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    values = instruct(world, stopped, aligned, LONG)
    process = start_script(world, values)
    wait_for_lines(process, stopped / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    step = latest_step(stopped)
    assert 3 <= step < 10 and max(losses(stopped)) == step
    assert f"stopped by SIGTERM; step {step} of 10 is saved" in out
    run(values)
    run(instruct(world, whole, aligned, LONG))
    assert latest_step(stopped) == 10
    assert_same_runs(stopped, whole)


OTHERS = {
    "8 devices": (8, {"mesh.data": 2, "mesh.fsdp": 4}),
    "tensor axis and microbatches": (4, {"mesh.fsdp": 2, "mesh.tensor": 2, "accumulation": 4}),
}


@pytest.fixture(scope="module")
def half(world, run, aligned, tmp_path_factory) -> tuple[dict, Path, Path]:
    """(values, run directory of a whole run of 4 steps, and of one cut off after 2)."""
    folder = tmp_path_factory.mktemp("half")
    values = {"data.validation": "", "batch_size": 8, "data.max_length": 192, "save_every": 2}
    run(instruct(world, folder / "whole", aligned, values))
    shutil.copytree(folder / "whole", folder / "cut")
    shutil.rmtree(folder / "cut/checkpoints/4")
    return values, folder / "whole", folder / "cut"


@pytest.mark.parametrize(
    "name", ["8 devices", pytest.param("tensor axis and microbatches", marks=pytest.mark.slow)]
)
def test_resumed_on_other_devices_is_never_stopped(name, world, run, aligned, half, tmp_path):
    values, whole, cut = half
    devices, changes = OTHERS[name]
    shutil.copytree(cut, tmp_path / "run")
    run(instruct(world, tmp_path / "run", aligned, values | changes), devices)
    assert_same_runs(tmp_path / "run", whole)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def cut_arrays(folder: Path) -> None:
    each(folder, "d/*", cut)


def each(folder: Path, name: str, change) -> None:
    found = list(folder.rglob(name))
    assert found
    for path in found:
        change(path)


def flip_a_bit(step: Path) -> None:
    """In the middle of the largest file of parameters: of an array, not of what describes it."""
    largest = max((p for p in (step / "params").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


DAMAGE = {
    "a bit": flip_a_bit,
    "arrays cut": lambda step: cut_arrays(step / "params"),
    "moments cut": lambda step: cut_arrays(step / "opt_state"),
    "arrays gone": lambda step: each(step, "d", shutil.rmtree),
    "item gone": lambda step: shutil.rmtree(step / "opt_state"),
    "parameters gone": lambda step: shutil.rmtree(step / "params"),
    "manifest empty": lambda step: each(step, "manifest.ocdbt", lambda p: p.write_bytes(b"")),
    "metadata empty": lambda step: each(step, "_METADATA", lambda p: p.write_text("")),
    "metadata cut": lambda step: each(
        step, "_METADATA", lambda p: p.write_text(p.read_text()[:50])
    ),
    "metadata gone": lambda step: each(step, "_METADATA", Path.unlink),
    "nothing left": lambda step: [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()
    ],
    "all empty": lambda step: each(step, "*", lambda p: p.is_file() and p.write_bytes(b"")),
}


@pytest.fixture(scope="module")
def every_step(world, run, tmp_path_factory) -> Path:
    """The run directory of a finished stage 1 with a checkpoint of each of its 4 steps."""
    workdir = tmp_path_factory.mktemp("every") / "align"
    run(align(world, workdir, {"save_every": 1, "keep": 9}))
    return workdir


QUICK = ("a bit", "moments cut", "item gone", "metadata cut", "all empty")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in DAMAGE]
)
def test_a_damaged_newest_checkpoint_is_put_aside(name, world, run, every_step, tmp_path, capsys):
    workdir = tmp_path / "align"
    shutil.copytree(every_step, workdir)
    DAMAGE[name](workdir / "checkpoints/4")
    run(align(world, workdir, {"save_every": 1, "keep": 9}))
    output = capsys.readouterr().err
    assert "checkpoints/4" in output and "put aside as 4.damaged" in output
    assert "resuming from step 3" in output
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["1", "2", "3", "4", "4.damaged"]
    assert_same_runs(workdir, every_step)


def test_damage_in_all_checkpoints_is_reported(world, run, every_step, tmp_path):
    workdir = tmp_path / "align"
    shutil.copytree(every_step, workdir)
    for step in range(1, 5):
        cut_arrays(workdir / f"checkpoints/{step}")
    with pytest.raises(LlavaError, match="checkpoints/4 is damaged: .*none before it") as error:
        run(align(world, workdir))
    assert "\n" not in str(error.value)
    assert len(list((workdir / "checkpoints").glob("?"))) == 4


def test_a_disk_without_room_ends_the_run_and_spares_what_is_there(
    world, run, aligned, half, tmp_path
):
    """No file may grow past 24 KiB: what a full disk does to the next checkpoint's arrays."""
    values, whole, cut_off = half
    workdir = tmp_path / "run"
    shutil.copytree(cut_off, workdir)
    values = instruct(world, workdir, aligned, values)
    process = start_script(world, values, file_size=24)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    last = err.rstrip().splitlines()[-1]
    assert last.startswith(
        f"train.py: a checkpoint could not be written to {workdir}/checkpoints: "
    )
    assert latest_step(workdir) == 2
    run(values)
    assert_same_runs(workdir, whole)
