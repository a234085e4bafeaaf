"""Run directories that were moved, changed or damaged: loaded, or refused with what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax import Llava
from llava_jax.errors import LlavaError
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of
from tests import tiny_run
from tests.tiny_model import random_image
from tests.tiny_run import align, instruct


def test_a_run_moved_together_with_its_base_still_loads(aligned, aligned_copy, tmp_path):
    before = Llava.from_pretrained(aligned).chat("Hi?", [random_image(0)], max_new_tokens=4)
    (tmp_path / "elsewhere").mkdir()
    for name in ("align", "parts"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = Llava.from_pretrained(tmp_path / "elsewhere/align")
    assert moved.chat("Hi?", [random_image(0)], max_new_tokens=4) == before
    shutil.rmtree(tmp_path / "elsewhere/parts/vision")
    with pytest.raises(LlavaError, match="frozen vision from .*parts/vision, which is not there"):
        Llava.from_pretrained(tmp_path / "elsewhere/align")


def test_a_base_that_changed_is_refused(aligned_copy, tmp_path):
    shutil.rmtree(tmp_path / "parts")
    tiny_run.write_parts(tmp_path / "parts", seed=1)
    with pytest.raises(LlavaError, match="the weights in .*parts/.* changed since .*align"):
        load_run(checkpoint_of(aligned_copy))


def test_a_run_is_not_continued_on_another_base(world, run, aligned_copy):
    shutil.rmtree(aligned_copy / "checkpoints/4")
    path = aligned_copy / "model.json"
    values = json.loads(path.read_text())
    values["sources"]["decoder"]["checksum"] = "0" * 64  # as if its folder held others since
    path.write_text(json.dumps(values))
    with pytest.raises(LlavaError, match="weights in .*parts/decoder are not those that .*align"):
        run(align(world, aligned_copy))
    assert json.loads(path.read_text()) == values


def rewrite_params(step_folder: Path, change) -> None:
    """Changes the trained tree of a checkpoint, keyed by "a/b/c"."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = flatten_dict(checkpointer.restore(step_folder / "params"), sep="/")
        change(tree)
        shutil.rmtree(step_folder / "params")
        nested = unflatten_dict({tuple(k.split("/")): v for k, v in tree.items()})
        checkpointer.save(step_folder / "params", nested)


BROKEN = {
    "missing": (
        lambda tree: tree.pop("projector/linear_1/bias"),
        "lacks parameters of the model: projector/linear_1/bias",
    ),
    "extra": (
        lambda tree: tree.update({"projector/linear_7/bias": np.zeros(3, np.float32)}),
        "has parameters that the model does not have: projector/linear_7/bias",
    ),
    "misshapen": (
        lambda tree: tree.update({"projector/linear_0/bias": np.zeros(3, np.float32)}),
        r"another shape than the model: projector/linear_0/bias \(\(3,\) and not \(32,\)\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused(name, world, run, aligned_copy, tmp_path):
    change, message = BROKEN[name]
    rewrite_params(checkpoint_of(aligned_copy), change)
    with pytest.raises(LlavaError, match=message):
        Llava.from_pretrained(aligned_copy)
    with pytest.raises(LlavaError, match=message):
        run(instruct(world, tmp_path / "next", aligned_copy))


@pytest.mark.parametrize("name", BROKEN)
def test_resuming_from_a_checkpoint_that_does_not_fit_is_refused(name, world, run, aligned_copy):
    change, message = BROKEN[name]
    shutil.rmtree(aligned_copy / "checkpoints/4")
    rewrite_params(checkpoint_of(aligned_copy), change)
    with pytest.raises(LlavaError, match="align/checkpoints/2 .*" + message):
        run(align(world, aligned_copy))


def test_a_checkpoint_whose_bits_changed_is_refused(aligned_copy):
    def change(tree):
        tree["projector/linear_1/bias"] = np.nextafter(tree["projector/linear_1/bias"], 1)

    rewrite_params(checkpoint_of(aligned_copy), change)
    with pytest.raises(LlavaError, match="checkpoints/4 is damaged: the bits of .*'linear_1'"):
        Llava.from_pretrained(aligned_copy)


def cut_arrays(item: Path) -> None:
    for path in item.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:9])


def test_a_damaged_checkpoint_is_reported(world, run, aligned_copy):
    shutil.rmtree(aligned_copy / "checkpoints/4")
    cut_arrays(aligned_copy / "checkpoints/2/opt_state")
    message = "checkpoints/2 is damaged: .*, and there is none before it"
    with pytest.raises(LlavaError, match=message) as error:
        run(align(world, aligned_copy))
    assert "\n" not in str(error.value)
    cut_arrays(aligned_copy / "checkpoints/2/params")
    with pytest.raises(LlavaError, match="checkpoints/2 is damaged: ") as error:
        Llava.from_pretrained(aligned_copy)
    assert "\n" not in str(error.value)
