"""Files and folders that are wrong, each told with its name; and files that are right."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from llava_jax.errors import LlavaError
from llava_jax.weights.checksums import CHECKSUMS_FILE, write_checksums
from llava_jax.weights.formats.folders import open_folder
from llava_jax.weights.formats.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorToWrite,
    write_checkpoint_files,
    write_file,
)


def example_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 4), np.float32),
        "b": rng.standard_normal((5,), np.float32).astype(np.float16),
        "c": rng.standard_normal((2, 2), np.float32).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def folder(tmp_path):
    save_file(example_tensors(), tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tensors = example_tensors()
    shards = {"one.safetensors": ["a", "b"], "two.safetensors": ["c", "scalar", "empty"]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
    set_index(tmp_path, {name: shard for shard, names in shards.items() for name in names})
    return tmp_path


def set_index(folder, weight_map) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_of(folder) -> dict:
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def refused(folder, *words: str) -> None:
    with pytest.raises(LlavaError) as error:
        open_folder(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_reads_what_the_package_writes(kind, request):
    opened = open_folder(request.getfixturevalue(kind))
    expected = example_tensors()
    assert opened.keys() == expected.keys()
    for name, tensor in opened.items():
        assert tensor.read().dtype == expected[name].dtype
        np.testing.assert_array_equal(tensor.read(), expected[name])


def test_writes_what_the_package_reads(tmp_path):
    expected = example_tensors()
    path = tmp_path / SINGLE_FILE
    write_file(
        path, [TensorToWrite(n, v.shape, v.dtype, lambda v=v: v) for n, v in expected.items()]
    )
    for name, values in load_file(path).items():
        np.testing.assert_array_equal(values, expected[name])
    assert open_folder(tmp_path).keys() == expected.keys()


def test_shards(tmp_path):
    expected = example_tensors()
    tensors = [TensorToWrite(n, v.shape, v.dtype, lambda v=v: v) for n, v in expected.items()]
    written = []
    digests = write_checkpoint_files(tmp_path, tensors, written.append, shard_bytes=60)
    assert written == [48, 10, 8, 4, 0]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(digests) == names and index_of(tmp_path)["c"] == names[1]
    write_checksums(tmp_path, digests)  # wrong ones would be found here
    for name, tensor in open_folder(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), expected[name])


def test_truncated_file(folder):
    path = folder / SINGLE_FILE
    os.truncate(path, path.stat().st_size - 4)
    refused(folder, SINGLE_FILE, "truncated", "'")
    for size in (20, 3, 0):
        os.truncate(path, size)
        refused(folder, SINGLE_FILE, "truncated")


def test_trailing_bytes(folder):
    with open(folder / SINGLE_FILE, "ab") as file:
        file.write(b"1234")
    refused(folder, SINGLE_FILE, "damaged")


def test_missing_shard(sharded):
    (sharded / "two.safetensors").unlink()
    refused(sharded, "two.safetensors", "missing")


@pytest.mark.parametrize("path", ["../one.safetensors", "/b/one.safetensors", "x/../../y", ""])
def test_shard_outside_the_folder(sharded, path):
    set_index(sharded, index_of(sharded) | {"a": path})
    refused(sharded, INDEX_FILE, "'a'", path)


def test_tensor_in_two_shards(sharded):
    tensors = example_tensors()
    save_file({n: tensors[n] for n in ("c", "scalar", "empty", "a")}, sharded / "two.safetensors")
    refused(sharded, "'a'", "one.safetensors", "two.safetensors")


def test_tensor_twice_in_a_header(folder):
    path = folder / SINGLE_FILE
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"a":', b'"b":', 1))
    refused(folder, SINGLE_FILE, "'b'", "twice")


def test_index_and_shards_disagree(sharded):
    index = index_of(sharded)
    set_index(sharded, index | {"a": "two.safetensors"})
    refused(sharded, "'a'", "two.safetensors")
    set_index(sharded, index | {"ghost": "one.safetensors"})
    refused(sharded, "'ghost'", "one.safetensors")
    set_index(sharded, {name: shard for name, shard in index.items() if name != "a"})
    refused(sharded, "'a'", INDEX_FILE)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"]
)
def test_damaged_index(sharded, text):
    (sharded / INDEX_FILE).write_text(text, encoding="latin-1")
    refused(sharded, INDEX_FILE)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin", "safetensors")


def test_no_weights(tmp_path):
    refused(tmp_path, str(tmp_path), SINGLE_FILE)
    refused(tmp_path / "nothing", "nothing", "folder")


def test_other_dtypes_are_named_when_read(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / SINGLE_FILE)
    tensor = open_folder(tmp_path)["ids"]
    with pytest.raises(LlavaError, match="'ids'.*I64"):
        tensor.read()


def add_to_header(path, **entries) -> None:
    """Puts tensors of any dtype behind those of a file: name -> (header entry, bytes)."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    for name, (entry, count) in entries.items():
        header[name] = entry | {"data_offsets": [len(values), len(values) + count]}
        values += bytes(count)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


