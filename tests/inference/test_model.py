"""`Llava`: batches equal to singles, order, compilations, errors, and what it imports."""

import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import sources
from llava_jax.errors import LlavaError
from llava_jax.inference.device import tile_bucket
from llava_jax.inference.model import Llava
from llava_jax.inference.prefill import (
    TOKENS_AT_A_TIME,
    chunk_bucket,
    chunk_count,
    count_bucket,
    length_bucket,
    take_prompts,
    token_bucket,
)
from llava_jax.inference.sampling import SamplingParams
from tests.tiny_model import (
    CONFIG,
    byte_tokenizer,
    config_with,
    random_image,
    random_params,
    tiny_llava,
)

# Lengths differ inside one bucket: every shape costs seconds of compilation.
QUESTIONS = [
    "What is it now?",
    "And this?",
    "Which color?",
    "<image> and <image>?",
    "So, what is it?",
]
IMAGES = [None, random_image(1), [random_image(2)], [random_image(3), random_image(4)], None]
TOKENS = 20


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def test_a_mixed_batch_answers_as_each_prompt_alone(llava):
    together = llava.generate(QUESTIONS, images=IMAGES, max_new_tokens=TOKENS)
    alone = [
        llava.generate(question, images=image, max_new_tokens=TOKENS)
        for question, image in zip(QUESTIONS, IMAGES, strict=True)
    ]
    assert together == alone
    assert len(set(together)) == len(together)
    turned = llava.generate(
        QUESTIONS[::-1], images=IMAGES[::-1], max_new_tokens=TOKENS, batch_size=4
    )
    assert turned == together[::-1]


def test_a_drawn_answer_depends_on_its_prompt_and_seed_alone(llava):
    settings = {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 0.95}
    seeds = [3, 1, 4, 1, 5]
    together = llava.generate(QUESTIONS, images=IMAGES, seed=seeds, **settings)
    for question, image, seed, answer in zip(QUESTIONS, IMAGES, seeds, together, strict=True):
        assert llava.generate(question, images=image, seed=seed, **settings) == answer
    several = llava.generate([QUESTIONS[0]] * 4, seed=[0, 1, 2, 3], **settings)
    assert len(set(several)) == 4


def test_answers_come_from_the_picture(llava):
    pictures = [random_image(i) for i in range(4)]
    answers = llava.generate(["What is it?"] * 4, images=pictures, max_new_tokens=TOKENS)
    assert len(set(answers)) == 4
    assert answers[::-1] == llava.generate(
        ["What is it?"] * 4, images=pictures[::-1], max_new_tokens=TOKENS
    )
    both = [pictures[:2], pictures[1::-1]]
    first, second = llava.generate(["Which of them?"] * 2, images=both, max_new_tokens=TOKENS)
    assert first != second


def test_buckets_are_few_and_waste_little():
    assert len({length_bucket(n) for n in range(1, 4097)}) < 20
    for n in range(17, 4097):
        assert n <= length_bucket(n) <= 1.5 * n
    assert [count_bucket(n) for n in (0, 1, 2, 3, 5, 8)] == [0, 1, 2, 4, 8, 8]
    totals = (3, 40, 1695, 4000, 9000)
    whole, filled = ([token_bucket(n, 16, more) for n in totals] for more in (False, True))
    assert whole == [16, 48, 2048, 4096, TOKENS_AT_A_TIME]
    assert filled == [16, 32, 1536, 4096, TOKENS_AT_A_TIME]  # what does not fit can wait
    assert token_bucket(9000, least=8200, more=True) == 12288
    for longest in (1, 16, 17, 64, 65, 600, 4000):
        chunk = chunk_bucket(longest)
        assert longest <= 4 * chunk and (chunk == 16 or chunk < longest)
        for tokens in (length_bucket(longest), 4096):
            assert chunk_count(tokens, chunk) * chunk >= tokens
    assert [tile_bucket(n) for n in (1, 2, 3, 13, 14, 55, 56, 500)] == [1, 1, 4, 4, 16, 16, 64, 64]


def test_a_call_reads_as_many_prompts_as_leave_the_least_padding():
    def calls(*rests: int, more: bool = False) -> list[tuple[int, int]]:
        """Prompts and tokens of the calls that read prompts of so many tokens."""
        read = [SimpleNamespace(rest=rest) for rest in rests]
        wave, made = [SimpleNamespace(readings=[one], filled=one.rest) for one in read], []
        while wave:
            jobs, shape = take_prompts(wave, 8192, more)
            assert shape.pieces(*jobs) <= shape.chunks
            made.append((len(jobs), shape.tokens))
        return made

    assert calls(3060, 30, 30, 30) == [(1, 3072), (3, 96)]  # not 4,096 for the first three
    assert calls(*[40] * 8) == [(8, 384)]  # one call that is not full is better than two
    assert calls(3060) == [(1, 3072)]
    assert calls(1000, 500, 40) == [(2, 1536), (1, 48)]
    assert calls(1000, 600, 400) == [(3, 2048)]
    assert calls(*[40] * 8, more=True)[0] == (6, 256)  # the others wait for more


