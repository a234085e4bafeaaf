"""Two processes of four devices each against one: what they compute, read, write and refuse."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.test_reliability import assert_same_runs, wait_for_lines
from tests.tiny_run import instruct, start_script

STAGE = {
    "batch_size": 8,
    "data.max_length": 192,
    "steps": 4,
    "save_every": 2,
    "mesh.data": 2,
    "validate_every": 4,
}


def start_two(world: Path, *values: dict) -> list[subprocess.Popen]:
    """Two processes of four simulated devices, both with `values[0]` or each with its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start_script(
            world,
            values[process % len(values)],
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES="4",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(process),
        )
        for process in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.fixture(scope="module")
def one(world, run, aligned, tmp_path_factory) -> Path:
    """The run directory of the stage on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(instruct(world, workdir, aligned, STAGE | {"mesh.data": 1}))
    return workdir


@pytest.fixture(scope="module")
def two(world, aligned, tmp_path_factory):
    """(run directory of the stage in two processes, what they printed)."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    results = finish(start_two(world, instruct(world, workdir, aligned, STAGE)))
    assert [code for code, _, _ in results] == [0, 0], results
    return workdir, results


def test_two_processes_are_one(one, two):
    assert_same_runs(two[0], one)
    held_out = [
        [
            line["validation_loss"]
            for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
            if "validation_loss" in line
        ]
        for workdir in (one, two[0])
    ]
    np.testing.assert_allclose(held_out[0], held_out[1], rtol=1e-4)


def test_the_first_process_alone_reports_and_writes(two):
    workdir, ((_, out, err), (_, other_out, other_err)) = two
    assert "4 steps done" in out and "of 2 processes as" in err
    # Without Gloo's own, of two threads, which may end a line with a number in the next.
    output = [x for x in other_out.splitlines() if re.search("[a-z]", x) and "peer ranks" not in x]
    assert not output and "steps" not in other_err and "compiled" not in other_err
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines if "grad_norm" in x] == [1, 2, 3, 4]
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_one_and_back(world, run, aligned, one, two, tmp_path):
    for start in (one, two[0]):
        workdir = tmp_path / start.parent.name
        shutil.copytree(start, workdir)
        shutil.rmtree(workdir / "checkpoints/4")
        if start == one:
            values = instruct(world, workdir, aligned, STAGE)
            results = finish(start_two(world, values))
            assert [code for code, _, _ in results] == [0, 0], results
            assert "resuming from step 2" in results[0][2]
        else:
            run(instruct(world, workdir, aligned, STAGE | {"mesh.data": 1}))
        assert_same_runs(workdir, one)


def test_sigterm_to_one_process_saves_the_same_step_in_both(world, aligned, tmp_path):
    changes = {"data.validation": "", "save_every": 100, "steps": 200}
    values = instruct(world, tmp_path / "run", aligned, STAGE | changes)
    processes = start_two(world, values)
    wait_for_lines(processes[0], tmp_path / "run/metrics.jsonl", 2)
    processes[1].terminate()
    results = finish(processes)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "stopped by SIGTERM; step" in results[0][1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[-1])["step"]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [str(step)]


def test_processes_with_different_configs_refuse_to_start(world, aligned, tmp_path):
    values = instruct(world, tmp_path / "run", aligned, STAGE)
    results = finish(start_two(world, values, values | {"optimizer.b2": 0.9, "seed": 3}))
    for code, _, err in results:
        assert code == 1 and "Traceback" not in err
        assert "process 1 differs from process 0 in config.optimizer.b2: 0.9 and not 0.999" in err
        assert "config.seed: 3 and not 0" in err
    assert not (tmp_path / "run/checkpoints").exists()
