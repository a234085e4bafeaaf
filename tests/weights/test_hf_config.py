"""config.json and preprocessor_config.json of many kinds, and those that are not supported."""

import dataclasses
import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig, RopeScaling
from llava_jax.models.images import ImageSpec
from llava_jax.models.presets import DINOV2_SMALL, SMOLLM2_135M, clip_large
from llava_jax.weights.families import (
    decoder_config,
    decoder_to_hf,
    encoder_config,
    encoder_to_hf,
)
from llava_jax.weights.read.huggingface import composed_config, llava_config
from llava_jax.weights.read.image_settings import image_settings

LLAVA_15 = {  # as llava-hf/llava-1.5-7b-hf has it: mostly defaults left out
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
CLIP_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "resample": 3,
    "size": {"shortest_edge": 336},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

DEFAULT = ImageSpec(mode="square")


def write(folder, config=None, pixels=None, name="preprocessor_config.json"):
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if pixels is not None:
        (folder / name).write_text(json.dumps(pixels))
    return folder


def test_llava_15_of_the_hub(tmp_path):
    config, families = llava_config(write(tmp_path, LLAVA_15, CLIP_PIXELS))
    assert (families.vision.class_name, families.decoder.class_name) == ("CLIPVisionModel", "Llama")
    assert config.vision == clip_large(336)
    assert config.decoder == DecoderConfig(32064, 4096, 11008, 32, 32, 32, 128)
    assert (config.image_token_id, config.image.mode, config.image.size) == (32000, "square", 336)
    assert (config.feature_layer, config.keep_class_token) == (-2, False)


def test_no_vision_config_means_clip_large(tmp_path):
    values = {k: v for k, v in LLAVA_15.items() if k != "vision_config"}
    assert llava_config(write(tmp_path, values))[0].vision == clip_large(336)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "llavaonevision1_5"}, "LLaVA-OneVision-1.5.*not supported"),
        ({"model_type": "blip-2"}, "BLIP.*not supported; llava, llava_next.* are"),
        ({"model_type": "qwen2_5_vl"}, "Qwen2.5-VL.*not supported"),
        ({"model_type": "llama"}, "language model alone.*--vision_tower"),
        ({"model_type": "dinov2"}, "vision encoder alone"),
        ({"model_type": "resnet"}, "resnet"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "llava_llama"}, "llava_llama"),
        ({"vision_feature_layer": [-2, "last"]}, "number of a layer"),
        ({"vision_feature_layer": []}, "number of a layer"),
        ({"vision_feature_layer": [-2, 25]}, "25 does not exist"),
        ({"vision_feature_select_strategy": "cls"}, "default or full"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"image_token_index": 32064}, "image_token_index=32064.*vocabulary of 32064"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"text_config": {"model_type": "gemma"}}, "gemma"),
    ],
)
def test_llavas_that_are_not_supported(change, word, tmp_path):
    with pytest.raises(LlavaError, match=word) as error:
        llava_config(write(tmp_path, LLAVA_15 | change))
    assert "config.json" in str(error.value)


ODD = [None, True, -1, 0, 3, 0.5, 7.5, "x", [], [1, "y"], {}, {"z": 1}, {"z": [1]}, 10**30]
FULL = json.loads(json.dumps(LLAVA_15)) | {"image_token_id": None, "quantization_config": None}
FULL["text_config"] |= decoder_to_hf(DecoderConfig(32064, 64, 96, 2, 4, 2, 16))
FULL["text_config"] |= {"use_sliding_window": True, "sliding_window": 8}
FULL["text_config"] |= {"max_window_layers": 0, "layer_types": None}
FULL["vision_config"] |= encoder_to_hf(clip_large(336))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "seed_oss"])
def test_any_value_is_read_or_told(family, tmp_path):
    """Never a crash, whatever a config holds."""
    write(tmp_path, FULL, CLIP_PIXELS)
    llava_config(tmp_path)
    for section in (None, "text_config", "vision_config", "pixels"):
        for key in (
            FULL if section is None else CLIP_PIXELS if section == "pixels" else FULL[section]
        ):
            for value in ODD:
                config, pixels = json.loads(json.dumps(FULL)), dict(CLIP_PIXELS)
                config["text_config"]["model_type"] = family
                (pixels if section == "pixels" else config[section] if section else config)[key] = (
                    value
                )
                write(tmp_path, config, pixels)
                try:
                    llava_config(tmp_path)
                except LlavaError as error:
                    assert ".json" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5.*divide"),
        ({"head_dim": 9}, "heads of 9"),
        ({"rms_norm_eps": None, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "window"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta=0.0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor above 0"),
    ],
)
def test_decoders_that_are_not_supported(values, word):
    with pytest.raises(LlavaError, match=word):
        decoder_config(values, "config.json")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_channels": 1}, "num_channels"),
        ({"num_attention_heads": 7}, "num_attention_heads=7.*divide hidden_size=768"),
        ({"image_size": 16}, "image_size=16.*patch alone has 32"),
        ({"model_type": "vit"}, "vit"),
        ({"model_type": "clip", "vision_config": "x"}, "vision_config='x'"),
        ({"model_type": "dinov2", "mlp_ratio": 1e308}, "intermediate_size"),
    ],
)
def test_encoders_that_are_not_supported(values, word):
    with pytest.raises(LlavaError, match=word):
        encoder_config(values, "config.json")


