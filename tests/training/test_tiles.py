"""The loss of pictures in tiles: against torch, packed or not, on one device or several."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaModel
from llava_jax.training.stage import Stage
from llava_jax.weights.read.llava_folder import open_llava
from tests import tiny_run
from tests.data.conftest import record
from tests.tiny_model import CONFIG, byte_tokenizer, loss_and_tokens, random_image, random_params
from tests.training.test_step import assert_near
from tests.weights.family_models import family_model, family_tokenizer, processor_of, save_family

SIZES = ((20, 20), (40, 10), (10, 40), (8, 30), (7, 7), (300, 2))
SPECS = {
    "next": ImageSpec(8, "anyres"),
    "onevision": ImageSpec(8, "anyres", tiling=Tiling(cap=1, one_view=True)),
}


def data_of(config, records, tokenizer=None, **options) -> list[dict]:
    settings = {"max_length": 400, "row_length": 800, "tiles": 15, "batch_size": 2} | options
    rows = {"max_length", "row_length", "tiles", "packing"} & settings.keys()
    row_format = RowFormat.of(config, "chatml", **{name: settings.pop(name) for name in rows})
    data = TrainingData(
        records, tokenizer or byte_tokenizer(), row_format,
        epochs=1, pad_final_batch=True, progress=False, **settings,
    )  # fmt: skip
    return [batch.arrays for batch in data.batch_iterator()]


@functools.partial(jax.jit, static_argnames="config")
def loss_and_grads(config, params, batch):
    """((sum of token losses, supervised tokens), gradients of the sum)."""
    total = lambda p: loss_and_tokens(LlavaModel(config), p, batch)
    return jax.value_and_grad(total, has_aux=True)(params)


def summed(config, params, batches):
    results = [loss_and_grads(config, params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: sum(leaves), *results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of one picture, two and none, whose sizes differ."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        random_image(i, SIZES[i % 6]).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps([tiny_run.conversation(i) for i in range(12)]))
    return folder


@pytest.mark.parametrize("kind", [pytest.param("next", marks=pytest.mark.slow), "onevision"])
def test_packed_and_unpacked_give_the_same_loss_and_gradients(kind, folder):
    config = dataclasses.replace(CONFIG, image=SPECS[kind])
    params, records = random_params(config), open_records(folder / "data.json")
    packed = data_of(config, records)
    plain = data_of(config, records, packing=False)
    assert len(packed) < len(plain) == 6
    assert (packed[0]["feature_ids"].ndim == 3) == (kind == "onevision")
    (loss, tokens), grads = summed(config, params, packed)
    (plain_loss, plain_tokens), plain_grads = summed(config, params, plain)
    assert tokens == plain_tokens > 50 and abs(grads["projector"]["newline"]).min() > 0
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    assert_near(grads, plain_grads)


@pytest.mark.parametrize("size", [(60, 50), (90, 20)])
@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_loss_and_gradients_are_those_of_transformers(kind, size, tmp_path):
    """One record through our rows, the same tokens and picture through their processor."""
    import torch

    theirs = family_model(kind).train()
    opened = open_llava(save_family(tmp_path / "model", theirs))
    image = random_image(3, size)
    image.save(tmp_path / "cat.png")
    (tmp_path / "data.json").write_text(json.dumps([record("cat", image="cat.png")]))
    records = open_records(tmp_path / "data.json")
    (batch,) = data_of(opened.config, records, family_tokenizer(), batch_size=1)
    (total, tokens), grads = loss_and_grads(opened.config, opened.read("float32"), batch)

    used = int((batch["segment_ids"][0] == 1).sum())
    ids = np.where(batch["input_ids"] == opened.config.image_token_id, 259, batch["input_ids"])
    pixels = processor_of(theirs).image_processor(image, return_tensors="pt")
    tensor = lambda array: torch.from_numpy(array[:, :used].astype(np.int64))
    loss = theirs(input_ids=tensor(ids), labels=tensor(batch["labels"]), **pixels).loss
    loss.backward()
    assert abs(float(total / tokens) - loss.item()) < 1e-4
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3)
    newline = theirs.model.image_newline.grad.numpy()
    near(grads["projector"]["newline"] / tokens, newline, atol=1e-4 * abs(newline).max())
    kernel = theirs.model.multi_modal_projector.linear_1.weight.grad.numpy().T
    found = grads["projector"]["linear_0"]["kernel"] / tokens
    near(found, kernel, atol=1e-3 * abs(kernel).max())


def test_several_devices_do_what_one_does(world, folder, tmp_path):
    def step(devices: int, mesh: dict):
        changes = {
            "model.image_mode": "anyres",
            "model.tiling.cap": 1,
            "model.remat_policy": "full",
            "trainable": {"vision": 1e-3, "projector": 1e-3, "decoder": 1e-3},
            "data.train": str(folder / "data.json"),
            "data.image_root": str(folder),
            "data.images_per_row": 15,
            "batch_size": 4,
            "accumulation": 1,
            **{f"mesh.{axis}": size for axis, size in mesh.items()},
        }
        values = tiny_run.align(world, tmp_path / "run", tiny_run.INSTRUCT | changes)
        stage = Stage.of(tiny_run.recipe(values), jax.devices()[:devices])
        optimizer = stage.optimizer(lambda step: 1.0)
        sources = {part: world / "parts" / part for part in ("vision", "decoder")}
        state, frozen = stage.starting_state(sources, optimizer)
        data = stage.training_data(byte_tokenizer(), progress=False, cache_dir=None)
        arrays = stage.put(next(data.batch_iterator()).arrays)
        with stage.scope():
            state, metrics = stage.compile_step(optimizer, state, frozen, arrays)(
                state, frozen, arrays
            )
        return jax.device_get(metrics)

    alone, shared = step(1, {"fsdp": 1}), step(8, {"data": 2, "fsdp": 2, "tensor": 2})
    for name in alone:
        np.testing.assert_allclose(shared[name], alone[name], rtol=1e-4, err_msg=name)
