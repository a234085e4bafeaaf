"""What `convert` writes besides weights: complete, whatever the source lacked."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax import cli  # noqa: E402
from llava_jax.data.media import preprocess  # noqa: E402
from llava_jax.errors import LlavaError  # noqa: E402
from llava_jax.inference.model import Llava  # noqa: E402
from llava_jax.models.llava import normalize_images  # noqa: E402
from llava_jax.text.conversation import Turn  # noqa: E402
from llava_jax.weights.read.llava_folder import open_llava  # noqa: E402
from tests.tiny_model import byte_tokenizer, random_image  # noqa: E402
from tests.weights.conftest import edit_config  # noqa: E402
from tests.weights.test_original import Parts  # noqa: E402
from tests.weights.test_parity import tiny_llava  # noqa: E402

JINJA = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' assistant:' }}{% endif %}"
)
PROCESSOR, PICTURES = "processor_config.json", "preprocessor_config.json"


def source(folder, mark="<image>", **model):
    """A LLaVA of transformers with everything that its processor needs, the placeholder last."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True)], special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
    theirs = tiny_llava(vocab_size=320, image_token_index=len(tokenizer) - 1, **model)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    siglip = model.get("tower", "") == "siglip_vision_model"
    (folder / PROCESSOR).write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "image_token": mark,
                "patch_size": 7,
                "num_additional_image_tokens": int(not siglip),
                "vision_feature_select_strategy": model.get(
                    "vision_feature_select_strategy", "default"
                ),
            }
        )
    )
    square = {"height": 28, "width": 28}
    kind = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
    size = square if siglip else {"shortest_edge": 28}
    values = {"image_processor_type": kind, "size": size, "crop_size": square, "resample": 3}
    (folder / PICTURES).write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text(JINJA.replace("<image>", mark))
    return theirs


def edit(name: str, **changes):
    def change(folder) -> None:
        values = json.loads((folder / name).read_text())
        values |= changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return change


def move_template(folder) -> None:
    edit("tokenizer_config.json", chat_template=JINJA)(folder)
    (folder / "chat_template.jinja").unlink()


LACKING = {
    "nothing": lambda folder: None,
    "processor_config.json": lambda folder: (folder / PROCESSOR).unlink(),
    "patch_size": edit(PROCESSOR, patch_size=...),
    "null patch_size": edit(PROCESSOR, patch_size=None),
    "num_additional_image_tokens": edit(PROCESSOR, num_additional_image_tokens=...),
    "the right num_additional_image_tokens": edit(PROCESSOR, num_additional_image_tokens=0),
    "strategy": edit(PROCESSOR, vision_feature_select_strategy=...),
    "all but the class": lambda folder: (folder / PROCESSOR).write_text(
        '{"processor_class": "LlavaProcessor"}'
    ),
    "image_processor_type": edit(PICTURES, image_processor_type=...),
    "preprocessor_config.json": lambda folder: (folder / PICTURES).unlink(),
    "a template of the processor": move_template,
}
MODELS = {
    "CLIP": {},
    "CLIP, class token": {"vision_feature_select_strategy": "full"},
    "SigLIP": {"tower": "siglip_vision_model", "vision_feature_select_strategy": "full"},
    "SigLIP, first patch dropped": {"tower": "siglip_vision_model"},
}


def asked_in_transformers(folder) -> tuple[dict, np.ndarray]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=random_image(0), return_tensors="pt")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return inputs, model(**inputs).logits.numpy()


@pytest.mark.parametrize(
    "model, lacking",
    [("CLIP", lacking) for lacking in LACKING]
    + [(model, "all but the class") for model in list(MODELS)[1:]],
)
def test_convert_completes_the_processor(model, lacking, tmp_path):
    (tmp_path / "source").mkdir()
    source(tmp_path / "source", **MODELS[model])
    LACKING[lacking](tmp_path / "source")
    if lacking == "image_processor_type" and model.startswith("SigLIP"):
        pytest.skip("the type says which defaults are meant")
    out = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path / "source"), "--out", str(out)]) == 0
    inputs, logits = asked_in_transformers(out)
    ours = Llava.from_pretrained(out)
    prompt = ours.prompt_ids([Turn("human", "<image>What?")], 1)
    assert inputs["input_ids"][0].tolist() == prompt.tolist()
    found = ours.logits(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy())
    np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("mode", "wanted"), [("pad", "square"), ("square", "pad")])
