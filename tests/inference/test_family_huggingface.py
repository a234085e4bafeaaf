"""LLaVA-NeXT, OneVision and NeXT-Video through transformers and through `Llava`, end to end."""

import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Picture, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.llava import normalize_images
from tests.tiny_model import random_image
from tests.weights.family_models import (
    family_model,
    pixels_of,
    processor_of,
    save_family,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = 64  # of several calls of `decode`, over more than one window
picture = lambda seed, *size: random_image(seed, size)
# Left padded: rows differ in length a lot.
ROWS = {
    "extreme": [[picture(0, 400, 9)], [picture(1, 9, 400)], [picture(2, 1, 1)]],
    "mixed": [[picture(0, 50, 20), picture(1, 31, 90)], [picture(2, 84, 80)], []],
}
QUESTIONS = ("What is it?", "Why?", "How many of them are there?")
MODELS = [
    ("llava_next", "llama"),
    ("llava_next_video", "llama"),
    ("llava_onevision", "qwen2"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda pair: pair[0])
def pair(request, tmp_path_factory):
    """(their model, ours) of one folder."""
    folder = tmp_path_factory.mktemp("family")
    model = family_model(*request.param)
    save_family(folder, model)
    return model, Llava.from_pretrained(folder, template="mistral_instruct")


def inputs_of(model, rows: list, side: str = "left") -> dict:
    processor = processor_of(model)
    texts = ["<image> " * len(row) + ask for row, ask in zip(rows, QUESTIONS, strict=True)]
    nested = model.config.model_type == "llava_onevision"
    images = rows if nested else [image for row in rows for image in row]
    return processor(
        text=texts, images=images, padding=True, padding_side=side, return_tensors="pt"
    )


def expected_logits(model, inputs: dict) -> np.ndarray:
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, position_ids=positions).logits.numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ROWS)
def test_logits_of_what_the_processor_returns(name, side, pair):
    theirs, ours = pair
    inputs = inputs_of(theirs, ROWS[name], side)
    held = inputs["attention_mask"].numpy() == 1
    found = np.asarray(ours.logits(**inputs))
    np.testing.assert_allclose(found[held], expected_logits(theirs, inputs)[held], atol=1e-4)


def test_logits_of_a_flat_list_are_those_of_pictures_alone(pair):
    """OneVision's processor tells prompts of several pictures apart by nesting alone."""
    theirs, ours = pair
    rows = [image for row in ROWS["mixed"] for image in row]
    texts = ["<image> <image> <image> how?"]
    inputs = processor_of(theirs)(text=texts, images=rows, return_tensors="pt")
    np.testing.assert_allclose(ours.logits(**inputs), expected_logits(theirs, inputs), atol=1e-4)


def test_logits_of_videos_and_pictures(pair):
    theirs, ours = pair
    video = [picture(10 + i, 40, 30) for i in range(3)]
    config = ours.config
    if config.image.video is None:
        with pytest.raises(LlavaError, match="takes pictures, not videos"):
            ours.logits(np.ones((1, 4), int), pixel_values_videos=np.zeros((1, 2, 3, 28, 28)))
        return
    frames = np.asarray(normalize_images(config.image, pixels_of(config, [video])))
    count = len(config.layouts([(40, 30, 3)])[0])
    shown = inputs_of(theirs, [[picture(0, 60, 44)], [], []])
    ids, mask = (shown[key].numpy() for key in ("input_ids", "attention_mask"))
    behind = np.pad(ids, ((0, 0), (0, count + 2)), constant_values=7)
    behind[1, -count - 1 : -1] = config.video_token_id
    inputs = dict(shown) | {
        "input_ids": torch.tensor(behind),
        "attention_mask": torch.tensor(np.pad(mask, ((0, 0), (0, count + 2)), constant_values=1)),
        "pixel_values_videos": torch.tensor(frames.transpose(0, 3, 1, 2)[None]),
    }
    held = inputs["attention_mask"].numpy() == 1
    found = np.asarray(ours.logits(**inputs))
    np.testing.assert_allclose(found[held], expected_logits(theirs, inputs)[held], atol=1e-4)


