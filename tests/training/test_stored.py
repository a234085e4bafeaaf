"""Losses, gradients and greedy tokens of the one-tile picture modes, as they were first stored.

What the host computes and the tokens are exactly the stored ones; sums on a device may differ in
their last bits from one kind of processor to another.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.inference.model import Llava
from llava_jax.models.llava import LlavaModel
from tests import tiny_run
from tests.tiny_model import CONFIG, byte_tokenizer, loss_and_tokens, random_image, random_params

STORED = json.loads((Path(__file__).parent / "stored" / "picture_modes.json").read_text())


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write_data(folder, count=12)
    return open_records(folder / "instruct.json", folder / "images")


def config_of(mode: str):
    return dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, mode=mode))


@pytest.mark.parametrize("mode", STORED)
def test_batches_losses_and_gradients_are_the_stored_ones(mode, records):
    stored, config = STORED[mode], config_of(mode)
    row_format = RowFormat.of(config, "chatml", max_length=320, tiles=4)
    options = {"batch_size": 2, "epochs": 1, "pad_final_batch": True, "progress": False}
    data = TrainingData(records, byte_tokenizer(), row_format, **options)
    batches = [batch.arrays for batch in data.batch_iterator()]
    for name, digest in stored["arrays"].items():
        array = np.concatenate([batch[name] for batch in batches])
        assert hashlib.sha256(array.tobytes()).hexdigest() == digest, name

    total = functools.partial(loss_and_tokens, LlavaModel(config))
    loss_and_grads = jax.jit(jax.value_and_grad(total, has_aux=True))
    for number, batch in enumerate(batches):
        (loss, tokens), grads = loss_and_grads(random_params(config), batch)
        wanted, supervised = stored["losses"][number]
        assert tokens == supervised
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        # Gradients that are zero but for rounding (of key biases) have no digits to compare.
        largest = max(norms[number] for norms in stored["gradients"].values())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            name = "/".join(key.key for key in path)
            norm = np.linalg.norm(np.float64(leaf))
            wanted = stored["gradients"][name][number]
            np.testing.assert_allclose(norm, wanted, rtol=5e-6, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("mode", STORED)
def test_greedy_tokens_are_the_stored_ones(mode):
    llava = Llava(config_of(mode), random_params(CONFIG), byte_tokenizer(), "chatml")
    images = [random_image(1, (40, 23)), [random_image(2, (9, 30)), random_image(3, (8, 8))], None]
    prompts = ["What?", "<image> or <image>?", "no picture"]
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answers = llava.complete(prompts, images, **options)
    assert [list(answer.tokens) for (answer,) in answers] == STORED[mode]["tokens"]
