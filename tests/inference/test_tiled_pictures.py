"""The engine with models that cut pictures into tiles: LLaVA-NeXT's and OneVision's ways."""

import dataclasses
import io
import random

import jax
import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.inference import prefill
from llava_jax.inference.decoding import tile_slots
from llava_jax.inference.jobs import Picture, Request
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models import cached_attention
from llava_jax.models.anyres import NEXT_GRIDS, Tiling
from llava_jax.models.cache import PAGE
from llava_jax.models.images import ImageSpec
from llava_jax.models.video import VideoSpec
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params, tiny_llava

TOKENS = 10
SIZE = 128
TEMPLATE = "mistral_instruct"  # short
SMALL_GRIDS = tuple((columns, rows) for columns in range(1, 4) for rows in range(1, 4))
SPECS = {
    "next": ImageSpec(8, "anyres", tiling=Tiling(NEXT_GRIDS)),
    "onevision": ImageSpec(
        8, "anyres", tiling=Tiling(SMALL_GRIDS, cap=2, one_view=True), video=VideoSpec()
    ),
}
# Of every aspect: of one tile, of all, without a row of features, without a column.
SIZES = [(9, 8), (30, 10), (10, 30), (17, 16), (25, 24), (400, 3), (3, 400), (1, 1)]


def config_of(name: str):
    return dataclasses.replace(CONFIG, image=SPECS[name])


@pytest.fixture(scope="module", params=[pytest.param("next", marks=pytest.mark.slow), "onevision"])
def llava(request):
    model = tiny_llava(config_of(request.param), TEMPLATE)
    model.engine.warm_up(batch_size=4, size=SIZE, few=True)
    return model


def mixed_requests(count: int, seed: int) -> tuple[list[str], list]:
    """Prompts with none, one or two of pictures of every size."""
    rng = random.Random(seed)
    pictures = [random_image(i, size) for i, size in enumerate(SIZES)]
    prompts = ["".join(rng.choices("abc ", k=rng.randint(1, 9))) + "?" for _ in range(count)]
    return prompts, [rng.sample(pictures, rng.choice([0, 1, 1, 2])) for _ in range(count)]


def ask(llava, prompts, images, batch_size=4, **settings):
    """Tokens of each answer."""
    params = SamplingParams(TOKENS, ignore_eos=True, **settings)
    requests = [llava.request(*entry, params) for entry in zip(prompts, images, strict=True)]
    return answered(llava, requests, batch_size)


def answered(llava, requests, batch_size=4):
    jobs = [llava.jobs(request)[0] for request in requests]
    for answer in llava.engine.run(jobs, batch_size):
        assert answer.error is None
    return [job.answer.tokens for job in jobs]


def whole_pass(llava, request: Request, tokens) -> np.ndarray:
    """Log probabilities [T, V] of a request and its answer, read at once."""
    ids = np.concatenate([request.input_ids, tokens])[None]
    spec, places = llava.config.image, np.flatnonzero(ids[0] == llava.config.image_token_id)
    taps = () if spec.taps == 1 else (spec.taps,)
    features = np.full((*ids.shape, *taps), -1)
    weights = np.zeros(features.shape, np.float32) if taps else None
    tiles, start = [np.zeros((0, spec.size, spec.size, 3), np.uint8)], 0
    for picture in request.pictures:
        part, layout = places[start : start + len(picture.layout)], picture.layout
        features[0, part] = layout.placed(sum(map(len, tiles)), llava.config.tokens_per_tile)
        if taps:
            weights[0, part] = layout.weights
        tiles.append(picture.load())
        start += len(layout)
    assert start == len(places)
    inputs = ids, np.concatenate(tiles), features, np.ones_like(ids), weights
    return np.array(jax.nn.log_softmax(llava.engine.logits(*inputs)[0]))


@pytest.mark.parametrize("images", [[0], [1], [4], [5], [6], [1, 2], [3, 5]], ids=str)
def test_answers_are_those_of_a_whole_pass(llava, images):
    pictures = [random_image(i, SIZES[i]) for i in images]
    llava.engine.forget()
    settings = {"max_tokens": TOKENS, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 0}
    ((answer,),) = llava.complete(["a?"], [pictures], 4, **settings)
    request = llava.request("a?", pictures, SamplingParams())
    expected = whole_pass(llava, request, answer.tokens)
    length = len(request.input_ids)
    assert expected[length - 1 : -1].argmax(1).tolist() == answer.tokens
    entries = [*answer.prompt_logprobs, *answer.logprobs]
    for at, entry in enumerate(entries):
        if entry.token >= 0:
            assert entry.logprob == pytest.approx(expected[at, entry.token], abs=1e-4)


