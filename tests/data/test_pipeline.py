import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.build import build_data_set
from llava_jax.data.media import load_image, preprocess
from llava_jax.data.pipeline import TrainingData, live_as_long_as_the_run
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template

SPAWN = multiprocessing.get_context("spawn")
SPEC = ImageSpec(28, "pad", (0.5, 0.4, 0.3), (1, 1, 1))
FORMAT = RowFormat(get_template("chatml"), SPEC, tokens_per_tile=4, max_length=128, tiles=4)


@pytest.fixture
def make(data_set, tokenizers):
    def make(records=None, **options):
        options = {
            "batch_size": 4, "epochs": 2, "progress": False,
        } | options  # fmt: skip
        if "template" in options:
            options["template"] = get_template(options["template"])
        fields = {field.name for field in dataclasses.fields(RowFormat)} & options.keys()
        row_format = dataclasses.replace(FORMAT, **{name: options.pop(name) for name in fields})
        records = records if records is not None else open_records(*data_set)
        tokenizer = options.pop("tokenizer", tokenizers["smollm"])
        return TrainingData(records, tokenizer, row_format, **options)

    return make


def equal(a, b):
    assert a.record_ids == b.record_ids and a.skipped == b.skipped
    assert a.arrays.keys() == b.arrays.keys()
    for key in a.arrays:
        assert a.arrays[key].dtype == b.arrays[key].dtype
        np.testing.assert_array_equal(a.arrays[key], b.arrays[key])


def test_batches_hold_the_conversations_and_their_images(make, data_set):
    data = make()
    records = {r.id: r for r in (open_records(*data_set)[i] for i in range(24))}
    seen = []
    for batch in data.batch_iterator():
        arrays = batch.arrays
        assert arrays["input_ids"].shape == (4, 128) and arrays["tiles"].shape == (4, 4, 28, 28, 3)
        ids = iter(batch.record_ids)
        for row in range(4):
            slot = 0
            for segment in range(1, arrays["segment_ids"][row].max() + 1):
                record = records[next(ids)]
                here = arrays["segment_ids"][row] == segment
                tokens = arrays["input_ids"][row][here]
                assert (tokens == -200).sum() == 4 * len(record.images)
                np.testing.assert_array_equal(arrays["position_ids"][row][here], range(here.sum()))
                assert (arrays["labels"][row][here] != -100).any()
                for path in record.images:
                    (pixels,) = preprocess(load_image(path), SPEC)
                    np.testing.assert_array_equal(arrays["tiles"][row, slot], pixels)
                    slot += 1
            assert not arrays["tiles"][row, slot:].any()
            assert (arrays["labels"][row][arrays["segment_ids"][row] == 0] == -100).all()
        seen += batch.record_ids
    total = data.steps * data.batch_size
    assert data.rows_per_epoch <= total < 3 * data.rows_per_epoch
    assert data.records_used == 24 and data.fill > 0.6
    assert set(seen) == set(records)


def test_an_epoch_is_every_record_once(make):
    data = make(epochs=1, batch_size=1)
    ids = [i for batch in data.batch_iterator() for i in batch.record_ids]
    assert sorted(ids) == sorted(f"r{i}" for i in range(24))
    assert ids != sorted(ids)
    assert [i for batch in data.batch_iterator() for i in batch.record_ids] == ids
    other = make(epochs=1, batch_size=1, seed=1)
    assert [i for batch in other.batch_iterator() for i in batch.record_ids] != ids


def test_resuming_at_any_step_gives_the_same_bytes(make):
    whole = list(make(epochs=4).batch_iterator())
    assert len(whole) == make(epochs=4).steps > 4
    for start in range(len(whole) + 1):
        rest = list(make(epochs=4).batch_iterator(start_step=start))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            equal(a, b)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_batches(make, processes):
    data = make()
    parts = [list(data.batch_iterator(1, index, processes)) for index in range(processes)]
    for step, batch in enumerate(data.batch_iterator(1)):
        for key, array in batch.arrays.items():
            joined = np.concatenate([part[step].arrays[key] for part in parts])
            np.testing.assert_array_equal(joined, array)
        assert batch.record_ids == [i for part in parts for i in part[step].record_ids]
    with pytest.raises(LlavaError, match="batch_size=4 cannot be split over 3 processes"):
        data.batch_iterator(0, 0, 3)


