"""What is written of LLaVA-NeXT, OneVision and their video models: in both forms, and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax import cli  # noqa: E402
from llava_jax.models.video import VideoSpec  # noqa: E402
from llava_jax.weights.export import hugging_face, write_folder  # noqa: E402
from llava_jax.weights.read.llava_folder import load_llava, open_llava  # noqa: E402
from tests.tiny_model import random_image  # noqa: E402
from tests.weights.conftest import edit_config  # noqa: E402
from tests.weights.family_models import (  # noqa: E402
    CLASSES,
    family_model,
    family_tokenizer,
    save_family,
)
from tests.weights.test_family_original import (  # noqa: E402
    NEXT,
    NEXT_VIDEO,
    ONEVISION,
    VIDEO,
    write_original,
)

TEXTS = {"llava_next": "mistral", "llava_next_video": "llama", "llava_onevision": "qwen2"}


@pytest.fixture(scope="module", params=CLASSES)
def folder(request, tmp_path_factory):
    """A Hugging Face folder of each class."""
    folder = tmp_path_factory.mktemp("source") / request.param
    return save_family(folder, family_model(request.param, TEXTS[request.param]))


def run(*command: object) -> None:
    assert cli.main([*map(str, command)]) == 0


def same_files(first, second) -> None:
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def same_model(first, second, **changes) -> None:
    (config, params), (other, again) = load_llava(first), load_llava(second)
    assert dataclasses.replace(config, **changes) == dataclasses.replace(other, **changes)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_hugging_face(folder, tmp_path):
    """Loads strictly in transformers, with the names that 4.45 to 5.24 read; again the same."""
    out, again = tmp_path / "out", tmp_path / "again"
    run("convert", folder, "--out", out)
    run("convert", out, "--out", again)
    same_files(out, again)
    same_model(folder, out)
    names = set(load_file(out / "model.safetensors"))
    assert {"image_newline", "language_model.model.norm.weight"} < names
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    _, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert "llava_jax" not in json.loads((out / "config.json").read_text())
    # Transformers 4 does not have the name under which 5 saves a plain tokenizer.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    if folder.name == "llava_next":  # processors of videos ask for torchvision
        processor = transformers.AutoProcessor.from_pretrained(out)
        inputs = processor(text="<image>?", images=random_image(0, (50, 20)), return_tensors="pt")
        tokens = len(open_llava(out).config.layouts([(50, 20)])[0])
        assert (inputs["input_ids"] == 259).sum() == tokens


def test_a_processor_that_lacks_everything_is_completed(folder, tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    model = family_model(folder.name, TEXTS[folder.name])
    model.save_pretrained(bare)
    family_tokenizer().save_pretrained(bare)
    opened = open_llava(bare)
    assert "no preprocessor_config.json" in opened.notes[0]
    run("convert", bare, "--out", out)
    same_model(bare, out)
    assert not open_llava(out).notes
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_grid_pinpoints"] == model.config.image_grid_pinpoints
    processor = json.loads((out / "processor_config.json").read_text())
    name = CLASSES[folder.name]["name"]
    assert processor["processor_class"] == f"{name}Processor"
    if name == "LlavaOnevision":
        assert (processor["num_image_tokens"], processor["vision_aspect_ratio"]) == (
            16,
            "anyres_max_2",
        )
    else:
        assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (7, 1)
    frames = out / "video_preprocessor_config.json"
    assert frames.exists() is (name != "LlavaNext")


def test_there_and_back(folder, tmp_path):
    """Hugging Face's form, the original's, and Hugging Face's again."""
    original, back, again = (tmp_path / name for name in ("original", "back", "again"))
    run("export", "--checkpoint", folder, "--format", "llava", "--out", original)
    ids = {"image_token_id": -200, "video_token_id": None}
    same_model(folder, original, **ids)
    assert "model.image_newline" in load_file(original / "model.safetensors")
    run("export", "--checkpoint", original, "--format", "hf", "--out", back)
    same_model(original, back, **ids)
    run("export", "--checkpoint", back, "--format", "llava", "--out", again)
    first, last = (load_file(f / "model.safetensors") for f in (original, again))
    assert first.keys() == last.keys()
    jax.tree.map(np.testing.assert_array_equal, first, last)


ORIGINALS = {
    "next": ("llava_next", NEXT),
    "next video": ("llava_next_video", NEXT_VIDEO),
    "onevision": ("llava_onevision", ONEVISION),
    "llava video": ("llava_onevision", VIDEO),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_become_hugging_face_folders(name, tmp_path, capsys):
    """With what transformers does otherwise under a key of ours, and in a message."""
    kind, config = ORIGINALS[name]
    model = family_model(kind, "qwen2" if "one" in kind else "llama")
    source = write_original(tmp_path / "model", model, config)
    family_tokenizer().save_pretrained(source)
    out, again = tmp_path / "out", tmp_path / "again"
    capsys.readouterr()
    run("convert", source, "--out", out)
    said = capsys.readouterr().err
    run("convert", out, "--out", again)
    same_files(out, again)
    same_model(source, out, image_token_id=259, video_token_id=None)
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == kind
    assert values["llava_jax"]["tiling"] == {"rounded": False}
    assert "keeps tiling.rounded=False" in said
    assert (values["llava_jax"].get("video") is not None) is (name == "llava video")
    if name == "llava video":
        assert open_llava(out).config.image.video == VideoSpec(
            newline="grid", frames=64, time_instruction=True
        )
    loaded, info = getattr(transformers, values["architectures"][0]).from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info.values()), info
    newline = model.state_dict()["model.image_newline"].numpy()
    np.testing.assert_array_equal(loaded.state_dict()["model.image_newline"].numpy(), newline)


