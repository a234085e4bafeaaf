"""config.json and processor files of LLaVA-NeXT, OneVision and NeXT-Video in Hugging Face form."""

import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.models.anyres import NEXT_GRIDS
from llava_jax.models.images import CLIP_MEAN
from llava_jax.models.presets import SIGLIP_SO400M, clip_large, preset
from llava_jax.models.video import VideoSpec
from llava_jax.weights.read.huggingface import huggingface_notes, llava_config

# As llava-hf/llava-v1.6-mistral-7b-hf has it: much is left out.
NEXT = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vocab_size": 32064,
}
NEXT_PIXELS = {
    "image_processor_type": "LlavaNextImageProcessor",
    "crop_size": {"height": 336, "width": 336},
    "do_pad": True,
    "image_grid_pinpoints": NEXT["image_grid_pinpoints"],
    "size": {"shortest_edge": 336},
}
QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
ONEVISION = {"model_type": "llava_onevision", "text_config": QWEN}
ONEVISION_PIXELS = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"height": 384, "width": 384},
}
FRAMES = ONEVISION_PIXELS | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
del FRAMES["image_processor_type"]
FILES = {
    "pixels": "preprocessor_config.json",
    "frames": "video_preprocessor_config.json",
    "processor": "processor_config.json",
}


def read(folder, config, order=None, **files):
    (folder / "config.json").write_text(json.dumps(config))
    for name, values in files.items():
        (folder / FILES[name]).write_text(json.dumps(values))
    return llava_config(folder, pinpoint_order=order)[0]


def test_next_of_the_hub(tmp_path):
    config = read(tmp_path, NEXT, pixels=NEXT_PIXELS)
    assert config.vision == clip_large(336)
    assert config.decoder.sliding_window is None and config.decoder.hidden_size == 4096
    assert (config.image_token_id, config.video_token_id, config.feature_layer) == (32000, None, -2)
    image = config.image
    assert (image.mode, image.size, image.mean, image.video) == ("anyres", 336, CLIP_MEAN, None)
    # (height, width): the first of the list lies down, and so it is read.
    assert image.tiling.grids == ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
    assert (image.tiling.rounded, image.tiling.cap, image.tiling.one_view) == (True, 0, False)
    assert [len(config.layouts([size])[0]) for size in ((300, 200), (200, 300))] == [1464, 984]


def test_the_order_of_the_original_by_request(tmp_path):
    config = read(tmp_path, NEXT, "original", pixels=NEXT_PIXELS)
    assert config.image.tiling.grids == NEXT_GRIDS and not config.image.tiling.rounded
    assert [len(config.layouts([size])[0]) for size in ((300, 200), (200, 300))] == [976, 1476]


def test_onevision_says_almost_nothing(tmp_path):
    """All that its class takes for granted, and what the 7B's files say besides."""
    config = read(tmp_path, ONEVISION, pixels=ONEVISION_PIXELS)
    assert config.vision == SIGLIP_SO400M
    assert (config.image_token_id, config.video_token_id) == (151646, 151647)
    assert (config.feature_layer, config.drop_first_patch, config.tokens_per_tile) == (
        -1,
        False,
        729,
    )
    wanted = preset("onevision_0p5b").image
    assert config.image.video == VideoSpec() and config.image.mean == wanted.mean
    assert (config.image.tiling.cap, config.image.tiling.one_view) == (9, True)
    # Its list is its own mirror image, so both orders choose the same tiles.
    assert sorted(config.image.tiling.grids) == sorted(wanted.tiling.grids)
    other = read(tmp_path, ONEVISION | {"vision_aspect_ratio": "anyres_max_4"})
    assert other.image.tiling.cap == 4


VIDEO = NEXT | {
    "model_type": "llava_next_video",
    "architectures": ["LlavaNextVideoForConditionalGeneration"],
    "image_token_index": 32001,
    "video_token_index": 32000,
}


