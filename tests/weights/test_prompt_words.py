"""The words in which a folder's model is asked, wherever the folder says them."""

import json
import re

import pytest

from llava_jax.errors import LlavaError
from llava_jax.text.chat_template import chat_template
from llava_jax.text.templates import get_template
from llava_jax.weights.families import DECODERS
from llava_jax.weights.read.prompt_words import prompt_words, run_words

TEXT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
OTHER = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


def words(folder, config=None, family="llama", **options):
    return prompt_words([folder], config or {}, DECODERS[family], **options)


def put(folder, name: str, value) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    "name, value",
    [
        ("chat_template.jinja", TEXT),
        ("chat_template.json", {"chat_template": TEXT}),
        ("processor_config.json", {"chat_template": TEXT}),
        ("tokenizer_config.json", {"chat_template": TEXT}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": TEXT}]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "only", "template": TEXT}]}),
        ("chat_templates/default.jinja", TEXT),
    ],
)
def test_a_chat_template_is_found(name, value, tmp_path):
    put(tmp_path, name, value)
    found = words(tmp_path)
    assert found.chat_template == TEXT and found.source == str(tmp_path / name)
    assert not found.guessed and found.warning is None


ORDER = ("processor_config", "chat_template", "chat_template.jinja", "tokenizer_config")


@pytest.mark.parametrize("first", range(3))
def test_of_several_files_the_one_that_transformers_takes(first, tmp_path):
    for i, name in enumerate(ORDER[first:]):
        text = TEXT if i == 0 else OTHER
        if name.endswith("jinja"):
            put(tmp_path, name, text)
        else:
            put(tmp_path, f"{name}.json", {"chat_template": text})
    assert words(tmp_path).chat_template == TEXT
    transformers = pytest.importorskip("transformers")
    found, _ = transformers.processing_utils.ProcessorMixin.get_processor_dict(str(tmp_path))
    assert found["chat_template"] == TEXT


def test_the_text_that_export_writes_is_one_of_our_templates(tmp_path):
    put(tmp_path, "chat_template.jinja", chat_template(get_template("llama_3")))
    found = words(tmp_path)
    assert (found.template, found.chat_template) == ("llama_3", None)


def test_several_named_templates(tmp_path):
    named = [{"name": "short", "template": TEXT}, {"name": "tool_use", "template": OTHER}]
    put(tmp_path, "tokenizer_config.json", {"chat_template": named})
    with pytest.raises(LlavaError, match="short, tool_use and none called default.*--template"):
        words(tmp_path)
    assert words(tmp_path, template="tool_use").chat_template == OTHER
    assert words(tmp_path, template="v1").chat_template is None


def test_a_template_asked_for_counts_more_than_the_folder(tmp_path):
    put(tmp_path, "chat_template.jinja", TEXT)
    found = words(tmp_path, template="llama_2")
    assert (found.template, found.chat_template, found.guessed) == ("llama_2", None, False)
    with pytest.raises(LlavaError, match="unknown template 'x': choose one of .*llama_2"):
        words(tmp_path, template="x")


@pytest.mark.parametrize("value", [[1], {"chat_template": 3}, {"chat_template": [{"name": 1}]}])
def test_a_chat_template_that_is_none(value, tmp_path):
    put(tmp_path, "tokenizer_config.json", value)
    with pytest.raises(LlavaError, match="tokenizer_config.json"):
        words(tmp_path)


@pytest.mark.parametrize(
    "mark, template",
    [
        ("<|start_header_id|>", "llama_3"),
        ("<|im_start|>", "chatml"),
        ("<|assistant|>", "phi_3"),
        ("[INST]", "mistral_instruct"),
        ("<seed:bos>", "seed_oss"),
    ],
)
def test_a_guess_by_the_tokenizer(mark, template, tmp_path):
    put(tmp_path, "tokenizer.json", {"added_tokens": [{"id": 5, "content": mark}]})
    found = words(tmp_path)
    assert (found.template, found.guessed) == (template, True)
    assert f"using {template}, since its tokenizer has {mark}" in found.warning
    assert "--template" in found.warning and str(tmp_path) in found.warning


