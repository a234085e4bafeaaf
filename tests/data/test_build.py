import base64
import json
import os
import pickle
import subprocess
import sys

import pytest
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from llava_jax.data import build
from llava_jax.data.build import build_data_set
from llava_jax.data.build_parts import Shard
from llava_jax.data.records import checked_record, open_records
from llava_jax.errors import LlavaError
from llava_jax.files import locked


def test_reads_back_the_same_records(data_set, tmp_path, run, capsys):
    path, root = data_set
    arguments = (path, "--image_root", root, "--out", tmp_path / "sets", "--name", "shapes")
    assert run(build, *arguments, "--split", "test") == 0
    assert capsys.readouterr().out == f"data set: {tmp_path / 'sets/shapes/1.0.0'}\n"
    source, written = open_records(path, root), open_records(tmp_path / "sets", split="test")
    assert len(written) == len(source) == 24
    written = pickle.loads(pickle.dumps(written))
    for index in range(24):
        ours, theirs = checked_record(written, index), source[index]
        assert (ours.index, ours.id, ours.turns) == (index, theirs.id, theirs.turns)
        assert ours.image_names == theirs.image_names
        assert list(ours.images) == [open(p, "rb").read() for p in theirs.images]
    folder = tmp_path / "sets/shapes/1.0.0"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["records"] == 24 and metadata["images"] == 24
    assert metadata["source_sha256"] == source.fingerprint()
    assert metadata["sha256"] == written.fingerprint()
    assert not list((tmp_path / "sets").glob(".*"))


def test_overwrites_only_on_request(data_set, tmp_path):
    path, root = data_set
    make = lambda **options: build_data_set(
        path, root, tmp_path / "sets", "shapes", progress=False, **options
    )
    folder = make()
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    make()
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == times
    with pytest.raises(LlavaError, match="holds other data.*--overwrite"):
        make(split="test")
    (root / "a/5.png").write_bytes((root / "a/6.png").read_bytes())
    with pytest.raises(LlavaError, match="holds other data.*--overwrite"):
        make()
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    make(overwrite=True)
    assert open_records(folder)[5].images == open_records(folder)[6].images


def test_faults_are_reported_before_anything_is_written(data_set, tmp_path):
    path, root = data_set
    items = json.loads(path.read_text())
    out = tmp_path / "sets"
    path.write_text(json.dumps([*items, items[3] | {"audio": "a.wav"}]))
    with pytest.raises(LlavaError, match="data.json: record 24 .*'audio'"):
        build_data_set(path, root, out, "shapes", progress=False)
    path.write_text(json.dumps(items))
    (root / "a/9.png").unlink()
    with pytest.raises(LlavaError, match="data.json: record 9 .*9.png"):
        build_data_set(path, root, out, "shapes", progress=False)
    with pytest.raises(LlavaError, match="--name"):
        build_data_set(path, root, out, "My-Set", progress=False)
    assert not out.exists()


def test_repeated_ids_system_prompts_and_encoded_images(data_set, tmp_path, capsys):
    path, root = data_set
    items = json.loads(path.read_text())
    encoded = base64.b64encode((root / "a/5.png").read_bytes()).decode()
    more = [
        items[3] | {"conversations": items[6]["conversations"]},
        items[5] | {"image": f"data:image/png;base64,{encoded}", "system": "Be brief.", "foo": 1},
    ]
    path.write_text(json.dumps([*items, *more]))
    written = open_records(build_data_set(path, root, tmp_path / "sets", "shapes", progress=False))
    assert "ignored keys: foo (1 record)" in capsys.readouterr().out
    assert len(written) == 26 and written[24].id == written[3].id == "r3"
    assert written[24].turns == written[6].turns
    assert written[25].system == "Be brief." and written[5].system is None
    assert written[25].images == written[5].images
    assert written[25].image_names[0].startswith("data:image/png;base64 (")
    checked_record(written, 25)


def test_the_old_name_of_overwrite(data_set, tmp_path, run):
    path, root = data_set
    arguments = (path, "--image_root", root, "--out", tmp_path / "sets", "--name", "shapes")
    assert run(build, *arguments) == 0
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    assert run(build, *arguments, "--force") == 0
    assert len(open_records(tmp_path / "sets")) == 3