def test_the_order_that_was_asked_for_is_kept(tmp_path):
    source = save_family(tmp_path / "source", family_model("llava_next"))
    out, again = tmp_path / "out", tmp_path / "again"
    run("convert", source, "--pinpoint_order", "original", "--out", out)
    wanted = open_llava(source, pinpoint_order="original").config
    assert open_llava(out).config == wanted != open_llava(source).config
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((out / name).read_text())
        assert values["image_grid_pinpoints"][0] == [56, 28]
    run("convert", out, "--out", again)
    same_files(out, again)


@pytest.mark.parametrize("form", ["hf", "llava"])
def test_the_order_that_was_asked_for_decides_the_rounding(form, tmp_path):
    """Also where our key says how the model was read before."""
    source, out = save_family(tmp_path / "source", family_model("llava_next")), tmp_path / "out"
    asked = {"hf": "original", "llava": "hf"}[form]
    held = asked == "hf"
    run("convert", source, "--pinpoint_order", asked, "--out", tmp_path / "read")
    run("export", "--checkpoint", tmp_path / "read", "--format", form, "--out", out)
    values = json.loads((out / "config.json").read_text())
    assert values["llava_jax"] == {"tiling": {"rounded": held}}
    for order, rounded in ((None, held), ("hf", True), ("original", False)):
        assert open_llava(out, pinpoint_order=order).config.image.tiling.rounded is rounded
    run("convert", out, "--pinpoint_order", form.replace("llava", "original"), "--out", out / "own")
    again = open_llava(out / "own").config.image.tiling
    assert again.rounded is not held


def test_a_picture_in_one_view_by_request(tmp_path):
    model = family_model("llava_onevision", "qwen2")
    source, out = write_original(tmp_path / "model", model, ONEVISION), tmp_path / "out"
    family_tokenizer().save_pretrained(source)
    run("convert", source, "--image_mode", "resize", "--out", out)
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "llava" and open_llava(out).config.image.mode == "resize"
    assert "image_newline" not in load_file(out / "model.safetensors")
    saved = save_family(tmp_path / "saved", model)
    run("convert", saved, "--image_mode", "pad", "--out", tmp_path / "padded")
    padded = open_llava(tmp_path / "padded").config
    assert padded.image.mode == "pad" and padded.image.tiling is None


def test_a_head_of_its_own_is_kept_in_one_view(tmp_path):
    """The config says tied, and the head differs from the table: in tiles and without them."""
    source = save_family(tmp_path / "source", family_model("llava_next", "qwen2"))
    values = json.loads((source / "config.json").read_text())
    assert values["text_config"]["tie_word_embeddings"]
    config, params = load_llava(source)
    run("convert", source, "--image_mode", "pad", "--out", tmp_path / "padded")
    for folder, mode in ((source, "pad"), (tmp_path / "padded", None)):
        one_view, found = load_llava(folder, image_mode=mode)
        assert one_view.image.mode == "pad" and one_view.decoder == config.decoder
        assert not one_view.decoder.tie_word_embeddings
        jax.tree.map(np.testing.assert_array_equal, found["decoder"], params["decoder"])


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_other_merges_stay_in_the_original_form(merge, tmp_path, capsys):
    model = family_model("llava_next")
    source = write_original(tmp_path / "model", model, NEXT | {"mm_patch_merge_type": merge})
    family_tokenizer().save_pretrained(source)
    run("convert", source, "--out", tmp_path / "out")
    same_model(source, tmp_path / "out")
    assert "mm_patch_merge_type" in json.loads((tmp_path / "out/config.json").read_text())
    command = ["export", str(source), "--format", "hf", "--out", str(tmp_path / "no")]
    assert cli.main(command) == 1
    assert f"does not merge tiles as {merge}; use --format llava" in capsys.readouterr().err


def test_a_chat_template_of_ours_has_videos(tmp_path):
    model = family_model("llava_onevision", "qwen2")
    source = write_original(tmp_path / "model", model, ONEVISION)
    family_tokenizer().save_pretrained(source)
    run("convert", source, "--out", tmp_path / "out")
    assert open_llava(tmp_path / "out").words().template == "chatml"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n<|im_start|>assistant\n" in text


def test_a_model_that_takes_no_videos_still_has_the_token_that_its_class_has_for_them(tmp_path):
    """As one that train.py made of a language model, with tiles alone."""
    source, out = tmp_path / "source", tmp_path / "out"
    opened = open_llava(save_family(source, family_model("llava_onevision", "qwen2")))
    image = dataclasses.replace(opened.config.image, video=None)
    config = dataclasses.replace(opened.config, image=image, video_token_id=None)
    run_of_train = dataclasses.replace(opened, config=config, folder=tmp_path / "run")
    write_folder(hugging_face(run_of_train, None, "chatml"), out)
    assert open_llava(out).config == config
    values = json.loads((out / "config.json").read_text())
    assert values["llava_jax"] == {"video": None}
    assert values["video_token_index"] not in (None, values["image_token_index"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(values["video_token_index"]) == "<video>"


def test_own_keys_that_say_nothing_new_are_left_out(tmp_path):
    source = save_family(tmp_path / "source", family_model("llava_next"))
    edit_config(source, llava_jax={"tiling": {"rounded": True}})
    run("convert", source, "--out", tmp_path / "out")
    assert "llava_jax" not in json.loads((tmp_path / "out/config.json").read_text())