@pytest.mark.parametrize(
    "config, template",
    [
        ({"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, "llama_2"),
        ({"text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"}}, "v1"),
        ({"_name_or_path": "./checkpoints/llava-Mistral-7B"}, "mistral_instruct"),
        ({"version": "llava_llama_2"}, "llava_llama_2"),
    ],
)
def test_a_guess_by_the_name(config, template, tmp_path):
    found = words(tmp_path, config)
    assert (found.template, found.guessed) == (template, True)


def test_a_guess_by_the_folder_of_an_original_llama_2(tmp_path):
    folder = tmp_path / "llava-llama-2-13b-chat-lightning-preview"
    folder.mkdir()
    assert words(folder).template == "llama_2"


def test_a_guess_by_the_marks_of_pictures(tmp_path):
    assert words(tmp_path, marked=True).template == "v0"


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_without_any_other_hint(family, tmp_path):
    found = words(tmp_path, family=family)
    assert found.template == DECODERS[family].template and found.guessed
    get_template(found.template)


def test_an_adapter_that_leaves_its_words_to_the_base(tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    put(base, "chat_template.jinja", TEXT)
    put(base, "generation_config.json", {"eos_token_id": 4})
    found = prompt_words([adapter, base], {"eos_token_id": 2}, DECODERS["llama"])
    assert (found.chat_template, found.stop_token_ids) == (TEXT, (4,))


# --- ends of an answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generation, config, stops",
    [
        ({"eos_token_id": [257, 258]}, {"eos_token_id": 2}, (257, 258)),
        ({"eos_token_id": 258}, {}, (258,)),
        ({"bos_token_id": 1}, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {"eos_token_id": 2, "text_config": {"eos_token_id": [7, 8]}}, (7, 8)),
        (None, {"eos_token_id": 2, "text_config": {"eos_token_id": None}}, (2,)),
        (None, {"eos_token_id": -1}, ()),
        (None, {}, ()),
    ],
)
def test_ends_of_an_answer(generation, config, stops, tmp_path):
    if generation is not None:
        put(tmp_path, "generation_config.json", generation)
    assert words(tmp_path, config).stop_token_ids == stops


@pytest.mark.parametrize("value", ["2", [1, "2"], True, {"a": 1}, 2.0])
def test_an_end_that_is_no_token(value, tmp_path):
    put(tmp_path, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(LlavaError, match="generation_config.json has eos_token_id="):
        words(tmp_path)


def test_a_run_keeps_its_template_and_the_ends_of_its_start(tmp_path):
    put(tmp_path, "generation_config.json", {"eos_token_id": [5, 6]})
    put(tmp_path, "chat_template.jinja", TEXT)  # the start's, which training did not follow
    found = run_words(tmp_path, "v1")
    assert (found.template, found.chat_template) == ("v1", None)
    assert (found.stop_token_ids, found.guessed) == ((5, 6), False)
    assert run_words(tmp_path, "v1", "chatml").template == "chatml"


# --- LLaVA-NeXT and later -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, mark, template, stop",
    [
        ("llama", "</s>", "v1", "</s>"),  # Vicuna
        ("llama", "<|im_start|>", "chatml_direct", "<|im_end|>"),  # Yi
        ("llama", "<|start_header_id|>", "llama_3", "<|eot_id|>"),
        ("mistral", "</s>", "mistral_instruct", "</s>"),
        ("qwen2", "<|im_start|>", "chatml", "<|im_end|>"),
    ],
)
def test_the_original_code_asks_in_its_own_words(family, mark, template, stop, tmp_path):
    """Its folders hold the chat template of a language model that never saw a picture."""
    put(tmp_path, "tokenizer.json", {"added_tokens": [{"id": 5, "content": mark}]})
    put(tmp_path, "tokenizer_config.json", {"chat_template": TEXT})
    found = words(tmp_path, family=family, tiled=True, original=True)
    assert (found.template, found.chat_template) == (template, None)
    assert stop in get_template(template).stop
    assert f"for texts alone in {tmp_path}: using {template}" in found.warning
    assert words(tmp_path, family=family, tiled=True).chat_template == TEXT
    assert words(tmp_path, family=family, original=True).chat_template == TEXT


@pytest.mark.parametrize("text", ["{{ '<image>' }}", chat_template(get_template("v1"))])
def test_a_chat_template_for_pictures_counts_in_every_form(text, tmp_path):
    put(tmp_path, "chat_template.jinja", text)
    found = words(tmp_path, family="qwen2", tiled=True, original=True)
    assert not found.guessed and (found.chat_template == text or found.template == "v1")


def test_both_texts_of_a_template_of_ours(tmp_path):
    put(tmp_path, "chat_template.jinja", chat_template(get_template("chatml"), videos=True))
    assert (words(tmp_path).template, words(tmp_path).chat_template) == ("chatml", None)


@pytest.mark.parametrize("value", ["yolo", [], {}, None])
def test_an_unknown_box_convention_is_refused(value, tmp_path):
    words = re.escape(f"config.json has box_convention={value!r}: it must be one of llava")
    with pytest.raises(LlavaError, match=words):
        prompt_words([tmp_path], {"box_convention": value}, DECODERS["llama"])