def test_every_batch_gives_the_tokens_of_each_request_alone(llava):
    prompts, images = mixed_requests(14, seed=0)
    together = ask(llava, prompts, images)
    alone = []
    for entry in zip(prompts, images, strict=True):
        llava.engine.forget()
        alone += ask(llava, *([x] for x in entry))
    assert together == alone
    order = random.Random(1).sample(range(14), 14)
    shuffled = ask(llava, *([x[i] for i in order] for x in (prompts, images)), 3)
    assert shuffled == [together[i] for i in order]
    pieces = [""] * 14
    settings = {"max_tokens": TOKENS, "ignore_eos": True}
    for number, piece in llava.stream(prompts, images, 4, **settings):
        pieces[number] += piece
    assert pieces == llava.generate(prompts, images, 4, **settings)


def test_nothing_compiles_after_warm_up_whatever_the_pictures_sizes(llava):
    before = llava.engine.counts.compilations
    for seed in (2, 3):
        llava.engine.forget()
        ask(llava, *mixed_requests(9, seed), temperature=0.5)
    assert llava.engine.counts.compilations == before


def test_pictures_of_equal_tiles_and_other_layouts_share_no_token(llava):
    """Black pictures differ in their padding alone, which no tile shows."""
    black = [Image.new("RGB", size) for size in ((16, 9), (16, 11), (16, 13), (16, 15))]
    first, *others = [llava.request("a?", [picture], SamplingParams()) for picture in black]
    same = [r for r in others if (r.pictures[0].load() == 0).all()]
    assert {r.pictures[0].layout.tiles for r in same} == {first.pictures[0].layout.tiles}
    assert len({len(r.input_ids) for r in (first, *same)}) > 1
    alone = []
    for picture in black:
        llava.engine.forget()
        alone += ask(llava, ["a?"], [[picture]])
    llava.engine.forget()
    before = llava.engine.counts.encoded_images
    assert ask(llava, ["a?"] * 4, [[picture] for picture in black]) == alone
    assert llava.engine.counts.encoded_images - before == 1  # all tiles are black


def test_a_second_turn_reads_only_what_is_new_and_encodes_nothing(llava):
    picture = random_image(1, SIZES[4])
    llava.engine.forget()
    answer = llava.chat("a?", picture, max_tokens=8, ignore_eos=True)
    before = llava.engine.counts
    after = llava.chat("b?", picture, [("a?", answer)], max_tokens=8)
    counts = llava.engine.counts
    first = len(llava.request("a?", [picture], SamplingParams()).input_ids)
    assert counts.shared_tokens - before.shared_tokens >= first // PAGE * PAGE
    assert counts.encoded_images == before.encoded_images
    llava.engine.forget()
    assert after == llava.chat("b?", picture, [("a?", answer)], max_tokens=8)


def test_a_second_turn_with_another_picture(llava):
    """Where several pictures are one view each, nothing read of the first is right any more."""
    pictures = [random_image(1, SIZES[4]), random_image(2, SIZES[1])]
    llava.engine.forget()
    answer = llava.chat("<image>a?", pictures[:1], max_tokens=8, ignore_eos=True)
    before = llava.engine.counts.shared_tokens
    turn = "<image>b?", pictures, [("<image>a?", answer)]
    after = llava.chat(*turn, max_tokens=8)
    shared = llava.engine.counts.shared_tokens - before
    alone = llava.request("<image>a?", pictures[:1], SamplingParams())
    both = llava.request("<image>b?", pictures, SamplingParams(), [("<image>a?", answer)])
    if llava.config.image.tiling.one_view:
        assert [len(p.layout) for p in both.pictures] == [5, 5]
        assert shared < list(both.input_ids).index(llava.config.image_token_id) + 1
    else:
        assert len(both.pictures[0].layout) == len(alone.pictures[0].layout)
        assert shared >= len(alone.input_ids) // PAGE * PAGE
    llava.engine.forget()
    assert after == llava.chat(*turn, max_tokens=8)


def test_long_prompts_are_read_in_parts(llava, monkeypatch):
    """Next to short ones, of which some share their beginning; and nothing compiles for it."""
    prompts, images = mixed_requests(8, seed=7)
    long = ["abcdefgh" * 7 + "?", "abcdefgh" * 6 + "i?", "abcdefgh" * 7 + "?b"]
    prompts, images = long + prompts, [[random_image(4, SIZES[4])], [], [], *images]
    llava.engine.forget()
    expected = ask(llava, prompts, images)
    monkeypatch.setattr(prefill, "TOKENS_AT_A_TIME", 32)
    monkeypatch.setattr(cached_attention, "LONG_ROW", 16)
    monkeypatch.setattr(cached_attention, "BLOCK", 16)
    model = tiny_llava(llava.config, TEMPLATE)
    model.engine.warm_up(batch_size=4, size=SIZE, few=True)
    before, tokens = model.engine.counts.compilations, []
    run = model.engine.device.prefill
    monkeypatch.setattr(
        model.engine.device, "prefill", lambda p: tokens.append(len(p.input_ids)) or run(p)
    )
    assert ask(model, prompts, images) == expected
    model.engine.forget()
    assert ask(model, prompts[::-1], images[::-1], 3)[::-1] == expected
    assert model.engine.counts.compilations == before and max(tokens) == 32