def test_a_half_written_set_is_never_read(data_set, tmp_path, monkeypatch):
    path, root = data_set
    out = tmp_path / "sets"
    with monkeypatch.context() as patch:
        # As if killed between writing and putting in place.
        patch.setattr("pathlib.Path.rename", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            build_data_set(path, root, out, "shapes", progress=False)
    with pytest.raises(LlavaError, match="holds no data set"):
        open_records(out)
    build_data_set(path, root, out, "shapes", progress=False)
    assert len(open_records(out)) == 24


def test_a_killed_build_goes_on_with_the_shards_that_are_missing(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardConfig, "min_shard_size", 1)  # several shards of the few records
    path, root = data_set
    whole = build_data_set(path, root, tmp_path / "whole", "shapes", progress=False)
    written = []

    def killed_after(count: int):
        def workers(function, records, parts):
            for part in parts:
                if isinstance(part, Shard) and not part.path.exists():
                    if len(written) == count:
                        part.path.with_name(f".{part.path.name}.half").write_bytes(b"half")
                        sys.exit(9)
                    written.append(part.path.name)
                yield function(records, part)

        return workers

    make = lambda count: build_data_set(
        path, root, tmp_path / "sets", "shapes", progress=False, workers=killed_after(count)
    )
    for count in (5, 9):
        with pytest.raises(SystemExit):
            make(count)
    folder = make(100)
    assert written == sorted({*written}) and len(written) == 16  # none twice
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }
    # What was written of other data is of no use.
    written.clear()
    path.write_text(json.dumps(json.loads(path.read_text())[:20]))
    with pytest.raises(SystemExit):
        build_data_set(
            path, root, tmp_path / "other", "shapes", progress=False, workers=killed_after(5)
        )
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    folder = build_data_set(path, root, tmp_path / "other", "shapes", progress=False)
    assert open_records(folder)[0].id == "r19"


def test_memory_does_not_grow_with_the_set(data_set, tmp_path, monkeypatch):
    """TFDS's own writer keeps a gigabyte, then needs TensorFlow, and reads all back at once."""
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 1)
    path, root = data_set
    assert len(open_records(build_data_set(path, root, tmp_path, "shapes", progress=False))) == 24


def test_two_builds_of_a_set_at_a_time(data_set, tmp_path):
    path, root = data_set
    (tmp_path / "sets/.shapes.building").mkdir(parents=True)
    with (
        locked(tmp_path / "sets/.shapes.building", "busy"),
        pytest.raises(LlavaError, match="another build is writing .*shapes/1.0.0"),
    ):
        build_data_set(path, root, tmp_path / "sets", "shapes", progress=False)


def test_a_set_of_the_first_version_is_known_again(data_set, tmp_path):
    """It hashed all records as one text."""
    path, root = data_set
    folder = build_data_set(path, root, tmp_path / "sets", "shapes", progress=False)
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata |= {"format": "llava_jax records 1", "sha256": "0" * 64}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert build_data_set(path, root, tmp_path / "sets", "shapes", progress=False) == folder
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == times
    (root / "a/5.png").write_bytes((root / "a/6.png").read_bytes())
    with pytest.raises(LlavaError, match="holds other data.*--overwrite"):
        build_data_set(path, root, tmp_path / "sets", "shapes", progress=False)


def test_unknown_splits_and_several_sets(data_set, tmp_path):
    path, root = data_set
    build_data_set(path, root, tmp_path / "sets", "one", progress=False)
    with pytest.raises(LlavaError, match="no split 'test'; it has: train"):
        open_records(tmp_path / "sets", split="test")
    with pytest.raises(LlavaError, match="leave image_root out"):
        open_records(tmp_path / "sets", root)
    build_data_set(path, root, tmp_path / "sets", "two", progress=False)
    with pytest.raises(LlavaError, match="several data sets"):
        open_records(tmp_path / "sets")
    assert len(open_records(tmp_path / "sets/two")) == 24


def test_neither_tensorflow_nor_torch_is_imported(data_set, tmp_path):
    path, root = data_set
    program = f"""
import sys
from llava_jax.data import build, pipeline, records, show, validate
folder = build.build_data_set({str(path)!r}, {str(root)!r}, {str(tmp_path)!r}, "s", progress=False)
assert len(records.open_records(folder)) == 24
assert not {{"tensorflow", "torch"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_process_writes_the_same_bytes(data_set, tmp_path):
    path, root = data_set
    program = f"""
import sys
from llava_jax.data.build import build_data_set
build_data_set({str(path)!r}, {str(root)!r}, sys.argv[1], "s", progress=False)
"""
    sets = [tmp_path / "one", tmp_path / "two"]
    for number, out in enumerate(sets):
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", program, str(out)], check=True, env=environment)
    one, two = ({f.name: f.read_bytes() for f in (out / "s/1.0.0").iterdir()} for out in sets)
    assert one == two
