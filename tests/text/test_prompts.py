"""Token ids of prompts: those of the original LLaVA, and those of a Hugging Face processor."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from llava_jax.errors import LlavaError
from llava_jax.inference.prompts import PromptReader
from llava_jax.inference.sampling import SamplingParams
from llava_jax.text.conversation import Turn
from llava_jax.text.processor_prompt import ProcessorPrompt
from llava_jax.text.templates import get_template, render
from llava_jax.text.tokenization import SegmentTokenizer
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.weights.write.huggingface import prepare_tokenizer
from tests.tiny_model import CONFIG

# --- the original ---------------------------------------------------------------------------------

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def original_prompt(turns) -> str:
    """vicuna_v1: one space after a question, the end-of-text mark after an answer."""
    text = VICUNA + " "
    for turn in turns:
        text += f"USER: {turn.text} " if turn.role == "human" else f"ASSISTANT: {turn.text}</s>"
    return text + "ASSISTANT:"


def original_ids(prompt: str, tokenizer) -> list[int]:
    """tokenizer_image_token: chunks tokenized as texts of their own, one BOS, -200 between them."""
    chunks = [tokenizer(chunk)["input_ids"] for chunk in prompt.split("<image>")]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids = chunks[0][:1] if has_bos else []
    for i, chunk in enumerate(chunks):
        ids = ids + [-200] * (i > 0) + chunk[has_bos:]
    return ids


CONVERSATIONS = [
    [Turn("human", "<image>\nWhat color is the shape?")],
    [
        Turn("human", "Is there a circle?"),
        Turn("gpt", "no"),
        Turn("human", "<image>\na  square?"),
    ],
    [
        Turn("human", "<image> red,\n<image>green? <image>"),
        Turn("gpt", "yes"),
        Turn("human", "你好"),
    ],
]


@pytest.mark.parametrize("kind", ["llama2", "llama5", "llama3", "gpt2"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_of_the_original(kind, turns, tokenizers):
    segments = render(get_template("vicuna_v1"), turns, generation=True)
    ours = SegmentTokenizer(tokenizers[kind])(
        segments, [1] * sum(turn.text.count("<image>") for turn in turns)
    )
    assert ours.input_ids.tolist() == original_ids(original_prompt(turns), tokenizers[kind])


@pytest.mark.parametrize("kind", ["llama2", "llama5", "llama3", "gpt2"])
@pytest.mark.parametrize("template", ["v0", "v1", "llama_2", "mistral_instruct", "chatml", "phi_3"])
def test_an_answer_that_is_given_is_read_as_in_training(template, kind, tokenizers):
    decoder = dataclasses.replace(CONFIG.decoder, vocab_size=10_000)
    config = dataclasses.replace(CONFIG, decoder=decoder)
    reader = PromptReader(config, tokenizers[kind], get_template(template), None)
    turns = [Turn("human", "What color is the shape?"), Turn("gpt", "a red circle, yes")]
    request = reader.request(turns[:1], (), None, SamplingParams(), ())
    found = reader.traced(request, " a red circle, yes\n")
    row = SegmentTokenizer(tokenizers[kind])(render(get_template(template), turns))
    assert found.input_ids.tolist() == row.input_ids[: len(found.input_ids)].tolist()
    assert found.input_ids.tolist()[: -found.traced] == request.input_ids.tolist()
    end = row.offsets[len(found.input_ids), 0]
    text = "".join(segment.text for segment in render(get_template(template), turns))
    assert text[:end].endswith("a red circle, yes")


def test_a_sentencepiece_model_merges_by_its_scores(sentencepiece_folder, tmp_path):
    """Llama's runs of spaces have low ids and the lowest scores."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((sentencepiece_folder / "tokenizer.model").read_bytes())
    (spaces,) = [piece for piece in model.pieces if piece.piece == "▁t"]
    spaces.piece, spaces.score = "▁▁", -1e9
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in ("What  color", "is the   shape?", "a    b"):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours == pieces.encode(text)