def test_convert_writes_the_mode_that_was_asked_for(mode, wanted, nested, tmp_path, capsys):
    """transformers prepares a picture as we do; no key of ours is needed for it."""
    folder, out, again = (tmp_path / name for name in ("source", "out", "again"))
    folder.mkdir()
    source(folder)
    if mode == "pad":
        edit(PICTURES, image_processor_type="LlavaImageProcessor", do_pad=True)(folder)
    if nested:  # as transformers 5 writes it
        edit(PROCESSOR, image_processor=json.loads((folder / PICTURES).read_text()))(folder)
        (folder / PICTURES).unlink()
    assert open_llava(folder).config.image.mode == mode
    command = ["convert", str(folder), "--image_mode", wanted, "--out", str(out)]
    assert cli.main(command) == 0 and "llava-jax" not in capsys.readouterr().err
    assert "llava_jax" not in json.loads((out / "config.json").read_text())
    assert "image_processor" not in json.loads((out / PROCESSOR).read_text())
    spec, picture = open_llava(out).config.image, random_image(0, (50, 20))
    assert spec.mode == wanted
    ours = np.asarray(normalize_images(spec, preprocess(picture, spec)))
    theirs = transformers.AutoProcessor.from_pretrained(out).image_processor(picture)
    theirs = np.asarray(theirs["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-6)
    assert cli.main(["convert", str(out), "--out", str(again)]) == 0
    assert (again / PICTURES).read_bytes() == (out / PICTURES).read_bytes()


def test_convert_refuses_a_folder_without_a_tokenizer(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    source(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).unlink()
    out = tmp_path / "out"
    assert cli.main(["convert", "--checkpoint", str(tmp_path / "source"), "--out", str(out)]) == 1
    assert f"{tmp_path / 'source'} has no tokenizer" in capsys.readouterr().err
    assert not out.exists()


# --- another spelling of the placeholder ----------------------------------------------------------

MARK = "<|reserved_special_token_69|>"


def test_a_placeholder_of_another_name(tmp_path):
    (tmp_path / "source").mkdir()
    source(tmp_path / "source", mark=MARK)
    ours = Llava.from_pretrained(tmp_path / "source")
    inputs, logits = asked_in_transformers(tmp_path / "source")
    prompt = ours.prompt_ids([Turn("human", "<image>What?")], 1)
    assert inputs["input_ids"][0].tolist() == prompt.tolist()
    found = ours.logits(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy())
    np.testing.assert_allclose(found, logits, atol=1e-4)
    plain = ours.prompt_ids([Turn("human", f"<image>Is {MARK} here?")], 1)
    assert (plain == ours.config.image_token_id).sum() == ours.config.tokens_per_tile
    out = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path / "source"), "--out", str(out)]) == 0
    again, same = asked_in_transformers(out)
    assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
    np.testing.assert_array_equal(same, logits)


