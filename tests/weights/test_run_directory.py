"""Which paths below `checkpoints/` are steps: those that Orbax takes for one."""

import orbax.checkpoint as ocp
import pytest

from llava_jax.errors import LlavaError
from llava_jax.weights.run_directory import checkpoint_of, latest_step


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    checkpoints = tmp_path / "checkpoints"
    for name in ("2", "10"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "99").write_text("a file")
    (checkpoints / "0050").mkdir()
    (checkpoints / "60.orbax-checkpoint-tmp").mkdir()
    (checkpoints / "٧٠").mkdir()
    return tmp_path


def test_the_newest_step_is_the_one_that_orbax_takes(run):
    assert latest_step(run) == 10
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        assert manager.latest_step() == 10
    assert checkpoint_of(run) == run / "checkpoints" / "10"
    assert checkpoint_of(run / "checkpoints" / "2") == run / "checkpoints" / "2"


@pytest.mark.parametrize("name", ["99", "0050", "٧٠"])
def test_other_paths_are_no_steps(name, run):
    with pytest.raises(LlavaError, match="is no checkpoint"):
        checkpoint_of(run / "checkpoints" / name)
