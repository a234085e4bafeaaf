"""What is known of records before the first batch, collected or raised, and its cache."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import measuring
from llava_jax.data.measuring import Findings, ImagePolicy, measure
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError
from llava_jax.models.images import MODES, ImageSpec, Mode, views
from llava_jax.text.templates import get_template
from llava_jax.text.tokenization import SegmentTokenizer

FORMAT = RowFormat(
    get_template("chatml"), ImageSpec(28), tokens_per_tile=4, max_length=128, tiles=1
)
POLICY = ImagePolicy(MAX_PIXELS, skip=False, ceiling=0)


@pytest.fixture
def tokenizer(tokenizers):
    return SegmentTokenizer(tokenizers["smollm"])


def edit(data_set, change) -> None:
    items = json.loads(data_set[0].read_text())
    change(items)
    data_set[0].write_text(json.dumps(items))


def make_bad(data_set) -> None:
    def change(items):
        items[1]["conversations"][0]["value"] = "why " * 300 + "\n<image>"
        items[3]["conversations"][1]["value"] = "long " * 300
        items[6]["conversations"][0]["from"] = "robot"
        items[7]["conversations"].append({"from": "human", "value": "and?"})

    edit(data_set, change)
    root = data_set[1] / "a"
    (root / "2.png").unlink()
    Image.new("L", (13_000, 1)).save(root / "5.png")
    (root / "7.png").write_bytes(b"no image")


class Collected(Findings):
    def __init__(self):
        self.faults, self.records, self.lengths = [], [], {}

    def fault(self, index, error):
        assert f": record {index} (id 'r{index}')" in str(error)
        self.faults.append((index, error.kind))

    def record(self, record):
        self.records.append(record.index)

    def tokens(self, index, length, tiles, reason):
        self.lengths[index] = length, reason


def test_findings_are_all_that_training_would_do(data_set, tokenizer):
    make_bad(data_set)
    found = Collected()
    measured = measure(
        open_records(*data_set), tokenizer, FORMAT, POLICY, progress=False, findings=found
    )
    assert sorted(found.faults) == [
        (2, "missing image"),
        (5, "image too elongated"),
        (6, "unknown role"),
        (7, "last turn unanswered"),
        (7, "not an image"),
    ]
    too_long = "no supervised token is left at max_length=128"
    assert measured.refused == {
        too_long: [1],
        "more images than images_per_row=1": [0, 8, 16],
    }
    assert found.lengths[1][0] > 128 and found.lengths[1][1] == too_long
    assert found.lengths[3][0] > 128 and found.lengths[3][1] is None and measured.cut == 1
    assert measured.lengths[3] == 128 and measured.lengths[1] == 0
    assert not {6, 7} & {*found.lengths, *found.records}


def test_training_raises_each_fault_and_leaves_out_what_was_found(data_set, tokenizers):
    """Each fault is taken away once it was raised: all that were found are, and no other."""
    make_bad(data_set)
    options = {"batch_size": 1, "epochs": 1, "progress": False}
    sound = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "blue"}]
    raised, data = [], None
    while data is None:
        records = open_records(*data_set)
        try:
            data = TrainingData(records, tokenizers["smollm"], FORMAT, **options)
        except LlavaError as error:
            index = int(str(error).split("record ")[1].split()[0])
            raised.append(index)
            items = json.loads(data_set[0].read_text())
            items[index] = {"id": "sound", "conversations": sound}
            data_set[0].write_text(json.dumps(items))
    assert sorted(raised) == [2, 5, 6, 7]
    assert sorted(i for indices in data.refused.values() for i in indices) == [0, 1, 8, 16]
    assert data.records_cut == 1


def test_lengths_of_an_earlier_version_are_measured_anew_and_that_is_said(
    data_set, tokenizer, tmp_path, capsys
):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "lengths-0123456789abcdef0123456789abcdef.npz").write_bytes(b"of another time")
    run = lambda folder: measure(
        open_records(*data_set), tokenizer, FORMAT, POLICY, folder, progress=False
    )
    found, wanted = run(cache), run(None)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    assert "has lengths of an earlier version: they are measured anew" in capsys.readouterr().err
    run(cache)
    assert not capsys.readouterr().err


def test_a_program_on_standard_input_measures_by_itself(data_set, tokenizer, monkeypatch):
    """A process that it spawned could not find the program, and would be waited for."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
    monkeypatch.setattr(measuring, "ProcessPoolExecutor", None)
    run = lambda processes: measure(
        open_records(*data_set), tokenizer, FORMAT, POLICY, None, progress=False,
        processes=processes,
    )  # fmt: skip
    np.testing.assert_array_equal(run(2).lengths, run(1).lengths)


def test_a_mode_by_size_measures_each_picture_and_forgets_changed_ones(
    data_set, tokenizer, tmp_path, monkeypatch
):
    """Tokens of a picture that depend on its size: one for each column up to 40."""
    columns = lambda spec, per_tile, size: np.arange(min(size[0], 40), dtype=np.int32)
    monkeypatch.setitem(MODES, "columns", Mode(views_of_a_row, columns, by_size=True))
    spec = ImageSpec(28, "columns")
    row_format = dataclasses.replace(FORMAT, image=spec, tiles=3, tokens_per_tile=40)
    run = lambda: measure(
        open_records(*data_set), tokenizer, row_format, POLICY, tmp_path, progress=False
    )
    before, again = run(), run()
    np.testing.assert_array_equal(before.lengths, again.lengths)
    assert before.tiles[1] == 2 and before.tiles[0] == 4 and before.tiles[4] == 0
    plain = measure(open_records(*data_set), tokenizer, FORMAT, POLICY, progress=False)
    assert before.lengths[1] == plain.lengths[1] + 31 - 4
    Image.new("RGB", (80, 20)).save(data_set[1] / "a/1.png")
    after = run()
    assert after.tiles[1] == 3 and after.lengths[1] == before.lengths[1] + 40 - 31
    assert (after.lengths == before.lengths).sum() == 23


def views_of_a_row(spec, size):
    """A tile for each 28 pixels of the width."""
    (view,) = views(ImageSpec(spec.size, "resize"), size)
    width = -(-size[0] // spec.size) * spec.size
    return (dataclasses.replace(view, resized=(width, spec.size), cut=(width, spec.size)),)
