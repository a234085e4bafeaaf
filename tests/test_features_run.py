"""Runs from stored features are, bit for bit, those that encode pictures in every step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of
from tests.test_preferences_run import KINDS, pairs, values_of  # noqa: F401
from tests.test_reliability import assert_same_runs
from tests.test_train import assert_same_trees
from tests.test_two_processes import STAGE, finish, start_two
from tests.tiny_run import ROOT, align, instruct


def figures(workdir: Path) -> list[tuple]:
    """Step, loss, gradient norm and held-out loss of each line of the log."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    names = ("step", "loss", "grad_norm", "validation_loss")
    return [tuple(line.get(name) for name in names) for line in lines]


def assert_same_bits(a: Path, b: Path) -> None:
    assert figures(a) == figures(b) and len(figures(a)) >= 4
    assert_same_trees(*(load_run(checkpoint_of(workdir))[1] for workdir in (a, b)))


def test_stage_1_is_the_same_and_resumes(world, run, aligned, tmp_path, capsys):
    stored = {"features.folder": str(tmp_path / "features")}
    run(align(world, tmp_path / "run", stored))
    assert_same_bits(tmp_path / "run", aligned)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    capsys.readouterr()
    run(align(world, tmp_path / "run", stored | {"data.workers": 1}))
    report = capsys.readouterr().err
    assert "resuming from step 2" in report and "encoding" not in report
    run(align(world, tmp_path / "other", {}))  # the folder is no part of the recipe
    shutil.rmtree(tmp_path / "other/checkpoints/4")
    run(align(world, tmp_path / "other", stored))
    for name in ("run", "other"):
        assert_same_trees(*(load_run(checkpoint_of(d))[1] for d in (tmp_path / name, aligned)))


@pytest.mark.slow
def test_stage_2_with_held_out_data_is_the_same(world, run, aligned, tmp_path):
    changes = {"batch_size": 4, "accumulation": 2, "samples": 2}
    run(instruct(world, tmp_path / "encoded", aligned, changes))
    stored = {"features.folder": str(tmp_path / "features")}
    run(instruct(world, tmp_path / "stored", aligned, changes | stored))
    assert_same_bits(tmp_path / "stored", tmp_path / "encoded")
    samples = [(tmp_path / d / "samples.jsonl").read_text() for d in ("stored", "encoded")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_preferences_are_the_same_to_rounding(world, run, aligned, pairs, tmp_path):  # noqa: F811
    """XLA sums the gradients of two passes in another order where the encoder is not with them."""
    run(values_of(world, tmp_path / "encoded", aligned, pairs, KINDS["whole"]))
    stored = {"features.folder": str(tmp_path / "features")}
    run(values_of(world, tmp_path / "stored", aligned, pairs, KINDS["whole"] | stored))
    assert_same_runs(tmp_path / "stored", tmp_path / "encoded")
    first = [figures(tmp_path / name)[0] for name in ("stored", "encoded")]
    assert first[0] == first[1]


DIES = """
import os, sys
from llava_jax.data import features

features.FILE_BYTES = 1  # a file for each picture
add, count = features.FeatureWriter.add, 0

def dies(self, *arguments):
    global count
    count += 1
    if count == 6:
        self._pictures, features.FILE_BYTES = [], 1 << 20
        add(self, *arguments)  # its file is half-written
        os._exit(9)
    add(self, *arguments)

features.FeatureWriter.add = dies
from tests.conftest import FLAGS
import jax, json
from tests import tiny_run
tiny_run.train_module().run(tiny_run.recipe({}, json.loads(sys.argv[1])), jax.devices()[:1])
"""


def test_killed_while_it_stores_goes_on(world, run, aligned, tmp_path, capsys):
    values = align(world, tmp_path / "run", {"features.folder": str(tmp_path / "features")})
    command = [sys.executable, "-c", DIES, json.dumps(values)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 9, ended.stderr
    found = lambda suffix: list((tmp_path / "features").glob(f"*/*{suffix}"))
    assert (len(found(".features")), len(found(".partial"))) == (5, 1)
    run(values)
    assert "encoder sees of 19 pictures" in capsys.readouterr().err  # 24 less 5
    assert_same_bits(tmp_path / "run", aligned)


@pytest.mark.slow
def test_two_processes_share_a_folder(world, run, aligned, tmp_path):
    """Each encodes its part; one process then finds all that it needs."""
    stored = STAGE | {"features.folder": str(tmp_path / "features"), "data.validation": ""}
    results = finish(start_two(world, instruct(world, tmp_path / "two", aligned, stored)))
    assert [code for code, _, _ in results] == [0, 0], results
    assert len(list((tmp_path / "features").glob("*/*.features"))) == 2
    run(instruct(world, tmp_path / "one", aligned, stored | {"mesh.data": 1}))
    assert len(list((tmp_path / "features").glob("*/*.features"))) == 2
    losses = [[line[1] for line in figures(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_weights_spread_over_devices_encode_too(world, run, aligned, tmp_path):
    changes = {"batch_size": 8, "data.validation": "", "mesh.data": 2, "mesh.fsdp": 4}
    run(instruct(world, tmp_path / "encoded", aligned, changes), 8)
    stored = {"features.folder": str(tmp_path / "features")}
    run(instruct(world, tmp_path / "stored", aligned, changes | stored), 8)
    losses = [[line[1] for line in figures(tmp_path / name)] for name in ("encoded", "stored")]
    np.testing.assert_allclose(*losses, rtol=1e-6)
