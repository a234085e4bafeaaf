"""Small offline tokenizers of the kinds that matter."""

import json

import pytest
import sentencepiece
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
