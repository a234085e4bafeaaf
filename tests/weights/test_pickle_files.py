"""PyTorch's files: the same tensors as PyTorch reads, and nothing that they ask for is run."""

import collections
import json
import os
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.weights.formats.folders import open_weights  # noqa: E402
from llava_jax.weights.formats.pickle_files import open_pickle  # noqa: E402
from llava_jax.weights.read.llava_folder import load_decoder  # noqa: E402


def saved(tmp_path, content, **options):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path, **options)
    return path


def refused(path, *words: str) -> None:
    with pytest.raises(LlavaError) as error:
        open_pickle(path, allow_pickle=True)
    for word in (path.name, *words):
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_same_tensors_as_pytorch(tmp_path):
    table = torch.randn(6, 4)
    content = {
        "float": torch.randn(3, 5),
        "half": torch.randn(2, 3, 4).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "rows of another": table[2:5],
        "the other": table,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "transposed": table.T,
        "axes in another order": torch.randn(2, 3, 4).permute(2, 0, 1),
        "one row, odd strides": table.T[:1].T.as_strided((1, 4), (99, 1)),
    }
    path = saved(tmp_path, collections.OrderedDict(content))
    tensors = open_pickle(path, allow_pickle=True)
    assert list(tensors) == list(content)
    for name, tensor in tensors.items():
        values = tensor.read()
        expected = content[name].detach()
        assert values.shape == tuple(expected.shape) and tensor.name == name
        np.testing.assert_array_equal(values.astype(np.float32), expected.float().numpy())


def test_a_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    tensors = open_pickle(saved(tmp_path, module.state_dict()), allow_pickle=True)
    np.testing.assert_array_equal(tensors["0.weight"].read(), module[0].weight.detach().numpy())


def test_only_when_allowed(tmp_path, llama_folder):
    path = saved(tmp_path, {"x": torch.ones(2)})
    for look in (lambda: open_pickle(path, False), lambda: open_weights(tmp_path)):
        with pytest.raises(LlavaError, match="pytorch_model.bin is a pickle.*--allow_pickle"):
            look()
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    with pytest.raises(LlavaError, match="--allow_pickle"):
        load_decoder(tmp_path)


def test_safetensors_come_first(tmp_path, llama_folder):
    saved(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes())
    assert "model.norm.weight" in open_weights(tmp_path, allow_pickle=True)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("where", ["a value", "the whole", "beside tensors"])
def test_code_is_refused_and_not_run(where, tmp_path):
    evil = Evil(tmp_path / "was_here")
    content = {"the whole": evil, "a value": {"x": evil}}.get(
        where, {"x": torch.ones(2), "y": evil}
    )
    refused(saved(tmp_path, content), "asks for posix.mkdir")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "torch.load", "torch._utils._rebuild"]
)
def test_names_that_look_harmless_are_refused(name, tmp_path):
    path = tmp_path / "x.bin"
    module, attribute = name.rsplit(".", 1)
    program = f"c{module}\n{attribute}\n(tR.".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
    refused(path, name)


def test_other_contents_are_told(tmp_path):
    refused(saved(tmp_path, {"model": {"x": torch.ones(2)}}), "'model'", "no tensor")
    refused(saved(tmp_path, {"x": torch.ones(2), "epoch": 3}), "'epoch'", "no tensor")
    refused(saved(tmp_path, torch.ones(2)), "not a dict")
    refused(saved(tmp_path, {"x": torch.ones(2, 3)[:, :2]}), "'x'", "contiguous")
    refused(saved(tmp_path, {"x": torch.ones(1, 3).expand(2, 3)}), "'x'", "storage")
    refused(
        saved(tmp_path, {"x": torch.ones(2).to_sparse()}), "asks for torch._utils._rebuild_sparse"
    )
    refused(saved(tmp_path, {"x": torch.ones(2)}, _use_new_zipfile_serialization=False), "1.6")


def test_damage_is_told(tmp_path):
    path = saved(tmp_path, {"x": torch.arange(100.0), "y": torch.ones(3)})
    whole = path.read_bytes()
    for cut in (0, 10, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path)
    with pytest.raises(LlavaError, match="nowhere.bin is missing"):
        open_pickle(tmp_path / "nowhere.bin", allow_pickle=True)


