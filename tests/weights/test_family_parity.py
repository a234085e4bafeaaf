"""LLaVA-NeXT, OneVision and NeXT-Video against transformers: pictures of any shape, and videos."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax.models.llava import normalize_images  # noqa: E402
from llava_jax.weights.read.llava_folder import load_llava  # noqa: E402
from tests.tiny_model import random_image  # noqa: E402
from tests.weights.conftest import rename  # noqa: E402
from tests.weights.family_models import (  # noqa: E402
    CLASSES,
    family_model,
    our_logits,
    pixels_of,
    processor_of,
    save_family,
)
from tests.weights.test_parity import with_tower_level  # noqa: E402

picture = lambda seed, *size: random_image(seed, size)
# Several pictures are a list in a list for OneVision, whose transformers class tells them apart.
ROWS = {
    "extreme": [[picture(0, 400, 9)], [picture(1, 9, 400)], [picture(2, 1, 1)]],
    "many tiles": [[picture(0, 84, 80)], [picture(1, 60, 44)], [picture(2, 30, 83)]],
    "several": [[picture(0, 50, 20), picture(1, 31, 90)], [picture(2, 40, 40)], []],
    "text": [[], [], []],
}
QUESTIONS = ("What is it?", "Why?", "How many of them are there?")
MODELS = [
    ("llava_next", "llama"),
    ("llava_next", "mistral"),
    ("llava_next", "qwen2"),
    ("llava_next_video", "llama"),
    ("llava_onevision", "qwen2"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda pair: " on ".join(pair))
def loaded(request, tmp_path_factory):
    """(transformers' model, our config, our parameters)."""
    folder = tmp_path_factory.mktemp("family")
    model = family_model(*request.param)
    save_family(folder, model)
    return model, *load_llava(folder)


def inputs_of(model, rows: list, side: str) -> dict:
    processor = processor_of(model)
    texts = ["<image> " * len(row) + ask for row, ask in zip(rows, QUESTIONS, strict=True)]
    nested = model.config.model_type == "llava_onevision"
    images = rows if nested else [image for row in rows for image in row]
    images = {"images": images} if any(rows) else {}
    return processor(text=texts, **images, padding=True, padding_side=side, return_tensors="pt")


def expected_logits(model, inputs: dict) -> np.ndarray:
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, position_ids=positions).logits.numpy()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("extreme", "left"),
        ("many tiles", "right"),
        ("several", "left"),
        ("several", "right"),
        ("text", "left"),
    ],
)
def test_logits(name, side, loaded):
    (model, config, params), rows = loaded, ROWS[name]
    inputs = inputs_of(model, rows, side)
    ids, mask = (inputs[key].numpy() for key in ("input_ids", "attention_mask"))
    found = our_logits(config, params, ids, mask, rows)
    expected, held = expected_logits(model, inputs), mask == 1
    np.testing.assert_allclose(found[held], expected[held], atol=1e-4)


@pytest.mark.parametrize("name", ["extreme", "many tiles", "several"])
def test_pixels(name, loaded):
    (model, config, _), rows = loaded, ROWS[name]
    theirs = inputs_of(model, rows, "left")["pixel_values"].numpy()
    number = 0
    for row in rows:
        ours = np.asarray(normalize_images(config.image, pixels_of(config, row)))
        counts = [layout.tiles for layout in config.layouts([p.size for p in row])]
        for tiles in np.split(ours, np.cumsum(counts)[:-1]) if row else []:
            expected = theirs[number, : len(tiles)].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(tiles, expected, atol=1e-6)
            number += 1


@pytest.mark.parametrize("frames", [1, 5])
def test_videos(frames, loaded):
    """A video of a few frames, a picture after it in the other row."""
    model, config, params = loaded
    if config.image.video is None:
        pytest.skip("the class takes no videos")
    video = [picture(10 + i, 40, 30) for i in range(frames)]
    pixels = np.asarray(normalize_images(config.image, pixels_of(config, [video])))
    count = len(config.layouts([(40, 30, frames)])[0])
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (1, count + 9))
    ids[0, 4 : 4 + count] = config.video_token_id
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2)[None])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), pixel_values_videos=pixels).logits.numpy()
    found = our_logits(config, params, ids, np.ones_like(ids), [[video]])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("tower_level", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_naming_eras(kind, tower_level, in_memory, tmp_path):
    """On disk as versions 4.39 to 4.57 and 5 write it, and the names of both in memory."""
    model = family_model(kind)
    model.save_pretrained(tmp_path / "saved", save_original_format=not in_memory)
    change = with_tower_level if tower_level else lambda name: name
    folder = rename(tmp_path / "saved", tmp_path / "era", change)
    _, params = load_llava(folder)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.testing.assert_array_equal(params["projector"]["newline"], state["model.image_newline"])
    np.testing.assert_array_equal(
        params["vision"]["layers"]["mlp"]["fc1"]["bias"][1],
        state["model.vision_tower.encoder.layers.1.mlp.fc1.bias"],
    )
    np.testing.assert_array_equal(params["decoder"]["lm_head"]["kernel"].T, state["lm_head.weight"])
