"""The engine: continuous batches, shared prefixes, pictures, compilations, sampling through it."""

import io
import itertools
import random
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.inference import engine
from llava_jax.inference.admission import PictureNumbers, TileSlots
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.models.quantization import pack_kernels
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

TOKENS = 12
SIZE = 64  # prompt and answer of every request here: one cache size, few compilations
TEMPLATE = "mistral_instruct"  # short


@pytest.fixture(scope="module")
def llava():
    model = tiny_llava(template=TEMPLATE)
    model.engine.warm_up(batch_size=4, size=SIZE)
    return model


def mixed_requests(count: int, seed: int) -> tuple[list[str], list, list[int]]:
    """Prompts with none, one or two of few pictures, and how many tokens to answer with."""
    rng = random.Random(seed)
    pictures = [random_image(i) for i in range(3)]
    prompts = ["".join(rng.choices("abc ", k=rng.randint(1, 9))) + "?" for _ in range(count)]
    images = [rng.sample(pictures, rng.choice([0, 1, 1, 2])) for _ in range(count)]
    return prompts, images, [rng.randint(1, TOKENS) for _ in range(count)]


def ask(llava, prompts, images, tokens, batch_size):
    """Tokens of each answer. Not by `Llava.answers`: it may take smaller batches."""
    jobs = [
        llava.jobs(llava.request(p, i, SamplingParams(t, ignore_eos=True)))[0]
        for p, i, t in zip(prompts, images, tokens, strict=True)
    ]
    for _ in llava.engine.run(jobs, batch_size):
        pass
    return [job.answer.tokens for job in jobs]


def test_every_batch_composition_gives_the_tokens_of_each_request_alone(llava):
    prompts, images, tokens = mixed_requests(20, seed=0)
    together = ask(llava, prompts, images, tokens, 4)
    assert [len(answer) for answer in together] == tokens
    alone = []
    for entry in zip(prompts, images, tokens, strict=True):
        llava.engine.forget()  # nothing is shared
        alone += ask(llava, *([x] for x in entry), 4)
    assert together == alone
    order = list(range(20))
    random.Random(1).shuffle(order)
    shuffled = ask(llava, *([x[i] for i in order] for x in (prompts, images, tokens)), 3)
    assert shuffled == [together[i] for i in order]


def test_nothing_compiles_after_warm_up(llava):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    before = llava.engine.counts.compilations
    jax.jit(lambda x: x * 3)(1.0)
    assert compiled, "the listener hears no compilation"
    compiled.clear()
    for seed, batch_size in ((2, 4), (3, 3), (4, 4)):
        prompts, images, _ = mixed_requests(11, seed)
        llava.engine.forget()
        llava.generate(prompts, images, batch_size, max_tokens=TOKENS, temperature=0.5, top_k=3)
        llava.generate(prompts, images, batch_size, logprobs=2, stop="e", max_tokens=TOKENS)
    assert compiled == [] and llava.engine.counts.compilations == before


def test_a_picture_is_encoded_once_and_its_prefix_read_once(llava):
    # A beginning in common that is worth a wait for the first one's prefill.
    picture, prompts = random_image(9), [f"TELL ME OF {c}?" for c in "abcdefgh"]
    llava.engine.forget()
    before = vars(llava.engine.counts).copy()
    answers = llava.generate(prompts, [picture] * 8, 4, max_tokens=3)
    counts = {name: value - before[name] for name, value in vars(llava.engine.counts).items()}
    assert counts["requests"] == counts["images"] == 8 and counts["encoded_images"] == 1
    ids = list(llava.request(prompts[0], [picture], SamplingParams()).input_ids)
    prefix = ids.index(ord("a") - 33)  # what stands before the letter
    pages = prefix // PAGE * PAGE  # what is shared is whole pages
    assert (
        pages and counts["shared_tokens"] >= 7 * pages and counts["prompt_tokens"] == 8 * len(ids)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        llava.engine.forget()
        params = SamplingParams(3)
        jobs = llava.jobs(llava.request(prompt, [picture], params))
        for _ in llava.engine.run(jobs, 4):
            pass
        assert jobs[0].answer.text == answer


def test_prompts_of_one_call_share_what_they_begin_with(llava, monkeypatch):
    """Chains of it too: the third shares more with the second than with the first."""
    first = "abcdefghijklmnopqrst"
    prompts = [f"{first}one?", f"{first}two, more long?", f"{first}two, more longer?", "other?"]
    alone = []
    for prompt in prompts:
        llava.engine.forget()
        alone += ask(llava, [prompt], [[]], [6], 4)
    calls, pack = [], engine.pack_prompts
    monkeypatch.setattr(
        engine, "pack_prompts", lambda jobs, *to: calls.append(jobs) or pack(jobs, *to)
    )
    llava.engine.forget()
    assert ask(llava, prompts, [[]] * 4, [6] * 4, 4) == alone
    (jobs,) = calls
    one, two, three, other = (job.request.input_ids for job in jobs)
    common = lambda a, b: next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)  # noqa: B905
    assert jobs[1].shared == common(one, two) // PAGE * PAGE > 0
    assert jobs[2].shared == common(two, three) // PAGE * PAGE > jobs[1].shared
    assert jobs[3].shared == common(one, other) // PAGE * PAGE


