"""Every recipe is a small difference on configs/base.py, and none changes without notice.

After a wanted change: python -m tests.test_configs
"""

import importlib
import json
from pathlib import Path

import pytest

from configs import base
from llava_jax.models.presets import preset
from llava_jax.training.config_values import check_config, flatten
from llava_jax.training.recipe import model_config, row_format

ROOT = Path(__file__).parent.parent
SNAPSHOTS = ROOT / "tests/configs_snapshot"
NAMES = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if path.name != "__init__.py"
)
RECIPES = [name for name in NAMES if "/" not in name and name != "base"]


def load(name: str) -> dict:
    """The resolved config as nested dicts of plain values."""
    module = importlib.import_module("configs." + name.replace("/", "."))
    return json.loads(module.get_config().to_json_best_effort())


def snapshot(name: str) -> Path:
    return SNAPSHOTS / f"{name.replace('/', '_')}.json"


@pytest.mark.parametrize("name", NAMES)
def test_no_value_changed_without_notice(name):
    path = snapshot(name)
    assert path.exists(), "a new config: run `python -m tests.test_configs` and commit its snapshot"
    old, new = flatten(json.loads(path.read_text())), flatten(load(name))
    changed = {k: (old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)}
    assert not changed, f"wanted? then run `python -m tests.test_configs`: {changed}"


def test_no_snapshot_outlives_its_config():
    assert {path.name for path in SNAPSHOTS.iterdir()} == {snapshot(name).name for name in NAMES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_difference_on_the_base(name):
    common, own = flatten(load("base")), flatten(load(name))
    unknown = {key for key in own.keys() - common.keys() if not key.startswith("trainable.")}
    assert not unknown
    for key in own.keys() & common.keys():
        kinds = {type(own[key]), type(common[key])} - {type(None)}
        assert len(kinds) <= 1 or kinds == {int, float}, key


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_its_own_checks(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    check_config(config)
    assert config.init.checkpoint or (config.init.vision and config.init.decoder)
    if config.model.preset:
        preset(config.model.preset)


# Published recipe -> (rates, conversations an update, epochs, template, picture, projector).
FULL, LORA = {"projector": 2e-5, "decoder": 2e-5}, {"projector": 2e-5, "lora": 2e-4}
PUBLISHED = {
    "llava_v1_7b_align": ({"projector": 2e-3}, 128, 1, "plain", "square", "linear"),
    "llava_v1_7b_instruct": (FULL, 32, 3, "v1", "square", "linear"),
    **{
        f"llava15_{size}_{stage}": values
        for size in ("7b", "13b")
        for stage, values in {
            "align": ({"projector": 1e-3}, 256, 1, "plain", "square", "mlp2x_gelu"),
            "instruct": (FULL, 128, 1, "v1", "pad", "mlp2x_gelu"),
            "instruct_lora": (LORA, 128, 1, "v1", "pad", "mlp2x_gelu"),
        }.items()
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyper_parameters_are_the_published_ones(name):
    """Of arXiv:2304.08485, arXiv:2310.03744 and the scripts that went with them."""
    config = importlib.import_module(f"configs.{name}").get_config()
    model = model_config(config)
    rates, conversations, epochs, template, picture, projector = PUBLISHED[name]
    assert config.trainable.to_dict() == rates
    # A row of stage 1 is full with as many captions as it has room for pictures; how many
    # conversations of stage 2 a row packs is up to the data.
    per_row = config.data.images_per_row if name.endswith("align") else 1
    assert config.batch_size * per_row == conversations
    assert (config.epochs, config.steps, config.model.template) == (epochs, None, template)
    assert (model.image.mode, model.projector, model.feature_layer) == (picture, projector, -2)
    assert model.image.size == (224 if "v1_7b" in name else 336)
    assert not model.keep_class_token and not model.use_im_start_end
    whole = model.decoder.max_position_embeddings >= config.data.max_length
    assert whole and (config.data.max_length == 2048 or name.endswith("align"))
    optimizer = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}
    assert config.optimizer.to_dict().items() >= (optimizer | {"warmup_ratio": 0.03}).items()
    lora = config.lora
    wanted = (128, 256.0, 0.05) if rates is LORA else (0, 16.0, 0.0)
    assert (lora.rank, lora.alpha, lora.dropout) == wanted


def all_parts(rate: float) -> dict:
    """The tower has its own rate; the newline, below projector, that of the language model."""
    return {"vision": 2e-6, "projector": rate, "decoder": rate}


# Recipe of pictures in tiles -> (rates, template, picture, tokens a conversation, tokens and tiles
# a row).
ALIGN = {"projector": 1e-3}
TILED = {
    "llava16_7b_align": (ALIGN, "plain", "square", 640, 640, 1),
    "llava16_13b_align": (ALIGN, "plain", "square", 640, 640, 1),
    "llava16_34b_align": (ALIGN, "plain", "square", 640, 640, 1),
    "llava16_7b_instruct": (all_parts(2e-5), "v1", "anyres", 4096, 8192, 15),
    "llava16_13b_instruct": (all_parts(2e-5), "v1", "anyres", 4096, 8192, 15),
    "llava16_34b_instruct": (all_parts(1e-5), "chatml_direct", "anyres", 4096, 8192, 15),
    **{
        f"onevision_{size}_{stage}": values
        for size in ("0p5b", "7b")
        for stage, values in {
            "align": (ALIGN, "plain", "resize", 896, 896, 1),
            **dict.fromkeys(
                ("mid", "single", "onevision"),
                (all_parts(1e-5), "chatml", "anyres", 16384, 16384, 48),
            ),
        }.items()
    },
}


@pytest.mark.parametrize("name", TILED)
def test_recipes_of_pictures_in_tiles_have_the_published_numbers(name):
    """Of LLaVA-NeXT's scripts/train, the released configs and Open-LLaVA-NeXT."""
    config = importlib.import_module(f"configs.{name}").get_config()
    model = model_config(config)
    rows = row_format(config, model)
    rates, template, picture, most, length, tiles = TILED[name]
    assert config.trainable.to_dict() == rates and config.model.template == template
    assert (config.epochs, config.steps) == (1, None)
    assert (model.image.mode, rows.max_length, rows.length, rows.tiles) == (
        picture, most, length, tiles
    )  # fmt: skip
    assert model.decoder.max_position_embeddings >= most
    optimizer = {"weight_decay": 0.0, "clip_norm": 1.0, "warmup_ratio": 0.03}
    assert config.optimizer.to_dict().items() >= optimizer.items()
    if picture == "anyres":
        largest = rows.layouts([(2304, 2304)])[0]
        assert largest.tiles <= tiles and len(largest) < length and model.image.newline
        assert largest.tiles == (37 if "onevision" in name else 5)
    else:
        assert model.image.tiling is None
    kept = {"align": None, "mid": "align", "single": "mid", "onevision": "single"}
    before = kept.get(name.rpartition("_")[2], "align")
    folder = config.workdir.rpartition("/")[0]
    assert config.init.checkpoint == (f"{folder}/{before}" if before else "")


def test_the_base_has_no_recipe_of_its_own():
    config = base.get_config()
    assert (config.workdir, config.data.train, config.epochs, config.steps) == ("", "", None, None)


def write_snapshots() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for path in SNAPSHOTS.iterdir():
        path.unlink()
    for name in NAMES:
        snapshot(name).write_text(json.dumps(load(name), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_snapshots()
