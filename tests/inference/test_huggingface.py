"""The same folder through transformers and through `Llava`: logits and greedy tokens."""

import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bench.huggingface import HuggingFace, compare
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import byte_tokenizer, random_image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
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


# name -> changes to the text, the vision and the LLaVA config
MODELS = {
    "llama, clip": ({}, {}, {}),
    "mistral with a window, siglip without its first patch": (
        {"model_type": "mistral", "sliding_window": 24},
        {"model_type": "siglip_vision_model"},
        {},
    ),
    "tied qwen2, several layers of clip with class token": (
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {},
        {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
    ),
    "qwen3, dinov2, no projector bias": (
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "dinov2", "mlp_ratio": 2},
        {"multimodal_projector_bias": False, "vision_feature_layer": -1},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(their model, their processor, ours) of one saved folder of random weights."""
    folder = tmp_path_factory.mktemp("llava")
    text, vision, fields = MODELS[request.param]
    strategy = fields.get("vision_feature_select_strategy", "default")
    class_token = vision.get("model_type") != "siglip_vision_model"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(class_token),
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        text_config=TEXT | text, vision_config=VISION | vision, image_token_index=image_id, **fields
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


@pytest.mark.parametrize("pair", ["llama, clip"], indirect=True)
def test_a_folder_is_read_onto_a_mesh_part_by_part(pair, tmp_path, monkeypatch):
    theirs, processor, ours = pair
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    whole = []
    monkeypatch.setattr("llava_jax.weights.read.llava_folder.read_tree", lambda *_: whole.append(1))
    spread = Llava.from_pretrained(tmp_path, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert not whole
    kernel = spread.engine.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    question = ["<image> what?"], [random_image(0)], 4
    assert spread.generate(*question, max_tokens=8) == ours.generate(*question, max_tokens=8)


@pytest.mark.parametrize("pair", ["llama, clip"], indirect=True)
def test_the_benches_compare_the_same_answers(pair, tmp_path, capsys):
    theirs, processor, ours = pair
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # As its user runs it: two benches in one process would define the same flags.
    command = [sys.executable, "-m", "bench.generate", f"--checkpoint={tmp_path}"]
    command += ["--batch_sizes=2", "--tokens=6", "--rounds=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "100% of the answers are token for token the same" in done.stdout, done.stderr
    assert "a decode step reads" in done.stdout

    params = SamplingParams(6, min_tokens=6)
    requests = [ours.request("What is it?", random_image(n), params) for n in range(2)]
    compare(ours, HuggingFace(tmp_path, "float32", ours), requests, 2, [1], 6, 1)
    assert "2 of 2 answers token for token the same" in capsys.readouterr().out


def batch(processor, side: str = "left"):
    """Rows of no, one and two pictures, padded on the left as for generation, or on the right."""
    processor.tokenizer.padding_side = side
    texts = ["A longer text without any picture", "<image> what?", "<image> and <image> differ?"]
    pictures = [random_image(i, (40 + i, 31)) for i in range(3)]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_what_a_processor_returns(side, pair):
    theirs, processor, ours = pair
    inputs = batch(processor, side)
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
        expected = theirs.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None)
    pictures = iter(random_image(i, (40 + i, 31)) for i in range(3))
    requests = [
        as_request(ours, ids[mask == 1].numpy(), pictures, 64)
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    for answer, tokens in zip(ours.answers(requests, 4), expected, strict=True):
        (answer,) = answer
        assert answer.tokens == tokens[inputs["input_ids"].shape[1] :].tolist()


def as_request(ours, ids, pictures, tokens: int) -> Request:
    """Ids of a processor, with the next of `pictures` for their placeholders."""
    count = (ids == ours.config.image_token_id).sum() // ours.config.tokens_per_tile
    shown = ours._pictures.pictures(list(islice(pictures, count)))
    return Request(ids, shown, SamplingParams(tokens, ignore_eos=True))


@pytest.mark.parametrize(
    "pair",
    [
        name if name == "llama, clip" else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
    indirect=True,
)
def test_any_order_and_batch_size_gives_their_greedy_tokens(pair):
    """Theirs of each prompt alone, without padding; prompts begin alike and pictures come again."""
    theirs, processor, ours = pair
    rng = random.Random(0)
    requests, expected = [], []
    for _ in range(8):
        pictures = [random_image(rng.randrange(3), (33, 40)) for _ in range(rng.choice((0, 1, 2)))]
        words = ("".join(rng.choices("ab é", k=rng.randint(1, 10))) for _ in pictures)
        text = "".join(f"<image> {word}" for word in words) + rng.choice(("what?", "b" * 20))
        tokens = rng.randint(1, 20)
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        with torch.no_grad():
            output = theirs.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
        length = inputs["input_ids"].shape[1]
        requests.append(as_request(ours, output[0, :length].numpy(), iter(pictures), tokens))
        expected.append(output[0, length:].tolist())
    for batch_size in (1, 4):
        order = rng.sample(range(8), 8)
        answers = ours.answers([requests[i] for i in order], batch_size)
        assert [answer.tokens for (answer,) in answers] == [expected[i] for i in order]
