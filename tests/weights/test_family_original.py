"""LLaVA-NeXT, Interleave, OneVision and their video models in the form of the original code."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.models.anyres import NEXT_GRIDS  # noqa: E402
from llava_jax.models.presets import preset  # noqa: E402
from llava_jax.models.video import VideoSpec  # noqa: E402
from llava_jax.weights.families import DECODERS  # noqa: E402
from llava_jax.weights.read.llava_folder import load_llava, open_llava  # noqa: E402
from llava_jax.weights.read.original_pictures import original_pictures  # noqa: E402
from tests.weights.conftest import VISION, randomize  # noqa: E402
from tests.weights.family_models import ALL_PINPOINTS, family_model, save_family  # noqa: E402

TOWER = "model.vision_tower.vision_tower.vision_model."
NAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", TOWER),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
)
FIVE = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
NEXT = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": FIVE,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-tiny",
    "mm_resampler_type": None,
    "unfreeze_mm_vision_tower": True,
}
ONEVISION = NEXT | {
    "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "mm_vision_tower": "google/siglip-tiny",
    "use_pos_skipping": False,
}
VIDEO = ONEVISION | {
    "model_type": "llava_qwen",
    "mm_newline_position": "grid",
    "add_faster_video": False,
    "add_time_instruction": True,
}
NEXT_VIDEO = NEXT | {
    "mm_resampler_type": "spatial_pool",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
}


def write_original(folder, model, config: dict, inside=True, blocks=0, **more):
    """A model of transformers in the original's form, its encoder inside the file or beside it.

    Args:
      blocks: how many more the encoder's own folder has than run.
      more: tensors.
    """
    folder.mkdir(parents=True)
    values = model.config.text_config.to_dict()
    values |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": VISION["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(values | config))
    state = dict(more)
    for name, tensor in model.state_dict().items():
        old, new = next(pair for pair in NAMES if name.startswith(pair[0]))
        if inside or not new.startswith(TOWER):
            state[new + name.removeprefix(old)] = tensor.contiguous().clone()
    if values["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    c = model.config.vision_config
    c = type(c)(**(c.to_dict() | {"num_hidden_layers": c.num_hidden_layers + blocks}))
    kind = "SiglipVisionModel" if "siglip" in c.model_type else "CLIPVisionModel"
    tower = randomize(getattr(transformers, kind)(c))
    if not inside:
        tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    tower.save_pretrained(folder.parent / config["mm_vision_tower"].split("/")[1])
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Class of transformers -> (model, its config and parameters as read from its own folder)."""
    kinds = {"llava_next": "llama", "llava_next_video": "llama", "llava_onevision": "qwen2"}
    found = {}
    for kind, text in kinds.items():
        # In the order (height, width) of transformers, of what the original reads the other way.
        turned = [pair[::-1] for pair in (ALL_PINPOINTS if "one" in kind else FIVE)]
        model = family_model(kind, text, image_grid_pinpoints=turned)
        folder = save_family(tmp_path_factory.mktemp(kind) / "model", model)
        found[kind] = (model, *load_llava(folder))
    return found


def same(folder, expected: dict, **options):
    config, params = load_llava(folder, **options)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    return config


@pytest.mark.parametrize("inside", [True, False])
def test_next(inside, saved, tmp_path):
    model, theirs, params = saved["llava_next"]
    config = same(write_original(tmp_path / "model", model, NEXT, inside), params)
    # The same list means other tiles, which the saved model's list names the other way round.
    assert config.image.tiling.grids == theirs.image.tiling.grids == NEXT_GRIDS
    assert not config.image.tiling.rounded and theirs.image.tiling.rounded
    assert not config.image.tiling.one_view and config.image.video is None
    assert config.decoder == theirs.decoder and config.vision == theirs.vision
    other = open_llava(tmp_path / "model", pinpoint_order="hf").config.image.tiling
    assert other.rounded and other.grids[:2] == ((2, 1), (1, 2))


