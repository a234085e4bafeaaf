"""Whatever happens to a file of the newest checkpoint: its own bits come back, or those before."""

import shutil
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.training.checkpoint import Checkpoints
from llava_jax.training.step import TrainState
from llava_jax.weights.run_directory import latest_step

DAMAGE = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another text": lambda path: path.write_text('{"not": "this"}'),
}


def state(step: int) -> TrainState:
    # Numbers that compress badly: small arrays get no file of their own.
    kernel = jax.random.normal(jax.random.key(step), (32, 64))
    params = {"projector": {"kernel": kernel}}
    return TrainState(jnp.int32(step), params, optax.scale_by_adam().init(params))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run directory with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, keep=9)
    for step in (1, 2):
        checkpoints.save(state(step), step)
    checkpoints.close()
    return workdir


def test_files_and_folders_that_are_no_checkpoints(tmp_path, capsys):
    """Orbax does not see a file `3` or a folder `0009`; neither do we, and 3 can be saved."""
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        checkpoints.save(state(2), 2)
    for name in ("0009", "9.damaged", "٣"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/3").write_text("notes")
    assert latest_step(tmp_path) == 2
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        assert int(checkpoints.restore_newest(state(0)).step) == 2
        checkpoints.save(state(3), 3)
    assert latest_step(tmp_path) == 3 and "renamed to 3.file" in capsys.readouterr().err
    assert (tmp_path / "checkpoints/3.file").read_text() == "notes"


def test_no_checkpoint_yet(tmp_path):
    assert latest_step(tmp_path) is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_gives_the_same_bits_or_the_step_before(
    kind, two_steps, tmp_path, capsys
):
    newest = two_steps / "checkpoints/2"
    files = [p.relative_to(newest) for p in newest.rglob("*") if p.stat().st_size and p.is_file()]
    put_aside = set()
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two_steps, workdir)
        DAMAGE[kind](workdir / "checkpoints/2" / file)
        found = Checkpoints(workdir, keep=9).restore_newest(state(0))
        step = int(found.step)
        jax.tree.map(np.testing.assert_array_equal, found, state(step))
        output = capsys.readouterr().err
        assert step == 2 or "is damaged" in output or "cannot be read" in output, file
        if step == 1:
            put_aside.add(file.parts[0])
    assert {"params", "opt_state", "bit_sums"} <= put_aside


def test_a_write_that_ends_late_is_silent_and_nothing_else_is(tmp_path, monkeypatch, capsys):
    class Late:
        def __init__(self, text: str):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end
    Checkpoints(tmp_path, keep=1).close()
    Late("Event loop is closed")
    assert not capsys.readouterr().err
    Late("another fault")
    assert "another fault" in capsys.readouterr().err