def test_pages_that_others_share_are_not_overwritten_in_their_wave(llava):
    """The cache holds three prompts; the next four begin as one of them, and want all rows."""
    first = ["abcdefghabcdefgh?", "ijklmnopijklmnop?", "qrstuvwxqrstuvwx?"]
    second = [f"{first[i][:-1]}{n}?" for i, n in ((0, 1), (0, 2), (1, 3), (2, 4), (0, 5))]
    alone = []
    for prompt in second:
        llava.engine.forget()
        alone += ask(llava, [prompt], [[]], [6], 4)
    llava.engine.forget()
    ask(llava, first, [[]] * 3, [6] * 3, 4)
    assert ask(llava, second, [[]] * 5, [6] * 5, 4) == alone


def test_one_prompt_with_two_pictures_is_not_taken_for_the_other(llava):
    pictures = [random_image(i) for i in range(6)]
    llava.engine.forget()
    answers = ask(llava, ["x?"] * 6, [[p] for p in pictures], [TOKENS] * 6, 4)
    assert len({tuple(answer) for answer in answers}) == 6
    assert answers[::-1] == ask(llava, ["x?"] * 6, [[p] for p in pictures[::-1]], [TOKENS] * 6, 4)


def test_other_parameters_are_never_mixed_with_what_was_read_before(llava):
    first = llava.generate(["a?"], [random_image(0)], 4, max_tokens=TOKENS)
    kept = llava.engine.params
    try:
        llava.engine.params = random_params(CONFIG, seed=7)
        other = llava.generate(["a?"], [random_image(0)], 4, max_tokens=TOKENS)
    finally:
        llava.engine.params = kept
    assert other != first
    assert llava.generate(["a?"], [random_image(0)], 4, max_tokens=TOKENS) == first


def test_a_stream_left_early_leaves_nothing_behind(llava):
    expected = llava.generate(["a?", "b?"], None, 4, max_tokens=TOKENS)
    stream = llava.stream(["long?", "longer?"], None, 4, max_tokens=20)
    next(stream)
    stream.close()
    assert llava.generate(["a?", "b?"], None, 4, max_tokens=TOKENS) == expected


def test_a_stream_gives_the_text_of_each_prompt_in_pieces(llava):
    prompts, images, _ = mixed_requests(7, seed=5)
    texts = [""] * 7
    pieces = list(llava.stream(prompts, images, 3, max_tokens=TOKENS))
    for number, piece in pieces:
        texts[number] += piece
    assert texts == llava.generate(prompts, images, 3, max_tokens=TOKENS)
    numbers = [number for number, _ in pieces]
    assert len(list(itertools.groupby(numbers))) > 7  # they come side by side


def damaged_png() -> bytes:
    """Its first and last bytes are good; what is wrong shows when it is decoded."""
    file = io.BytesIO()
    random_image(0, (40, 40)).save(file, "PNG")
    data = bytearray(file.getvalue())
    start = data.index(b"IDAT") + 8
    data[start : start + 20] = bytes(20)
    return bytes(data)


def test_a_request_with_an_unreadable_picture_spares_the_others(llava):
    params = SamplingParams(3)
    good, bad = random_image(0), damaged_png()
    requests = [llava.request("a?", [i], params) for i in (good, bad, good)]
    jobs = [llava.jobs(request)[0] for request in requests]
    for _ in llava.engine.run(jobs, 4):
        pass
    answers = [job.answer for job in jobs]
    assert "image 0" in str(answers[1].error) and answers[1].finish_reason == "error"
    assert answers[0].text == answers[2].text == llava.generate("a?", good, max_tokens=3)
    with pytest.raises(LlavaError, match="prompt 1: .*image 0"):
        llava.generate(["a?", "a?"], [good, bad], 4)


