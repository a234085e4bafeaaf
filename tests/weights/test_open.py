"""`open_llava` on folders of every form but the original's: what they are, what goes with them."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from llava_jax import cli  # noqa: E402
from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.inference.model import Llava  # noqa: E402
from llava_jax.text.chat_template import chat_template  # noqa: E402
from llava_jax.text.conversation import Turn  # noqa: E402
from llava_jax.text.templates import get_template  # noqa: E402
from llava_jax.weights import hub  # noqa: E402
from llava_jax.weights.read.llava_folder import (  # noqa: E402
    is_llava_folder,
    load_decoder,
    load_vision,
    open_llava,
)
from tests.tiny_model import byte_tokenizer  # noqa: E402
from tests.weights.conftest import VISION, edit_config, randomize, with_tokenizer  # noqa: E402
from tests.weights.test_original import Parts  # noqa: E402
from tests.weights.test_parity import tiny_llava  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def refused(folder, *words: str, **options) -> None:
    with pytest.raises(LlavaError) as error:
        open_llava(folder, **options)
    for word in words:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


# --- LoRA on Hugging Face's LLaVA -----------------------------------------------------------------


@pytest.mark.parametrize("era", ["4", "5"])
def test_an_adapter_of_peft(era, saved, tmp_path):
    modules = {  # names in memory, which PEFT writes
        "language_model.layers.1.mlp.up_proj": ("decoder", "mlp", "up_proj", 1),
        "vision_tower.encoder.layers.0.self_attn.q_proj": ("vision", "self_attn", "q_proj", 0),
    }
    rng, adapter = np.random.default_rng(0), {}
    checkpoint = open_llava(saved)
    before = checkpoint.read()
    growth = {}
    for name, (part, *path, layer) in modules.items():
        size, out = before[part]["layers"][path[0]][path[1]]["kernel"][layer].shape
        down, up = rng.normal(size=(2, size)), rng.normal(size=(out, 2))
        if era == "4":
            name = name.replace("language_model.", "language_model.model.")
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        else:
            name = f"model.{name}"
        adapter[f"base_model.model.{name}.lora_A.weight"] = torch.tensor(down).float()
        adapter[f"base_model.model.{name}.lora_B.weight"] = torch.tensor(up).float()
        growth[part, *path, layer] = 4 * (up @ down).T
    safetensors_torch.save_file(adapter, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert is_llava_folder(tmp_path)
    refused(tmp_path, "LoRA adapter", "--base")
    merged = open_llava(tmp_path, base=saved)
    assert merged.idle.keys() == checkpoint.idle.keys()
    after = merged.read()
    for (part, group, layer_name, layer), expected in growth.items():
        kernel = lambda tree: tree[part]["layers"][group][layer_name]["kernel"]  # noqa: B023
        np.testing.assert_allclose(
            kernel(after)[layer], kernel(before)[layer] + expected, atol=1e-5
        )
        kernel(after)[layer] = kernel(before)[layer]
    jax.tree.map(np.testing.assert_array_equal, after, before)


# --- composed -------------------------------------------------------------------------------------


def test_a_language_model_and_an_encoder(llama_folder, tmp_path):
    config = transformers.SiglipVisionConfig(**VISION)
    randomize(transformers.SiglipVisionModel(config)).save_pretrained(tmp_path)
    refused(llama_folder, "language model alone", "--vision_tower")
    refused(tmp_path, "vision encoder alone")
    checkpoint = open_llava(llama_folder, vision_tower=tmp_path)
    assert checkpoint.config.image.mode == "resize"
    params, again = checkpoint.read(), open_llava(llama_folder, vision_tower=tmp_path).read()
    jax.tree.map(np.testing.assert_array_equal, params, again)
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], load_decoder(llama_folder)[1])
    vision = load_vision(tmp_path, num_blocks=2)[1]
    jax.tree.map(np.testing.assert_array_equal, params["vision"], vision)
    kernels = [params["projector"][f"linear_{i}"]["kernel"] for i in range(2)]
    for kernel in kernels:  # PyTorch's default for a linear layer
        assert 0.9 * 32**-0.5 < np.abs(kernel).max() <= 32**-0.5


def test_both_of_pickles(llama_folder, tmp_path):
    """As the first CLIP and Vicuna came."""
    clip = randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "vicuna").mkdir()
    config = (llama_folder / "config.json").read_bytes()
    (tmp_path / "vicuna/config.json").write_bytes(config)
    state = safetensors_torch.load_file(llama_folder / "model.safetensors")
    torch.save(state, tmp_path / "vicuna/pytorch_model.bin")
    expected = load_vision(tmp_path / "clip", num_blocks=2)[1], load_decoder(llama_folder)[1]
    (tmp_path / "clip/model.safetensors").unlink()
    torch.save(clip.state_dict(), tmp_path / "clip/pytorch_model.bin")
    towers = {"vision_tower": tmp_path / "clip"}
    refused(tmp_path / "vicuna", "pickle", "llava-jax convert --allow_pickle", **towers)
    with pytest.raises(LlavaError, match="is a pickle"):
        load_vision(tmp_path / "clip")
    composed = open_llava(tmp_path / "vicuna", **towers, allow_pickle=True).read()
    vision = load_vision(tmp_path / "clip", num_blocks=2, allow_pickle=True)[1]
    decoder = load_decoder(tmp_path / "vicuna", allow_pickle=True)[1]
    for found in ((composed["vision"], composed["decoder"]), (vision, decoder)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- what goes with the weights -------------------------------------------------------------------

USER_ONLY = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}>"
)


def test_template_and_tokenizer(copy):
    words = open_llava(copy).words()
    assert (words.template, words.guessed) == ("v1", True) and str(copy) in words.warning
    assert open_llava(copy).tokenizer_dir is None
    (copy / "chat_template.jinja").write_text(chat_template(get_template("chatml")))
    byte_tokenizer().save_pretrained(copy / "elsewhere")
    (copy / "elsewhere/tokenizer.json").rename(copy / "tokenizer.json")
    found = open_llava(copy)
    words = found.words()
    assert (words.template, words.chat_template, found.tokenizer_dir) == ("chatml", None, copy)
    assert not words.guessed and words.warning is None
    (copy / "chat_template.jinja").write_text(USER_ONLY)
    found = open_llava(copy)
    words = found.words()
    assert (words.template, words.chat_template) == ("v1", USER_ONLY)
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": USER_ONLY}))
    assert open_llava(copy).words().chat_template == USER_ONLY


def test_from_pretrained_asks_as_the_processor(tmp_path):
    tiny_llava(image_token_index=299, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(LlavaError, match="has no tokenizer"):
        Llava.from_pretrained(tmp_path)
    with_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text(USER_ONLY)
    model = Llava.from_pretrained(tmp_path)
    ids = model.prompt_ids([Turn("human", "red?")], images=1)
    assert model.tokenizer.decode(ids) == "user: " + "<image>" * 16 + "red?>"
    with_tokenizer(tmp_path, 303)
    with pytest.raises(LlavaError, match="does not fit the model.*<image>.*302.*300 rows"):
        Llava.from_pretrained(tmp_path)


def test_convert_refuses_a_tokenizer_that_does_not_fit(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llava(image_token_index=299, vocab_size=300).save_pretrained(source)
    with_tokenizer(source, 301)
    assert cli.main(["convert", str(source), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    for word in (str(source), "<image>", "300", "does not fit"):
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with_tokenizer(source, 300)
    edit_config(source, image_token_index=5)  # an ordinary token
    assert cli.main(["convert", str(source), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"{source} has <image> as 299" in message and "image_token_index=5" in message
    edit_config(source, image_token_index=299)
    assert cli.main(["convert", str(source), "--out", str(out)]) == 0


def test_from_pretrained_of_the_original_form(tmp_path):
    parts = Parts()
    parts.tower.save_pretrained(tmp_path / "clip-vit-tiny")
    folder = parts.write(tmp_path / "model", parts.tensors())
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with pytest.raises(LlavaError, match="--allow_pickle"):
        Llava.from_pretrained(folder)
    with pytest.raises(LlavaError, match="does not fit the model"):
        Llava.from_pretrained(folder, allow_pickle=True)


def test_kinds_of_folders(saved, llama_folder, tmp_path):
    assert is_llava_folder(saved)
    assert not is_llava_folder(llama_folder) and not is_llava_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mm_projector_type": "linear"}))
    assert is_llava_folder(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    assert not is_llava_folder(tmp_path)


def test_a_whole_llava_needs_nothing_else(saved, llama_folder):
    refused(saved, "whole LLaVA", "leave out base", base=llama_folder)
    refused(saved, "base is no/such", base="no/such")


# --- duplicates -----------------------------------------------------------------------------------


def test_a_parameter_under_the_names_of_two_eras(copy):
    tensors = safetensors_torch.load_file(copy / "model.safetensors")
    old, new = "language_model.model.norm.weight", "model.language_model.norm.weight"
    safetensors_torch.save_file(tensors | {new: tensors[old] + 1}, copy / "model.safetensors")
    refused(copy, old, new, "same parameter")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64", "int8"])
def test_a_dtype_that_is_no_parameters(dtype, copy):
    tensors = safetensors_torch.load_file(copy / "model.safetensors")
    name = "multi_modal_projector.linear_1.bias"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    safetensors_torch.save_file(tensors, copy / "model.safetensors")
    refused(copy, name, "model.safetensors", "is stored as")


def test_missing_and_misshapen_tensors_are_named_as_on_disk(copy):
    tensors = safetensors_torch.load_file(copy / "model.safetensors")
    gone = tensors.pop("language_model.model.layers.1.mlp.up_proj.weight")
    safetensors_torch.save_file(tensors, copy / "model.safetensors")
    refused(copy, "missing language_model.model.layers.1.mlp.up_proj.weight")
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] = gone.T.contiguous()
    safetensors_torch.save_file(tensors, copy / "model.safetensors")
    refused(copy, "language_model.model.layers.1.mlp.up_proj.weight is [32, 48] and not [48, 32]")


# --- the hub --------------------------------------------------------------------------------------


def test_a_name_of_the_hub_out_of_its_cache(copy, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--llava" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((copy / "config.json").read_bytes())
    refs = cache / "models--someone--llava" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert hub.local_folder("someone/llava").samefile(snapshot)
    assert hub.local_folder(str(copy)) == copy
    with pytest.raises(LlavaError, match="someone/else is no folder here") as error:
        hub.local_folder("someone/else")
    assert "\n" not in str(error.value)
