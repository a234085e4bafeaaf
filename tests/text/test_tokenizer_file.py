"""A tokenizer.json read without transformers is the tokenizer that transformers makes of it."""

import copy
import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.text.tokenizer_file import FileTokenizer

TEXTS = ("", " red", "<|im_start|>user\nIs it? <|im_end|>\n", "你好 <unk>", "a  b\n\nc")


def write(folder, tokenizer, remove=(), **settings):
    """A folder of a tokenizer, with other settings."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(kept | settings))
    return folder


@pytest.mark.parametrize("name", ["smollm", "gpt2", "llama3"])
@pytest.mark.parametrize("remove, settings", [
    ((), {}),
    (("backend",), {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (("backend",), {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}),
    (("backend",), {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None,
                    "eos_token": "<unk>", "unk_token": None, "pad_token": None}),
])  # fmt: skip
def test_it_is_what_transformers_makes_of_the_file(tokenizers, tmp_path, name, remove, settings):
    if settings.get("eos_token"):
        settings = settings | {"eos_token": "<|begin|>" if name == "llama3" else "<unk>"}
    tokenizer = load_tokenizer(write(tmp_path, tokenizers[name], remove, **settings))
    assert isinstance(tokenizer, FileTokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    whole = tokenizer.whole
    assert not isinstance(whole, FileTokenizer)
    if settings.get("tokenizer_class") != "Qwen2Tokenizer":  # which brings tokens of its own
        own, other = (one.backend_tokenizer.to_str() for one in (tokenizer, whole))
        assert json.loads(own) == json.loads(other)
        assert tokenizer.get_vocab() == whole.get_vocab() and len(tokenizer) == len(whole)
    for key in ("name_or_path", "bos_token", "eos_token", "eos_token_id", "pad_token"):
        assert getattr(tokenizer, key) == getattr(whole, key), key
    for text in TEXTS:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        assert ids == whole(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
        for options in ({}, {"skip_special_tokens": True}):
            assert tokenizer.decode(ids, **options) == whole.decode(ids, **options)
    assert tokenizer.decode(5) == whole.decode(5)
    assert tokenizer.convert_ids_to_tokens(5) == whole.convert_ids_to_tokens(5)


FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}


@pytest.mark.parametrize("settings, also", [
    ({"tokenizer_class": "LlamaTokenizer"}, {}),
    ({"pad_token": "<pad>"}, {}),
    ({"additional_special_tokens": ["<pad>"]}, {}),
    ({"image_token": "<image>"}, {}),
    ({"split_special_tokens": True}, {}),
    ({"added_tokens_decoder": {"0": FLAGS | {"content": "<unk>", "lstrip": True}}}, {}),
    ({"added_tokens_decoder": {"900": FLAGS | {"content": "<pad>"}}}, {}),
    ({}, {"special_tokens_map.json": {"pad_token": FLAGS | {"content": "<pad>"}}}),
    ({}, {"added_tokens.json": {"<pad>": 900}}),
])  # fmt: skip
def test_a_folder_that_says_more_is_read_by_transformers(tokenizers, tmp_path, settings, also):
    folder = write(tmp_path, tokenizers["smollm"], **settings)
    for name, content in also.items():
        (folder / name).write_text(json.dumps(content))
    assert not isinstance(load_tokenizer(folder), FileTokenizer)


def test_a_class_that_brings_an_end_which_the_folder_does_not_name(tokenizers, tmp_path):
    write(tmp_path, tokenizers["smollm"], ("eos_token",), tokenizer_class="Qwen2Tokenizer")
    assert not isinstance(load_tokenizer(tmp_path), FileTokenizer)


def test_the_ends_of_special_tokens_map(tokenizers, tmp_path):
    folder = write(tmp_path, tokenizers["smollm"], remove=("eos_token", "added_tokens_decoder"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<unk>"}))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.eos_token_id == tokenizer.whole.eos_token_id == 0


def test_a_file_that_pads_and_cuts_does_neither(tokenizers, tmp_path):
    core = Tokenizer.from_str(tokenizers["smollm"].backend_tokenizer.to_str())
    core.enable_truncation(2)
    core.enable_padding(length=9)
    folder = write(tmp_path, tokenizers["smollm"])
    core.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FileTokenizer)
    text = "Is there a circle?"
    assert tokenizer.backend_tokenizer.encode(text).ids == tokenizers["smollm"](text)["input_ids"]


def test_it_can_be_copied(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert copy.copy(tokenizer).decode([9, 10]) == tokenizer.decode([9, 10])


def test_it_is_read_without_transformers(tokenizer_folder):
    script = (
        "import sys\nfrom llava_jax.text.tokenizer import load_tokenizer\n"
        "load_tokenizer(sys.argv[1], 2000, ['<image>']).decode([3])\n"
        "print(sorted({'transformers', 'torch'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", script, str(tokenizer_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
