"""A stage that trains LoRA: what it keeps, resuming, and using what it left."""

import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax import Llava
from llava_jax.errors import LlavaError
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of, saved_params
from tests.tiny_run import instruct

STAGE = {
    "trainable": {"projector": 1e-3, "lora": 5e-3, "lora/decoder/layers/mlp": 1e-3},
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
    "data.validation": "",
}


@pytest.fixture(scope="module")
def tuned(world, run, aligned, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned") / "lora"
    run(instruct(world, workdir, aligned, STAGE))
    return workdir


def test_a_checkpoint_holds_what_trains_alone(tuned):
    saved = flatten_dict(saved_params(checkpoint_of(tuned)))
    assert {path[0] for path in saved} == {"lora", "projector"}
    assert sum(path[-1] == "lora_a" for path in saved) == 7


def test_base_weights_stay_and_kernels_of_the_merged_model_move(tuned, aligned):
    before, after = (flatten_dict(load_run(checkpoint_of(d))[1]) for d in (aligned, tuned))
    assert before.keys() == after.keys()
    for path in before:
        adapted = path[:2] == ("decoder", "layers") and path[-1] == "kernel"
        moved = bool((np.asarray(before[path]) != np.asarray(after[path])).any())
        assert moved == (adapted or path[0] == "projector"), path


def test_each_part_of_the_update_has_its_rate(tuned):
    pairs = flatten_dict(_trained(tuned)["lora"])
    # lora_b starts at zero and Adam's steps are about the rate: 5 times larger outside the MLP.
    size = lambda *path: float(abs(pairs["decoder", "layers", *path, "lora_b"]).max())
    assert 2 < size("self_attn", "q_proj") / size("mlp", "up_proj") < 10


def _trained(workdir) -> dict:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint_of(workdir) / "params")


@pytest.mark.slow
def test_it_resumes(world, run, aligned, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "lora")
    shutil.rmtree(tmp_path / "lora/checkpoints/4")
    run(instruct(world, tmp_path / "lora", aligned, STAGE))
    jax.tree.map(np.testing.assert_array_equal, _trained(tmp_path / "lora"), _trained(tuned))


def test_the_run_directory_can_be_used_and_be_a_next_stage_s_start(world, run, tuned, tmp_path):
    assert isinstance(Llava.from_pretrained(tuned).chat("Hi?", max_new_tokens=2), str)
    more = STAGE | {"trainable": {"decoder": 1e-4}, "lora.rank": 0, "steps": 1}
    run(instruct(world, tmp_path / "next", tuned, more))
    before, after = (load_run(checkpoint_of(d))[1] for d in (tuned, tmp_path / "next"))
    np.testing.assert_allclose(
        after["decoder"]["layers"]["mlp"]["up_proj"]["kernel"],
        before["decoder"]["layers"]["mlp"]["up_proj"]["kernel"],
        atol=2e-4,
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora.rank": 0}, "config.lora.rank is 0, but config.trainable names lora, lora"),
        ({"trainable": {"projector": 1e-3}}, "config.lora.rank is 4, but .* needs a .*rate"),
        ({"lora.dropout": 1.0}, "config.lora.dropout is 1.0: it is a share, from 0 to less than 1"),
        ({"lora.targets": ("decoder/*_prj",)}, "config.lora.targets: 'decoder/.*no linear layer"),
    ],
)
def test_a_wrong_setting_is_reported(changes, message, world, run, aligned, tmp_path):
    with pytest.raises(LlavaError, match=message):
        run(instruct(world, tmp_path / "run", aligned, STAGE | changes))
