"""train.py from the outside: both stages, kill and resume, what it leaves, what it refuses."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from llava_jax import Llava
from llava_jax.errors import LlavaError
from llava_jax.weights.load import load_run
from llava_jax.weights.read.llava_folder import load_decoder, load_vision
from llava_jax.weights.run_directory import checkpoint_of, latest_step
from tests import tiny_run
from tests.tiny_run import align, instruct, run_script, start_script

COMPONENTS = ("vision", "projector", "decoder")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_trees(a, b) -> None:
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for key in a:
        assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


def saved_paths(step_folder: Path, item: str) -> list[tuple]:
    with ocp.StandardCheckpointer() as reader:
        tree = reader.metadata(step_folder / item).item_metadata.tree
    return [
        tuple(str(key.key if hasattr(key, "key") else key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


LONG = {"steps": 12, "save_every": 3, "validate_every": 5, "accumulation": 2, "samples": 2}


@pytest.fixture(scope="module")
def both_stages(world, tmp_path_factory) -> tuple[Path, Path, str]:
    """The run directories of stage 1 and, LONG, of stage 2 by the script; output of the first."""
    folder = tmp_path_factory.mktemp("stages")
    first, second = folder / "align", folder / "instruct"
    code, out, err = run_script(world, align(world, first))
    assert code == 0, err
    code, _, err = run_script(world, instruct(world, second, first, LONG))
    assert code == 0, err
    return first, second, out


def test_both_stages_from_the_command_line(both_stages):
    first, second, out = both_stages
    assert f"{first}: 4 steps done" in out and "llava-jax chat --checkpoint" in out
    for name in ("config.json", "model.json", "tokenizer/tokenizer.json", "loss.png"):
        assert (second / name).stat().st_size > 0, name
    assert list((second / "tensorboard").iterdir())

    steps = [line for line in read_lines(second / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    wanted = {"loss", "grad_norm", "learning_rate/projector", "learning_rate/decoder", "images"}
    wanted |= {"tokens_per_second", "images_per_second", "real_token_share", "step_seconds"}
    assert wanted | {"data_wait_seconds", "tokens", "supervised_tokens"} <= steps[0].keys()
    assert all(np.isfinite(value) for line in steps for value in line.values())
    held_out = [x["step"] for x in read_lines(second / "metrics.jsonl") if "validation_loss" in x]
    assert held_out == [5, 10, 12]
    samples = read_lines(second / "samples.jsonl")
    assert [(s["step"], s["id"]) for s in samples] == [
        (step, f"talk-{i}") for step in held_out for i in (0, 1)
    ]
    assert {"question", "prediction", "reference"} <= samples[0].keys()
    assert sorted(p.name for p in (second / "checkpoints").iterdir()) == ["12", "9"]
    assert isinstance(Llava.from_pretrained(second).chat("Hi?", max_new_tokens=2), str)


def test_a_finished_run_started_again_does_nothing(world, run, aligned_copy, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("llava_jax.training.recipe.starting_params", refuse)
    before = (aligned_copy / "metrics.jsonl").read_bytes()
    values = align(world, aligned_copy)
    run(values)
    assert (aligned_copy / "metrics.jsonl").read_bytes() == before
    assert "4 steps done" in capsys.readouterr().out


def test_stage_1_changes_and_keeps_the_projector_alone(world, aligned):
    _, params = load_run(checkpoint_of(aligned))
    assert_same_trees(params["decoder"], load_decoder(world / "parts/decoder")[1])
    assert_same_trees(params["vision"], load_vision(world / "parts/vision", 2)[1])
    early = load_run(aligned / "checkpoints/2")[1]["projector"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), early, params["projector"])
    assert all(jax.tree.leaves(changed))
    kept = saved_paths(checkpoint_of(aligned), "params")
    assert {path[0] for path in kept} == {"projector"} and len(kept) == 4
    moments = saved_paths(checkpoint_of(aligned), "opt_state")
    assert sum("projector" in path for path in moments) == 2 * len(kept)
    assert not any({"decoder", "vision"} & set(path) for path in moments)


def kill_at_line(process: subprocess.Popen, log: Path, lines: int, delay: float) -> None:
    """Waits until a log has some lines and for `delay` seconds more, then kills."""
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_killed_and_resumed_is_never_killed(world, both_stages, tmp_path, seed):
    """Killed before or while the first checkpoint is written, and again after it."""
    start, whole, _ = both_stages
    workdir = tmp_path / "killed"
    values = instruct(world, workdir, start, LONG)
    chance = random.Random(seed)
    for lines in (chance.randrange(1, 6), chance.randrange(9, 13)):
        process = start_script(world, values)
        kill_at_line(process, workdir / "metrics.jsonl", lines, chance.uniform(0, 0.05))
    code, _, err = run_script(world, values)
    assert code == 0, err
    assert "resuming from step" in err

    for item in ("metrics.jsonl", "samples.jsonl"):
        timings = ("_per_second", "seconds")
        lines = [
            [{k: v for k, v in x.items() if not k.endswith(timings)} for x in read_lines(d / item)]
            for d in (workdir, whole)
        ]
        assert lines[0] == lines[1]
    for step in ("9", "12"):
        folders = [d / "checkpoints" / step for d in (workdir, whole)]
        for item in ("params", "opt_state"):
            with ocp.StandardCheckpointer() as reader:
                a, b = (jax.tree.leaves(reader.restore(f / item)) for f in folders)
            assert len(a) == len(b) > 10
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_run_in_parts_with_other_free_keys_is_the_whole_run(world, run, aligned, tmp_path):
    """How often a run saves, logs and how it cuts its batches is no part of the recipe."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    no_validation = {"data.validation": "", "save_every": 2}
    run(instruct(world, whole, aligned, no_validation | {"save_every": 4}))
    values = instruct(world, parts, aligned, no_validation)
    run(values)
    shutil.rmtree(parts / "checkpoints/4")
    run(values | {"accumulation": 2, "log_every": 3, "keep": 5, "model.remat_policy": "full"})
    assert latest_step(parts) == 4
    a, b = (flatten_dict(load_run(checkpoint_of(d))[1]) for d in (whole, parts))
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=1e-5, err_msg=str(path))


