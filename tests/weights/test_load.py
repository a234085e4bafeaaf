"""A checkpoint that does not fit is refused with the names, before anything is read."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.errors import LlavaError
from llava_jax.weights.read.llava_folder import load_decoder, load_llava, load_vision
from tests.weights.conftest import edit_config


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, *words: str, load=load_decoder, **kwargs) -> None:
    with pytest.raises(LlavaError) as error:
        load(folder, **kwargs)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


NORM = "model.layers.1.input_layernorm.weight"


def test_missing(llama_copy):
    change_tensors(llama_copy, lambda t: t.pop(NORM))
    refused(llama_copy, "missing", NORM)


def test_extra(llama_copy):
    change_tensors(llama_copy, lambda t: t.update({"model.layers.3.mlp.x": t[NORM], "y": t[NORM]}))
    refused(llama_copy, "not expected", "model.layers.3.mlp.x", "y")


def test_a_bias_the_config_does_not_have(llama_copy):
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(llama_copy, lambda t: t.update({name: t[NORM]}))
    refused(llama_copy, "not expected", name)


def test_misshapen(llama_copy):
    name = "model.layers.0.mlp.gate_proj.weight"
    change_tensors(llama_copy, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    refused(llama_copy, "wrong shape", name, "[32, 48]", "[48, 32]")


def test_many_names_are_counted(llama_copy):
    edit_config(llama_copy, num_hidden_layers=5)
    refused(llama_copy, "missing", "model.layers.3.input_layernorm.weight", "13 more")


def test_same_parameter_under_two_names(llama_copy):
    change_tensors(llama_copy, lambda t: t.update({"norm.weight": t["model.norm.weight"]}))
    refused(llama_copy, "model.norm.weight", "'norm.weight'")


def test_buffers_of_old_checkpoints_are_ignored(llama_copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(llama_copy, lambda t: t.update({name: np.ones(4, np.float32)}))
    load_decoder(llama_copy)


def test_head_missing_where_not_tied(llama_copy):
    change_tensors(llama_copy, lambda t: t.pop("lm_head.weight"))
    refused(llama_copy, "missing", "lm_head.weight")


def test_another_model_than_asked_for(llama_copy):
    config, _ = load_decoder(llama_copy)
    other = dataclasses.replace(config, vocab_size=81, rope_theta=5.0)
    refused(llama_copy, "vocab_size is 80 and not 81", "rope_theta", config=other)


def test_float16_that_does_not_hold_the_values(llama_copy):
    change_tensors(llama_copy, lambda t: t.update({NORM: np.full(32, 1e6, np.float32)}))
    refused(llama_copy, NORM, "float16", dtype="float16")
    load_decoder(llama_copy, dtype="bfloat16")


def test_unknown_dtype(llama_copy):
    refused(llama_copy, "float8", "float32", dtype="float8")


def test_wrong_kind_of_model(llama_copy):
    refused(llama_copy, "llama", "clip", load=load_vision)
    refused(llama_copy, "language model alone", "--vision_tower", load=load_llava)


def test_no_config(llama_copy):
    (llama_copy / "config.json").unlink()
    refused(llama_copy, "config.json", "missing")
    (llama_copy / "config.json").write_text("{")
    refused(llama_copy, "config.json")


def test_foreign_tensor_in_a_llava(llama_copy):
    sections = {"text_config": {}, "vision_config": {}, "image_token_index": 5}
    edit_config(llama_copy, model_type="llava", **sections)
    refused(llama_copy, "model.safetensors", "no part of a LLaVA", load=load_llava)