# NeXT-Video shows pictures as NeXT does; its videos are asked about below.
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(model, marks=[pytest.mark.slow] * ("video" in model[0]), id=model[0])
        for model in MODELS
    ],
    indirect=True,
)
@pytest.mark.parametrize("name, batch_size", [("extreme", 2), ("mixed", 3)])
def test_greedy_tokens(name, batch_size, pair):
    theirs, ours = pair
    inputs = inputs_of(theirs, ROWS[name])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = theirs.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    requests = [
        Request(
            ids[mask == 1].numpy(),
            ours._pictures.pictures(row),
            SamplingParams(TOKENS, ignore_eos=True),
        )
        for ids, mask, row in zip(
            inputs["input_ids"], inputs["attention_mask"], ROWS[name], strict=True
        )
    ]
    answers = ours.answers(requests, batch_size)
    assert [answer.tokens for (answer,) in answers] == expected.tolist()


def test_greedy_tokens_about_a_video(pair):
    theirs, ours = pair
    if ours.config.image.video is None:
        pytest.skip("the class takes no videos")
    config, video = ours.config, [picture(10 + i, 40, 30) for i in range(3)]
    tiles, (layout,) = pixels_of(config, [video]), config.layouts([(40, 30, 3)])
    ids = np.array([*b"What", *[config.video_token_id] * len(layout), *b"is it?"], np.int32)
    pixels = np.asarray(normalize_images(config.image, tiles)).transpose(0, 3, 1, 2)[None]
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.tensor(ids[None]).long(),
            pixel_values_videos=torch.tensor(pixels),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    params = SamplingParams(TOKENS, ignore_eos=True)
    request = Request(ids, (Picture(layout, lambda: tiles),), params)
    (((answer,),),) = (ours.answers([request], 2),)
    assert answer.tokens == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_sizes": None}, r"give image_sizes, \(height, width\) of each picture"),
        ({"image_sizes": [[20, 50]]}, "image_sizes must be the .height, width. of 2 picture"),
        ({"image_sizes": [[20, 50], [0, 4]]}, "image_sizes must be .* from 1"),
        ({"image_sizes": [[20, 50], [28, 28]]}, r"placeholders \(259\) but 2 image\(s\)"),
        ({"pixel_values": np.zeros((2, 3, 28, 28))}, r"pixel_values must be \[images, tiles, 3"),
        (
            {"pixel_values": np.zeros((2, 1, 3, 28, 28))},
            "1 tiles a picture, but picture 0 of 50x20",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_one_sentence(change, message, pair):
    theirs, ours = pair
    rows = [[picture(0, 50, 20)], [picture(1, 31, 90)], []]
    inputs = dict(inputs_of(theirs, rows)) | change
    with pytest.raises(LlavaError, match=message):
        ours.logits(**inputs)


def test_a_picture_may_not_go_on_in_the_next_row(pair):
    theirs, ours = pair
    inputs = dict(inputs_of(theirs, [[picture(0, 50, 20)], [picture(0, 50, 20)], []], "right"))
    ids = inputs["input_ids"].numpy().copy()
    ids[0, np.flatnonzero(ids[0] == 259)[-1]] = 7
    ids[1, np.flatnonzero(ids[1] == 259)[-1] + 1] = 259
    with pytest.raises(LlavaError, match="row 0 of input_ids .* no whole number of images"):
        ours.logits(**{**inputs, "input_ids": ids})


def test_counts_of_pictures_that_are_not_there(pair):
    theirs, ours = pair
    inputs = inputs_of(theirs, [[picture(0, 50, 20)], [], []])
    with pytest.raises(LlavaError, match=r"batch_num_images count 3 picture\(s\), but pixel_value"):
        ours.logits(**{**inputs, "batch_num_images": [1, 2, 0]})