def test_a_chats_next_turn_reads_only_what_is_new(llava):
    picture = random_image(1)
    answer = llava.chat("a?", picture, max_tokens=8, ignore_eos=True)
    history = [("a?", answer)]
    before = llava.engine.counts.shared_tokens
    first = len(llava.request("a?", [picture], SamplingParams()).input_ids)
    after = llava.chat("b?", picture, history, max_tokens=8)
    assert llava.engine.counts.shared_tokens - before >= first // PAGE * PAGE > 0
    llava.engine.forget()
    assert after == llava.chat("b?", picture, history, max_tokens=8)


def test_n_answers_are_those_of_the_seeds_that_follow(llava):
    several = llava.generate(["a?", "b?"], None, 4, n=3, seed=5, temperature=1.0, max_tokens=TOKENS)
    assert len(several) == 2
    for prompt, texts in zip(["a?", "b?"], several, strict=True):
        for i, text in enumerate(texts):
            drawn = {"seed": 5 + i, "temperature": 1.0, "max_tokens": TOKENS}
            assert llava.generate([prompt], None, 4, **drawn) == [text]
    assert len(set(several[0])) > 1


def test_stops_end_an_answer_and_min_tokens_holds_them_back(llava):
    settings = {"max_tokens": TOKENS, "ignore_eos": True}
    ((free,),) = llava.complete(["a?"], None, 4, **settings)
    assert free.finish_reason == "length" and len(free.tokens) == TOKENS
    stop = free.tokens[5]
    place = free.tokens.index(stop)
    ((ended,),) = llava.complete(["a?"], None, 4, stop_token_ids=[stop], **settings)
    assert ended.tokens == free.tokens[:place] and ended.finish_reason == "stop"
    least = place + 3
    ((held,),) = llava.complete(
        ["a?"], None, 4, stop_token_ids=[stop], min_tokens=least, **settings
    )
    assert len(held.tokens) >= least and stop not in held.tokens
    assert held.tokens[:place] == free.tokens[:place]


def test_a_stop_text_may_cross_tokens_and_ends_where_it_is_whole(llava):
    settings = {"max_tokens": TOKENS, "ignore_eos": True}
    for seed in range(20):  # an answer with some text in it
        drawn = {**settings, "temperature": 1.0, "seed": seed}
        ((free,),) = llava.complete(["a?"], None, 4, **drawn)
        if len(free.text) >= 5 and free.text.isascii() and " " not in free.text:
            break
    text = free.text
    stop = text[2:4]
    ((ended,),) = llava.complete(["a?"], None, 4, stop=[stop, "never"], **drawn)
    assert ended.text == text[: text.index(stop)].strip() and ended.finish_reason == "stop"
    assert ended.tokens == free.tokens[: len(ended.tokens)]


def test_logprobs_are_those_of_a_forward_pass(llava):
    picture = random_image(2)
    settings = {"max_tokens": 6, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 2}
    drawn = {**settings, "temperature": 1.3, "seed": 3, "repetition_penalty": 1.5}
    for prompt, images, values in (("a?", None, settings), ("b?", [picture], drawn)):
        ((answer,),) = llava.complete([prompt, "zz"], [images, None], 4, **values)[:1]
        request = llava.request(prompt, images, SamplingParams())
        ids = np.concatenate([request.input_ids, answer.tokens])[None]
        tiles = np.concatenate([np.zeros((0, 8, 8, 3)), *(p.load() for p in request.pictures)])
        is_image = ids == CONFIG.image_token_id
        features = np.where(is_image, np.cumsum(is_image) - 1, -1)
        logits = llava.engine.logits(ids, tiles.astype(np.uint8), features, np.ones_like(ids))
        expected = np.array(jax.nn.log_softmax(logits[0]))
        entries = [*answer.prompt_logprobs, *answer.logprobs]
        assert len(answer.logprobs) == 6 and len(entries) == ids.size - 1
        for at, entry in enumerate(entries):
            assert entry.token == ids[0, at + 1]
            if entry.token >= 0:
                assert entry.logprob == pytest.approx(expected[at, entry.token], abs=1e-4)
            count = 2 if at < len(answer.prompt_logprobs) else 3
            assert list(entry.top.values()) == pytest.approx(
                np.sort(expected[at])[::-1][:count], abs=1e-4
            )
            for token, value in entry.top.items():
                assert value == pytest.approx(expected[at, token], abs=1e-4)


