"""Where a model looked: the trace of a given answer, and the two maps of a picture made of it."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.inference.explain import Explanation, Inquiry, blanked, peak, window_boxes
from llava_jax.inference.jobs import picture_places
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.inference.scoring import TRACED
from llava_jax.models.video import VideoSpec
from llava_jax.parallel.mesh import make_mesh
from tests.inference.test_tiled_pictures import SIZES, TEMPLATE, config_of, whole_pass
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

CONFIGS = {
    "square": dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, mode="square")),
    "next": config_of("next"),
    "onevision": config_of("onevision"),
}


@pytest.fixture(scope="module")
def plain():
    return tiny_llava(CONFIGS["square"], TEMPLATE)


def logprobs_by_whole_pass(llava, question: str, images, answer: str) -> np.ndarray:
    """float32[A] from `Llava.logits` of prompt and answer."""
    request = llava.request(question, images, SamplingParams())
    tokens = llava.traced(request, answer).input_ids[len(request.input_ids) :]
    logprobs = whole_pass(llava, request, tokens)[len(request.input_ids) - 1 : -1]
    return logprobs[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize("name", CONFIGS)
def test_drops_are_those_of_whole_passes_over_blanked_pictures(name):
    llava = tiny_llava(CONFIGS[name], TEMPLATE)
    pictures = [random_image(0), random_image(1, SIZES[1])]
    for shown in ([pictures[1]], pictures):
        found = llava.explain("a?", shown, "xyz", windows=4)
        whole = logprobs_by_whole_pass(llava, "a?", shown, "xyz")
        np.testing.assert_allclose(found.logprobs, whole, atol=1e-4)
        for number, box in enumerate(window_boxes(SIZES[1], 4)):
            others = [*shown[:-1], blanked(pictures[1], box)]
            drop = whole - logprobs_by_whole_pass(llava, "a?", others, "xyz")
            row, column = divmod(number, 4)
            np.testing.assert_allclose(found.drops[:, row, column], drop, atol=1e-4)
        assert found.tokens == (" ", "x", "y", "z") and found.answer == "xyz"
        assert found.attention().shape == found.drop().shape == SIZES[1][::-1]
        assert np.abs(found.drops).max() > 0.01


def test_attention_is_that_of_the_token_from_which_each_is_predicted(plain):
    """What a token attends to, its own position last, does not depend on what follows."""
    request = plain.request("a?", random_image(0), SamplingParams())
    given = plain.traced(request, "xyz")
    (job,) = plain.jobs(given)
    list(plain.engine.run([job], 1))
    trace = job.answer.trace
    length = len(request.input_ids)
    assert trace.attention.shape == (4, length + 4)
    np.testing.assert_allclose(trace.attention.sum(1), 1, rtol=1e-5)
    for number in range(4):  # the last token that is attended to is the one before
        seen = np.flatnonzero(trace.attention[number])
        assert seen[-1] == length - 1 + number and len(seen) == length + number
    found = plain.explain("a?", random_image(0), "xyz", windows=3)
    (places,) = picture_places(given, plain.config)
    np.testing.assert_allclose(found.shares, trace.attention[:, places], rtol=1e-5)
    np.testing.assert_allclose(found.attention().sum(), found.shares.mean(0).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.attention(1).sum(), found.shares[1].sum(), rtol=1e-5)


def test_many_at_once_are_each_alone(plain):
    pictures = [random_image(i, size) for i, size in enumerate(SIZES[:3])]
    questions, answers = ["a?", "bb?", "c?"], ["x", "yy y", "z" * (TRACED + 6)]
    together = plain.explain(questions, pictures, answers, windows=4, batch_size=3)
    plain.engine.forget()
    for entry, found in zip(zip(questions, pictures, answers, strict=True), together, strict=True):
        alone = plain.explain(*entry, windows=4)
        for name in ("logprobs", "shares", "drops"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-5)
    np.testing.assert_allclose(  # of an answer that takes two passes
        together[2].logprobs,
        logprobs_by_whole_pass(plain, "c?", [pictures[2]], answers[2]),
        atol=1e-4,
    )


def test_answers_and_traces_share_an_engine(plain):
    """Requests of both kinds in one run: the answers are those of a run without traces."""
    picture = random_image(3)
    asked = [plain.request(f"{i}?", picture, SamplingParams(5 + i)) for i in range(6)]
    expected = plain.answers(asked, 3)
    traced = [plain.traced(request, "xyz") for request in asked]
    mixed = plain.answers([r for pair in zip(asked, traced, strict=True) for r in pair], 3)
    for number, (answer,) in enumerate(mixed):
        wanted = expected[number // 2][0]
        assert (answer.trace is not None) == bool(number % 2)
        assert number % 2 or (answer.tokens == wanted.tokens and answer.text == wanted.text)


def test_a_trace_that_nobody_waits_for_is_not_computed(plain, monkeypatch):
    request = plain.request("a?", random_image(0), SamplingParams())
    jobs = [plain.jobs(plain.traced(request, "xyz"))[0] for _ in range(3)]
    jobs[1].answer.cancel()
    assert all(answer.done for answer in plain.engine.run(jobs, 3))
    assert [job.answer.trace is None for job in jobs] == [False, True, False]
    assert jobs[1].answer.finish_reason == "cancelled"


def test_nothing_compiles_after_warm_up():
    llava = tiny_llava(CONFIGS["onevision"], TEMPLATE)
    llava.engine.warm_up(batch_size=2, size=64, few=True, traces=True)
    before = llava.engine.counts.compilations
    llava.explain(["a?", "b?"], [random_image(0, SIZES[0]), random_image(1, SIZES[7])],
                  ["x", "xyz"], windows=3, batch_size=2)  # fmt: skip
    assert llava.engine.counts.compilations == before


def test_two_copies_explain_as_one(plain):
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    two = Llava(plain.config, random_params(CONFIG), byte_tokenizer(), TEMPLATE, mesh=mesh)
    found, wanted = (m.explain("a?", random_image(0), "xyz", windows=4) for m in (two, plain))
    np.testing.assert_allclose(found.drops, wanted.drops, atol=1e-5)
    assert min(engine.counts.requests for engine in two.engine.engines)  # both had work


def test_without_an_answer_it_is_the_model_s_own(plain):
    question = "a?", random_image(0)
    answer = plain.chat(*question)
    assert answer and plain.explain(*question, windows=3).answer == answer
    history = [("<image>\nb?", "yes")]
    image = random_image(0)
    found = plain.explain("a?", image, "x", history=history, windows=3)
    request = plain.request("a?", image, SamplingParams(), history)
    ids = plain.traced(request, "x").input_ids[-2:]  # " " and "x"
    expected = whole_pass(plain, request, ids)[len(request.input_ids) - 1, ids[0]]
    assert found.logprobs[0] == pytest.approx(expected, abs=1e-4)


# Maps of drops, without a model.


def explanation(drops, size=(40, 20)) -> Explanation:
    drops = np.asarray(drops, np.float32)
    tokens = tuple("abcdef"[: len(drops)])
    shares = np.full((len(drops), 4), 0.1, np.float32)
    picture = Image.new("RGB", size, "gray")
    logprobs = -np.ones(len(drops), np.float32)
    return Explanation(picture, "abc", tokens, logprobs, shares, drops, CONFIG)


def test_a_pixel_has_the_mean_of_the_windows_that_cover_it():
    rng, size = np.random.default_rng(0), (37, 23)
    found = explanation(rng.normal(size=(2, 5, 5)), size)
    for token in (0, 1, None):
        drops = found.drops.sum(0) if token is None else found.drops[token]
        total, count = np.zeros((23, 37)), np.zeros((23, 37))
        for drop, box in zip(drops.reshape(-1), window_boxes(size, 5), strict=True):
            left, top, right, bottom = box
            total[top:bottom, left:right] += drop
            count[top:bottom, left:right] += 1
        assert (count == 9).all()
        np.testing.assert_allclose(found.drop(token), total / count, rtol=1e-5)
    assert found.drop(shape=(8, 5)).shape == (8, 5)


def test_windows_blank_with_the_mean_colour_and_nothing_else():
    image = random_image(5, (30, 20))
    box = list(window_boxes(image.size, 8))[20]
    pixels, before = np.asarray(blanked(image, box)), np.asarray(image)
    left, top, right, bottom = box
    inside = np.zeros(before.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert (pixels[~inside] == before[~inside]).all()
    np.testing.assert_allclose(pixels[inside].mean(0), before.reshape(-1, 3).mean(0), atol=0.5)
    assert pixels[inside].std(0).max() == 0


def test_a_picture_smaller_than_its_windows_has_them_all():
    assert len(list(window_boxes((1, 3), 7))) == 49
    assert explanation(np.zeros((1, 7, 7)), (1, 3)).drop().shape == (3, 1)


def test_a_peak_is_the_middle_of_the_largest_value():
    drops = np.zeros((1, 4, 4))
    drops[0, 3, 0] = 1
    assert peak(explanation(drops).drop()) == (10, 15)  # the corner that the window is on


def test_what_is_cropped_away_costs_nothing(plain):
    """Of a wide picture the middle is seen alone; the rest may be blanked."""
    found = plain.explain("a?", random_image(0, (60, 10)), "xyz", windows=11)
    assert np.abs(found.drops[:, :, :3]).max() == np.abs(found.drops[:, :, -3:]).max() == 0
    assert np.abs(found.drops).max() > 0.01


def test_both_maps_are_written_over_the_picture(tmp_path):
    explanation(np.random.default_rng(0).normal(size=(3, 7, 7))).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 100
    priced = dataclasses.replace(explanation(np.ones((1, 3, 3))), answer=r"from $5\frac{ to $10")
    priced.save(tmp_path / "without_suffix")  # no formula, and written where it was asked for
    assert Image.open(tmp_path / "without_suffix").format == "PNG"
    with pytest.raises(LlavaError, match="cannot write .*a.nothing"):
        explanation(np.zeros((1, 3, 3))).save(tmp_path / "a.nothing")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("a?", None, "x"), {}, "no picture"),
        (("a?", [random_image(0)], " "), {}, "the answer is empty"),
        (("a?", [random_image(0)], "x" * 600), {}, "the prompt and its answer have .* at most 512"),
        (("a?", [random_image(0)], "x"), {"windows": 2}, "windows must be .* from 3 to 32, not 2"),
        (("a?", [random_image(0)], "x"), {"windows": 4.0}, "windows must be .* not 4.0"),
        ((["a?"], [random_image(0)], ["x", "y"]), {}, "answers must be a list of 1 texts"),
        ((["a?"], [random_image(0)], "x"), {}, "answers must be a list of 1 texts"),
        (("a?", [random_image(0)], 5), {}, "answers must be a list of 1 texts"),
    ],
)
def test_what_cannot_be_explained_is_refused(plain, arguments, options, message):
    with pytest.raises(LlavaError, match=message):
        plain.explain(*arguments, **options)


def test_of_pictures_and_videos_the_last_picture_is_explained():
    image = dataclasses.replace(CONFIG.image, video=VideoSpec(frames=2))
    llava = tiny_llava(dataclasses.replace(CONFIG, image=image), TEMPLATE)
    video = Video([random_image(1), random_image(2)])
    picture = random_image(0, (12, 8))
    request = llava.request("<image>a <video>b?", [picture, video], SamplingParams())
    assert Inquiry(llava, request, "x", 3).requests[1].pictures[1] is request.pictures[1]
    assert llava.explain("<image>a <video>b?", [picture, video], "x").drop().shape == (8, 12)
    with pytest.raises(LlavaError, match="no picture"):
        llava.explain("b?", video, "x")
