"""Dry runs: numbers against hand counts; simulated devices, and TPUs where libtpu is."""

import dataclasses
import importlib
import importlib.util
import json

import jax
import numpy as np
import pytest

from llava_jax.dry_run import run as dry_run
from llava_jax.dry_run.chips import CHIPS, GIB
from llava_jax.dry_run.compiling import needed_by
from llava_jax.dry_run.estimate import (
    CONVERSATIONS,
    Contents,
    assumed_counts,
    contents_of,
    estimate,
    executed_flops,
)
from llava_jax.dry_run.report import bytes_on_a_device, parameter_count
from llava_jax.dry_run.topology import Topology, topology
from llava_jax.models.presets import preset
from llava_jax.training.flops import image_flops
from llava_jax.training.stage import Stage
from tests import tiny_run
from tests.tiny_model import byte_tokenizer

# Matrices of 7B: 32 layers of four 4096 x 4096 and three 4096 x 11008, their norms, embedding,
# output projection and last norm.
DECODER_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
PROJECTOR_7B = 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def test_the_published_recipe_by_shapes_alone():
    """7B stage 2 over eight devices: counts, bytes and dtypes, with no weight and no file there."""
    config = load("llava15_7b_instruct")
    config.model.dtype = "bfloat16"
    stage = Stage.of(config, topology("cpu:8").devices)
    assert parameter_count(stage.state.params) == DECODER_7B + PROJECTOR_7B
    matrices = DECODER_7B - 65 * 4096
    weights = bytes_on_a_device(stage.state.params)
    assert weights == pytest.approx(4 * (matrices + PROJECTOR_7B) / 8 + 4 * 65 * 4096, rel=1e-3)
    assert bytes_on_a_device(stage.state.opt_state) == pytest.approx(2 * weights, rel=1e-6)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stage.frozen)} == {"bfloat16"}
    leaves = jax.tree.leaves((stage.state, stage.frozen, stage.batch_spec()))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert stage.batch_spec()["tiles"].shape == (128, 3, 336, 336, 3)


def test_moments_in_bfloat16_halve_the_optimizer():
    config = load("llava15_7b_instruct")
    config.optimizer.moments_dtype = "bfloat16"
    stage = Stage.of(config, topology("cpu:8").devices)
    weights = bytes_on_a_device(stage.state.params)
    assert bytes_on_a_device(stage.state.opt_state) == pytest.approx(weights, rel=1e-6)


def run_dry(config, capsys, fit: bool = False) -> tuple[int, str, dict]:
    """(exit status, what was printed, the JSON object of the last line)."""
    code = dry_run.run(config, "cpu:8", fit)
    text = capsys.readouterr().out
    return code, text, json.loads(text.splitlines()[-1])


def test_a_run_that_is_all_here(world, tmp_path, capsys):
    """The real step compiled, the first packed row shown with what is learnt, nothing trained."""
    changes = {"batch_size": 8, "data.max_length": 48}
    values = tiny_run.align(world, tmp_path / "run", changes)
    config = tiny_run.recipe({}, values)
    code, text, figures = run_dry(config, capsys)
    assert code == 0 and figures["fits"]
    assert figures["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert figures["bytes"]["needed"] >= figures["bytes"]["arguments"] > 0
    assert figures["collectives"]["all-gather"]["bytes"] > 0
    assert "«" in figures["first_row"] and "<image x 4>" in figures["first_row"]
    assert not (tmp_path / "run/checkpoints").exists()


def test_files_that_are_not_here_are_figures_and_assumed(world, tmp_path, capsys):
    values = tiny_run.align(world, tmp_path / "run", {"batch_size": 8, "data.train": "gone.json"})
    code, text, figures = run_dry(tiny_run.recipe({}, values), capsys, fit=True)
    assert code == 0 and "gone.json" in text.splitlines()[0]
    assert figures["first_row"] is None and figures["assumed"]["fill"] > 0
    best = figures["fit"]["best"]
    assert (best["remat_policy"], best["accumulation"], best["fits"]) == ("none", 1, True)


@pytest.mark.slow
def test_pictures_in_tiles_are_dry_run_and_fitted(world, tmp_path, capsys):
    changes = tiny_run.INSTRUCT | {"model.image_mode": "anyres", "model.tiling.cap": 1}
    changes |= {"batch_size": 8, "data.train": "gone.json", "data.images_per_row": 10}
    changes |= {"trainable": {"vision": 1e-6, "projector": 1e-3, "decoder": 1e-3}}
    values = tiny_run.align(world, tmp_path / "run", changes)
    code, _, figures = run_dry(tiny_run.recipe({}, values), capsys, fit=True)
    assert code == 0 and figures["fit"]["best"]["fits"]
    assert len(figures["assumed"]["sizes"]) == 8 and figures["model_flops"] > 0


def test_a_row_as_text_marks_what_is_learnt():
    tokenizer = byte_tokenizer()
    question, answer = tokenizer("ab")["input_ids"], tokenizer("cd")["input_ids"]
    ids = [*question, -200, -200, *answer, *question, 0]
    labels = [-100] * 4 + answer + [-100] * 3
    row = {
        "input_ids": np.array(ids),
        "labels": np.array(labels),
        "segment_ids": np.array([1] * 6 + [2] * 2 + [0]),
    }
    text = dry_run.row_text(row, tokenizer, -200)
    assert text.splitlines()[1:] == [
        "segment 1: ab<image x 2>«cd»",
        "segment 2: ab",
        "padding: 1 tokens",
    ]


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("the total memory required for HLO temporaries (24.06G) exceeds available HBM", 24.06),
        ("Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.", 18.5),
        ("the total memory required for HLO temporaries (1.50T) exceeds available HBM", 1536),
    ],
)
def test_the_compilers_complaint_is_read(message, size):
    assert needed_by(message) == int(size * GIB)


