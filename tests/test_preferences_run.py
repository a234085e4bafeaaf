"""A stage on pairs of answers: what it keeps and logs, resuming, and what it refuses."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax import Llava
from llava_jax.errors import LlavaError
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import checkpoint_of, saved_params
from tests import tiny_run
from tests.test_lora_run import _trained as trained
from tests.test_train import assert_same_trees, read_lines
from tests.tiny_model import random_image

WHOLE = {"trainable": {"projector": 1e-3, "decoder": 1e-3}, "dpo.beta": 0.5}
LORA = {"trainable": {"lora": 1e-2}, "lora.rank": 2, "lora.dropout": 0.1}
KINDS = {"whole": WHOLE, "lora": LORA}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs; its pictures and held_out.json are next to it."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(15):
        random_image(i, (12, 9 + i % 5)).save(folder / f"{i}.png")
    items = [tiny_run.pair(i) for i in range(15)]
    (folder / "pairs.json").write_text(json.dumps(items[:12]))
    (folder / "held_out.json").write_text(json.dumps(items[12:]))
    return folder / "pairs.json"


def values_of(world, workdir, start, pairs, changes) -> dict:
    held_out = {"data.validation": str(pairs.with_name("held_out.json")), "samples": 1}
    return tiny_run.preferences(world, workdir, start, pairs, held_out | changes)


@pytest.fixture(scope="module", params=["whole", pytest.param("lora", marks=pytest.mark.slow)])
def tuned(request, world, run, aligned, pairs, tmp_path_factory):
    """(work directory, the changes of its recipe)."""
    workdir = tmp_path_factory.mktemp("tuned") / request.param
    run(values_of(world, workdir, aligned, pairs, KINDS[request.param]))
    return workdir, KINDS[request.param]


def test_the_log_has_rewards_that_begin_at_zero_and_grow(tuned):
    workdir, changes = tuned
    lines = read_lines(workdir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if "lora.dropout" not in changes:  # which changes answers from the start
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(steps[0]["reward/margin"]) < 1e-5
    assert steps[-1]["reward/margin"] > 0 and steps[-1]["loss"] < math.log(2)
    held_out = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    names = ("reward/accuracy", "reward/margin", "reward/chosen", "reward/rejected")
    for name in (*names, "log_prob/chosen", "log_prob/rejected"):
        assert name in steps[0] and f"validation_{name}" in held_out[0]
    samples = read_lines(workdir / "samples.jsonl")
    assert samples[0]["reference"] == tiny_run.pair(12)["chosen"]


def test_a_checkpoint_holds_what_trains_alone_and_the_rest_stays(tuned, aligned):
    workdir, changes = tuned
    saved = flatten_dict(saved_params(checkpoint_of(workdir)))
    assert {path[0] for path in saved} == set(changes["trainable"])
    before, after = (load_run(checkpoint_of(d))[1] for d in (aligned, workdir))
    assert_same_trees(before["vision"], after["vision"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before["decoder"], after["decoder"])
    assert not all(jax.tree.leaves(same))
    if "lora.rank" in changes:
        assert_same_trees(before["projector"], after["projector"])
    assert isinstance(Llava.from_pretrained(workdir).chat("Hi?", max_new_tokens=2), str)


def test_it_resumes(world, run, aligned, pairs, tuned, tmp_path):
    workdir, changes = tuned
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    run(values_of(world, tmp_path / "run", aligned, pairs, changes))
    jax.tree.map(np.testing.assert_array_equal, trained(tmp_path / "run"), trained(workdir))
    names = ("loss", "reward/margin", "validation_loss", "validation_reward/margin")
    numbers = [
        [line[name] for line in read_lines(d / "metrics.jsonl") for name in names if name in line]
        for d in (tmp_path / "run", workdir)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 12


def test_another_reference_is_refused(world, run, aligned, pairs, tuned, tmp_path):
    workdir, changes = tuned
    if "lora.rank" in changes:
        pytest.skip("it has no reference of its own")
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    path = tmp_path / "run/config.json"
    recipe = json.loads(path.read_text())
    recipe["reference"]["decoder"] = "0" * 64
    path.write_text(json.dumps(recipe))
    with pytest.raises(LlavaError, match="another recipe .reference.decoder: '0000"):
        run(values_of(world, tmp_path / "run", aligned, pairs, changes))


REFUSED = {
    "init.checkpoint": ("", "config.loss is dpo and config.init.checkpoint is empty: name the"),
    "data.turns": ("independent", "config.data.turns is 'independent', which means nothing with"),
    "data.labels": ("original", "config.data.labels is 'original', which means nothing with"),
    "model.template": ("plain", "config.model.template is 'plain', which writes captions alone"),
    "parity": (True, "config.parity is True, which means nothing with config.loss=dpo"),
    "dpo.beta": (0.0, "config.dpo.beta is 0.0: it must be greater than 0"),
    "loss": ("ppo", "config.loss is 'ppo': choose one of answers, dpo"),
    "model.attention": ("splash", "it cannot keep independent turns apart"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_wrong_setting_is_reported(key, world, run, aligned, pairs, tmp_path):
    value, message = REFUSED[key]
    changes = WHOLE | {key: value} | ({"batch_size": 8} if key == "parity" else {})
    with pytest.raises(LlavaError, match=message):
        run(values_of(world, tmp_path / "run", aligned, pairs, changes))
    assert not (tmp_path / "run/checkpoints").exists()


def test_records_and_loss_that_do_not_go_together(world, run, aligned, pairs, tmp_path):
    talks = {"data.train": str(world / "data/instruct.json")}
    talks["data.image_root"] = str(world / "data/images")
    with pytest.raises(LlavaError, match="record 0 .*there is no 'rejected': with config.loss=dpo"):
        run(values_of(world, tmp_path / "run", aligned, pairs, WHOLE | talks))
    with pytest.raises(LlavaError, match="record 0 .*; pairs of answers are read only with config"):
        run(values_of(world, tmp_path / "run", aligned, pairs, WHOLE | {"loss": "answers"}))
