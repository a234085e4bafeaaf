"""A video through `Llava`, from its frames to its answer, against transformers' generate."""

import numpy as np
import pytest

from llava_jax import Llava, Video
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.llava import normalize_images
from tests.tiny_model import random_image
from tests.weights.family_models import family_model, pixels_of, save_family

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = 24


@pytest.mark.parametrize(
    "kind, text", [("llava_onevision", "qwen2"), ("llava_next_video", "llama")]
)
def test_answers_about_a_video_are_those_of_transformers(kind, text, tmp_path):
    theirs = family_model(kind, text)
    save_family(tmp_path, theirs)
    ours = Llava.from_pretrained(tmp_path, template="chatml")
    frames = [random_image(i, (40, 30)) for i in range(5)]
    params = SamplingParams(TOKENS, ignore_eos=True)
    request = ours.request("<video>\nWhat?", Video(frames), params)
    (video,) = request.pictures
    np.testing.assert_array_equal(video.load(), pixels_of(ours.config, [frames]))
    # transformers' own id of a video's placeholder, and the pixels as it wants them.
    shown = request.input_ids == ours.config.image_token_id
    ids = torch.tensor(np.where(shown, ours.config.video_token_id, request.input_ids)[None]).long()
    pixels = np.asarray(normalize_images(ours.config.image, video.load()))
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=ids,
            pixel_values_videos=torch.tensor(pixels.transpose(0, 3, 1, 2)[None]),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    (((answer,),),) = (ours.answers([request], 1),)
    assert answer.tokens == expected[0, ids.shape[1] :].tolist()