def test_worker_processes_give_the_same_batches(make):
    here, there = make(), make(workers=2)
    for a, b in zip(here.batch_iterator(), there.batch_iterator(), strict=True):
        equal(a, b)


def test_steps_run_over_epochs(make):
    data = make(epochs=None, steps=20)
    batches = list(data.batch_iterator())
    assert len(batches) == 20 == data.steps
    rows = make(epochs=9)
    for a, b in zip(batches, rows.batch_iterator(), strict=False):
        equal(a, b)


def test_without_packing_one_conversation_a_row(make):
    data = make(packing=False, epochs=1)
    assert data.rows_per_epoch == 24 and data.steps == 6
    for batch in data.batch_iterator():
        assert (batch.arrays["segment_ids"].max(axis=1) == 1).all()
        assert len(batch.record_ids) == 4


def test_the_last_batch_can_be_filled_up(make):
    data = make(packing=False, epochs=1, batch_size=5, pad_final_batch=True)
    *_, last = data.batch_iterator()
    assert data.steps == 5 and len(last.record_ids) == 4
    assert not last.arrays["segment_ids"][4].any() and (last.arrays["labels"][4] == -100).all()


def test_a_built_data_set_gives_the_same_batches(make, data_set, tmp_path):
    path, root = data_set
    built = build_data_set(path, root, tmp_path / "sets", "shapes", progress=False)
    from_json, from_set = make(), make(open_records(built))
    assert from_json.describe().split(",")[1:] == from_set.describe().split(",")[1:]
    for a, b in zip(from_json.batch_iterator(), from_set.batch_iterator(), strict=True):
        equal(a, b)


def refuse(*_, **__):
    raise AssertionError("measured again")