@pytest.mark.parametrize(("inside", "blocks"), [(True, 0), (True, 1), (False, 1)])
def test_onevision(inside, blocks, saved, tmp_path):
    """The last block of an encoder's own folder is taken away; the select layer is not read."""
    model, theirs, params = saved["llava_onevision"]
    folder = write_original(tmp_path / "model", model, ONEVISION, inside, blocks)
    config = same(folder, params)
    assert (config.feature_layer, config.vision) == (-1, theirs.vision)
    tiling = config.image.tiling
    assert (tiling.cap, tiling.one_view, tiling.rounded) == (2, True, False)
    assert tiling.grids == theirs.image.tiling.grids
    assert config.image.video == VideoSpec() == theirs.image.video
    assert config.image.mean == (0.5,) * 3 and config.decoder == theirs.decoder


def test_next_video(saved, tmp_path):
    model, theirs, params = saved["llava_next_video"]
    more = {"model.vision_resampler.pool.weight": torch.zeros(1)}
    folder = write_original(tmp_path / "model", model, NEXT_VIDEO, **more)
    assert same(folder, params).image.video == theirs.image.video
    assert "model.vision_resampler.pool.weight" in open_llava(folder).notes[0]


def test_llava_video(saved, tmp_path):
    model, _, params = saved["llava_onevision"]
    config = same(write_original(tmp_path / "model", model, VIDEO), params)
    assert config.image.video == VideoSpec(newline="grid", frames=64, time_instruction=True)
    assert len(config.layouts([(40, 30, 5)])[0]) == 5 * 2 * 3


def test_interleave_as_its_config_says_and_as_transformers_has_it(saved, tmp_path):
    model, _, _ = saved["llava_onevision"]
    values = {k: v for k, v in ONEVISION.items() if not k.startswith(("mm_newline", "mm_spatial"))}
    values |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": FIVE}
    folder = write_original(tmp_path / "model", model, values | {"model_type": "llava_qwen"})
    config = open_llava(folder).config
    assert config.image.tiling.one_view and not config.image.tiling.cap
    assert [len(x) for x in config.layouts([(40, 30)] * 2)] == [17, 17]
    flat = open_llava(folder, image_mode="resize")
    assert flat.config.image.tiling is None and "projector/newline" not in flat.params
    assert [len(x) for x in flat.config.layouts([(40, 30)] * 2)] == [16, 16]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_grid_pinpoints": "[(28, 56), (56, 28)]"}, ((1, 2), (2, 1))),
        ({"image_grid_pinpoints": "(1x2),...,(2x2)"}, ((1, 2), (2, 2))),
        ({"image_grid_pinpoints": "(2x2),(1x1)"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[28, 30]]}, "multiples of 28"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type"),
        ({"mm_patch_merge_type": "flat"}, "flat"),
        ({"mm_patch_merge_type": "spatial"}, "spatial"),
        ({"mm_newline_position": "frame"}, None),
        ({"mm_newline_position": "end"}, "mm_newline_position='end'"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode='max'"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver'"),
        ({"add_faster_video": True}, "add_faster_video"),
        ({"use_pos_skipping": True}, "use_pos_skipping"),
        ({"image_aspect_ratio": "anyres_max_x"}, "anyres_max_x"),
        ({"architectures": ["LlavaGemmaForCausalLM"]}, "LlavaGemmaForCausalLM"),
        ({"llava_jax": {"video": {"pool": "cubic"}}}, "llava_jax.*cubic"),
    ],
)
def test_options(change, words, saved, tmp_path):
    folder = write_original(tmp_path / "model", saved["llava_onevision"][0], ONEVISION | change)
    if isinstance(words, tuple):
        assert open_llava(folder).config.image.tiling.grids == words
    elif words in (None, "flat", "spatial"):
        image = open_llava(folder).config.image
        assert image.tiling.merge == (words or "spatial_unpad")
        assert (image.video is None) is (words == "flat")
        assert image.newline is (words is None)
    else:
        with pytest.raises(LlavaError, match=words) as error:
            open_llava(folder)
        assert "config.json" in str(error.value)


