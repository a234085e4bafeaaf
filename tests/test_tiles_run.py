"""Both stages of a model that cuts pictures into tiles: the first without, the second with them."""

import json
import re
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_jax import Llava, cli
from llava_jax.errors import LlavaError
from llava_jax.weights.export import FORMATS, open_checkpoint, write_folder
from llava_jax.weights.load import load_run
from llava_jax.weights.read.llava_folder import open_llava
from llava_jax.weights.run_directory import checkpoint_of, read_run_model, saved_params
from tests.test_train import assert_same_trees
from tests.tiny_model import random_image
from tests.tiny_run import conversation, instruct
from tests.weights.family_models import family_model, save_family

NEWLINE = ("projector", "newline")
STAGE = {
    "model.image_mode": "anyres",
    "model.tiling.cap": 2,  # pictures of 2 x 2 tiles are shrunk, so tokens mix several features
    "model.remat_policy": "full",
    "trainable": {"vision": 1e-4, "projector": 1e-3, "projector/newline": 1e-2, "decoder": 1e-3},
    "data.validation": "",
    "data.row_length": 400,
    "data.images_per_row": 12,
}
SIZES = ((20, 20), (40, 10), (10, 40), (8, 30), (7, 7), (300, 2))


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> dict:
    """Records of one picture, of two, and of none, whose sizes differ, as config values."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "images").mkdir()
    for i in range(24):
        random_image(i, SIZES[i % 6]).save(folder / "images" / f"{i}.png")
    (folder / "tiles.json").write_text(json.dumps([conversation(i) for i in range(24)]))
    places = {"data.train": folder / "tiles.json", "data.image_root": folder / "images"}
    return {name: str(path) for name, path in places.items()}


@pytest.fixture(scope="module")
def tiled(world, run, aligned, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tiled") / "instruct"
    run(instruct(world, workdir, aligned, STAGE | data))
    return workdir


def flat(workdir) -> dict:
    return flatten_dict(load_run(checkpoint_of(workdir))[1])


def test_every_part_learns_at_its_own_rate(tiled, aligned):
    before, after = flat(aligned), flat(tiled)
    assert after.keys() - before.keys() == {NEWLINE}
    moved = {path: abs(np.asarray(after[path] - before[path])).max() for path in before}
    assert all(moved[path] > 0 for path in moved if path[-1] == "kernel")
    size = lambda part: max(moved[p] for p in moved if p[0] == part and p[-1] == "kernel")
    assert 5 < size("projector") / size("vision") < 20  # Adam's first steps are about the rate
    assert read_run_model(tiled).config.image.tiling.cap == 2


def test_the_newline_is_drawn_and_learns(world, run, aligned, data, tmp_path, capsys):
    rates = STAGE["trainable"] | {"projector/newline": 0.0}
    run(instruct(world, tmp_path / "still", aligned, STAGE | data | {"trainable": rates}))
    report = capsys.readouterr().err
    assert "align/checkpoints/4 has no projector/newline: it is drawn at random" in report
    assert "% of tokens and " in report
    run(instruct(world, tmp_path / "again", aligned, STAGE | data | {"steps": 1}))
    still, first = flat(tmp_path / "still")[NEWLINE], flat(tmp_path / "again")[NEWLINE]
    np.testing.assert_array_equal(still, first)  # warm-up: the rate of the first step is 0
    assert 0.5 < still.std() * 32**0.5 < 1.5


def test_it_resumes_bit_for_bit(world, run, aligned, data, tiled, tmp_path, capsys):
    shutil.copytree(tiled, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/4")
    run(instruct(world, tmp_path / "parts", aligned, STAGE | data))
    report = capsys.readouterr().err
    assert "resuming from step 2" in report and "drawn at random" not in report
    assert_same_trees(*(load_run(checkpoint_of(d))[1] for d in (tmp_path / "parts", tiled)))


def test_a_newline_alone_of_the_projector_may_learn(world, run, aligned, data, tmp_path, capsys):
    rates = {"trainable": {"projector/newline": 1e-2, "decoder": 1e-3}}
    run(instruct(world, tmp_path / "run", aligned, STAGE | data | rates))
    saved = flatten_dict(saved_params(checkpoint_of(tmp_path / "run")))
    assert [path for path in saved if path[0] == "projector"] == [NEWLINE]
    before, after = flat(aligned), flat(tmp_path / "run")
    kept = [path for path in before if path[0] in ("vision", "projector")]
    for path in kept:
        np.testing.assert_array_equal(before[path], after[path])
    assert "drawn at random" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    run(instruct(world, tmp_path / "run", aligned, STAGE | data | rates))
    report = capsys.readouterr().err
    assert "resuming from step 2" in report and "drawn at random" not in report
    assert_same_trees(flat(tmp_path / "run"), after)


def test_a_newline_that_is_drawn_must_learn(world, run, aligned, data, tmp_path):
    rates = {"trainable": {"decoder": 1e-3}}
    with pytest.raises(LlavaError, match="has no projector/newline and config.trainable leaves it"):
        run(instruct(world, tmp_path / "run", aligned, STAGE | data | rates))


@pytest.mark.slow
def test_training_with_fewer_tiles_leaves_the_model_its_own(world, run, aligned, data, tmp_path):
    """Held-out data are measured with the training's tiles, and questions answered with all."""
    few = {"data.max_tiles": 2, "data.images_per_row": 6, "steps": 1}
    few |= {"data.validation": str(world / "data/held_out.json"), "samples": 2}
    run(instruct(world, tmp_path / "run", aligned, STAGE | data | few))
    assert len(read_run_model(tmp_path / "run").config.image.tiling.grids) == 5
    first, held_out = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first["images"] == round(first["real_tile_share"] * 2 * 6)
    assert np.isfinite(held_out["validation_loss"])
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 2
    model = Llava.from_pretrained(tmp_path / "run")
    assert isinstance(model.chat("Hi?", [random_image(0, (20, 20))], max_new_tokens=2), str)


