"""Every recipe is a small difference on configs/base.py, and none changes without notice.

After a wanted change: python -m tests.test_configs
"""

import importlib
import json
from pathlib import Path

import pytest

from configs import base
from llava_jax.models.presets import preset
from llava_jax.training.recipe import check_config, flatten

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
