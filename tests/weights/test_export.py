"""What is written loads in transformers strictly, says the same, and is read back bit for bit."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from llava_jax import cli
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora
from llava_jax.models.vit import ViTConfig
from llava_jax.text.conversation import Turn
from llava_jax.weights.export import hugging_face, original, write_folder
from llava_jax.weights.families import families_of
from llava_jax.weights.formats.safetensors_files import SINGLE_FILE
from llava_jax.weights.load import load_model
from llava_jax.weights.read.llava_folder import LlavaFolder, open_llava
from llava_jax.weights.read.prompt_words import run_words
from llava_jax.weights.run_directory import (
    RunModel,
    Source,
    weights_checksum,
    write_run_model,
)
from llava_jax.weights.write.save import array_params
from tests.tiny_model import CONFIG, byte_tokenizer, config_with, random_image, random_params

CLIP = ViTConfig(16, 32, 3, 2, 4, 8, "quick_gelu", 1e-5, True, True, False, False)
SIGLIP = dataclasses.replace(
    CLIP, hidden_act="gelu_pytorch_tanh", class_token=False, pre_norm=False, patch_bias=True
)
FULL = 259  # the tokenizer's ids: no row is left for <image>
MODELS: dict[str, tuple[LlavaConfig, str]] = {
    "DINOv2, Llama": (CONFIG, "chatml"),
    "CLIP, tied Qwen2, full vocabulary": (
        dataclasses.replace(
            config_with(qkv_bias=True, tie_word_embeddings=True, vocab_size=FULL), vision=CLIP
        ),
        "v1",
    ),
    "SigLIP, Qwen3, full vocabulary": (
        dataclasses.replace(
            config_with(qk_norm=True, vocab_size=FULL),
            vision=SIGLIP,
            feature_layer=-1,
            image=ImageSpec(8, "resize"),
            projector_bias=False,
        ),
        "llama_3",
    ),
}


def in_memory(folder: Path, config: LlavaConfig, template: str) -> tuple[LlavaFolder, dict]:
    """A checkpoint of random parameters, its tokenizer in `folder`; and the parameters."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    tree = random_params(config)
    params = {
        f"{part}/{path}": array
        for part, branch in tree.items()
        for path, array in array_params(branch).items()
    }
    families = families_of(config)
    words = functools.partial(run_words, folder, template)
    return LlavaFolder(folder / "step", config, families, params, {}, words, folder), tree


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(folder in Hugging Face form, our model that went into it)."""
    folder = tmp_path_factory.mktemp("export")
    config, template = MODELS[request.param]
    checkpoint, tree = in_memory(folder / "tokenizer", config, template)
    write_folder(hugging_face(checkpoint, None), folder / "out")
    return folder / "out", Llava(config, tree, byte_tokenizer(), template)


def test_transformers_says_the_same(exported):
    """Strict loading, the processor's own prompt and pixels, and its logits."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder, ours = exported
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=random_image(0), return_tensors="pt")
    ids = inputs["input_ids"].numpy()
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    our_ids = np.where(ids == image_id, ours.config.image_token_id, ids)
    prompt = ours.prompt_ids([Turn("human", "<image>\nWhat is it?")], 1)
    assert our_ids[0].tolist() == prompt.tolist()
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits.numpy()
    logits = np.asarray(ours.logits(our_ids, inputs["pixel_values"]))
    known = ours.config.decoder.vocab_size
    np.testing.assert_allclose(logits, expected[..., :known], atol=1e-4)
    assert not (expected.argmax(-1) >= known).any()  # rows made for <image> never win


