"""Benchmarks on a tiny model: that they run, and that their tables say what was compiled."""

import dataclasses
import importlib
import importlib.util

import numpy as np
import pytest

from bench import contrast, dpo_step, lookup, scaling, train_step
from llava_jax.inference.engine import Engine
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.models.presets import PRESETS
from llava_jax.training import recipe
from tests import tiny_run
from tests.tiny_model import tiny_llava

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler"
)


def scaled(world, tmp_path, names: list[str], capsys) -> list[list[list[str]]]:
    """The lines of each table, without its head, for stage 1 on 8 rows of the tiny model."""
    changes = {"batch_size": 8, "accumulation": 4, "data.max_length": 48}
    values = tiny_run.align(world, tmp_path / "run", changes)
    scaling.print_tables(tiny_run.recipe({}, values), names)
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    lines = [
        [line.strip("| ").split(" | ") for line in table.strip().split("\n")] for table in tables
    ]
    for table in lines:
        assert table[0] == list(scaling.HEAD) and {len(line) for line in table} == {len(table[0])}
    return [table[2:] for table in lines]


@pytest.mark.slow
def test_a_table_of_scaling_has_both_ways_to_grow(world, tmp_path, capsys, monkeypatch):
    compiled = []

    def compile_stage(stage):
        compiled.append((stage.mesh.size, stage.config.batch_size))
        return scaling_compile(stage)

    scaling_compile = scaling.compile_stage
    monkeypatch.setattr(scaling, "compile_stage", compile_stage)
    same_batch, same_share = scaled(world, tmp_path, ["cpu:2", "cpu:4"], capsys)
    start = lambda table: [line[:3] for line in table]
    assert start(same_batch) == [["cpu:2", "8", "4"], ["cpu:4", "8", "2"]]
    assert start(same_share) == [["cpu:2", "8", "4"], ["cpu:4", "16", "4"]]
    assert compiled == [(2, 8), (4, 8), (4, 16)]  # each once
    assert float(same_batch[0][3]) >= 0 and float(same_batch[0][4]) >= 0
    assert same_batch[0][5:] == ["-"] * 6  # of a CPU no speed is assumed


@pytest.mark.slow
@needs_libtpu
def test_a_table_of_scaling_over_tpus(world, tmp_path, capsys):
    for table in scaled(world, tmp_path, ["v5e:2x2", "v5e:2x4"], capsys):
        for line in table:
            assert all(float(cell) >= 0 for cell in line[3:8])
            assert line[8].count(" to ") == line[9].count(" to ") == 1 and line[10][-1] == "%"


TOWERS = {  # recipe -> what differs from CLIP and 1.5
    "llava15_7b_instruct": {},
    "llava16_7b_instruct": {"image": ImageSpec(28, "anyres")},
    "onevision_7b_single": {
        "image": ImageSpec(28, "anyres", tiling=Tiling(cap=1, one_view=True)),
        "feature_layer": -1,
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llava15_7b_instruct", marks=pytest.mark.slow),
        pytest.param("llava16_7b_instruct", marks=pytest.mark.slow),
        "onevision_7b_single",
    ],
)
def test_a_recipe_s_shape_is_timed_with_random_parameters(name, monkeypatch):
    """What the benchmark on a GPU does where no weights are: here of a tiny tower and decoder."""
    pytest.importorskip("torch")
    big = PRESETS["llava-1.5-7b"] if "15" in name else PRESETS[name.rpartition("_")[0]]
    small = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    shape = dataclasses.replace(
        big,
        vision=dataclasses.replace(big.vision, **small, image_size=28),
        decoder=dataclasses.replace(
            big.decoder, **small, vocab_size=300, num_kv_heads=4, head_dim=8
        ),
        **{"image": ImageSpec(28)} | TOWERS[name],
    )
    monkeypatch.setattr(recipe, "model_config", lambda config: shape)
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size, config.accumulation, config.data.max_length = 2, 1, 32
    config.model.dtype = "float32"
    if shape.image.by_size:
        config.data.max_length, config.data.row_length, config.data.images_per_row = 300, None, 10
    batch = train_step.random_batch(config, shape)
    ours, _ = train_step.start_ours(config, [batch])
    theirs, _ = train_step.start_theirs(config, [batch], {}, 1)
    for step in (ours, theirs):
        first, second = step(0), step(1)
        assert abs(first - np.log(300)) < 1 and second < first


@pytest.mark.slow
def test_two_separate_models_take_the_same_steps_on_pairs(world, tmp_path, aligned):
    changes = {"model.dtype": "float32", "optimizer.eps": 1e-3}
    values = tiny_run.preferences(world, tmp_path, aligned, tmp_path, changes)
    sides = dpo_step.compiled_sides(tiny_run.recipe(values), pairs=2, prompt=9, answer=5)
    losses = {name: dpo_step.run(side, 3) for name, side in sides.items()}
    assert losses["llava_jax"][2] < losses["llava_jax"][0]
    np.testing.assert_allclose(losses["llava_jax"], losses["separate"], rtol=1e-4)
    assert sides["llava_jax"].needed < sides["separate"].needed


def test_contrast_is_timed_next_to_plain_requests():
    model = tiny_llava()
    sides = {kind: contrast.make_requests(model, 2, 3, kind) for kind in (None, "absent")}
    least = contrast.least_seconds(model, sides, 1)
    assert list(least) == [None, "absent"] and min(least.values()) > 0
    assert model.engine.counts.answer_tokens == 2 * 2 * (2 * 3)  # of both, twice


@pytest.mark.slow
def test_the_same_requests_are_answered_with_and_without_guesses():
    model = tiny_llava()
    guessing = Engine(model.config, model.engine.params, "float32", lookup=2)
    sides, params = [lookup.Side(model.engine), lookup.Side(guessing)], SamplingParams(9)
    for kind in lookup.KINDS:
        lookup.measure(model, sides, kind, 2, params, rounds=1)
        assert sides[0].tokens == sides[1].tokens and sides[0].decoded == sides[1].decoded
        assert sides[0].tokens_a_pass == 1 <= sides[1].tokens_a_pass
        assert sides[1].whole > sides[1].first > 0
