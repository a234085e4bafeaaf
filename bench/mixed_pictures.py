"""Questions a second about pictures of many sizes: our engine and Hugging Face generate.

python -m bench.mixed_pictures --layers=3

A random OneVision of the 0.5B's widths with fewer layers and a smaller vocabulary, in float32. Each
picture has its own size, from one tile to dozens, and several questions. Both sides run alternately
in one run and read the same token ids and pixels; Hugging Face runs at each of --hf_batch_sizes.
"""

import tempfile
from pathlib import Path

import transformers
from absl import flags
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from bench.huggingface import HuggingFace, compare
from llava_jax import command
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams

SIZES = ((640, 480), (427, 640), (300, 200), (800, 600), (1280, 720), (1000, 300), (100, 100))
WORDS = "what shape and colour has the thing in the middle of this picture".split()
IMAGE_ID, VIDEO_ID, VOCABULARY = 259, 260, 8192

LAYERS = flags.DEFINE_integer("layers", 3, "Of the encoder and of the language model.")
PICTURES = flags.DEFINE_integer("pictures", len(SIZES), "One size after the other.")
QUESTIONS = flags.DEFINE_integer("questions", 4, "About each picture.")
TOKENS = flags.DEFINE_integer("tokens", 16, "Of each answer.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Of our side.")
HF_BATCH_SIZES = flags.DEFINE_list("hf_batch_sizes", ["1", "4"], "Tried on their side.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Of each side, alternately.")


def save_model(folder: Path, layers: int) -> None:
    """Writes the random OneVision with its tokenizer and picture processor."""
    from tests.tiny_model import byte_tokenizer

    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    text |= {"num_hidden_layers": layers, "max_position_embeddings": 32768, "rope_theta": 1e6}
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    tower |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 384}
    tower |= {"num_hidden_layers": layers, "vision_use_head": False}
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        tie_word_embeddings=True,
    )
    transformers.set_seed(0)
    transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.save_pretrained(folder)


def make_requests(model: Llava, folder: Path) -> list[Request]:
    """Several questions about each picture, picture after picture."""
    from tests.tiny_model import random_image

    params, requests = SamplingParams(TOKENS.value, min_tokens=TOKENS.value), []
    for number in range(PICTURES.value):
        path = folder / f"{number}.png"
        random_image(number, SIZES[number % len(SIZES)]).save(path)
        for question in range(QUESTIONS.value):
            words = WORDS[question % len(WORDS) :] + WORDS[: question % len(WORDS)]
            requests.append(model.request(" ".join(words) + "?", path, params))
    return requests


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", LAYERS.value)
        ours = Llava.from_pretrained(folder / "model", template="mistral_instruct")
        theirs = HuggingFace(folder / "model", "float32", ours)
        requests = make_requests(ours, folder)
        tokens = sum(len(request.input_ids) for request in requests)
        print(f"{len(requests)} questions about {PICTURES.value} pictures, {tokens:,} tokens")
        batches = [int(size) for size in HF_BATCH_SIZES.value]
        compare(ours, theirs, requests, BATCH_SIZE.value, batches, TOKENS.value, ROUNDS.value)


if __name__ == "__main__":
    command.run(main, required=())