def test_chat_streams_what_it_returns_and_reads_its_history(llava):
    picture = random_image(7)
    answer = llava.chat("What is it?", images=[picture], max_new_tokens=TOKENS)
    pieces = list(llava.stream_chat("What is it?", images=[picture], max_new_tokens=TOKENS))
    assert (
        "".join(pieces) == answer == llava.generate("What is it?", picture, max_new_tokens=TOKENS)
    )
    assert len(pieces) > 1
    history = [("<image>\nWhat is it?", "A cat.")]
    after = llava.chat("Sure?", images=[picture], history=history, max_new_tokens=TOKENS)
    unwritten = [("What is it?", "A cat.")]
    assert after == llava.chat("Sure?", picture, history=unwritten, max_new_tokens=TOKENS)
    other = llava.chat("Sure?", picture, history=[("What is it?", "A dog.")], max_new_tokens=TOKENS)
    assert after != other


def test_an_answer_ends_with_the_models_positions():
    model = tiny_llava(config_with(max_position_embeddings=80))
    text = model.request("hi", None, SamplingParams(1))
    room = 80 - len(text.input_ids)
    long = model.generate("hi", max_new_tokens=10_000)
    assert long == model.generate("hi", max_new_tokens=room)
    with pytest.raises(LlavaError, match=r"prompt 1: the prompt has \d+ tokens .* at most 80"):
        model.generate(["hi", "x" * 90], max_new_tokens=2)


def test_answers_end_where_the_folder_says_too():
    """Not only at the ends of the tokenizer and of the template."""
    params, ask = random_params(CONFIG), {"max_tokens": 12, "logprobs": 0}
    make = lambda *ends: Llava(CONFIG, params, byte_tokenizer(), "chatml", stop_token_ids=ends)
    ((free,),) = make().complete(["What?"], **ask)
    end = free.tokens[5]
    model = make(end)
    ((ended,),) = model.complete(["What?"], **ask)
    assert ended.tokens == free.tokens[: free.tokens.index(end)]
    assert ended.finish_reason == "stop"
    assert set(model._ends) == {*make()._ends, end}
    names = model.describe_stops()
    assert "<|endoftext|>, <|im_end|>" in names
    assert model.tokenizer.convert_ids_to_tokens(end) in names


def test_logits_take_what_a_processor_returns(llava):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 290, (3, 14))
    ids[0, 3:7] = ids[2, 1:5] = ids[2, 8:12] = CONFIG.image_token_id
    pixels = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    together = llava.logits(ids, pixels)
    assert together.shape == (3, 14, 300) and together.dtype == np.float32
    alone = [
        llava.logits(ids[:1], pixels[:1]),
        llava.logits(ids[1:2]),
        llava.logits(ids[2:], pixels[1:]),
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=2e-5)
    padded = np.pad(ids, ((0, 0), (6, 0)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (6, 0)))
    np.testing.assert_allclose(
        llava.logits(padded, pixels, mask)[:, 6:], together, rtol=1e-5, atol=2e-5
    )


def test_logits_take_torch_tensors_of_any_kind(llava):
    torch = pytest.importorskip("torch")
    ids = torch.tensor([[5, *[CONFIG.image_token_id] * 4, 6, 7]])
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = llava.logits(ids.numpy(), pixels.detach().float().numpy())
    np.testing.assert_array_equal(llava.logits(ids, pixels, torch.ones_like(ids)), expected)