def test_a_class_token_among_the_features_of_a_tile_is_refused(saved, tmp_path):
    values = NEXT | {"mm_vision_select_feature": "cls_patch"}
    folder = write_original(tmp_path / "model", saved["llava_next"][0], values)
    with pytest.raises(LlavaError, match="config.json has mm_vision_select_feature='cls_patch'"):
        open_llava(folder)
    assert open_llava(folder, image_mode="pad").config.tokens_per_tile == 17
    values = ONEVISION | {"mm_vision_select_feature": "cls_patch"}  # its encoder has no class token
    folder = write_original(tmp_path / "siglip", saved["llava_onevision"][0], values)
    assert open_llava(folder).config.tokens_per_tile == 16


def test_a_newline_that_is_missing(saved, tmp_path):
    model, _, _ = saved["llava_next"]
    folder = write_original(tmp_path / "model", model, NEXT)
    tensors = {k: v for k, v in model.state_dict().items() if k != "model.image_newline"}
    state = {}
    for name, tensor in tensors.items():
        old, new = next(pair for pair in NAMES if name.startswith(pair[0]))
        state[new + name.removeprefix(old)] = tensor.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlavaError, match="missing model.mm_projector.image_newline|image_newline"):
        open_llava(folder)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_the_class_says_what_the_language_model_is(text, saved, tmp_path):
    model = family_model("llava_next", text)
    name = {"mistral": "LlavaMistralForCausalLM", "qwen2": "LlavaQwenForCausalLM"}[text]
    for kind in ("llava", "qwen2"):
        values = NEXT | {"model_type": kind, "architectures": [name]}
        folder = write_original(tmp_path / kind / "model", model, values)
        opened = open_llava(folder)
        assert opened.families.decoder.model_type == text
        assert not opened.config.image.tiling.one_view  # its encoder is CLIP


PINPOINTS_OF_ONEVISION = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "family", "values"),
    [
        ("llava16_7b", "llama", {"image_grid_pinpoints": [[12 * n for n in p] for p in FIVE]}),
        (
            "onevision_7b",
            "qwen2",
            {
                "image_aspect_ratio": "anyres_max_9",
                "image_grid_pinpoints": str(PINPOINTS_OF_ONEVISION),
                "mm_newline_position": "one_token",
                "mm_spatial_pool_mode": "bilinear",
                "mm_spatial_pool_stride": 2,
            },
        ),
    ],
)
def test_published_pictures_are_those_of_the_presets(name, family, values):
    """As config.json of llava-v1.6-vicuna-7b and llava-onevision-qwen2-7b-ov has them."""
    model = preset(name)
    tower = dataclasses.replace(model.image, mode="square", tiling=None, video=None)
    tower = dataclasses.replace(tower, mode="resize") if model.image.video else tower
    values = NEXT | values
    found = original_pictures(values, "config.json", tower, model.vision, DECODERS[family])
    assert found == model.image


ODD = [None, True, -1, 0, 3, 0.5, "x", "(1x)", "((", [], [1, "y"], [[1, 2]], {}, {"z": 1}, 10**30]


@pytest.mark.parametrize("values", [NEXT, ONEVISION, VIDEO, NEXT_VIDEO])
def test_any_value_is_read_or_told(values):
    """Never a crash, whatever a config.json holds."""
    model = preset("onevision_0p5b")
    tower = dataclasses.replace(model.image, size=28, mode="resize", tiling=None, video=None)
    family = DECODERS["qwen2"]
    read = lambda v: original_pictures(v, "config.json", tower, model.vision, family)
    read(values)
    for key in (*values, "frames_upbound", "s2", "llava_jax"):
        for value in ODD:
            try:
                read(values | {key: value})
            except LlavaError as error:
                assert "config.json" in str(error) and "\n" not in str(error)