def test_more_tiles_than_the_store_has_are_encoded_again_when_they_are_needed(llava):
    pictures = [random_image(i, SIZES[4]) for i in range(20)]  # of five or ten tiles
    llava.engine.forget()
    expected = ask(llava, ["a?"] * 20, [[p] for p in pictures])
    again = ask(llava, ["b?"] * 20 + ["a?"] * 20, [[p] for p in pictures] * 2)
    assert again[20:] == expected
    tiles = sum(llava.config.layouts([SIZES[4]])[0].tiles for _ in pictures)
    assert tiles > llava.engine.device.tile_slots or llava.config.image.taps == 1


def test_a_prompt_shares_pictures_that_are_in_the_store_no_more(llava):
    """Pages still hold what was read of them, if the question behind them fills the last one."""
    picture, question = random_image(1, SIZES[4]), "a" * PAGE + "?"
    llava.engine.forget()
    expected = ask(llava, [question], [[picture]])
    device = llava.engine.device
    device.store = device.store * np.nan  # whoever looked there would know
    llava.engine._admission._tiles = type(llava.engine._admission._tiles)(device.tile_slots)
    before = llava.engine.counts.encoded_images
    assert ask(llava, [question], [[picture]]) == expected
    assert llava.engine.counts.encoded_images == before
    llava.engine.forget()


def test_a_picture_is_cut_by_its_upright_size(llava):
    lying, exif = random_image(3, (40, 9)), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    sources = [file.getvalue(), Image.open(io.BytesIO(file.getvalue())), upright]
    answers = ask(llava, ["a?"] * 3, [[source] for source in sources])
    assert answers[0] == answers[1] == answers[2]


def test_a_file_of_another_size_by_the_time_it_is_read_is_an_error(llava, tmp_path):
    path = tmp_path / "picture.png"
    random_image(0, (40, 9)).save(path)
    request = llava.request("a?", path, SamplingParams(TOKENS))
    random_image(0, (9, 40)).save(path)
    with pytest.raises(LlavaError, match="changed while it was asked about: it had 40x9 .* 9x40"):
        llava.answer([request], 4)


def test_the_store_has_room_for_the_largest_picture_and_a_video():
    assert tile_slots(CONFIG.image) == tile_slots(SPECS["next"]) == 64
    grids = tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7))
    onevision = ImageSpec(384, "anyres", tiling=Tiling(grids, cap=9), video=VideoSpec(frames=32))
    assert tile_slots(onevision) == 37 + 32


def test_more_tiles_than_the_store_has_are_refused_by_name(llava):
    picture = llava.picture(random_image(1, SIZES[4]))
    count = 1 + llava.engine.device.tile_slots // picture.layout.tiles
    model = Llava(
        dataclasses.replace(
            llava.config,
            decoder=dataclasses.replace(llava.config.decoder, max_position_embeddings=9999),
        ),
        random_params(llava.config),
        byte_tokenizer(),
        TEMPLATE,
    )
    turns = llava_turns("<image>" * count)
    words = rf"{count} images or videos of \d+ tiles in all: give fewer images or frames"
    with pytest.raises(LlavaError, match=words):
        model.conversation_request(turns, [picture] * count, SamplingParams())


def llava_turns(text: str):
    from llava_jax.text.conversation import Turn

    return [Turn("human", text)]


def test_a_video_is_a_picture_of_many_tiles(llava):
    """Whoever reads videos makes such pictures; the engine needs no more."""
    spec = llava.config.image
    if spec.video is None:
        with pytest.raises(LlavaError, match="takes pictures, not videos"):
            llava.config.layouts([(20, 20, 5)])
        return
    (layout,) = llava.config.layouts([(20, 20, 5)])
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    video = Picture(layout, lambda: frames, "video")
    request = llava.conversation_request(
        llava_turns("<image>a?"), [video], SamplingParams(TOKENS, ignore_eos=True)
    )
    (tokens,) = answered(llava, [request])
    expected = whole_pass(llava, request, tokens)
    assert expected[len(request.input_ids) - 1 : -1].argmax(1).tolist() == tokens
