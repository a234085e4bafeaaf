"""What the encoder sees of pictures is stored once, whole, and is what a step would compute."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax.data import features as stored
from llava_jax.data.features import FeatureStore, FeatureWriter
from llava_jax.data.sources import Seen
from llava_jax.errors import LlavaError
from llava_jax.models.llava import LlavaModel
from llava_jax.training import features, flops
from llava_jax.training.recipe import starting_sources
from llava_jax.training.stage import Stage
from tests import tiny_run
from tests.tiny_model import byte_tokenizer, random_image
from tests.videos import frame

ANYRES = {"model.image_mode": "anyres", "data.images_per_row": 12, "data.row_length": 500}
VIDEO = {
    "model.image_mode": "resize",
    "model.video.newline": "frame",
    "model.video.frames": 3,
    "model.video.time_instruction": True,
    "data.images_per_row": 9,
    "data.max_length": 512,
}
NEWLINE = {"trainable": {"projector": 1e-3, "projector/newline": 1e-3, "decoder": 1e-3}}
MODES = {
    "square": {},
    "pad": {"model.image_mode": "pad"},
    "resize": {"model.image_mode": "resize", "data.packing": False},
    "anyres": ANYRES | NEWLINE,
    "shrunk": ANYRES | NEWLINE | {"model.tiling.cap": 2},
    "one view": ANYRES | NEWLINE | {"model.tiling.one_view": True},
    "video": VIDEO | NEWLINE,
    "video pooled in the encoder": VIDEO
    | NEWLINE
    | {"model.video.pool": "average_before_projector"},
    "independent turns": {"data.turns": "independent", "accumulation": 2},
}
SIZES = ((20, 20), (40, 10), (10, 40), (8, 30))


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """Records of one picture, of two, of a video and of none; pictures of several sizes."""
    folder = tmp_path_factory.mktemp("talks")
    records = [tiny_run.conversation(i) for i in range(12)]
    for i in range(12):
        random_image(i, SIZES[i % 4]).save(folder / f"{i}.png")
        (folder / f"clip{i}").mkdir()
        for number in range(1 + i % 4):
            frame(number, (12, 9)).save(folder / f"clip{i}/{number}.png")
    (folder / "talks.json").write_text(json.dumps(records))
    for record in records[1::3]:  # those without a picture
        record["video"] = f"clip{record['id'].split('-')[1]}"
        record["conversations"][0]["value"] = "<image>\nWhat happens?"
    (folder / "videos.json").write_text(json.dumps(records))
    return folder


def values_of(world, talks, folder, changes) -> dict:
    """A recipe on the talks, with a store in folder/features."""
    name = "videos" if "model.video.frames" in changes else "talks"
    places = {
        "data.train": str(talks / f"{name}.json"),
        "data.image_root": str(talks),
        "features.folder": str(folder / "features"),
        "epochs": 1,
        "steps": None,
    }
    return tiny_run.align(world, folder / "run", tiny_run.INSTRUCT | places | changes)


class Run:
    """A stage, its data and its frozen parameters."""

    def __init__(self, values: dict, devices: int = 1):
        self.stage = Stage.of(tiny_run.recipe({}, values), jax.devices()[:devices])
        self.data = self.stage.training_data(byte_tokenizer(), progress=False, cache_dir=None)
        optimizer = self.stage.optimizer(lambda step: 1.0)
        sources = starting_sources(self.stage.config)
        self.state, self.frozen = self.stage.starting_state(sources, optimizer)

    def batches(self) -> list[dict]:
        return [batch.arrays for batch in self.data.batch_iterator()]

    def store(self) -> None:
        with self.stage.scope():
            features.train_from_features(self.stage, self.frozen, [self.data])


@pytest.fixture
def stored_run(world, talks, tmp_path):
    """The run of a mode with its features stored, on copies of the pictures."""
    shutil.copytree(talks, tmp_path / "talks")

    def make(changes: dict | None = None) -> Run:
        run = Run(values_of(world, tmp_path / "talks", tmp_path, changes or {}))
        run.store()
        return run

    return make


def files(folder: Path, suffix: str = ".features") -> list[Path]:
    return sorted(folder.glob(f"features/*/*{suffix}"))


@pytest.mark.parametrize("mode", MODES)
def test_rows_hold_what_the_step_would_compute(mode, world, talks, tmp_path):
    run = Run(values_of(world, talks, tmp_path, MODES[mode]))
    before = run.batches()
    run.store()
    after, spec = run.batches(), run.stage.batch_spec()
    assert len(before) == len(after) >= 1
    see = jax.jit(
        lambda vision, tiles: run.stage.model.apply(
            {"params": {"vision": vision}}, tiles, method=LlavaModel.see
        )
    )
    shown = 0
    for pixels, found in zip(before, after, strict=True):
        tiles, seen = pixels.pop("tiles"), found.pop("seen")
        assert pixels.keys() == found.keys() == spec.keys() - {"seen"}
        for name, array in pixels.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert (seen.shape, seen.dtype) == (spec["seen"].shape, spec["seen"].dtype)
        parts = run.stage.microbatches
        for part in range(parts):  # strided, as the step cuts a batch
            some = tiles[part::parts]
            with run.stage.scope():
                flat = some.reshape(-1, *tiles.shape[2:])
                wanted = np.asarray(see(run.frozen["vision"], flat))
            wanted = wanted.reshape(*some.shape[:2], *wanted.shape[1:])
            used = some.any(axis=(2, 3, 4))
            np.testing.assert_array_equal(seen[part::parts][used], wanted[used])
            assert not seen[part::parts][~used].any()
            shown += used.sum()
    assert shown > 8


def test_what_is_stored_is_not_encoded_again(stored_run, tmp_path, capsys):
    stored_run()
    first = files(tmp_path)
    out = capsys.readouterr().err
    assert len(first) == 1 and "8 pictures (8 tiles) takes 0.00 MB" in out
    stored_run({"seed": 1})
    assert files(tmp_path) == first and "takes" not in capsys.readouterr().err


def test_a_changed_picture_is_another(stored_run, tmp_path):
    before = stored_run()
    random_image(99, SIZES[0]).save(tmp_path / "talks/0.png")  # that of many records
    with pytest.raises(LlavaError, match="0.png' is not the picture that was stored at the start"):
        before.batches()
    after = stored_run()
    assert len(files(tmp_path)) == 2
    assert after.batches()
    indices = [json.loads(path.with_suffix(".json").read_text()) for path in files(tmp_path)]
    assert sorted(len(index["pictures"]) for index in indices) == [1, 8]


@pytest.mark.parametrize(
    "changes",
    [{"model.image_mode": "pad"}, {"model.feature_layer": -1}, {"model.dtype": "bfloat16"}],
)
def test_another_model_has_a_folder_of_its_own(changes, stored_run, tmp_path):
    stored_run()
    run = stored_run(changes)
    assert len({path.parent for path in files(tmp_path)}) == 2
    assert run.batches()[0]["seen"].dtype == run.stage.model.dtype


def test_other_weights_have_a_folder_of_their_own(world, stored_run, tmp_path):
    stored_run()
    tiny_run.write_parts(tmp_path / "parts", seed=1)
    stored_run({"init.vision": str(tmp_path / "parts/vision")})
    assert len({path.parent for path in files(tmp_path)}) == 2


def test_only_pictures_that_the_steps_use_are_encoded(stored_run, tmp_path):
    run = stored_run({"epochs": None, "steps": 1})
    (index,) = files(tmp_path, ".json")
    used = json.loads(index.read_text())["pictures"]
    assert 0 < len(used) < 8 and len(run.batches()) == 1


def test_a_kept_file_that_is_damaged_is_reported(stored_run, tmp_path, capsys):
    run = stored_run()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run.store()
    with pytest.raises(LlavaError, match=f"{path} is damaged: delete it and start again"):
        run.batches()
    path.write_bytes(data[:-1])
    run.store()
    assert f"{path} is damaged: its pictures are encoded anew" in capsys.readouterr().err
    assert run.batches() and len(files(tmp_path)) == 2
    path.unlink()
    run.store()
    assert run.batches() and len(files(tmp_path)) == 1


def test_the_room_is_checked_before_anything_is_encoded(stored_run, tmp_path, monkeypatch):
    message = "of 8 pictures .* takes 0.00 MB and .* holds 0.00 MB: more than config.features.giga"
    with pytest.raises(LlavaError, match=message):
        stored_run({"features.gigabytes": 1e-6})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage(9, 0, 9))
    with pytest.raises(LlavaError, match="has 0.00 MB free: make room"):
        stored_run()
    assert not files(tmp_path)


def test_a_disk_without_room_leaves_what_is_whole(stored_run, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            if len(files(tmp_path)) == 3:
                self._file.write(data[:5])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

    @contextlib.contextmanager
    def whole_file(path):
        with real(path) as file:
            yield Full(file)

    real = stored.whole_file
    monkeypatch.setattr(stored, "FILE_BYTES", 1)  # a file for each picture
    monkeypatch.setattr(stored, "whole_file", whole_file)
    with pytest.raises(LlavaError, match="features cannot be written: No space left on device"):
        stored_run()
    assert len(files(tmp_path)) == len(files(tmp_path, ".json")) == 3
    assert not files(tmp_path, ".partial")
    monkeypatch.undo()
    assert stored_run().batches() and len(files(tmp_path)) == 4


def test_a_bad_picture_is_an_error_or_left_out(world, talks, stored_run, tmp_path):
    tiny_run.write_broken_image(tmp_path / "talks/3.png")
    with pytest.raises(LlavaError, match="talk-3.*broken or truncated"):
        stored_run()
    path = tmp_path / "talks/3.png"
    random_image(3, SIZES[3]).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255  # which shows when it is decoded
    path.write_bytes(data)
    with pytest.raises(LlavaError, match="talk-3.*broken or truncated"):
        stored_run()
    run = stored_run({"data.bad_image": "skip", "data.bad_image_ceiling": 1})
    batches = list(run.data.batch_iterator())
    assert [name for batch in batches for name in batch.skipped] == ["record 3 (id 'talk-3')"]


def test_what_was_half_written_long_ago_is_removed(stored_run, tmp_path):
    stored_run()
    (path,) = files(tmp_path)
    old, new = (path.with_name(f"{name}.features.1.partial") for name in ("old", "new"))
    for partial in (old, new):
        partial.write_bytes(b"1")
    os.utime(old, (0, 0))
    stored_run()
    assert new.exists() and not old.exists()


def test_many_write_at_once(tmp_path):
    """Each its own pictures and some of all."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 2, 3, 5)).astype(np.float32)
    make = lambda: FeatureStore(tmp_path, {"a": 1}, (3, 5), np.float32)

    def write(number: int) -> None:
        store = make()
        store.create()
        with FeatureWriter(store, 4) as writer:
            for i in [*range(5 * number, 5 * number + 5), 7]:
                writer.add(f"key{i}", Seen((8, 9)), rows[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(3)))
        list(pool.map(write, [3]))
    store = make()
    assert store.refresh() == [] and store.refresh() == []
    for i in range(20):
        kept = store.get(f"key{i}")
        assert (kept.tiles, kept.seen, kept.together) == (2, Seen((8, 9)), 4)
    assert store.get("key20") is None and store.taken() > rows.nbytes