@pytest.mark.parametrize("model_type", ["llava_next_video", "llava_next"])
def test_next_video_whatever_it_calls_itself(model_type, tmp_path):
    stray = VIDEO["text_config"] | {"factor": 2.0, "type": "linear"}
    values = VIDEO | {"model_type": model_type, "text_config": stray}
    config = read(tmp_path, values, pixels=NEXT_PIXELS)
    assert config.image.video == VideoSpec("square", "average_before_projector", "no_token")
    assert (config.image_token_id, config.video_token_id) == (32001, 32000)
    assert config.decoder.rope_scaling is None
    assert len(config.layouts([(640, 480, 8)])[0]) == 8 * 144
    scaled = stray | {"rope_scaling": {"factor": 2.5, "type": "linear"}}
    assert read(tmp_path, values | {"text_config": scaled}).decoder.rope_scaling.factor == 2.5


def test_both_spellings_of_the_placeholders(tmp_path):
    values = {k: v for k, v in VIDEO.items() if not k.endswith("_token_index")}
    config = read(tmp_path, values | {"image_token_id": 7, "video_token_id": 8})
    assert (config.image_token_id, config.video_token_id) == (7, 8)
    config = read(tmp_path, values)
    assert (config.image_token_id, config.video_token_id) == (32001, 32000)


def test_files_of_transformers_5(tmp_path):
    processor = {"image_processor": ONEVISION_PIXELS, "video_processor": FRAMES | {"num_frames": 8}}
    config = read(tmp_path, ONEVISION, processor=processor | {"num_image_tokens": 729})
    assert config.image.mean == (0.5,) * 3 and config.image.video.frames == 8


def test_frames_that_are_normalised_otherwise_are_left_out(tmp_path):
    frames = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    config = read(tmp_path, ONEVISION, pixels=ONEVISION_PIXELS, frames=frames)
    assert config.image.video is None and config.image.newline


@pytest.mark.parametrize("model_type", ["llava_next_video", "llava_next"])
def test_what_of_a_folder_is_not_obeyed(model_type, tmp_path):
    """Also of the first revisions of LLaVA-NeXT-Video, which call themselves llava_next."""
    stray = VIDEO["text_config"] | {"factor": 2.0, "type": "linear"}
    values = VIDEO | {"model_type": model_type, "text_config": stray}
    frames = {"image_mean": [0.1] * 3, "size": {"shortest_edge": 336}, "crop_size": 336}
    config = read(tmp_path, values, pixels=NEXT_PIXELS, frames=frames)
    rotary, videos = huggingface_notes(tmp_path, values, config)
    assert rotary == (
        f"{tmp_path}/config.json has factor and type in text_config, outside rope_scaling: rotary "
        "positions are not scaled by it, as in transformers"
    )
    assert videos == (
        f"{tmp_path}/video_preprocessor_config.json normalises frames otherwise than pictures are "
        "normalised: the model takes no videos"
    )


def test_a_folder_that_leaves_all_to_its_class_is_told_of_its_pictures(tmp_path):
    """As much as one whose config.json says something; of a language model there is no word."""
    values = {"model_type": "llava_onevision"}
    config = read(tmp_path, values)
    (note,) = huggingface_notes(tmp_path, values, config)
    assert note.startswith(f"{tmp_path} has no preprocessor_config.json: pictures are prepared as")
    assert not list(huggingface_notes(tmp_path, {"model_type": "qwen2"}, config))


