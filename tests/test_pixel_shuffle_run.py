"""A projector that folds 2 x 2 features, from train.py to an answer: a quarter of the tokens."""

import jax
import numpy as np
import pytest

from llava_jax import Llava, cli
from llava_jax.errors import LlavaError
from llava_jax.text.conversation import Turn
from llava_jax.weights.load import load_run
from llava_jax.weights.run_directory import read_run_model
from tests.tiny_model import random_image
from tests.tiny_run import align, instruct

KIND = "pixel_shuffle2_mlp2x_gelu"


@pytest.fixture(scope="module")
def folded(world, run, tmp_path_factory):
    """Two stages with this projector: the first trains it alone, the second all but the encoder."""
    folder = tmp_path_factory.mktemp("folded")
    run(align(world, folder / "align", {"model.projector": KIND}))
    run(instruct(world, folder / "run", folder / "align", {}))
    return folder / "run"


def test_the_run_keeps_the_projector_and_trains_it(folded):
    assert read_run_model(folded).config.projector == KIND
    config, steps = read_run_model(folded).config, sorted((folded / "checkpoints").iterdir())
    assert (config.image.size // config.vision.patch_size) ** 2 == 4 and config.tokens_per_tile == 1
    first, last = (load_run(step)[1]["projector"] for step in (steps[0], steps[-1]))
    assert first["linear_0"]["kernel"].shape == (4 * config.feature_size, 32)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), first, last)
    assert all(jax.tree.leaves(moved))


def test_it_answers_with_a_quarter_of_the_tokens(folded):
    model = Llava.from_pretrained(folded)
    ids = model.prompt_ids([Turn("human", "<image>\nWhat?")], 1)
    assert (ids == model.config.image_token_id).sum() == 1
    answers = [
        model.chat("What?", images=[random_image(i)], max_tokens=4, temperature=0) for i in (0, 0)
    ]
    assert answers[0] == answers[1]
    logits = [np.asarray(model.logits(ids[None], _pixels(model, seed)))[0, -1] for seed in range(2)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4  # the picture is looked at


def _pixels(model, seed: int) -> np.ndarray:
    side = model.config.image.size
    return np.random.default_rng(seed).normal(size=(1, 3, side, side)).astype(np.float32)


@pytest.mark.parametrize(
    "form, words", [("hf", "transformers has mlp2x_gelu only"), ("llava", KIND)]
)
def test_no_other_program_has_it(form, words, folded, tmp_path, capsys):
    arguments = ["export", "--checkpoint", str(folded), "--format", form]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert words in message and "use the run directory itself" in message
    assert not (tmp_path / "out").exists()


def test_an_odd_grid_is_refused_before_training(world, run, tmp_path):
    changes = {"model.projector": KIND, "model.image_size": 12}
    with pytest.raises(LlavaError, match="folds squares of 2 x 2 .* a picture has 3 x 3"):
        run(align(world, tmp_path / "run", changes))
    assert not (tmp_path / "run" / "checkpoints").exists()