def test_what_other_steps_have_encoded_is_used_and_reported(stored_run, tmp_path, capsys):
    stored_run()
    run = stored_run({"data.images_per_row": 5})
    assert len(files(tmp_path)) == 1 and run.batches()
    report = capsys.readouterr().err
    assert "8 of 8 pictures were not encoded 10 tiles at once" in report


REFUSED = {
    "vision trains": ({"trainable": {"vision": 1e-4}}, r"trainable \(vision\) changes the vision"),
    "vision is adapted": (
        {"trainable": {"lora": 1e-3}, "lora.rank": 2, "lora.targets": ("vision/layers/*",)},
        r"trainable \(lora\) changes the vision",
    ),
    "flip": ({"data.flip": 0.5}, "config.data.flip changes pictures anew in every step"),
    "crop": ({"data.crop": 0.1}, "config.data.crop changes pictures anew in every step"),
    "no room": ({"features.gigabytes": -1.0}, "config.features.gigabytes is -1.0: it must not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_a_store_is_refused(name, world, talks, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises(LlavaError, match=message):
        values = values_of(world, talks, tmp_path, changes)
        Stage.of(tiny_run.recipe({}, values), jax.devices()[:1])


def test_a_folder_that_cannot_be_written_is_named(stored_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LlavaError, match="folder .*file/x cannot be written: Not a directory"):
        stored_run({"features.folder": str(tmp_path / "file/x")})


def test_a_step_is_without_the_encoder(stored_run):
    run = stored_run()
    frozen = run.stage.of_steps(run.frozen)
    assert "vision" in run.frozen and "vision" not in frozen
    optimizer = run.stage.optimizer(lambda step: 1.0)
    batch = run.stage.put(run.batches()[0])
    with run.stage.scope():
        step = run.stage.compile_step(optimizer, run.state, frozen, batch)
    assert "vision" not in step.as_text()
    counts = {"tokens": 9, "attention_pairs": 9, "images": 2, "supervised_tokens": 3}
    config = run.stage.model.config
    whole, less = (flops.step_flops(config, {"projector"}, counts, encodes=e) for e in (1, 0))
    assert whole - less == 2 * flops.image_flops(config)[0]


def test_a_store_goes_to_another_process(stored_run):
    import pickle

    run = stored_run()
    builder = pickle.loads(pickle.dumps(run.data._row_builder))
    row = builder(np.array([0]))[0]
    np.testing.assert_array_equal(row["seen"], run.data._row_builder(np.array([0]))[0]["seen"])
    assert dataclasses.replace(builder.row_format, seen=None) == run.stage.row_format