def test_what_a_processor_takes_for_granted(tmp_path):
    """A tile has 224 pixels and CLIP's mean if its file does not say otherwise."""
    small = NEXT | {"vision_config": NEXT["vision_config"] | {"image_size": 224}}
    small |= {"image_grid_pinpoints": [[224, 448], [448, 224]]}
    pixels = {"image_processor_type": "LlavaNextImageProcessorFast"}
    config = read(tmp_path, small, pixels=pixels)
    assert (config.image.size, config.image.mean) == (224, CLIP_MEAN)
    plain = {"image_processor_type": "LlavaOnevisionImageProcessorPil"}
    assert read(tmp_path, ONEVISION, pixels=plain).image.mean == CLIP_MEAN
    # Frames are those of the model's own class, if their file does not name another.
    frames = {"num_frames": 8}
    config = read(tmp_path, ONEVISION, pixels=plain, frames=frames)
    assert config.image.video == VideoSpec("resize", frames=8)
    frames |= {"size": {"shortest_edge": 336}, "crop_size": 336}
    video = read(tmp_path, VIDEO, pixels=NEXT_PIXELS, frames=frames).image.video
    assert (video.mode, video.frames) == ("square", 8)


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        (
            NEXT | {"image_grid_pinpoints": [[336, 600]]},
            {},
            "image_grid_pinpoints.*multiples of 336",
        ),
        (NEXT | {"image_grid_pinpoints": []}, {}, "image_grid_pinpoints"),
        (NEXT | {"image_grid_pinpoints": [[336, 336]]}, {"pixels": NEXT_PIXELS}, "must be equal"),
        (NEXT | {"vision_feature_select_strategy": "full"}, {}, "square of patches"),
        (ONEVISION | {"vision_feature_select_strategy": "default"}, {}, "square of patches"),
        (ONEVISION | {"vision_aspect_ratio": "anyres"}, {}, "vision_aspect_ratio='anyres'.*max_9"),
        (ONEVISION | {"vision_aspect_ratio": "anyres_max_0"}, {}, "anyres_max_0"),
        (ONEVISION, {"processor": {"vision_aspect_ratio": "anyres_max_4"}}, "anyres_max_4.*equal"),
        (NEXT, {"processor": {"patch_size": 16}}, "patch_size=16.*14"),
        (NEXT, {"pixels": NEXT_PIXELS | {"crop_size": 224}}, "crop_size"),
        (NEXT, {"pixels": NEXT_PIXELS | {"image_processor_type": "CLIPImageProcessor"}}, "CLIP"),
        (ONEVISION, {"pixels": ONEVISION_PIXELS | {"size": {"height": 224, "width": 224}}}, "224"),
        (ONEVISION, {"frames": FRAMES | {"size": {"height": 224, "width": 224}}}, "frames of 224"),
        (ONEVISION | {"video_token_index": 151646}, {}, "video_token_index.*same placeholder"),
        (ONEVISION | {"video_token_index": 152000}, {}, "video_token_index=152000"),
        (VIDEO | {"spatial_pool_mode": "max"}, {}, "spatial_pool_mode='max'"),
        (VIDEO | {"spatial_pool_stride": 4}, {}, "spatial_pool_stride=4"),
        (NEXT | {"llava_jax": {"tiling": {"cap": "x"}, "what": 1}}, {}, "llava_jax.*no what"),
        (NEXT | {"llava_jax": [1]}, {}, "llava_jax"),
        (NEXT | {"model_type": "llava_next_video2"}, {}, "llava_next_video2"),
    ],
)
def test_what_is_refused(config, files, words, tmp_path):
    with pytest.raises(LlavaError, match=words) as error:
        read(tmp_path, config, **files)
    assert ".json" in str(error.value) and "\n" not in str(error.value)


def test_an_order_that_nobody_has(tmp_path):
    from llava_jax.weights.read.llava_folder import open_llava

    read(tmp_path, NEXT)
    with pytest.raises(LlavaError, match="pinpoint_order is 'wide': choose one of hf, original"):
        open_llava(tmp_path, pinpoint_order="wide")


ODD = [None, True, -1, 0, 3, 0.5, "x", [], [1, "y"], [[1, 2]], {}, {"z": 1}, 10**30]


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision", "llava_next_video"])
def test_any_value_is_read_or_told(model_type, tmp_path):
    """Never a crash, whatever a folder holds."""
    if model_type == "llava_onevision":
        config, pixels = dict(ONEVISION), ONEVISION_PIXELS
        config |= {"vision_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": [[384, 768]]}
    else:
        config, pixels = VIDEO | {"model_type": model_type}, NEXT_PIXELS
        config |= {"spatial_pool_mode": "average", "spatial_pool_stride": 2}
    config |= {"llava_jax": {"tiling": {"rounded": False}}}
    frames = FRAMES | {"num_frames": 4, "size": pixels["size"]}
    processor = {"patch_size": 14, "vision_aspect_ratio": "anyres_max_9", "video_processor": {}}
    files = {"config": config, "pixels": pixels, "frames": frames, "processor": processor}
    for name, values in files.items():
        for key in values:
            for value in ODD:
                changed = files | {name: values | {key: value}}
                try:
                    read(tmp_path, **changed)
                except LlavaError as error:
                    assert ".json" in str(error) and "\n" not in str(error)