def test_eight_bits_answer_and_are_near(llava):
    low = Llava(
        CONFIG, random_params(CONFIG), byte_tokenizer(), "chatml", quantize="int8", kv_cache="int8"
    )
    kernel = low.engine.params["decoder"]["layers"]["mlp"]["up_proj"]
    assert kernel["kernel"].dtype == jnp.int8
    exact = llava.engine.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    error = abs(kernel["kernel"] * kernel["kernel_scale"] - exact)
    assert (error <= 0.501 * kernel["kernel_scale"]).all()
    ids = np.arange(20)[None]
    expected = llava.logits(ids)
    difference = abs(low.logits(ids) - expected).max()
    assert 0 < difference < 0.2 * abs(expected).max()
    assert low.engine.device.kv_dtype == jnp.int8
    assert isinstance(low.generate("a?", random_image(0), max_tokens=4), str)
    with pytest.raises(LlavaError, match="quantize must be int8 or int4"):
        Llava(CONFIG, {}, byte_tokenizer(), "chatml", quantize="int3")


def test_packed_kernels_compute_the_same():
    params, ids = random_params(CONFIG), np.arange(20)[None]
    plain, packed = (
        Llava(CONFIG, tree, byte_tokenizer(), TEMPLATE, dtype="mixed")
        for tree in (params, pack_kernels(params))
    )
    kernel = packed.engine.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.uint16
    picture = np.array(random_image(0, (8, 8)))[None]
    ids[0, 2:6] = CONFIG.image_token_id
    features = np.full_like(ids, -1)
    features[0, 2:6] = range(4)
    mask = np.ones_like(ids)
    np.testing.assert_allclose(
        packed.engine.logits(ids, picture, features, mask),
        plain.engine.logits(ids, picture, features, mask),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_model_on_a_mesh_gives_the_same_tokens_and_stays_where_it_is(llava):
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    spread = Llava(CONFIG, random_params(CONFIG), byte_tokenizer(), TEMPLATE, mesh=mesh)
    requests = mixed_requests(10, seed=6)
    assert ask(spread, *requests, 4) == ask(llava, *requests, 4)
    kernel = spread.engine.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert spread.engine.device.pages % 2 == 0
    keys = spread.engine.device.state.cache.keys
    assert keys.addressable_shards[0].data.size == keys.size // 4
    before = spread.engine.counts.compilations
    spread.engine.forget()  # what is shared decides the shapes
    ask(spread, *requests, 4)
    assert spread.engine.counts.compilations == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stop_token_ids": range(40)}, "stop tokens, the model's own included: at most 32"),
        ({"stop_token_ids": [300]}, "stop token 300 is not in the vocabulary"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(llava, settings, message):
    with pytest.raises(LlavaError, match=f"prompt 0: .*{message}"):
        llava.generate(["a?"], None, 4, **settings)


def test_tile_slots_forget_the_least_recently_used_and_no_pinned_one():
    slots = TileSlots(2)
    a, b = slots.add(b"a", ()), slots.add(b"b", ())
    assert slots.find(b"a") == a and slots.find(b"c") is None
    c = slots.add(b"c", pinned={a})
    assert c == b and slots.find(b"b") is None and slots.find(b"a") == a
    assert slots.add(b"d", pinned={0, 1}) is None
    assert slots.add(b"d", pinned=()) == c and slots.find(b"c") is None


def test_a_picture_that_was_forgotten_gets_a_number_that_no_other_ever_had():
    numbers = PictureNumbers(most=2)
    a, b = numbers[b"a"], numbers[b"b"]
    assert numbers[b"a"] == a != b
    given = [a, b, numbers[b"c"]]  # b is forgotten
    assert numbers[b"a"] == a and numbers[b"b"] not in given


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_requests_in_order(llava):
    """Of mixed sizes, two in five about pictures; and nothing compiles on the way."""
    compiled = llava.engine.counts.compilations
    peaks, count = [], 0
    for seed in range(100):
        prompts, images, tokens = mixed_requests(1000, seed)
        seeds = [3000 * seed + 3 * i for i in range(1000)]
        images = [
            [random_image(first + j) for j in range(len(some))] if first % 5 < 2 else []
            for first, some in zip(seeds, images, strict=True)
        ]
        answers = ask(llava, prompts, images, tokens, 4)
        assert [len(answer) for answer in answers] == tokens
        if seed % 20 == 0:  # the order: each answer is that of its request alone
            for i in random.Random(seed).sample(range(1000), 5):
                llava.engine.forget()
                entry = [prompts[i]], [images[i]], [tokens[i]]
                assert ask(llava, *entry, 4) == [answers[i]]
        count += len(answers)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert count == 100_000 and llava.engine.counts.compilations == compiled
    assert peaks[-1] - peaks[9] < 50, f"MiB at the peak after each 1,000: {peaks}"
    print(f"MiB at the peak after 10,000 and 100,000: {peaks[9]:.0f}, {peaks[-1]:.0f}")
