"""A whole LLaVA with one byte changed: refused with one sentence, or the same model."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.files import write_json
from llava_jax.weights.export import HF_ROOTS
from llava_jax.weights.families import families_of
from llava_jax.weights.formats.safetensors_files import (
    INDEX_FILE,
    TensorToWrite,
    write_checkpoint_files,
)
from llava_jax.weights.read.llava_folder import components, open_llava
from llava_jax.weights.write import huggingface as hf_form
from llava_jax.weights.write.save import array_params, stored_tensors
from tests.tiny_model import CONFIG, random_params
from tests.weights.conftest import with_tokenizer

CHANGES = 250  # of each kind of file


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A tiny LLaVA in three or more shards, without checksums, as those of others come."""
    folder, config = tmp_path / "source", hf_form.with_placeholders(CONFIG, 299)
    folder.mkdir()
    write_json(folder / "config.json", hf_form.config_json(config, {}, "float32"))
    images = hf_form.preprocessor_config_json(config)
    write_json(folder / "preprocessor_config.json", images)
    tree, tensors = random_params(config), []
    for part, (table, sub_config, _) in components(config, families_of(config)).items():
        for tensor in stored_tensors(table, sub_config, array_params(tree[part])):
            name = HF_ROOTS[part] + tensor.name
            tensors.append(TensorToWrite(name, tensor.shape, tensor.dtype, tensor.values))
    write_checkpoint_files(folder, tensors, shard_bytes=60_000)
    with_tokenizer(folder, 300)
    assert len(shards(folder)) >= 3
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def refused(folder: Path, capsys, *words: str) -> None:
    """convert says one sentence with these words, and writes nothing."""
    out = folder.parent / "out"
    assert cli.main(["convert", str(folder), "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert os.listdir(folder.parent) == [folder.name]


def test_sound_as_it_is(sharded):
    assert cli.main(["convert", str(sharded), "--out", str(sharded.parent / "out")]) == 0
    before, after = (open_llava(f).read() for f in (sharded, sharded.parent / "out"))
    np.testing.assert_equal(after, before)


def test_a_truncated_shard(sharded, capsys):
    last = shards(sharded)[-1]
    os.truncate(last, last.stat().st_size - 7)
    refused(sharded, capsys, str(last), "truncated", "tensor '")


def test_a_missing_shard(sharded, capsys):
    shards(sharded)[1].unlink()
    refused(sharded, capsys, shards(sharded)[0].name.replace("00001-of", "00002-of"), "missing")


def test_an_index_that_leaves_the_folder(sharded, capsys):
    path = sharded / INDEX_FILE
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = f"../source/{shards(sharded)[0].name}"
    path.write_text(json.dumps(index))
    refused(sharded, capsys, str(path), name, "../source/")


@pytest.mark.parametrize("kind", ["header", "index"])
def test_one_changed_byte(kind, sharded):
    """Refused in one sentence, or each parameter lies where it lay."""
    path = sharded / INDEX_FILE if kind == "index" else shards(sharded)[1]
    data = path.read_bytes()
    end = len(data) if kind == "index" else 8 + int.from_bytes(data[:8], "little")
    sound, rng, accepted = open_llava(sharded), np.random.default_rng(0), 0
    for position in rng.choice(end, CHANGES, replace=False):
        # Digits and letters make likelier mistakes than any byte.
        byte = rng.choice(list(b'0123456789abFU,."]} \x00\xff'))
        path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
        try:
            found = open_llava(sharded)
        except LlavaError as error:
            assert "\n" not in str(error) and str(sharded) in str(error)
            continue
        accepted += 1
        assert (found.config, found.params, found.idle) == (sound.config, sound.params, sound.idle)
    assert accepted < CHANGES / 2
