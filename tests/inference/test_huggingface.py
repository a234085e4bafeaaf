"""The same folder through transformers and through `Llava`: logits and greedy tokens."""

from functools import partial
from itertools import islice

import numpy as np
import pytest

from llava_jax.inference.answer import Answer
from llava_jax.inference.engine import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.llava import image_token_count
from tests.tiny_model import byte_tokenizer, random_image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their model, their processor, ours) of one saved folder of random weights."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        text_config=TEXT, vision_config=VISION, image_token_index=image_id
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (parameter.mean() > 0.5))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, Llava.from_pretrained(folder)


def batch(processor):
    """Rows of no, one and two pictures, padded on the left as for generation."""
    texts = ["A longer text without any picture", "<image> what?", "<image> and <image> differ?"]
    pictures = [random_image(i, (40 + i, 31)) for i in range(3)]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def test_logits_of_what_a_processor_returns(pair):
    theirs, processor, ours = pair
    inputs = batch(processor)
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    real = inputs["attention_mask"].numpy() == 1
    assert not real.all()
    logits = np.asarray(ours.logits(**inputs))
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


def test_greedy_tokens(pair):
    theirs, processor, ours = pair
    inputs = batch(processor)
    with torch.no_grad():
        expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    pictures = [random_image(i, (40 + i, 31)) for i in range(3)]
    images, requests = iter(pictures), []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask == 1].numpy()
        count = (ids == ours.config.image_token_id).sum() // image_token_count(ours.config)
        load = (partial(ours._load_image, image, "", "") for image in islice(images, count))
        requests.append(Request(ids, tuple(load), SamplingParams(20)))
    ours.engine.stop_ids = ()
    answers = [Answer(ours.tokenizer, (), ()) for _ in requests]
    list(ours.engine.run(requests, answers, batch_size=8))
    for answer, tokens in zip(answers, expected, strict=True):
        assert answer.tokens == tokens[inputs["input_ids"].shape[1] :].tolist()