def test_an_adapter_keeps_the_placeholder_of_its_base(tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter):
        folder.mkdir()
    source(base, mark=MARK)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    halves = {"A": np.ones((1, 32), np.float32), "B": np.ones((32, 1), np.float32)}
    tensors = {f"{module}.lora_{half}.weight": values for half, values in halves.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    command = ["convert", "--checkpoint", str(adapter), "--base", str(base), "--out", str(out)]
    assert cli.main(command) == 0
    assert open_llava(out).config.image_token_id == open_llava(base).config.image_token_id
    inputs, before = asked_in_transformers(base)
    again, after = asked_in_transformers(out)
    assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("template", [None, JINJA])
def test_an_ordinary_token_is_no_placeholder(template, tmp_path):
    (tmp_path / "source").mkdir()
    source(tmp_path / "source", mark="<other>")
    (tmp_path / "source" / "chat_template.jinja").unlink()
    if template:
        (tmp_path / "source" / "chat_template.jinja").write_text(template)
    edit_config(tmp_path / "source", image_token_index=byte_tokenizer().encode("<")[0])
    with pytest.raises(LlavaError, match="for the text '<': an image needs a token of its own"):
        Llava.from_pretrained(tmp_path / "source")


def test_a_template_of_ours_and_a_placeholder_of_another_name(tmp_path):
    """Without a chat template pictures stand between texts; plain text still cannot make one."""
    (tmp_path / "source").mkdir()
    source(tmp_path / "source", mark=MARK)
    (tmp_path / "source" / "chat_template.jinja").unlink()
    ours = Llava.from_pretrained(tmp_path / "source", template="llama_2")
    ids = ours.prompt_ids([Turn("human", "<image>\nWhat?")], 1)
    assert (ids == ours.config.image_token_id).sum() == ours.config.tokens_per_tile
    plain = ours.prompt_ids([Turn("human", f"<image>Is {MARK} here?")], 1)
    assert (plain == ours.config.image_token_id).sum() == ours.config.tokens_per_tile


# --- the words of the original's form -------------------------------------------------------------

TEXT_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_original_form_keeps_its_words(name, tmp_path, capsys):
    """A LLaVA on Llama-2-chat, whose tokenizer brings a template written for texts alone."""
    parts = Parts()
    parts.text.resize_token_embeddings(300)
    parts.tower.save_pretrained(tmp_path / "clip-vit-tiny")
    folder = parts.write(tmp_path / "model", parts.tensors(), vocab_size=300)
    byte_tokenizer().save_pretrained(folder)
    if name.endswith("jinja"):
        (folder / name).write_text(TEXT_ONLY)
    else:
        edit(name, chat_template=TEXT_ONLY)(folder)
    words = open_llava(folder, allow_pickle=True).words()
    assert (words.chat_template, words.template) == (TEXT_ONLY, "mistral_instruct")
    ours = Llava.from_pretrained(folder, allow_pickle=True)
    ids = ours.prompt_ids([Turn("human", "<image>\nWhat?")], 1).tolist()
    count = ours.config.tokens_per_tile
    where = ids.index(-200)
    assert ids[where : where + count] == [-200] * count
    assert ours.tokenizer.decode(ids[:where]) == "[INST] "
    assert ours.tokenizer.decode(ids[where + count :]) == "\nWhat? [/INST]"
    capsys.readouterr()
    out = tmp_path / "out"
    assert cli.main(["convert", str(folder), "--allow_pickle", "--out", str(out)]) == 0
    assert "no chat template" not in capsys.readouterr().err
    assert (out / "chat_template.jinja").read_text() == TEXT_ONLY
    renamed = ["convert", str(folder), "--allow_pickle", "--template", "llama_2"]
    assert cli.main([*renamed, "--out", str(tmp_path / "renamed")]) == 0
    assert open_llava(tmp_path / "renamed").words().template == "llama_2"


def test_ends_of_answers_survive_convert_and_export(tmp_path):
    (tmp_path / "source").mkdir()
    source(tmp_path / "source")
    path = tmp_path / "source" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [257, 258]}))
    for command in (["convert"], ["export", "--format", "hf"], ["export", "--format", "llava"]):
        out = tmp_path / "-".join(command)
        arguments = [*command, "--checkpoint", str(tmp_path / "source"), "--out", str(out)]
        assert cli.main(arguments) == 0
        assert {257, 258} <= set(open_llava(out).words().stop_token_ids)
    path.unlink()
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    edit_config(tmp_path / "source", text_config=values["text_config"] | {"eos_token_id": 258})
    out = tmp_path / "config"
    assert cli.main(["convert", str(tmp_path / "source"), "--out", str(out)]) == 0
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [258]


def test_what_was_written_says_who_loads_it(tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    source(tmp_path / "clip")
    assert cli.main(["convert", str(tmp_path / "clip"), "--out", str(tmp_path / "a")]) == 0
    assert "loads in transformers, vLLM and llama.cpp" in capsys.readouterr().err
    (tmp_path / "two").mkdir()
    source(tmp_path / "two", vision_feature_layer=[-2, -1])
    assert cli.main(["convert", str(tmp_path / "two"), "--out", str(tmp_path / "b")]) == 0
    assert "loads in transformers alone" in capsys.readouterr().err


def test_one_way_to_name_a_model(tmp_path, capsys):
    for arguments in (["convert"], ["convert", "a", "--checkpoint", "b"]):
        assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert "name one model with --checkpoint DIR" in capsys.readouterr().err