def test_logits_of_one_image_are_those_of_its_uint8_pixels(llava):
    """The two ways in, Hugging Face's normalised floats and our bytes, are one picture."""
    square = np.array(random_image(3, (8, 8)))
    ids = np.array([[5, *[CONFIG.image_token_id] * 4, 6, 7]])
    normalised = (square / 255 - CONFIG.image.mean) / CONFIG.image.std
    from_floats = llava.logits(ids, normalised.transpose(2, 0, 1)[None])
    features = np.array([[-1, 0, 1, 2, 3, -1, -1]])
    from_bytes = llava.engine.logits(ids, square[None], features, np.ones_like(ids))
    np.testing.assert_allclose(from_floats, from_bytes, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_near_float32(llava):
    low = Llava(CONFIG, llava.engine.params, byte_tokenizer(), "chatml", dtype="bfloat16")
    ids = np.arange(20)[None]
    high = llava.logits(ids)
    np.testing.assert_allclose(low.logits(ids), high, atol=0.1 * float(abs(high).max()))
    assert isinstance(low.generate("hi", random_image(0), max_new_tokens=4), str)


def truncated() -> Image.Image:
    """Opened, not read yet: what is wrong shows later."""
    file = io.BytesIO()
    random_image(0, (300, 300)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:300]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": ["", "<image> <image>"], "images": [None, IMAGES[1]]}, "prompt 1: .* 2 <imag"),
        ({"prompts": ["a <image>"]}, "prompt 0: .* 1 <image> but 0"),
        ({"prompts": ["a", "b"], "images": [None]}, "1 entries in images for 2 prompts"),
        ({"prompts": ["a", "b"], "images": random_image(0)}, "images must be a list, not Image"),
        ({"prompts": ["a"], "images": 5}, "images must be a list, not int: give one"),
        ({"prompts": ["a"], "images": {"a": b""}}, "images must be a list, not dict"),
        ({"prompts": None}, "prompts must be a list of texts, not NoneType"),
        ({"prompts": b"ab"}, "prompts must be a list of texts, not bytes"),
        ({"prompts": [], "max_token": 3}, "did you mean max_tokens"),
        ({"prompts": [], "n": "3"}, "n must be a whole number"),
        ({"prompts": ["a", 7]}, "prompt 1: a question or answer must be text, not 7"),
        ({"prompts": ["a"], "images": ["no/such.png"]}, "prompt 0: .*no/such.png"),
        ({"prompts": ["a"], "images": [b"not an image"]}, "prompt 0: .*not an image"),
        ({"prompts": ["a"], "images": ["a\0.png"]}, "prompt 0: no image file .*null byte"),
        ({"prompts": ["a"], "images": ["a" * 9999]}, "no image file 'a{300}...': File name"),
        ({"prompts": ["a"], "images": ["/dev/zero"]}, "prompt 0: '/dev/zero' is not a file"),
        ({"prompts": ["a"], "images": [truncated()]}, "prompt 0: image 'image 0' is broken"),
        ({"prompts": ["a"], "images": [3.5]}, "prompt 0: an image must be a path"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"prompts": ["a"], "temperature": -1}, "temperature must be a number from 0"),
        ({"prompts": ["a"], "temperature": float("nan")}, "temperature must be a number from 0"),
        ({"prompts": ["a"], "top_p": 0}, "top_p must be above 0"),
        ({"prompts": ["a"], "seed": -1}, "seed must be a whole number"),
        ({"prompts": ["a"], "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompts": ["a"], "seed": np.array(0.5)}, "seed must be a whole number"),
        ({"prompts": ["a"], "max_token": 3}, "unknown .* .max_token.: .* max_tokens"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size must be a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_reported_in_one_sentence(llava, arguments, message):
    with pytest.raises(LlavaError, match=message):
        llava.generate(**arguments)


@pytest.mark.parametrize("history", [5, "ab", ["ab"], [("a",)], [{"role": "user", "content": "a"}]])
def test_a_history_of_another_form_is_refused(llava, history):
    with pytest.raises(LlavaError, match="history must hold .question, answer. pairs, not"):
        llava.chat("b", history=history)


def test_iterables_and_numpys_numbers_are_taken(llava):
    settings = {"max_tokens": np.int32(2), "temperature": np.float32(1), "n": np.int64(2)}
    prompts, pictures = ["a", "b"], [random_image(0), None]
    expected = llava.generate(prompts, pictures, max_tokens=2, temperature=1.0, n=2, seed=7)
    assert llava.generate(iter(prompts), iter(pictures), seed=np.int32(7), **settings) == expected
    assert llava.generate(tuple(prompts), tuple(pictures), seed=[7, 7], **settings) == expected


def test_unknown_dtypes_are_errors(llava):
    with pytest.raises(LlavaError, match="unknown dtype 'int3'"):
        type(llava).from_pretrained("anywhere", dtype="int3")


@pytest.mark.parametrize(
    "ids, pixels, message",
    [
        ([[1, -200, -200]], (1, 3, 8, 8), "2 placeholders .* 1 image.* of 4 tokens need 4"),
        ([[1, -200, -200, -200, -200]], None, "4 placeholders .* 0 image"),
        ([[1, -200, -200, -200], [-200, 1, 1, 1]], (1, 3, 8, 8), "row 0 .* 3 placeholders"),
        ([[1, 2]], (1, 8, 8, 3), r"pixel_values must be \[images, 3, 8, 8\]"),
        ([[1, 300]], None, "token 1 of row 0 is 300"),
        ([1, 2], None, r"input_ids must be whole numbers \[B, T\]"),
    ],
)
def test_wrong_inputs_of_logits_are_reported_in_one_sentence(llava, ids, pixels, message):
    pixels = None if pixels is None else np.zeros(pixels, np.float32)
    with pytest.raises(LlavaError, match=message):
        llava.logits(np.array(ids), pixels)


def test_importing_llava_needs_neither_torch_nor_tensorflow():
    code = (
        "import sys, llava_jax; assert 'jax' not in sys.modules; from llava_jax import Llava; "
        "sys.exit(bool({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_asked_about_again_is_decoded_once_and_again_when_it_changed(
    llava, tmp_path, monkeypatch
):
    decoded, load = [], sources.load_image
    monkeypatch.setattr(sources, "load_image", lambda *a: decoded.append(a) or load(*a))
    path = tmp_path / "picture.png"
    random_image(3).save(path)
    settings = {"batch_size": 4, "max_tokens": TOKENS}
    first = llava.generate(["What?", "Where?", "Who?"], [path] * 3, **settings)
    assert len(decoded) == 1
    random_image(4).save(path)
    second = llava.generate(["What?", "Where?", "Who?"], [path] * 3, **settings)
    assert len(decoded) == 2 and first != second
