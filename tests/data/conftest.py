"""Small offline tokenizers of the kinds that matter, and a small set of records with images."""

import argparse
import json

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

LINES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What color is the shape? ASSISTANT: blue",
    "### Human: Is there a circle? ### Assistant: yes\n\n no",
    "[INST] You are a helpful language and vision assistant. [/INST] ok",
    "user assistant system Answer the questions. red green rectangle triangle",
] * 5


# How Llama 3 cuts a text: unlike GPT-2, line breaks stay together whatever follows.
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special, trim=False, template=None, pieces=None, **names):
    """A GPT-2 style tokenizer; `trim` cuts spaces off its offsets as GPT-2's own does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pieces:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pieces), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if template:
        bos = names["bos_token"]
        steps.append(
            processors.TemplateProcessing(
                single=template, special_tokens=[(bos, core.token_to_id(bos))]
            )
        )
    if steps:
        core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "lines.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def tokenizers(sentencepiece_folder):
    """name -> tokenizer.

    smollm: byte-level, no BOS added though one is named (as SmolLM2). gpt2: the same ids with
    trimmed offsets. llama3: byte-level, BOS added. llama2: SentencePiece with BOS and byte fallback
    in the form of Llama-2's tokenizer.json. llama5: the form transformers 5 makes of it.
    """
    chatml = ["<unk>", "<|im_start|>", "<|im_end|>"]
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    headers = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    llama5 = LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=True)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama5.backend_tokenizer.post_processor = bos
    core = Tokenizer.from_str(llama5.backend_tokenizer.to_str())
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    state = json.loads(core.to_str()) | {"pre_tokenizer": None}
    llama2 = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    return {
        "smollm": byte_level(chatml, **names),
        "gpt2": byte_level(chatml, trim=True, **names),
        "llama3": byte_level(
            headers, pieces=LLAMA3_PIECES, template="<|begin|> $A", bos_token="<|begin|>"
        ),
        "llama2": llama2,
        "llama5": llama5,
    }


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    tokenizers["smollm"].save_pretrained(folder)
    return folder


def record(record_id, question="<image>\nWhat color?", answer="blue", image=None):
    item = {
        "id": record_id,
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
    }
    return item | ({} if image is None else {"image": image})


@pytest.fixture
def data_set(tmp_path):
    """(JSON file, image root): 24 records, some with two images, some with none."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    random = np.random.default_rng(0)
    items = []
    for i in range(24):
        names = [f"a/{i}.png"] if i % 4 else [] if i % 8 else [f"a/{i}.png", f"a/{i}b.png"]
        for name in names:
            pixels = random.integers(0, 256, (20 + i, 31, 3), np.uint8)
            Image.fromarray(pixels).save(root / name)
        question = "<image> and <image>?" if len(names) == 2 else "<image>\n" * len(names) + "What?"
        item = record(f"r{i}", question, "blue " * (1 + i % 5), names or None)
        if i % 3 == 0:
            item["conversations"] += record("", "and 你好?", "yes")["conversations"]
        items.append(item)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(items))
    return path, root


@pytest.fixture
def run():
    """run(module, *arguments): a data command with its own parser; gives the exit code."""

    def run(module, *arguments):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return module.main(parser.parse_args([str(argument) for argument in arguments]))

    return run