def test_rope_of_transformers_4_and_5():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    config = decoder_config(old)
    assert config == decoder_config(new)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


def test_key_value_heads():
    heads = lambda **values: decoder_config({"num_attention_heads": 32} | values).num_kv_heads
    assert heads() == heads(model_type="mistral", num_key_value_heads=None) == 32
    assert heads(model_type="mistral") == 8


def test_mistral_window():
    assert decoder_config({"model_type": "mistral"}).sliding_window == 4096
    assert decoder_config({"model_type": "mistral", "sliding_window": None}).sliding_window is None


VARIANTS = [
    {},
    {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
    {"rope_scaling": RopeScaling("linear", 4.0)},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"qkv_bias": True},
    {"qkv_bias": True, "sliding_window": 64},
    {"qk_norm": True},
    {"sliding_window": 64},
    {"o_bias": True},
    {"qkv_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_config_round_trip(variant):
    config = dataclasses.replace(SMOLLM2_135M, **variant)
    values = json.loads(json.dumps(decoder_to_hf(config)))
    assert decoder_config(values) == config


def test_decoder_config_without_a_family():
    with pytest.raises(LlavaError, match="combination"):
        decoder_to_hf(dataclasses.replace(SMOLLM2_135M, qk_norm=True, mlp_bias=True))


def test_vision_config_round_trip():
    siglip = dataclasses.replace(
        clip_large(224), class_token=False, pre_norm=False, patch_bias=True, layer_norm_eps=1e-6
    )
    for config in (DINOV2_SMALL, clip_large(336), siglip):
        assert encoder_config(json.loads(json.dumps(encoder_to_hf(config)))) == config


def test_image_settings(tmp_path):
    assert image_settings(tmp_path, DEFAULT, 7) == dataclasses.replace(DEFAULT, size=7)
    write(tmp_path, pixels=CLIP_PIXELS)
    assert image_settings(tmp_path, DEFAULT, 7).mode == "square"
    write(tmp_path, pixels=CLIP_PIXELS | {"do_pad": True})
    assert image_settings(tmp_path, DEFAULT, 7).mode == "pad"
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 7, "width": 7}}
    write(tmp_path, pixels=siglip)
    assert image_settings(tmp_path, DEFAULT, 7) == ImageSpec(7, "resize", (0.5,) * 3, (0.5,) * 3)
    write(tmp_path, pixels=CLIP_PIXELS | {"size": {"height": 336, "width": 336}})
    assert image_settings(tmp_path, DEFAULT, 7).mode == "resize"  # not to the shortest edge
    old = {"size": 224, "crop_size": 224, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    write(tmp_path, pixels=old)
    assert image_settings(tmp_path, DEFAULT, 7).size == 224
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path, pixels={"image_processor": CLIP_PIXELS}, name="processor_config.json")
    assert image_settings(tmp_path, DEFAULT, 7).size == 336
    write(tmp_path, pixels={"image_processor": "clip"}, name="processor_config.json")
    with pytest.raises(LlavaError, match="processor_config.json has image_processor='clip'"):
        image_settings(tmp_path, DEFAULT, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 2},
        {"do_resize": False},
        {"crop_size": {"height": 3, "width": 4}},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"size": {"shortest_edge": 384}},
        {"size": {"longest_edge": 336}},
        {"do_center_crop": False},
        {"image_processor_type": "SiglipImageProcessor", "size": 336, "do_center_crop": False},
        {"rescale_factor": 1 / 127.5},
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"image_processor_type": "PixtralImageProcessor"},
    ],
)
def test_image_settings_that_are_not_supported(change, tmp_path):
    write(tmp_path, pixels=CLIP_PIXELS | change)
    with pytest.raises(LlavaError, match="preprocessor_config.json"):
        image_settings(tmp_path, DEFAULT, 7)


def test_a_fresh_model_takes_the_square_of_the_crop(tmp_path):
    """DINOv2's own files resize to 256 and crop to 224."""
    dinov2 = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
    write(tmp_path, pixels=dinov2 | {"crop_size": {"height": 224, "width": 224}})
    assert image_settings(tmp_path, DEFAULT, 7, trained=False).size == 224
    with pytest.raises(LlavaError, match="preprocessor_config.json has crop_size"):
        image_settings(tmp_path, DEFAULT, 7)


def test_composed_config(tmp_path):
    vision, decoder = tmp_path / "vision", tmp_path / "decoder"
    vision.mkdir()
    decoder.mkdir()
    write(vision, encoder_to_hf(DINOV2_SMALL))
    write(decoder, decoder_to_hf(SMOLLM2_135M))
    config, _ = composed_config(vision, decoder, image=ImageSpec(56), projector="mlp3x_gelu")
    assert (config.vision, config.decoder) == (DINOV2_SMALL, SMOLLM2_135M)
    assert (config.image.size, config.projector, config.image_token_id) == (56, "mlp3x_gelu", -200)