# --- Hugging Face ---------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
LISTS = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + LISTS
STRINGS = (
    "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


def with_image(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids("<image>")


def message(turn) -> dict:
    """The turn of a user of transformers; a template breaks the line after an image."""
    parts = turn.text.split("<image>")
    content = [{"type": "text", "text": parts[0]}] if parts[0] else []
    for part in parts[1:]:
        content.append({"type": "image", "image": Image.new("RGB", (30, 30))})
        part = part.removeprefix("\n")
        content += [{"type": "text", "text": part}] if part else []
    return {"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": content}


@pytest.mark.parametrize("kind", ["llama2", "llama5", "smollm"])
@pytest.mark.parametrize("template", [LISTS, WITH_BOS])
def test_ids_of_a_processor(kind, template, tokenizers, tmp_path):
    tokenizer, image_id = with_image(tokenizers[kind], tmp_path)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer=getattr(tokenizer, "whole", tokenizer),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    prompt = ProcessorPrompt(tokenizer, template, image_token_id=image_id)
    for turns in CONVERSATIONS:
        expected = processor.apply_chat_template(
            [message(turn) for turn in turns],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        images = sum(turn.text.count("<image>") for turn in turns)
        assert prompt(turns, [4] * images).tolist() == np.ravel(expected).tolist()


def test_ids_stay_when_a_tokenizer_goes_into_another_form(tokenizers, tmp_path):
    """Which class transformers makes of a folder's tokenizer hangs on its config.json too."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "original").mkdir()
    tokenizers["llama2"].save_pretrained(tmp_path / "hf")
    settings = tmp_path / "hf/tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    settings.write_text(json.dumps(values | {"legacy": False}))
    (tmp_path / "hf/config.json").write_text('{"model_type": "llava"}')
    prepare_tokenizer(tmp_path / "hf", LISTS, 1000).write(tmp_path / "original")
    (tmp_path / "original/config.json").write_text('{"model_type": "llava_llama"}')
    text = "USER: What  color?</s>USER: red"
    before, after = (
        load_tokenizer(tmp_path / form)(text)["input_ids"] for form in ("hf", "original")
    )
    assert before == after


def test_a_template_of_texts_alone(tokenizers, tmp_path):
    tokenizer, image_id = with_image(tokenizers["smollm"], tmp_path)
    prompt = ProcessorPrompt(tokenizer, STRINGS, image_token_id=image_id)
    text = tokenizer.decode(prompt([Turn("human", "<image>\nred?")], [2]))
    assert text == "### user\n<image><image>\nred?\n### assistant\n"


def test_templates_and_tokenizers_that_do_not_go_together(tokenizers, tmp_path):
    tokenizer, image_id = with_image(tokenizers["smollm"], tmp_path)
    with pytest.raises(LlavaError, match="config.json has image_token_index=7"):
        ProcessorPrompt(tokenizer, LISTS, 7)
    turns = [Turn("human", "<image>\nred?")]
    with pytest.raises(LlavaError, match="0 <image> of 1 image"):
        ProcessorPrompt(tokenizer, "no place for one", image_id)(turns, [2])
    with pytest.raises(LlavaError, match="cannot render.*my words"):
        ProcessorPrompt(tokenizer, "{{ raise_exception('my words') }}", image_id)(turns, [2])


def test_a_tokenizer_that_does_not_fit_the_vocabulary(tokenizer_folder):
    rows = len(load_tokenizer(tokenizer_folder))
    load_tokenizer(tokenizer_folder, rows)
    with pytest.raises(LlavaError, match=f"does not fit.*{rows - 1}.*has {rows - 1} rows"):
        load_tokenizer(tokenizer_folder, rows - 1)
    grown = load_tokenizer(tokenizer_folder, rows + 2, ["<im_start>", "<im_end>"])
    assert grown.convert_tokens_to_ids("<im_end>") == rows + 1