def test_values_that_changed_are_refused(tmp_path):
    """The archive has a CRC-32 of each storage, also of one that several tensors look into."""
    table = torch.randn(50, 4)
    path = saved(tmp_path, {"sound": torch.ones(3), "rows": table[2:5], "transposed": table.T})
    data = bytearray(path.read_bytes())
    data[bytes(data).index(table.numpy().tobytes()) + 700] ^= 1  # behind the rows
    path.write_bytes(data)
    tensors = open_pickle(path, allow_pickle=True)
    np.testing.assert_array_equal(tensors["sound"].read(), 1)
    for look in (tensors["rows"].read, tensors["rows"].map, tensors["transposed"].read):
        with pytest.raises(LlavaError, match="pytorch_model.bin is damaged: .*CRC-32"):
            look()


def rewritten(path, out, change):
    """A copy of the archive with the bytes of each member changed by change(name, bytes)."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as copy:
        for member in archive.infolist():
            copy.writestr(member.filename, change(member.filename, archive.read(member)))
    return out


def test_claims_of_the_pickle_are_checked(tmp_path):
    path = saved(tmp_path, {"x": torch.arange(100.0)})
    short = lambda name, data: data[:-4] if name.endswith("data/0") else data
    refused(rewritten(path, tmp_path / "short.bin", short), "'x'", "does not fit its storage")
    # 100 = K d, the shape and the number of items.
    larger = lambda name, data: (
        data.replace(b"Kd\x85", b"K\x65\x85") if "data.pkl" in name else data
    )
    refused(rewritten(path, tmp_path / "larger.bin", larger), "'x'", "does not fit its storage")
    big = lambda name, data: b"big" if name.endswith("byteorder") else data
    refused(rewritten(path, tmp_path / "big.bin", big), "big-endian")


def test_single_bytes_changed_never_crash(tmp_path):
    """Either the file is refused in one sentence, or its table of tensors is one that fits it."""
    path = saved(tmp_path, {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3).half()})
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        program = archive.read(name)
    rng = np.random.default_rng(0)
    for i, position in enumerate(rng.permutation(len(program))[:150]):
        changed = bytearray(program)
        changed[position] ^= 1 << int(rng.integers(8))
        swap = lambda member, data, changed=changed: bytes(changed) if member == name else data
        damaged = rewritten(path, tmp_path / f"{i}.bin", swap)
        try:
            for tensor in open_pickle(damaged, allow_pickle=True).values():
                tensor.read()
        except LlavaError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "float8_e4m3fn", "uint16", "int8"])
def test_dtypes_of_no_parameter_are_told_with_the_tensor(dtype, tmp_path):
    content = {"fine": torch.ones(2), "odd": torch.zeros(2, 3).to(getattr(torch, dtype))}
    tensors = open_pickle(saved(tmp_path, content), allow_pickle=True)
    np.testing.assert_array_equal(tensors["fine"].read(), 1)
    with pytest.raises(LlavaError, match="'odd' in .*pytorch_model.bin is stored as"):
        _ = tensors["odd"].value_dtype


def write_shards(folder, **changes):
    """Two shards and their index, in which `changes` are made ("" names no shard)."""
    extra = {"extra": torch.ones(1)} if "extra" in changes else {}
    torch.save({"a": torch.ones(2)} | extra, folder / "1.bin")
    torch.save({"b": torch.ones(3)}, folder / "2.bin")
    names = {"a": "1.bin", "b": "2.bin"} | changes
    index = {"weight_map": {name: shard for name, shard in names.items() if shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": "2.bin"}, ["'a' is in 2.bin, where it is not"]),
        ({"c": "1.bin"}, ["'c' is in 1.bin, where it is not"]),
        ({"extra": ""}, ["'extra' is in", "1.bin and not in"]),
        ({"a": "../1.bin"}, ["tensor 'a' in '../1.bin'"]),
        ({"b": "3.bin"}, ["3.bin is missing"]),
    ],
)
def test_an_index_that_is_not_of_its_shards(changes, words, tmp_path):
    write_shards(tmp_path)
    assert sorted(open_weights(tmp_path, allow_pickle=True)) == ["a", "b"]
    write_shards(tmp_path, **changes)
    with pytest.raises(LlavaError) as error:
        open_weights(tmp_path, allow_pickle=True)
    for word in ("pytorch_model.bin.index.json", *words):
        assert word in str(error.value)