@pytest.mark.parametrize(
    "kind", [pytest.param("llava_next", marks=pytest.mark.slow), "llava_onevision"]
)
def test_a_folder_of_transformers_is_trained_further(kind, run, data, aligned, world, tmp_path):
    """Its own way to cut pictures, newline included, as it stands in the folder."""
    source = save_family(tmp_path / "model", family_model(kind))
    as_it_is = dict.fromkeys(("model.image_mode", "model.image_size", "model.feature_layer"))
    changes = {"model.tiling.cap": None, "data.max_length": 700, "data.row_length": None}
    changes |= {"steps": 2, "optimizer.warmup_ratio": 0.0}
    run(instruct(world, tmp_path / "run", source, STAGE | data | as_it_is | changes))
    config = read_run_model(tmp_path / "run").config
    before = open_llava(source)
    assert config.image == before.config.image and config.image.newline
    start = flatten_dict(before.read("float32"))
    after = flat(tmp_path / "run")
    assert start.keys() == after.keys()
    assert 0 < abs(np.asarray(after[NEWLINE] - start[NEWLINE])).max() < 0.05
    export = FORMATS["hf"](open_checkpoint(tmp_path / "run"), "float32", None)
    write_folder(export, tmp_path / "hf")
    back = open_llava(tmp_path / "hf")  # what was trained leaves as it came, the tower too
    assert back.config.image == config.image
    found = flatten_dict(back.read("float32"))
    for path, leaf in after.items():
        assert np.asarray(found[path])[: len(leaf)].tobytes() == np.asarray(leaf).tobytes(), path


def test_what_hugging_face_s_form_cannot_say_is_not_quantized(tiled, tmp_path, capsys):
    given = ["--checkpoint", str(tiled), "--config", "configs/llava16_7b_instruct.py"]
    assert cli.main(["quantize", *given, "--out", str(tmp_path / "int4")]) == 1
    said = capsys.readouterr().err
    assert "cannot be quantized, for lack of a form to write it in: its tiles have 8" in said
    assert "--format" not in said


@pytest.mark.slow
def test_a_run_is_quantized_on_rows_with_tiles(world, run, aligned, data, tmp_path, capsys):
    tiled, size = tmp_path / "tiled", {"model.image_size": 16, "data.row_length": 900}
    values = instruct(world, tiled, aligned, STAGE | size | data)
    run(values)
    capsys.readouterr()
    recipe, out = tmp_path / "recipe.py", tmp_path / "int4"
    text = "from tests import tiny_run\n\n\ndef get_config():\n"
    recipe.write_text(f"{text}    return tiny_run.recipe({{}}, {values!r})\n")
    given = ["--checkpoint", str(tiled), "--config", str(recipe), "--rows", "4"]
    assert cli.main(["quantize", *given, "--out", str(out)]) == 0
    ours, nearest = map(float, re.findall(r"by ([\d.]+)%", capsys.readouterr().err))
    assert 0 < ours < nearest
    model = Llava.from_pretrained(out, template="v1")
    assert model.config.image.tiling.cap == 2
    assert isinstance(model.chat("What?", random_image(0, (40, 10)), max_tokens=2), str)