def test_executed_flops_of_7b():
    """Per token: 6N with all trained, 8N with full recomputation; attention and images aside."""
    config, rows, length = preset("llava-1.5-7b"), 2, 2048
    layers = DECODER_7B - 2 * 32000 * 4096 - 65 * 4096
    attention = 4 * rows * length * (length + 1) / 2 * 32 * 32 * 128
    count = lambda remat: executed_flops(config, {"decoder"}, rows, length, 0, remat)
    assert count("none") == pytest.approx(3 * (2 * layers * rows * length + attention))
    assert count("full") == pytest.approx(4 * (2 * layers * rows * length + attention))


def test_assumed_rows_never_hold_more_than_their_room():
    config = preset("llava-1.5-7b")
    counts = assumed_counts(config, CONVERSATIONS, 128, 2048, 3)
    assert counts["tokens"] == pytest.approx(128 * 2048 * CONVERSATIONS.fill)
    assert counts["images"] <= 128 * 3
    tight = assumed_counts(config, Contents(0.97, 32, 0.9, 1.0), 128, 2048, 1)
    assert tight["images"] == 128 and tight["tokens"] == 128 * (576 + 32)


def test_pictures_in_tiles_are_counted_by_their_layouts():
    """Not by tokens_per_tile: a picture of 640 x 427 has 5 tiles and 2,144 tokens."""
    config = preset("llava16_7b")
    one = Contents(0.95, 340, 0.4, 1.0, ((640, 427),))
    counts = assumed_counts(config, one, 64, 8192, 15)
    assert counts["images"] == 64 * 15  # three pictures, and no room for a fourth
    assert counts["tokens"] == pytest.approx(64 * 3 * (2144 + 340))
    assert counts["attention_pairs"] == pytest.approx(counts["tokens"] * (2144 + 340 + 1) / 2)
    assert contents_of(config, captions=False).fill == 0.95
    many = assumed_counts(config, contents_of(config, captions=False), 64, 8192, 15)
    assert many["tokens"] == pytest.approx(64 * 8192 * 0.95) and many["images"] < 64 * 15


def test_rows_of_pairs_are_assumed_to_hold_pictures_alone():
    config = preset("llava-1.5-7b")
    contents = contents_of(config, captions=False, pairs=True)
    counts = assumed_counts(config, contents, 32, 2048, 3)
    assert contents.pictured == 1.0 and counts["images"] <= 32 * 3
    assert counts["tokens"] == pytest.approx(counts["images"] * (576 + contents.text))
    tiled = contents_of(preset("llava16_7b"), captions=False, pairs=True)
    assert len(tiled.sizes) > 1 and tiled.text == contents.text


def test_a_trained_encoder_is_computed_again_too():
    config, tile = preset("llava16_7b"), image_flops(preset("llava16_7b"))[0]
    count = lambda parts, remat, tiles: executed_flops(config, parts, 2, 8192, tiles, remat)
    for parts, passes in (({"decoder"}, 1), ({"decoder", "vision"}, 4)):
        more = count(parts, "full", 15) - count(parts, "full", 0)
        projector = 2 * 15 * image_flops(config)[1]
        assert more == pytest.approx(2 * 15 * passes * tile + projector)


def test_the_roofline_takes_the_largest_term():
    where = Topology("v5p:4x4x4", (None,) * 64, (4, 4, 4), CHIPS["v5p"])
    seconds = {"compute": 0.5, "memory": 0.1, "collectives": 0.2}
    work = {
        "executed": seconds["compute"] * 64 * 459e12,
        "model": 0.3 * 64 * 459e12,
        "traffic": seconds["memory"] * CHIPS["v5p"].hbm_bandwidth,
        "links": seconds["collectives"],
    }
    figures = estimate(where, **work)
    assert figures["seconds"] == pytest.approx(seconds) and figures["bound_by"] == "compute"
    assert figures["mfu"] == pytest.approx(0.6) and figures["mfu_nothing_hidden"] == pytest.approx(
        0.375
    )
    assert estimate(where, **work, kernels=0.4)["mfu_as_compiled"] == pytest.approx(0.6)
    waiting = {"waiting": 0.1, "kernels": 0.5}
    figures = estimate(where, **work, **waiting)
    assert figures["mfu_as_compiled"] == pytest.approx(0.3 / 0.6)
    assert figures["waiting_seconds"] == pytest.approx(0.1) and figures["kernel_seconds"] == 0.5
    two = dataclasses.replace(where, slices=2)
    figures = estimate(two, **work, between=0.75 * CHIPS["v5p"].network)
    assert figures["bound_by"] == "between slices" and figures["mfu"] == pytest.approx(0.4)
    assert figures["waiting_seconds"] == pytest.approx(0.75)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")
def test_7b_fits_a_slice_through_the_tpu_compiler(capsys):
    config = load("llava15_7b_instruct")
    config.accumulation = 2
    assert dry_run.run(config, "v5e:4x4", False) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["bytes"]["needed"] < 14 * GIB and figures["attention"] == "splash"
    assert figures["collective_bytes"] < 1.6 * figures["fsdp"]["least"]
