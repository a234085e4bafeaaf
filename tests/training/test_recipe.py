"""A config made into checked objects: wrong values are reported; what resuming may change."""

import json
import types

import jax
import numpy as np
import pytest

from configs import base
from llava_jax.errors import LlavaError
from llava_jax.models.anyres import NEXT_GRIDS, Tiling
from llava_jax.models.presets import PRESETS
from llava_jax.models.video import VideoSpec
from llava_jax.training import config_values, recipe
from tests import tiny_run
from tests.tiny_model import CONFIG
from tests.tiny_run import ALIGN


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_run.write_parts(folder)
    return folder


def config(parts=None, **changes):
    """A sound recipe with changes; `__` stands for the dot of a key."""
    values = ALIGN | {"workdir": "run", "data.train": "data.json"}
    if parts:
        values |= {"init.vision": str(parts / "vision"), "init.decoder": str(parts / "decoder")}
    return tiny_run.recipe(values, {k.replace("__", "."): v for k, v in changes.items()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"workdir": ""}, "config.workdir is empty: set it in the config or with"),
        ({"data__train": ""}, "config.data.train is empty"),
        ({"workdir": "gs://b/run"}, "config.workdir is gs://b/run: a run lives in a folder"),
        ({"trainable": {}}, "config.trainable is empty"),
        ({"epochs": 1}, "set exactly one of config.epochs and config.steps"),
        ({"steps": None}, "set exactly one of config.epochs and config.steps"),
        ({"batch_size": 0}, "config.batch_size is 0: it must be at least 1"),
        ({"save_every": -1}, "config.save_every is -1"),
        ({"keep": 0}, "config.keep is 0"),
        ({"accumulation": 0}, "config.accumulation is 0: it must be at least 1"),
        ({"steps": 0}, "config.steps is 0: it must be at least 1"),
        ({"steps": None, "epochs": -1}, "config.epochs is -1: it must be at least 1"),
        ({"loss_chunk": 0}, "config.loss_chunk is 0: it must be at least 1"),
        ({"seed": -1}, "config.seed is -1: it must not be negative"),
        ({"data__workers": -1}, "config.data.workers is -1: it must not be negative"),
        ({"data__flip": 1.5}, "config.data.flip is 1.5: it is a share, from 0 to 1"),
        ({"data__flip": -0.1}, "config.data.flip is -0.1: it is a share, from 0 to 1"),
        ({"data__crop": 1.0}, "config.data.crop is 1.0: it is a share, from 0 to less than 1"),
        ({"data__bad_image_ceiling": -1}, "config.data.bad_image_ceiling is -1"),
        ({"optimizer__clip_norm": -1.0}, "config.optimizer.clip_norm is -1.0"),
        ({"optimizer__eps": 0.0}, "config.optimizer.eps is 0.0: it must be greater than 0"),
        ({"optimizer__b2": 1.0}, "config.optimizer.b2 is 1.0: it is a share, from 0 to less"),
        ({"optimizer__warmup_ratio": float("nan")}, "config.optimizer.warmup_ratio is nan"),
        ({"lora__alpha": 0.0}, "config.lora.alpha is 0.0: it must be greater than 0"),
        ({"trainable": {"projector": -1e-3}}, "config.trainable.projector is -0.001: a learning"),
        ({"trainable": {"projector": float("inf")}}, "config.trainable.projector is inf"),
        (
            {"model__remat_policy": "some"},
            "remat_policy is 'some': choose one of none, linear, attention, full",
        ),
        ({"model__dtype": "int8"}, "config.model.dtype is 'int8': choose one of auto, .*mixed"),
        ({"model__template": "v7"}, "unknown template 'v7'"),
        ({"wandb_project": "mine"}, "wandb_project is 'mine' but wandb is not installed"),
    ],
)
def test_each_wrong_value_is_reported(changes, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlavaError, match=message):
        config_values.check_config(config(**changes))


def test_a_sound_recipe_passes():
    config_values.check_config(config())


def test_the_model_is_composed_of_the_two_folders(parts):
    model = recipe.model_config(config(parts))
    assert (model.vision, model.decoder) == (CONFIG.vision, CONFIG.decoder)
    assert (model.image.size, model.image.mode, model.projector) == (8, "square", "mlp2x_gelu")