def test_lengths_are_cached(make, data_set, tmp_path, monkeypatch, tokenizers):
    cache = tmp_path / "cache"
    first = make(cache_dir=cache)
    assert len(list(cache.glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("llava_jax.data.measuring.Gauge.measured", refuse)
        second = make(cache_dir=cache)
        for changed in (
            {"max_length": 100},
            {"template": "v1"},
            {"tokenizer": tokenizers["llama2"]},
        ):
            with pytest.raises(AssertionError):
                make(cache_dir=cache, **changed)
    for a, b in zip(first.batch_iterator(), second.batch_iterator(), strict=True):
        equal(a, b)
    next(cache.glob("*.npz")).write_bytes(b"broken")
    assert make(cache_dir=cache).rows_per_epoch == first.rows_per_epoch
    # Files may go while the cache stays.
    (data_set[1] / "a/5.png").unlink()
    with pytest.raises(LlavaError, match="5.png"):
        make(cache_dir=cache)


def edit(data_set, change):
    path = data_set[0]
    items = json.loads(path.read_text())
    change(items)
    path.write_text(json.dumps(items))


def test_a_faulty_record_is_named_before_training(make, data_set):
    edit(data_set, lambda items: items[7]["conversations"][0].update({"from": "robot"}))
    with pytest.raises(LlavaError, match=r"data.json: record 7 \(id 'r7'\), turn 0: .*'robot'"):
        make()


def test_a_record_the_template_cannot_write_is_named(make):
    with pytest.raises(LlavaError, match=r"data.json: record 0 \(id 'r0'\): .*plain"):
        make(template="plain")


def test_refused_records_are_counted_with_reasons(make, data_set, tmp_path):
    def change(items):
        items[1]["conversations"][0]["value"] = "long " * 300 + "<image>"  # image moves to front
        items[2]["conversations"][0]["value"] = "why " * 300 + "\n<image>"
        items[3]["conversations"][1]["value"] = "long " * 300  # cut, still useful
        items[16]["conversations"][0]["value"] = "a " * 150 + "<image> <image>"

    edit(data_set, change)
    data = make(tiles=1)
    assert data.refused == {
        "no supervised token is left at max_length=128": [1, 2],
        "an image would be cut off at max_length=128": [16],
        "more images than images_per_row=1": [0, 8],
    }
    assert data.records_used == 19
    assert (
        "2 refused: no supervised token is left at max_length=128 (index 1, 2)" in data.describe()
    )
    for _ in range(2):  # measured, then out of the cache
        again = make(tiles=1, cache_dir=tmp_path / "cache")
        assert "(index 0, 8); 1 cut to 128 tokens), " in again.describe()
    ids = {i for batch in data.batch_iterator() for i in batch.record_ids}
    assert "r3" in ids and not ids & {"r0", "r1", "r2", "r8", "r16"}


def test_nothing_left_and_too_little_data(make):
    with pytest.raises(LlavaError, match="no record can be used .*21 refused: an image"):
        make(max_length=5)
    with pytest.raises(LlavaError, match="fewer than batch_size=64"):
        make(batch_size=64)
    with pytest.raises(LlavaError, match="either epochs or steps"):
        make(steps=3)
    with pytest.raises(LlavaError, match="bad_image"):
        make(bad_image="ignore")


BAD_FILES = {
    "not an image": lambda file: file.write_bytes(b"<html></html>"),
    "broken or truncated": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "no image file": lambda file: file.unlink(),
    "limit of 10,000": lambda file: Image.new("RGB", (101, 100)).save(file),
    "too elongated": lambda file: Image.new("L", (9000, 1)).save(file),
}


@pytest.mark.parametrize("words", BAD_FILES)
@pytest.mark.parametrize("built", [False, True])
def test_a_bad_image_is_told_before_the_first_step(make, data_set, tmp_path, words, built):
    BAD_FILES[words](data_set[1] / "a/5.png")
    records = open_records(*data_set)
    if built and words != "no image file":
        records = open_records(build_data_set(*data_set, tmp_path / "s", "s", progress=False))
    with pytest.raises(LlavaError) as caught:
        make(records, max_pixels=10_000)
    for part in (str(records.path), "record 5 (id 'r5')", "a/5.png", words):
        assert part in str(caught.value)
    data = make(records, max_pixels=10_000, bad_image="skip", bad_image_ceiling=1)
    assert data.refused == {"bad image": [5]} and data.records_used == 23
    assert "record 5 (id 'r5'): " in data.bad_images[0] and words in data.bad_images[0]
    assert "1 refused: bad image (index 5)" in data.describe()
    assert all("r5" not in batch.record_ids for batch in data.batch_iterator())
    with pytest.raises(LlavaError, match="1 records have bad images.*ceiling=0.*5.png"):
        make(records, max_pixels=10_000, bad_image="skip")


def test_good_images_are_inspected_once(make, data_set, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    make(cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr("llava_jax.data.media._open", None)  # would be called
        make(cache_dir=cache)
        with pytest.raises(TypeError):
            make(cache_dir=cache, max_pixels=10_000)
    built = build_data_set(*data_set, tmp_path / "sets", "shapes", progress=False)
    make(open_records(built), cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr("llava_jax.data.measuring.Gauge.measured", refuse)
        make(open_records(built), cache_dir=cache)
    (data_set[1] / "a/5.png").write_bytes(b"changed")
    with pytest.raises(LlavaError, match="5.png"):
        make(cache_dir=cache)


def break_in_the_middle(file):
    """Damage that only decoding shows."""
    data = bytearray(file.read_bytes())
    data[60:90] = bytes(30)
    file.write_bytes(data)


def test_workers_outlive_sigterm(make):
    """Slurm sends it to every process of a job, and the run wants to finish its step."""
    batches = make(workers=1, epochs=None, steps=60).batch_iterator()
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    assert sum(1 for _ in batches) == 59


def be_a_worker(pipe):
    live_as_long_as_the_run(0, 1)
    pipe.send("started")
    time.sleep(60)


def be_a_run(pipe):
    worker = SPAWN.Process(target=be_a_worker, args=(pipe,))
    worker.start()
    worker.join()


def test_workers_end_with_a_run_that_is_killed():
    here, there = SPAWN.Pipe()
    run = SPAWN.Process(target=be_a_run, args=(there,))
    run.start()
    there.close()
    assert here.recv() == "started"
    run.kill()
    assert here.poll(20), "the worker lives on"
    with pytest.raises(EOFError):
        here.recv()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_met_in_training_stops_the_run(make, data_set, workers):
    break_in_the_middle(data_set[1] / "a/5.png")
    data = make(workers=workers)
    with pytest.raises(LlavaError, match=r"data.json: record 5 \(id 'r5'\): image 'a/5.png' is br"):
        list(data.batch_iterator())


def test_bad_images_met_in_training_are_skipped_up_to_a_ceiling(make, data_set):
    good = list(make(packing=False, epochs=1).batch_iterator())
    for name in ("a/5.png", "a/8b.png", "a/9.png"):
        break_in_the_middle(data_set[1] / name)
    options = {"bad_image": "skip", "packing": False, "epochs": 1}
    batches = list(make(bad_image_ceiling=3, **options).batch_iterator())
    names = [f"record {i} (id 'r{i}')" for i in (5, 8, 9)]
    assert sorted(i for batch in batches for i in batch.skipped) == names
    for with_bad, without in zip(batches, good, strict=True):
        assert set(with_bad.record_ids) == set(without.record_ids) - {"r5", "r8", "r9"}
        used = with_bad.arrays["segment_ids"].any(axis=1)
        assert (~used).sum() == len(with_bad.skipped)
        assert not with_bad.arrays["tiles"][~used].any()
        np.testing.assert_array_equal(
            with_bad.arrays["input_ids"][used], without.arrays["input_ids"][used]
        )
    with pytest.raises(LlavaError, match="3 conversations were left out.*ceiling=2"):
        list(make(bad_image_ceiling=2, **options).batch_iterator())
    # In a packed row the others stay.
    packed = list(make(bad_image="skip", bad_image_ceiling=3, batch_size=1).batch_iterator())
    assert {i for b in packed for i in b.record_ids} | {"r5", "r8", "r9"} == {
        f"r{i}" for i in range(24)
    }


def test_bad_images_are_counted_by_record_as_ids_may_repeat(make, data_set):
    for name in ("a/5.png", "a/9.png"):
        break_in_the_middle(data_set[1] / name)

    def change(items):
        items[5]["id"] = items[9]["id"] = "same"

    edit(data_set, change)
    data = make(bad_image="skip", bad_image_ceiling=1, epochs=1)
    with pytest.raises(LlavaError, match=r"2 conv.*record 5 \(id 'same'\), record 9 \(id 'same'"):
        list(data.batch_iterator())


def test_text_that_spells_the_placeholder_is_no_picture(make, data_set, tokenizers):
    placeholder = tokenizers["smollm"].convert_tokens_to_ids("<unk>")
    options = {"packing": False, "batch_size": 1, "epochs": 1, "image_token_id": placeholder}
    data = make(**options)
    for batch in data.batch_iterator():
        (record_id,) = batch.record_ids
        features = batch.arrays["feature_ids"][0] >= 0
        assert features.sum() == 4 * len(data.records[int(record_id[1:])].images)
        real = batch.arrays["segment_ids"][0] > 0
        found = (batch.arrays["input_ids"][0] == placeholder) & real
        np.testing.assert_array_equal(found, features)

    def change(items):
        items[5]["conversations"][0]["value"] += " <unk>"

    edit(data_set, change)
    with pytest.raises(LlavaError, match=r"data.json: record 5 \(id 'r5'\): the text holds <unk>"):
        make(**options)
    make(packing=False)  # for another model it is text


def test_keys_that_nothing_reads_are_in_the_data_line(make, data_set):
    def change(items):
        items[5]["foo"], items[6]["foo"], items[6]["source"] = 1, 2, "web"

    assert "ignored" not in make().describe()
    edit(data_set, change)
    assert make().describe().endswith("; ignored keys: foo (2 records)")


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(12, id="to the end", marks=pytest.mark.slow),
        pytest.param(3, id="stopped early"),
    ],
)
def test_workers_leave_no_shared_memory(data_set, tokenizer_folder, steps):
    """Python's resource tracker warns of what is left when the process exits."""
    command = [sys.executable, "-m", "tests.data.workers_script"]
    arguments = [*map(str, data_set), str(tokenizer_folder), str(steps)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "read" in done.stdout, done.stderr
    assert "shared_memory" not in done.stderr