def test_read_back_bit_for_bit(exported, tmp_path):
    folder, ours = exported
    opened = open_llava(folder)
    assert opened.words().template == ours.template.name
    same = dataclasses.replace(
        opened.config, image_token_id=ours.config.image_token_id, decoder=ours.config.decoder
    )
    assert same == ours.config
    known = ours.config.decoder.vocab_size
    for path, lazy in opened.params.items():
        part, _, name = path.partition("/")
        expected = array_params(ours.engine.params[part])[name].values
        if name == "embed_tokens/embedding":
            np.testing.assert_array_equal(lazy.read()[:known], expected)
        elif name == "lm_head/kernel":
            np.testing.assert_array_equal(lazy.read()[:, :known], expected)
        else:
            blocks = [lazy.read(b) for b in range(len(lazy.tensors))]
            np.testing.assert_array_equal(np.stack(blocks) if lazy.stacked else blocks[0], expected)
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "again")]) == 0
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_what_serving_engines_look_for(exported):
    """Names of llava-hf checkpoints, and the ids that end an answer."""
    folder, ours = exported
    names = load_file(folder / SINGLE_FILE)
    block = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert {block, "language_model.model.norm.weight"} < names.keys()
    assert "multi_modal_projector.linear_2.weight" in names
    tied = ours.config.decoder.tie_word_embeddings
    assert ("language_model.lm_head.weight" in names) is not tied
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_seq_length"] == ours.config.tokens_per_tile
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert set(ours._ends) == set(generation["eos_token_id"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu"])
def test_original_form(projector, tmp_path):
    config = dataclasses.replace(CONFIG, vision=CLIP, projector=projector, use_im_start_end=False)
    checkpoint, tree = in_memory(tmp_path / "tokenizer", config, "chatml")
    out = tmp_path / "out"
    write_folder(original(checkpoint, None), out)
    names = load_file(out / SINGLE_FILE).keys()
    last = "weight" if projector == "linear" else "4.weight"
    assert {"model.embed_tokens.weight", "lm_head.weight", f"model.mm_projector.{last}"} < names
    assert "model.vision_tower.vision_tower.vision_model.post_layernorm.weight" in names
    opened = open_llava(out)
    assert opened.config == config and opened.words().template == "chatml"
    jax.tree.map(np.testing.assert_array_equal, opened.read(), jax.tree.map(np.asarray, tree))
    with pytest.raises(LlavaError, match=f"{projector}.*--format llava"):
        hugging_face(checkpoint, None)
    assert cli.main(["convert", str(out), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / SINGLE_FILE).read_bytes() == (out / SINGLE_FILE).read_bytes()


def test_the_path_of_the_encoder_changes_no_feature(tmp_path):
    """The original code wants a path for the name: both mean the same layers of a SigLIP."""
    image = ImageSpec(8, "resize", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = dataclasses.replace(CONFIG, vision=SIGLIP, feature_layer=-2, image=image)
    checkpoint, tree = in_memory(tmp_path / "tokenizer", config, "v1")
    out = tmp_path / "out"
    write_folder(original(checkpoint, None), out)
    assert open_llava(out).config == config
    values = json.loads((out / "config.json").read_text())
    values["mm_vision_tower"] = str(out / values["mm_vision_tower"])
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(LlavaError, match="config.json has changed"):
        open_llava(out)
    (out / "checksums.json").unlink()
    opened = open_llava(out)
    assert opened.config == config
    jax.tree.map(np.testing.assert_array_equal, opened.read(), jax.tree.map(np.asarray, tree))


def test_original_form_as_llama_cpp_takes_it_apart(tmp_path):
    """Its llava_surgery_v2.py sorts tensors by the beginnings of their names, of all files whose
    name has `model` in it; what each part leaves is a whole model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, vision=CLIP)
    checkpoint, _ = in_memory(tmp_path / "tokenizer", config, "v1")
    write_folder(original(checkpoint, None), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / SINGLE_FILE))
    encoder = {name for name in names if name.startswith("model.vision_tower")}
    projector = {name for name in names if name.startswith("model.mm_projector")}
    values = json.loads((tmp_path / "out/vision_tower/config.json").read_text())
    assert "projection_dim" in values  # of a layer that is not used; the encoder's script reads it
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig.from_dict(values))
    found = {name[name.index("vision_model.") :].removeprefix("vision_model.") for name in encoder}
    assert found == {key.removeprefix("vision_model.") for key in clip.state_dict()}
    layers = {f"model.mm_projector.{i}.{end}" for i in (0, 2) for end in ("weight", "bias")}
    assert projector == layers
    values = json.loads((tmp_path / "out/config.json").read_text()) | {"model_type": "llama"}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    assert names - encoder - projector == set(llama.state_dict())


def test_original_to_hugging_face_and_back(tmp_path):
    config = dataclasses.replace(CONFIG, vision=CLIP)
    checkpoint, _ = in_memory(tmp_path / "tokenizer", config, "v1")
    write_folder(original(checkpoint, None), tmp_path / "original")
    folders = {"hf": tmp_path / "hf", "llava": tmp_path / "back"}
    assert cli.main(["convert", str(tmp_path / "original"), "--out", str(folders["hf"])]) == 0
    command = ["export", str(folders["hf"]), "--format", "llava", "--out", str(folders["llava"])]
    assert cli.main(command) == 0
    first, last = (load_file(f / SINGLE_FILE) for f in (tmp_path / "original", folders["llava"]))
    assert first.keys() == last.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, last[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": dataclasses.replace(CONFIG.decoder, qk_norm=True)}, "qwen3"),
        ({"projector_bias": False}, "bias"),
        ({"feature_layer": (-2, -1)}, "as only transformers does"),
    ],
)
def test_what_the_original_form_cannot_say(change, words, tmp_path):
    config = dataclasses.replace(CONFIG, vision=CLIP, **change)
    with pytest.raises(LlavaError, match=f"{words}.*--format hf"):
        original(in_memory(tmp_path, config, "v1")[0], None)


def write_run(folder: Path) -> dict:
    """A run directory with one checkpoint of a whole model; returns its parameters."""
    _, tree = in_memory(folder / "tokenizer", CONFIG, "chatml")
    shutil.rmtree(folder / "tokenizer" / "step", ignore_errors=True)
    write_run_model(folder, RunModel(CONFIG, "chatml", {}))
    save_step(folder, 3, tree)
    return tree


def save_step(folder: Path, step: int, tree: dict) -> None:
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "checkpoints" / str(step) / "params").resolve(), tree)


def test_a_run_by_the_command(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    tree = write_run(run)
    command = ["export", str(run), "--format", "hf", "--out", str(out), "--dtype", "bfloat16"]
    assert cli.main(command) == 0
    assert "with checksums" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = open_llava(out).read("bfloat16")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), tree)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert cli.main(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_every_folder_says_how_its_model_writes_boxes(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_run(run)
    for convention in ("llava", "qwen_1000"):
        write_run_model(run, RunModel(CONFIG, "chatml", {}, box_convention=convention))
        assert load_model(run).box_convention == convention
        source = run
        for form in ("hf", "llava", "hf"):  # each from the one before
            out = tmp_path / f"{convention}-{source.name}-{form}"
            assert cli.main(["export", str(source), "--format", form, "--out", str(out)]) == 0
            assert load_model(out).box_convention == convention
            values = json.loads((out / "config.json").read_text())
            assert ("box_convention" in values) == (convention != "llava")
            source = out
    old = json.loads((run / "model.json").read_text())
    del old["box_convention"]  # as earlier versions wrote it
    (run / "model.json").write_text(json.dumps(old))
    assert load_model(run).box_convention == "llava"


def lora_run(folder: Path) -> tuple[Path, Path]:
    """(a run that trained LoRA and the projector, the Hugging Face LLaVA it started from)."""
    run, base = folder / "run", folder / "base"
    run.mkdir()
    lora = LoraConfig(2, 3.0, ("decoder/*", "vision/layers/*"))
    tree = write_run(run)
    assert cli.main(["export", str(run), "--format", "hf", "--out", str(base)]) == 0
    shapes = nn.meta.unbox(abstract_lora(lora, abstract_params(CONFIG)))
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    projector = jax.tree.map(lambda leaf: leaf + 1, tree["projector"])
    save_step(run, 4, {"lora": pairs, "projector": projector})
    frozen = {c: Source(base, weights_checksum(base)) for c in ("vision", "decoder")}
    # The base of a run keeps its vocabulary, and its image id, when they are those of the run.
    write_run_model(run, RunModel(open_llava(base).config, "chatml", frozen, lora))
    return run, base


def test_lora_apart(tmp_path, capsys):
    """Merged with the base by the reader of PEFT's adapters, it is the run with LoRA merged."""
    (run, base), adapter, merged = lora_run(tmp_path), tmp_path / "adapter", tmp_path / "merged"
    for name, out in (("peft", adapter), ("hf", merged)):
        assert cli.main(["export", str(run), "--format", name, "--out", str(out)]) == 0
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert "model.language_model.layers.1.mlp.up_proj" in settings["target_modules"]
    found, expected = open_llava(adapter, base=base).read(), open_llava(merged).read()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    for source in (base, merged):
        command = ["export", str(source), "--format", "peft", "--out", str(tmp_path / "no")]
        refused(command, capsys, str(source), "without LoRA")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(LlavaError, match="adapter_model.safetensors has changed"):
        open_llava(adapter, base=base)


def refused(command: list[str], capsys, *words: str) -> None:
    """The command says one line with these words and leaves nothing."""
    out = Path(command[command.index("--out") + 1])
    assert cli.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in error
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint, _ = in_memory(folder / "tokenizer", CONFIG, "chatml")
    write_folder(hugging_face(checkpoint, None), folder / "out")
    return folder / "out"


def test_no_room_on_the_disk(whole, tmp_path, capsys, monkeypatch):
    usage, asked = namedtuple("usage", "free")(10_000), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    refused(["convert", str(whole), "--out", str(tmp_path / "out")], capsys, "free")
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/out")
    assert cli.main(["convert", str(whole), "--out", str(tmp_path / "link")]) == 1
    assert asked == [tmp_path, tmp_path / "disk"]


def test_a_changed_source(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "source")
    path = tmp_path / "source" / SINGLE_FILE
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    command = ["convert", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    refused(command, capsys, str(path), "has changed")
    (tmp_path / "source" / "checksums.json").unlink()
    os.truncate(path, path.stat().st_size - 1)
    refused(command, capsys, str(path), "truncated", "tensor")


def test_a_value_too_large_for_float16(whole, tmp_path, capsys):
    checkpoint, tree = in_memory(tmp_path / "tokenizer", CONFIG, "chatml")
    large = {"norm": {"scale": tree["decoder"]["norm"]["scale"].at[0].set(1e6)}}
    checkpoint.params["decoder/norm/scale"] = array_params(large)["norm/scale"]
    with pytest.raises(LlavaError, match=r"model\.norm\.weight.*float16"):
        write_folder(hugging_face(checkpoint, "float16"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["tokenizer"]
    checkpoint, _ = in_memory(tmp_path / "tokenizer", CONFIG, "chatml")
    checkpoint.params["decoder/norm/scale"] = array_params(large)["norm/scale"]
    write_folder(hugging_face(checkpoint, "float32"), tmp_path / "large")
    with pytest.raises(LlavaError, match=r"model\.norm\.weight' in .*large/model.safetensors has"):
        write_folder(hugging_face(open_llava(tmp_path / "large"), "float16"), tmp_path / "out")


DIES_HALF_WAY = """
import dataclasses, os, signal, sys
from pathlib import Path
from llava_jax.weights.export import hugging_face, write_folder
from llava_jax.weights.read.llava_folder import open_llava
source, out = map(Path, sys.argv[1:])
folder = hugging_face(open_llava(source), None)
tensors, half = list(folder.tensors), len(folder.tensors) // 2
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
tensors[half] = dataclasses.replace(tensors[half], values=die)
write_folder(dataclasses.replace(folder, tensors=tensors), out)
"""


def test_a_process_that_is_killed_leaves_nothing_that_looks_complete(whole, tmp_path):
    """Killed half-way for real; the next one cleans up and finishes."""
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", DIES_HALF_WAY, whole, out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    assert cli.main(["convert", str(whole), "--out", str(out)]) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert (out / SINGLE_FILE).read_bytes() == (whole / SINGLE_FILE).read_bytes()