def test_a_preset_and_what_is_set_beside_it():
    unset = {f"model__{key}": None for key in recipe.MODEL_OVERRIDES}
    model = recipe.model_config(config(model__preset="llava-v1-7b", **unset))
    assert model == PRESETS["llava-v1-7b"]
    model = recipe.model_config(
        config(model__preset="llava-v1-7b", **unset | {"model__image_size": 336})
    )
    assert model.image.size == 336 and model.vision == PRESETS["llava-v1-7b"].vision


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__projector": "mlp"}, "config.model: unknown projector 'mlp'"),
        ({"model__projector": "identity"}, "image features are 16 wide .* model takes 32"),
        ({"model__feature_layer": 4}, "config.model: feature_layer 4 does not exist"),
        ({"model__image_mode": "crop"}, "image_mode is 'crop': choose one of square, pad"),
        ({"model__image_size": 3}, "image_size is 3: a patch alone has 4 pixels"),
        ({"init__vision": ""}, "config.init.vision is empty"),
        ({"init__decoder": "no/such"}, "config.init.decoder names no/such, which is not a folder"),
        ({"init__checkpoint": "no/such"}, "config.init.checkpoint names no/such"),
    ],
)
def test_a_model_that_cannot_be_is_reported(changes, message, parts):
    with pytest.raises(LlavaError, match=message):
        recipe.model_config(config(parts, **changes))


def test_parts_never_start_from_random_numbers_but_the_projector(parts):
    sources = recipe.starting_sources(config(parts))
    assert sources == {"vision": parts / "vision", "decoder": parts / "decoder"}
    with pytest.raises(LlavaError, match="the decoder would start from random numbers"):
        recipe.starting_sources(config(parts, init__decoder="", model__preset="quickstart"))


def test_starting_parameters_are_those_of_the_folders_and_a_seeded_projector(parts):
    model = recipe.model_config(config(parts))
    sources = recipe.starting_sources(config(parts))
    components = {"vision", "projector", "decoder"}
    read = lambda leaf: leaf[(slice(None),) * len(leaf.shape)]  # as a device asks for its part
    one, same, other = (
        jax.tree.map(read, recipe.starting_params(model, None, sources, components, seed))
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    kernel = lambda params: params["projector"]["linear_0"]["kernel"]
    assert (kernel(one) != kernel(other)).any()
    jax.tree.map(np.testing.assert_array_equal, one["decoder"], other["decoder"])
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {np.dtype(np.float32)}


def test_a_frozen_random_projector_is_refused(parts):
    sources = recipe.starting_sources(config(parts))
    with pytest.raises(LlavaError, match="leaves the projector frozen at its random start"):
        recipe.frozen_sources(sources, {"projector": {}, "vision": {}})
    found = recipe.frozen_sources(sources, {"vision": {}})
    assert set(found) == {"vision"} and len(found["vision"].checksum) == 64


def test_the_tokenizer_is_named_or_the_language_models(parts):
    assert recipe.tokenizer_folder(config(parts)) == parts / "decoder"
    named = config(parts, init__tokenizer=str(parts / "vision"))
    assert recipe.tokenizer_folder(named) == parts / "vision"


def as_dict(recipe_config) -> dict:
    return json.loads(recipe_config.to_json_best_effort())


def test_what_resuming_may_change_and_what_it_may_not():
    free = config(
        workdir="moved", accumulation=2, save_every=9, keep=7, log_every=3, loss_chunk=5,
        mesh__tensor=2, data__workers=3, model__remat_policy="full", wandb_project="mine",
    )  # fmt: skip
    assert config_values.differences(as_dict(config()), as_dict(free)) == []
    other = config(seed=3, steps=9, data__max_length=5, optimizer__b1=0.5, model__dtype="bfloat16")
    assert config_values.differences(as_dict(config()), as_dict(other)) == [
        "data.max_length: 64 -> 5",
        "model.dtype: 'float32' -> 'bfloat16'",
        "optimizer.b1: 0.9 -> 0.5",
        "seed: 0 -> 3",
        "steps: 4 -> 9",
    ]


def test_keys_that_came_or_went_are_differences():
    groups = config(trainable={"projector": 1e-3, "decoder": 1e-4})
    assert config_values.differences(as_dict(config()), as_dict(groups)) == [
        "trainable.decoder: None -> 0.0001"
    ]
    assert config_values.differences({"a": {"b": 1}}, {}) == ["a.b: 1 -> None"]


ANYRES = {"model__image_mode": "anyres"}


def test_any_model_may_cut_pictures_into_tiles(parts):
    tiling = recipe.model_config(config(parts, **ANYRES)).image.tiling
    assert tiling == Tiling()
    changes = {"grids": "1x1..2x2", "cap": 2, "one_view": True}
    changes = {f"model__tiling__{name}": value for name, value in changes.items()}
    image = recipe.model_config(config(parts, **ANYRES, **changes)).image
    assert image.tiling == Tiling(((1, 1), (1, 2), (2, 1), (2, 2)), cap=2, one_view=True)
    assert (image.taps, image.newline) == (4, True)
    listed = config(parts, **ANYRES, model__tiling__grids="2x1, 1x2 3x1")
    assert recipe.model_config(listed).image.tiling.grids == ((2, 1), (1, 2), (3, 1))


def test_a_stage_without_tiles_has_no_newline(parts):
    image = recipe.model_config(config(parts, model__image_mode="pad")).image
    assert image.tiling is None and not image.newline


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__tiling__cap": 2}, "config.model.tiling.cap is set, but image_mode is 'square'"),
        (ANYRES | {"model__tiling__grids": "2"}, "model.tiling.grids is '2': give columns x rows"),
        (ANYRES | {"model__tiling__grids": "2x2..1x1"}, "tiling.grids is empty"),
        (ANYRES | {"model__tiling__merge": "sum"}, "tiling.merge is 'sum': choose one of spatial"),
        (ANYRES | {"model__tiling__cap": -1}, "tiling.cap is -1: give a number of tiles"),
    ],
)
def test_each_wrong_tiling_is_reported(parts, changes, message):
    with pytest.raises(LlavaError, match=message):
        recipe.model_config(config(parts, **changes))