@pytest.mark.parametrize(
    "dtype, count",
    [("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12), ("F8_E4M3FNUZ", 16), ("F8_E5M2FNUZ", 16)],
)
def test_dtypes_of_safetensors_0_8(dtype, count, folder):
    """16 items of each: legal where they are not needed, named where they are."""
    known = open_folder(folder)
    add_to_header(folder / SINGLE_FILE, x=({"dtype": dtype, "shape": [2, 8]}, count))
    opened = open_folder(folder)
    assert opened.keys() == known.keys() | {"x"}
    with pytest.raises(LlavaError, match=f"'x'.*is stored as {dtype}: only F32"):
        opened["x"].read()
    with safetensors.safe_open(folder / SINGLE_FILE, "np") as theirs:  # legal for the package too
        assert set(theirs.keys()) == opened.keys()


def test_a_dtype_of_a_later_version_is_no_damage(folder):
    add_to_header(folder / SINGLE_FILE, x=({"dtype": "F3_NEW", "shape": [5]}, 2))
    with pytest.raises(LlavaError, match="'x'.*is stored as F3_NEW"):
        open_folder(folder)["x"].read()


def test_other_fields_of_an_entry_are_passed_over(folder):
    entry = {"dtype": "F32", "shape": [2], "comment": "from elsewhere"}
    add_to_header(folder / SINGLE_FILE, x=(entry, 8))
    np.testing.assert_array_equal(open_folder(folder)["x"].read(), [0, 0])


def test_checksums(folder):
    write_checksums(folder)
    open_folder(folder)
    path = folder / SINGLE_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, SINGLE_FILE, "changed")
    path.unlink()
    refused(folder, SINGLE_FILE, "missing")


def test_checksums_must_cover_the_weights(folder):
    (folder / CHECKSUMS_FILE).write_text("{}")
    refused(folder, SINGLE_FILE, CHECKSUMS_FILE)


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 3}', '{"../x": "' + "0" * 64 + '"}'])
def test_damaged_checksums(folder, text):
    (folder / CHECKSUMS_FILE).write_text(text)
    refused(folder, CHECKSUMS_FILE, "damaged")


def test_any_changed_header_byte_is_an_error_or_harmless(folder):
    """Never another exception, and never a tensor with other bounds under an old name."""
    path = folder / SINGLE_FILE
    data = path.read_bytes()
    sound = open_folder(folder)
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for position in range(header_bytes):
        for value in (0, 0x20, 0x31, 0xFF, int(rng.integers(256))):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                opened = open_folder(folder)
            except LlavaError:
                continue
            for name, tensor in opened.items():
                if name in sound and tensor.dtype == sound[name].dtype:
                    assert np.prod(tensor.shape) == np.prod(sound[name].shape)


def test_any_changed_index_byte_is_an_error_or_harmless(sharded):
    path = sharded / INDEX_FILE
    data = path.read_bytes()
    sound = open_folder(sharded)
    for position in range(len(data)):
        for value in (0, 0x2F, 0x31, 0xFF):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                assert open_folder(sharded) == sound
            except LlavaError:
                continue
