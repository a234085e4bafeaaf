"""Chunks of records are measured by any number of processes, once, whatever happens in between."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from llava_jax.data import chunks
from llava_jax.data.measuring import Gauge, ImagePolicy, measure
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.records import open_records
from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from llava_jax.text.tokenization import SegmentTokenizer
from tests.data import same_records as same
from tests.data.conftest import record
from tests.tiny_model import byte_tokenizer

FORMAT = RowFormat(get_template("chatml"), ImageSpec(28), 4, max_length=160, tiles=1)
POLICY = ImagePolicy(MAX_PIXELS, skip=False, ceiling=0)
SKIP = ImagePolicy(MAX_PIXELS, skip=True, ceiling=9)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of five records: the 24 of `data_set` are five of them."""
    monkeypatch.setattr(chunks, "SIZE", 5)


@pytest.fixture
def run(tmp_path):
    """run(records, ...) -> (what was measured, numbers of the chunks that were, in their order)."""

    def run(records, policy=POLICY, cache="cache", processes=1, host=(0, 1)):
        tokenizer, looked, measured = SegmentTokenizer(byte_tokenizer()), [], Gauge.measured
        with pytest.MonkeyPatch.context() as patch:
            note = lambda self, chunk, *rest: (
                looked.append(chunk.start // 5) or measured(self, chunk, *rest)
            )
            patch.setattr(Gauge, "measured", note)
            folder = cache and tmp_path / cache
            found = measure(
                records, tokenizer, FORMAT, policy, folder, 2, False, None, host, processes
            )
        return found, looked

    return run


def assert_same(one, other):
    for name in ("lengths", "full", "tiles"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert one.refused == other.refused and one.cut == other.cut
    assert one.bad_images == other.bad_images


def edit(path: Path, change) -> None:
    items = json.loads(path.read_text())
    change(items)
    path.write_text(json.dumps(items))


def test_any_number_of_processes_finds_the_same(data_set, run):
    path, root = data_set

    def change(items):
        items[1]["conversations"][0]["value"] = "why " * 60 + "\n<image>"
        items[3]["conversations"][1]["value"] = "long " * 60
        items[17]["conversations"][1]["value"] = "long " * 60

    edit(path, change)
    (root / "a/7.png").write_bytes(b"no image")
    (root / "a/22.png").unlink()
    alone, several = open_records(path, root), open_records(path, root)
    wanted, looked = run(alone, SKIP, None)
    assert looked == [0, 1, 2, 3, 4] and wanted.refused["bad image"] == [7, 22] and wanted.cut == 2
    found, looked = run(several, SKIP, "cache", processes=2)
    assert not looked  # here
    assert_same(found, wanted)
    assert several.forms() == alone.forms() and several.ignored_keys() == alone.ignored_keys()
    again, looked = run(open_records(path, root), SKIP)
    assert looked == [1, 4]  # those with bad pictures
    assert_same(again, wanted)
    for processes in (1, 2):
        with pytest.raises(LlavaError, match=r"record 7 \(id 'r7'\): 'a/7.png' is not an image"):
            run(open_records(path, root), POLICY, "other", processes=processes)


def test_hosts_that_share_a_folder_begin_at_different_chunks(data_set, run):
    wanted, _ = run(open_records(*data_set), cache=None)
    assert len(wanted.refused) == 1
    for host, order in (((1, 2), [2, 3, 4, 0, 1]), ((0, 2), [])):
        found, looked = run(open_records(*data_set), host=host)
        assert looked == order
        assert_same(found, wanted)


def test_what_was_measured_before_a_fault_is_kept(data_set, run):
    path, root = data_set
    whole = (root / "a/18.png").read_bytes()
    (root / "a/18.png").write_bytes(b"no image")
    with pytest.raises(LlavaError, match="record 18"):
        run(open_records(path, root))
    (root / "a/18.png").write_bytes(whole)
    found, looked = run(open_records(path, root))
    assert looked == [3, 4]
    assert_same(found, run(open_records(path, root), cache=None)[0])


def test_a_picture_that_changed_is_looked_at_again_with_its_chunk(data_set, run):
    path, root = data_set
    run(open_records(path, root))
    assert run(open_records(path, root))[1] == []
    Image.new("RGB", (9, 9)).save(root / "a/13.png")
    assert run(open_records(path, root))[1] == [2]
    (root / "a/1.png").unlink()
    with pytest.raises(LlavaError, match="record 1 .*no image file"):
        run(open_records(path, root))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_that_are_added_cost_their_own_chunks(tmp_path, run, suffix):
    path, items = tmp_path / f"d.{suffix}", [record(f"r{i}", "What?", "x" * i) for i in range(18)]
    write = lambda some: path.write_text(
        json.dumps(some, indent=1) if suffix == "json" else "\n".join(map(json.dumps, some))
    )
    write(items[:10])
    assert run(open_records(path))[1] == [0, 1]
    write(items)
    found, looked = run(open_records(path))
    assert looked == [2, 3]
    assert_same(found, run(open_records(path), cache=None)[0])
    items[7]["conversations"][1]["value"] = "other"
    write(items)
    assert run(open_records(path))[1] == [1]


def test_files_that_are_added_cost_their_own_chunks(tmp_path, run):
    items = [record(f"r{i}", "What?", "x" * i) for i in range(20)]
    same.write_parquet(tmp_path / "p/train-0.parquet", items[:12])
    opened = lambda: open_records(tmp_path / "p", cache_dir=tmp_path / "cache")
    assert run(opened())[1] == [0, 1, 2]
    same.write_parquet(tmp_path / "p/train-1.parquet", items[12:])
    found, looked = run(opened())
    assert looked == [12 // 5, 17 // 5] and len(found.lengths) == 20
    assert_same(found, run(opened(), cache=None)[0])
    assert_same(found, run(open_records(tmp_path / "p"), cache=None)[0])  # texts in memory


def test_samples_that_are_added_to_a_tar(tmp_path, run):
    samples = [
        (f"{i:03}", {"json": json.dumps(record(i, "What?", "x" * i)).encode()}) for i in range(18)
    ]
    path = same.write_tar(tmp_path / "d.tar", samples[:10])
    run(open_records(path))
    same.write_tar(tmp_path / "more.tar", samples[10:])
    with tarfile.open(path, "a") as tar, tarfile.open(tmp_path / "more.tar") as more:
        for member in more:
            tar.addfile(member, more.extractfile(member))
    with pytest.MonkeyPatch.context() as patch:  # pictures are looked at again, texts not read
        tokenized, measure_texts = [], SegmentTokenizer.measure
        patch.setattr(
            SegmentTokenizer,
            "measure",
            lambda self, texts, *rest: (
                tokenized.append(len(texts)) or measure_texts(self, texts, *rest)
            ),
        )
        found, _ = run(open_records(path))
    assert tokenized == [5, 3]
    assert_same(found, run(open_records(path), cache=None)[0])


def test_a_mixture_measures_what_it_repeats_once(tmp_path, run):
    items = [record(f"r{i}", "What?", "x" * i) for i in range(12)]
    (tmp_path / "d.json").write_text(json.dumps(items))
    listed = [{"json_path": "d.json", "repeat": 3},
              {"json_path": "d.json", "sampling_strategy": "random:3"},
              {"json_path": "d.json", "columns": {"id": "id"}},
              {"json_path": "d.json"}]  # fmt: skip
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": listed}))
    records = open_records(tmp_path / "mix.yaml")
    found, looked = run(records)
    assert looked == [0, 1, 2, 36 // 5, 37 // 5, 39 // 5, 44 // 5, 49 // 5]
    assert len(found.lengths) == 63
    every = run(open_records(tmp_path / "d.json"), cache=None)[0]
    numbers = [int(one.id[1:]) for one in records]
    np.testing.assert_array_equal(found.lengths, every.lengths[numbers])
    assert [line.split(" (")[1] for line in records.forms()] == [
        "36 records)", "3 records)", "12 records)", "12 records)"
    ]  # fmt: skip


_SCRIPT = """
import sys
from llava_jax.data import chunks, looking, measuring
from tests.data import test_chunks as here
if __name__ == "__main__":
    chunks.SIZE = 50
    records = here.open_records(sys.argv[1], sys.argv[2])
    tokenizer = here.SegmentTokenizer(here.byte_tokenizer())
    measuring.measure(records, tokenizer, here.FORMAT, here.POLICY, sys.argv[3], 1, False, None,
                      (0, 1), 2)
"""


def state_of(process: int) -> str | None:
    """Its letter in /proc, None where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(path.parent.name))
    return found


def test_a_killed_run_leaves_no_process_and_goes_on_where_it_was(data_set, tmp_path, run):
    path, root = data_set
    items = [{**item, "id": f"{i} {item['id']}"} for i in range(80) for item in
             json.loads(path.read_text())]  # fmt: skip
    path.write_text(json.dumps(items))
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(_SCRIPT)
    command = [sys.executable, script, path, root, cache]
    place = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=place, env=os.environ | {"PYTHONPATH": str(place)})
    while process.poll() is None and len([*cache.glob("measured-*.npz")]) < 9:
        time.sleep(0.01)
    children = children_of(process.pid)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(state_of(child) not in (None, "Z") for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)
    kept = len([*cache.glob("measured-*.npz")])
    assert 9 <= kept < 39
    chunks.SIZE = 50
    found, looked = run(open_records(path, root))
    assert len(looked) == 39 - kept
    assert_same(found, run(open_records(path, root), cache=None)[0])