def edit_records(world: Path, tmp_path: Path, change) -> dict:
    """A copy of align.json that `change` was applied to, as config values."""
    records = json.loads((world / "data/align.json").read_text())
    change(records)
    (tmp_path / "changed.json").write_text(json.dumps(records))
    return {"data.train": str(tmp_path / "changed.json")}


def set_image(name: str):
    return lambda records: records[3].update(image=name)


WRONG = {  # name -> (config values, words of the message)
    "preset": ({"model.preset": "llava-9"}, "unknown preset 'llava-9'.* llava-1.5-7b"),
    "template": ({"model.template": "v9"}, "unknown template 'v9'; known: .*chatml"),
    "projector": ({"model.projector": "mlp0x"}, "unknown projector 'mlp0x': choose linear"),
    "layer": ({"model.feature_layer": 9}, "feature_layer 9 does not exist"),
    "mode": ({"model.image_mode": "stretch"}, "image.?mode .*'stretch'"),
    "size": ({"model.image_size": 3}, "image_size .*3"),
    "no workdir": ({"workdir": ""}, "config.workdir is empty"),
    "no data": ({"data.train": ""}, "config.data.train is empty"),
    "data": ({"data.train": "no/such.json"}, "no data file or data set at no/such.json"),
    "root": ({"data.image_root": "no/such"}, "image root no/such is not a folder"),
    "encoder": ({"init.vision": "no/such"}, "config.init.vision names no/such, which is not"),
    "decoder": ({"init.decoder": ""}, "config.init.decoder is empty"),
    "tokenizer": ({"init.tokenizer": "no/such"}, "config.init.tokenizer names no/such"),
    "checkpoint": ({"init.checkpoint": "configs"}, "configs is no checkpoint: give a run"),
    "mesh": ({"mesh.data": 3}, "mesh data=3, .* does not fit 1 devices"),
    "group": ({"trainable": {"projecter": 1e-3}}, "trainable names projecter, which no parameter"),
    "sub-tree": ({"trainable": {"decoder/layer": 1e-3}}, r"trainable names \['decoder/layer'\]"),
    "steps": ({"epochs": 1}, "set exactly one of config.epochs and config.steps"),
    "long": ({"data.max_length": 3}, "no record can be used"),
    "wandb": ({"wandb_project": "mine"}, "wandb_project is 'mine' but wandb is not installed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_reported_before_the_first_step(name, world, run, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(LlavaError, match=message) as error:
        run(align(world, tmp_path / "run", changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


WRONG_RECORDS = {  # name -> (change of the records, words of the message)
    "no conversations": (
        lambda records: records[2].pop("conversations"),
        r"changed.json: record 2 \(id 'caption-2'\).*conversations",
    ),
    "role": (
        lambda records: records[2]["conversations"][0].update({"from": "robot"}),
        r"changed.json: record 2 \(id 'caption-2'\).*'robot'",
    ),
    "count": (
        lambda records: records[5]["conversations"][0].update(value="<image><image>"),
        r"changed.json: record 5 \(id 'caption-5'\).*2 .*<image>.* 1 image",
    ),
    "missing": (set_image("none.png"), r"record 3 \(id 'caption-3'\).*no image file '.*none.png'"),
    "not an image": (set_image("../align.json"), r"record 3 \(id 'caption-3'\).*align.json"),
    "truncated": (set_image("cut.jpg"), r"record 3 \(id 'caption-3'\).*cut.jpg' is broken"),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_bad_record_is_reported_before_the_first_step(name, world, run, tmp_path):
    change, message = WRONG_RECORDS[name]
    images = tmp_path / "images"
    shutil.copytree(world / "data/images", images)
    (tmp_path / "align.json").write_text("{}")
    tiny_run.write_broken_image(images / "cut.jpg")
    values = edit_records(world, tmp_path, change) | {"data.image_root": str(images)}
    # A cut image is the one fault that only its pixels show; one step's batch holds all records.
    values |= {"batch_size": 4, "steps": 1}
    with pytest.raises(LlavaError, match=message) as error:
        run(align(world, tmp_path / "run", values))
    assert "\n" not in str(error.value)
    assert latest_step(tmp_path / "run") is None


def test_data_without_pictures_teaches_the_projector_nothing(world, run, tmp_path, capsys):
    records = [tiny_run.conversation(i) for i in range(1, 24, 3)]
    assert not any("image" in record for record in records)
    (tmp_path / "text.json").write_text(json.dumps(records))
    values = {"data.train": str(tmp_path / "text.json"), "model.template": "chatml"}
    values |= {"data.max_length": 320, "data.packing": False, "steps": 1}
    message = "no record of .*text.json has a picture, so the projector would learn nothing and"
    with pytest.raises(LlavaError, match=message):
        run(align(world, tmp_path / "run", values))
    assert latest_step(tmp_path / "run") is None
    both = {"trainable": {"projector": 1e-3, "decoder": 1e-3}}
    run(align(world, tmp_path / "run", values | both))
    assert "text.json has a picture: the projector will learn nothing" in capsys.readouterr().err


def test_a_batch_that_the_devices_cannot_share(world, tmp_path):
    """In this process there are eight."""
    train = tiny_run.train_module()
    values = align(world, tmp_path, {"batch_size": 12})
    with pytest.raises(LlavaError, match="12 rows cannot be split over 8 devices .*multiple of 8"):
        train.run(tiny_run.recipe({}, values))


def test_a_work_directory_of_another_recipe(world, run, aligned_copy):
    changes = {"seed": 1, "trainable": {"projector": 2e-3}, "optimizer.b1": 0.8}
    with pytest.raises(LlavaError, match="holds the run of another recipe") as error:
        run(align(world, aligned_copy, changes))
    for words in ("seed: 0 -> 1", "trainable.projector: 0.001 -> 0.002", "optimizer.b1: 0.9 -> 0."):
        assert words in str(error.value)


def test_a_work_directory_of_other_data_under_the_same_name(world, run, tmp_path):
    values = align(world, tmp_path / "run", {"data.train": str(tmp_path / "align.json")})
    shutil.copy(world / "data/align.json", tmp_path)
    run(values | {"steps": 1})
    changed = edit_records(world, tmp_path, lambda records: records[0].update(image="1.png"))
    shutil.copy(changed["data.train"], tmp_path / "align.json")
    with pytest.raises(LlavaError, match="another recipe .*data_fingerprint"):
        run(values | {"steps": 1})


def test_two_runs_in_one_work_directory(world, run, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LlavaError, match=f"another train.py is running in {tmp_path}"):
            run(align(world, tmp_path))


def test_a_work_directory_that_cannot_be_written_is_reported_before_the_data_is_read(
    world, run, tmp_path
):
    (tmp_path / "file").write_text("")
    values = {"data.train": str(tmp_path / "none.json")}
    with pytest.raises(LlavaError, match="workdir .*/file cannot be written: File exists"):
        run(align(world, tmp_path / "file", values))
    with pytest.raises(LlavaError, match="workdir .*/file/run cannot be written: Not a directory"):
        run(align(world, tmp_path / "file/run", values))


def test_a_recipe_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    (tmp_path / "config.json").write_text("garbage")
    with pytest.raises(LlavaError, match="config.json cannot be read as JSON"):
        tiny_run.train_module().claim_workdir(tmp_path, {})


def test_a_loss_that_is_not_finite_stops_the_run(world, run, tmp_path):
    values = align(world, tmp_path / "run", {"trainable": {"projector": 1e30}, "save_every": 1})
    with pytest.raises(LlavaError) as error:
        run(values | {"steps": 8, "optimizer.clip_norm": 0.0})
    message = str(error.value)
    assert "step 3: loss is nan" in message or "step 3: grad_norm is" in message
    assert message.count("caption-") >= 2
    # After step 2 the parameters were huge: what step 1 left is the last known to be sound.
    assert "Last good checkpoint: step 1" in message
    flags = "--config.trainable.projector=5e+29 "
    flags += f"--config.init.checkpoint={tmp_path}/run/checkpoints/1"
    for flag in ("--config.workdir=NEW_FOLDER", *flags.split(), "--config.init.decoder= "):
        assert flag in message
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_bad_images_are_left_out_up_to_a_ceiling(world, run, tmp_path):
    values = edit_records(world, tmp_path, set_image("none.png"))
    values |= {"data.bad_image": "skip", "steps": 1, "data.bad_image_ceiling": 1}
    held_out = {"data.validation": values["data.train"], "validate_every": 1, "samples": 4}
    run(align(world, tmp_path / "run", values | held_out))
    ids = [item["id"] for item in json.loads((tmp_path / "changed.json").read_text())]
    answered = [line["id"] for line in read_lines(tmp_path / "run/samples.jsonl")]
    assert answered == [*ids[:3], ids[4]]
    with pytest.raises(LlavaError, match="bad_image_ceiling=0"):
        run(align(world, tmp_path / "other", values | {"data.bad_image_ceiling": 0}))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.bach_size=3", "unknown config key: .*bach_size"),
        ("--config.data.train=no/such.json", "no data file or data set at no/such.json"),
        ("--config.steps=many", "steps.*many"),
        ("--config=no/such.py", "no config file no/such.py"),
    ],
)
def test_the_script_ends_with_one_sentence_and_no_traceback(argument, message, world, tmp_path):
    code, _, err = run_script(world, align(world, tmp_path / "run"), argument)
    assert code == 1
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("train.py: ")
    assert re.search(message, last), err
