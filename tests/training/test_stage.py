"""A stage is derived from its recipe alone, which it leaves as it is."""

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.parallel.mesh import BATCH_AXES
from llava_jax.training.stage import Stage
from tests import tiny_run
from tests.tiny_model import byte_tokenizer


def recipe(world, tmp_path, **changes):
    """Stage 2's recipe without held-out data; `__` stands for the dot of a key."""
    values = tiny_run.align(world, tmp_path / "run", tiny_run.INSTRUCT)
    values |= {"data.train": str(world / "data/instruct.json"), "batch_size": 8, "accumulation": 4}
    return tiny_run.recipe(values, {k.replace("__", "."): v for k, v in changes.items()})


def test_a_recipe_stays_as_it_is(world, tmp_path):
    config = recipe(world, tmp_path)
    before = config.to_dict()
    stage = Stage.of(config, jax.devices()[:4])
    assert stage.microbatches == 2 and config.accumulation == 4  # 8 rows of 4 devices
    assert stage.batch_shards == stage.mesh.size == 4
    assert stage.trainable == {"projector", "decoder"} and set(stage.frozen) == {"vision"}
    assert config.to_dict() == before and config.is_locked


def test_nothing_is_computed(world, tmp_path):
    stage = Stage.of(recipe(world, tmp_path), jax.devices()[:2])
    leaves = jax.tree.leaves((stage.state, stage.frozen, stage.batch_spec()))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert {leaf.sharding.mesh for leaf in leaves} == {stage.mesh}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("turns", ["conversation", "independent"])
def test_batches_have_the_shapes_that_the_step_is_compiled_for(turns, world, tmp_path):
    stage = Stage.of(recipe(world, tmp_path, data__turns=turns), jax.devices()[:2])
    data = stage.training_data(byte_tokenizer(), progress=False, cache_dir=None)
    arrays = stage.put(next(data.batch_iterator()).arrays)
    spec = stage.batch_spec()
    assert arrays.keys() == spec.keys()
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (spec[name].shape, spec[name].dtype), name
        assert array.sharding == spec[name].sharding and array.sharding.spec[0] == BATCH_AXES


def test_held_out_data_are_read_once_a_microbatch_at_a_time(world, tmp_path):
    stage = Stage.of(recipe(world, tmp_path), jax.devices()[:1])
    assert stage.held_out_data(byte_tokenizer()) is None
    held_out = {"data__validation": str(world / "data/held_out.json")}
    stage = Stage.of(recipe(world, tmp_path, **held_out), jax.devices()[:1])
    data = stage.held_out_data(byte_tokenizer())
    assert (stage.microbatches, data.batch_size) == (4, 2) and data.records_used == 5


def test_what_does_not_suit_the_devices_is_refused(world, tmp_path):
    with pytest.raises(LlavaError, match="8 rows cannot be split over 3 devices"):
        Stage.of(recipe(world, tmp_path), jax.devices()[:3])