def test_labels_may_be_the_original_ones(parts):
    chat = config(parts, model__template="chatml", data__labels="original")
    template = recipe.row_format(chat, recipe.model_config(chat)).template
    assert template.learnt_tokens and template.supervise_gpt_role
    wrong = config(parts, data__labels="originals")
    with pytest.raises(LlavaError, match="data.labels is 'originals': choose one of None, orig"):
        config_values.check_config(wrong)


def test_training_may_use_fewer_tiles_than_the_model(parts):
    few = config(parts, **ANYRES, data__max_tiles=2)
    model = recipe.model_config(few)
    rows = recipe.row_format(few, model)
    assert model.image.tiling.grids == NEXT_GRIDS
    assert rows.image.tiling.grids == ((1, 2), (2, 1))
    assert rows.layouts([(100, 100)])[0].tiles == 3 and model.layouts([(100, 100)])[0].tiles == 5
    for changes, message in (
        (ANYRES | {"data__max_tiles": 1}, "data.max_tiles is 1: the smallest .* has 2 tiles"),
        ({"data__max_tiles": 4}, "data.max_tiles is 4, but image_mode is 'square'"),
    ):
        wrong = config(parts, **changes)
        with pytest.raises(LlavaError, match=message):
            recipe.row_format(wrong, recipe.model_config(wrong))


def test_any_model_may_take_videos(parts):
    assert recipe.model_config(config(parts)).image.video is None
    given = {"model__video__newline": "grid", "model__video__time_instruction": True}
    video = recipe.model_config(config(parts, **given, model__video__frames=64)).image.video
    assert video == VideoSpec(newline="grid", frames=64, time_instruction=True)


def test_training_may_sample_other_frames_than_the_model_is_asked_with(parts):
    given = config(parts, model__video__frames=32, data__video_frames=0, data__video_fps=1.0)
    model = recipe.model_config(given)
    video = recipe.row_format(given, model).image.video
    assert (video.frames, video.fps, model.image.video.frames) == (0, 1.0, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__video_fps": 1.0}, "config.data.video_fps is set, but the model takes no videos"),
        ({"model__video__pool": "max"}, "config.model.video: the pool of videos is 'max'"),
        ({"model__video__mode": "anyres"}, "config.model.video: the mode of videos is 'anyres'"),
        (
            {"model__video__pool": "average", "data__video_frames": 0},
            "config.data.video_frames and video_fps: videos are sampled by 0 frames and 0.0",
        ),
    ],
)
def test_each_wrong_video_is_reported(parts, changes, message):
    with pytest.raises(LlavaError, match=message):
        given = config(parts, **changes)
        recipe.row_format(given, recipe.model_config(given))


def test_options_that_have_come_since_had_their_defaults():
    """So a run of an earlier version is continued; what is free has no default."""
    new = as_dict(config())
    old = as_dict(config())
    del old["data"]["box_convention"], old["trainable"]
    before = config_values.with_later_options(old, as_dict(base.get_config()), base.FREE)
    (only,) = config_values.differences(before, new)
    assert only.startswith("trainable.projector: None -> ")
    new["data"]["box_convention"] = "pixel"
    assert "data.box_convention: 'llava' -> 'pixel'" in config_values.differences(before, new)


@pytest.mark.parametrize(
    ("changes", "attention", "refused"),
    [
        ({}, "cudnn", ""),
        ({"data.max_length": 63}, "xla", "cudnn: a row's length must be even"),
        ({"model.attention": "xla", "data.max_length": 63}, "xla", ""),
    ],
)
def test_attention_on_a_gpu_is_its_kernel_or_says_why_not(parts, changes, attention, refused):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    mesh = types.SimpleNamespace(devices=np.array([gpu]), shape={"tensor": 2})
    wanted = config(parts, **{"model.dtype": "bfloat16", "data.max_length": 64} | changes)
    model, why = recipe.training_model(wanted, recipe.model_config(wanted), mesh)
    assert (model.attention, why) == (attention, refused)
    changes = {"model.attention": "cudnn", "data.max_length": 63}
    with pytest.raises(LlavaError, match="config.model.attention: cudnn .* even; choose auto"):
        wanted = config(parts, **{"model.dtype": "bfloat16"} | changes)
        recipe.training_model(wanted, recipe.model_config(wanted), mesh)
