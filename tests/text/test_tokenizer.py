"""A tokenizer of a folder: the ids of transformers 4, whichever version is installed."""

import json
import re
import shutil

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from llava_jax.errors import LlavaError
from llava_jax.text import tokenizer as tokenizer_module
from llava_jax.text.tokenizer import load_tokenizer
from tests.tiny_model import byte_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = (
    *("red", " red", "\nred", "", "the  user"),
    *("USER: is it</s>ASSISTANT: blue</s>", "a</s> b", "<s>no"),
)


def write(folder, source, settings, model_type="llama", files=("tokenizer.model",)):
    folder.mkdir()
    for name in files:
        shutil.copy(source / name, folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def legacy_ids(pieces, text):
    """As transformers 4 and the original LLaVA: SentencePiece on what stands between tokens."""
    ids = []
    for part in re.split("(</s>|<s>)", text):
        ids += [("<unk>", "<s>", "</s>").index(part)] if part in NAMES.values() else (
            pieces.encode(part) if part else []
        )  # fmt: skip
    return ids


@pytest.mark.parametrize("settings, model_type, before, after", [
    ({"tokenizer_class": "LlamaTokenizer"}, "llama", [1], []),
    ({"tokenizer_class": "LlamaTokenizer"}, "llava", [1], []),
    ({"tokenizer_class": "LlamaTokenizerFast"}, "mistral", [1], []),
    ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, "llava_llama", [1], []),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "llama", [], []),
    ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, "llama", [1], [2]),
    (None, "llama", [1], []),
])  # fmt: skip
def test_what_a_sentencepiece_folder_leaves_open(
    sentencepiece_folder, tmp_path, settings, model_type, before, after
):
    tokenizer = load_tokenizer(write(tmp_path / "t", sentencepiece_folder, settings, model_type))
    pieces = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in TEXTS:
        found = tokenizer(text)["input_ids"]
        assert found == before + legacy_ids(pieces, text) + after, text
        if "s>" not in text:
            assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_a_model_that_is_not_legacy_has_no_space_after_a_special_token(
    sentencepiece_folder, tmp_path
):
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    tokenizer = load_tokenizer(write(tmp_path / "t", sentencepiece_folder, settings))
    first, second = (tokenizer.tokenize(text)[-1] for text in ("blue", "x</s>blue"))
    assert (first[0], second[0]) != ("▁", "▁") and first != second


@pytest.mark.parametrize("settings, says", [
    ({"tokenizer_class": "LlamaTokenizer"}, "<s> before a text"),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}, ""),
])  # fmt: skip
def test_what_was_decided_is_said_once(sentencepiece_folder, tmp_path, settings, says, capsys):
    folder = write(tmp_path / "t", sentencepiece_folder, settings)
    tokenizer_module._report.cache_clear()
    load_tokenizer(folder), load_tokenizer(folder)
    err = capsys.readouterr().err
    assert says in err and err.count("like transformers 4") == (1 if says else 0)


@pytest.mark.parametrize("model_type", ["llama", "llava", "mistral"])
def test_tokenizer_json_is_read_as_it_is(tokenizers, tmp_path, model_type):
    tokenizers["llama2"].save_pretrained(tmp_path)  # a space at each start
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    folder = write(tmp_path / "t", tmp_path, settings, model_type, ["tokenizer.json"])
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == file.encode(text).ids


def test_a_folder_of_transformers_5_is_read_as_5_reads_it(sentencepiece_folder, tmp_path):
    from transformers import LlamaTokenizer

    without_bos = LlamaTokenizer.from_pretrained(sentencepiece_folder)
    without_bos.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == without_bos(text)["input_ids"]


def test_byte_level_folders_stay_as_they_are(tokenizers, tmp_path, capsys):
    for name in ("smollm", "gpt2", "llama3"):
        tokenizers[name].save_pretrained(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings.pop("backend")  # as version 4 wrote it
        path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
        tokenizer = load_tokenizer(tmp_path / name)
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == tokenizers[name](text)["input_ids"]
    assert not capsys.readouterr().err


def test_load_tokenizer(tokenizer_folder, tmp_path):
    assert load_tokenizer(tokenizer_folder)("hi").input_ids
    with pytest.raises(LlavaError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "no")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LlavaError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_next_to_the_config_of_an_original_llava(tmp_path):
    """transformers reads config.json too, and fails on scaled positions of types it lacks."""
    byte_tokenizer().save_pretrained(tmp_path)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = {"model_type": "llava_llama", "rope_theta": 1e4, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).get_vocab() == byte_tokenizer().get_vocab()
