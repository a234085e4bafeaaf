"""train.py's and eval.py's command lines: what ml_collections takes without a word is refused."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from configs.eval import base as eval_base
from llava_jax.command import check_config
from llava_jax.errors import LlavaError

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")
TASKS = sorted(path.stem for path in (ROOT / "configs/eval").glob("*.py") if path.stem != "base")
PARSE = """
from ml_collections import config_flags
from configs import base
from llava_jax import command
C = config_flags.DEFINE_config_file("config", None, "", lock_config=True)
command.run(lambda: print(command.check_config(C.value, base), C.value.{key}), base=base)
"""


def parse(*flags: str, key: str = "seed") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script that prints a key of its checked config."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE.format(key=key), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_the_keys_and_kinds_of_the_base(name):
    check_config(importlib.import_module(f"configs.{name}").get_config(), base)


@pytest.mark.parametrize("name", TASKS)
def test_every_benchmark_has_the_keys_and_kinds_of_the_base(name):
    check_config(importlib.import_module(f"configs.eval.{name}").get_config(), eval_base)


def replace(section: str, values: dict):
    """A change that puts a section in place of another, as a flag of a section does."""

    def change(config: ConfigDict) -> None:
        config[section] = ConfigDict(values)

    return change


def put(section: str, key: str, value):
    """A change of one value that no type is checked of, as within a section that was replaced."""

    def change(config: ConfigDict) -> None:
        if section:
            config[section] = ConfigDict(config[section].to_dict() | {key: value})
        else:
            del config[key]
            config[key] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (replace("optimizer", {"b1": 0.8}), "config.optimizer has no b2, clip_norm, .*replaced as a"
         " whole.*--config.optimizer.b1=0.8"),
        (replace("data", {"train": "x"}), "config.data has no bad_image, .*--config.data.train=x"),
        (replace("mesh", {"data": 2, "fdsp": -1, "tensor": 1}), "fdsp, did you mean mesh.fsdp"),
        (put("optimizer", "beta1", 0.9), "optimizer.beta1"),
        (put("trainable", "projector", "1e-3"), "trainable.projector is the text '1e-3': give"),
        (put("trainable", "projector", True), "config.trainable.projector is True: give a number"),
        (put("trainable", "projector", None), "config.trainable.projector is None: give a number"),
        (put("trainable", "projector", float("nan")), "trainable.projector is nan: give a finite"),
        (put("optimizer", "eps", float("inf")), "config.optimizer.eps is inf: give a finite"),
        (put("optimizer", "b1", "0.9"), "config.optimizer.b1 is the text '0.9': give a number"),
        (put("data", "max_length", 2048.0), "data.max_length is 2048.0: give a whole number"),
        (put("data", "packing", 1), "config.data.packing is 1: give True or False"),
        (put("data", "train", None), "config.data.train is None: give text"),
        (put("data", "train_split", 3), "config.data.train_split is 3: give text"),
        (put("model", "image_size", "336"), "model.image_size is the text '336': give a whole num"),
        (put("", "mesh", 4), "config.mesh is 4: it is a section of keys"),
        (put("lora", "targets", 3), r"config.lora.targets is 3: give names, as in --config.l"),
        (put("lora", "targets", (3,)), r"config.lora.targets is \(3,\): give names"),
        (put("lora", "targets", ("",)), r"config.lora.targets is \('',\): give names"),
        (put("lora", "targets", ("a,b",)), r"the one name 'a,b': give .*targets=\"\('a', 'b'\)\""),
        (put("lora", "targets", "decoder/*"), "config.lora.targets is 'decoder/.': give names"),
    ],
)  # fmt: skip
def test_keys_and_kinds_that_the_base_does_not_have(change, message):
    config = base.get_config()
    change(config)
    with pytest.raises(LlavaError, match=message) as error:
        check_config(config, base)
    assert "\n" not in str(error.value)


def test_what_the_base_leaves_open_is_free():
    config = base.get_config()
    config.trainable = ConfigDict({"lora/decoder": 1, "vision/layers": 2e-6})
    config.steps, config.model.projector = 3, "linear"
    config.optimizer = ConfigDict(config.optimizer.to_dict() | {"b1": 0})
    check_config(config, base)
    config = eval_base.get_config()
    config.options = ConfigDict({"split": "test", "limit": 3, "names": ("a",)})
    check_config(config, eval_base)


RECIPE = "--config=configs/llava15_7b_align.py"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --config=configs/NAME.py, with NAME one of easy_vqa_align, .*llava_v1_7b_instr"),
        (
            [RECIPE, "--config.bach_size=3"],
            "config key: bach_size, did you mean batch_size",
        ),
        ([RECIPE, "--config.decoder=x"], "config key: decoder, did you mean init.decoder"),
        ([RECIPE, "--config.optimizer.b3=1"], "config key: optimizer.b3, did you mean optimizer.b"),
        ([RECIPE, "--config.seed.x=1"], "unknown config key: seed.x"),
        (
            [RECIPE, "--config.trainable.lora=1e-4"],
            "recipe's config.trainable has no lora: give",
        ),
        ([RECIPE, "--config.optimizer={'b1':0.8}"], "config.optimizer has no b2"),
        ([RECIPE, "--config.optimizer=3"], "'3' as a ConfigDict"),
        ([RECIPE, "--config.lora.targets=a,b"], "holds the one name 'a,b'"),
        ([RECIPE, "--config.batch_size=None"], "config.batch_size=None"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(flags, message):
    code, _, err = parse(*flags)
    assert code == 1 and "Traceback" not in err
    assert re.search(message, err.strip().splitlines()[-1]), err


def test_none_is_a_value_of_every_open_key():
    assert parse(RECIPE, "--config.epochs=None", key="epochs")[1] == "None None\n"
    assert parse(RECIPE, "--config.model.projector=None", key="model.projector")[1] == "None None\n"
