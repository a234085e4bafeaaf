"""Folders are written whole or not at all, and read back as they were."""

import dataclasses
import errno
import os

import flax.linen as nn
import jax
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import Decoder
from llava_jax.models.presets import DINOV2_SMALL, SMOLLM2_135M, clip_large
from llava_jax.models.vit import ViT
from llava_jax.weights.read.llava_folder import load_decoder, load_vision
from llava_jax.weights.write.save import save_decoder, save_vision, whole_folder

SMALL = dict(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
LLAMA = dataclasses.replace(SMOLLM2_135M, **SMALL, vocab_size=20, num_kv_heads=1, head_dim=8)
DECODERS = {
    "tied": LLAMA,
    "untied, qwen2": dataclasses.replace(LLAMA, tie_word_embeddings=False, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "all biases": dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
}
CLIP = dataclasses.replace(clip_large(28), **SMALL)
ENCODERS = {
    "clip": CLIP,
    "siglip": dataclasses.replace(CLIP, class_token=False, pre_norm=False, patch_bias=True),
    "dinov2": dataclasses.replace(DINOV2_SMALL, **SMALL | {"intermediate_size": 32}, image_size=28),
}


def random_params(module, *inputs, method=None) -> dict:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=method))
    rng = np.random.default_rng(0)
    params = nn.unbox(shapes)["params"]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)


def decoder_params(config) -> dict:
    def run(decoder, ids):
        hidden = decoder(decoder.embed(ids), ids, ids)
        return decoder.attend(hidden)

    return random_params(Decoder(config), np.ones((1, 1), np.int32), method=run)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_round_trip(name, tmp_path):
    params = decoder_params(DECODERS[name])
    save_decoder(tmp_path / "out", DECODERS[name], params)
    config, loaded = load_decoder(tmp_path / "out")
    assert config == DECODERS[name]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_vision_round_trip(name, layer, tmp_path):
    params = random_params(ViT(ENCODERS[name], layer), np.zeros((1, 28, 28, 3), np.float32))
    save_vision(tmp_path / "out", ENCODERS[name], params)
    config, loaded = load_vision(tmp_path / "out")
    assert config == dataclasses.replace(ENCODERS[name], num_layers=3 + layer)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_transformers_loads_it_strictly(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for name, config in DECODERS.items():
        save_decoder(tmp_path / name, config, decoder_params(config), dtype="bfloat16")
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info.values()), (name, info)
    for name, config in ENCODERS.items():
        params = random_params(ViT(config, -1), np.zeros((1, 28, 28, 3), np.float32))
        save_vision(tmp_path / name, config, params)
        architecture = {"clip": "CLIPVision", "siglip": "SiglipVision", "dinov2": "Dinov2"}[name]
        _, info = getattr(transformers, f"{architecture}Model").from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        unused = ("post_layernorm", "layernorm", "mask_token", "head.")
        missing = [k for k in info["missing_keys"] if not any(word in k for word in unused)]
        assert not missing and not info["unexpected_keys"], (name, info)


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(LlavaError, match="exists already"):
        save_decoder(tmp_path, LLAMA, {})
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(LlavaError, match="link exists already"):
        save_decoder(tmp_path / "link", LLAMA, {})


def test_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_second_writer_is_told_and_the_first_goes_on(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as temporary:
        (temporary / "file").write_text("first")
        with pytest.raises(LlavaError, match="another process is writing"), whole_folder(out):
            pass
    assert (out / "file").read_text() == "first" and os.listdir(tmp_path) == ["out"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    partial = tmp_path / ".out.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    with whole_folder(tmp_path / "out") as temporary:
        assert os.listdir(temporary) == []
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(LlavaError, match="the disk of .*out is full"):
        with whole_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LlavaError, match="out cannot be written: Not a directory"):
        with whole_folder(tmp_path / "file" / "out"):
            pass


def test_replaced_in_one_step(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_an_empty_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_path_by_way_of_a_folder_that_is_not_there(tmp_path):
    with whole_folder(tmp_path / "out/not_there/..") as temporary:
        (temporary / "file").write_text("new")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checksums.json", "file"]
