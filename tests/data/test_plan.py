import time

import numpy as np
import pytest

from llava_jax.data.plan import plan_rows
from llava_jax.models.images import ImageSpec, layouts


def lengths_and_images(count, seed=0):
    random = np.random.default_rng(seed)
    lengths = np.minimum(2048, random.lognormal(6.2, 0.6, count).astype(int) + 1)
    return lengths, random.integers(0, 3, count)


@pytest.mark.parametrize("packing", [True, False])
def test_every_record_once_within_both_budgets(packing):
    lengths, images = lengths_and_images(3000)
    plan = plan_rows(lengths, images, 2048, 4, seed=1, epoch=0, packing=packing)
    assert sorted(plan.members.tolist()) == list(range(3000))
    for row in range(len(plan)):
        assert 0 < lengths[plan[row]].sum() <= 2048 and images[plan[row]].sum() <= 4
    if not packing:
        assert len(plan) == 3000


def test_a_pure_function_of_seed_and_epoch():
    lengths, images = lengths_and_images(500)
    plan = lambda seed, epoch: plan_rows(lengths, images, 2048, 8, seed, epoch).members.tolist()
    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1) and plan(1, 0) != plan(2, 0)


def empty_share(lengths, images, max_length: int, images_per_row: int) -> float:
    rows = len(plan_rows(lengths, images, max_length, images_per_row, 0, 0))
    return 1 - lengths.sum() / (rows * max_length)


def test_rows_are_well_filled():
    lengths, images = lengths_and_images(20000)
    assert empty_share(lengths, np.minimum(images, 1), 2048, 16) < 0.01


# The 665K mix by its parts: thousands of records, turns of one, tokens a turn, with a picture. How
# many records is known; turns and tokens are estimates from the kinds of question.
MIX = (
    (56.7, 3, 85, True),  # LLaVA: conversations
    (23.2, 1, 125, True),  # LLaVA: descriptions
    (77.8, 1, 165, True),  # LLaVA: reasoning
    (40.7, 4, 400, False),  # ShareGPT
    (82.8, 5.4, 18, True),  # VQAv2
    (72.1, 10, 20, True),  # GQA
    (9.0, 1, 30, True),  # OKVQA
    (80.0, 5, 25, True),  # OCR-VQA
    (66.2, 1, 75, True),  # A-OKVQA
    (22.0, 1, 70, True),  # TextCaps
    (48.4, 8, 40, True),  # RefCOCO
    (86.4, 10, 45, True),  # Visual Genome
)
SYSTEM_PROMPT, PICTURE = 42, 576


def mix_665k(records_a_thousand: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of records in the mix's proportions, cut at 2,048 tokens."""
    random, lengths, images = np.random.default_rng(0), [], []
    for thousands, turns, tokens, pictured in MIX:
        count = int(thousands * records_a_thousand)
        each = 1 + random.poisson(turns - 1, count)
        text = random.gamma(4.0 * each, tokens / 4)  # a turn's: mean `tokens`, deviation half of it
        lengths.append(SYSTEM_PROMPT + PICTURE * pictured + text.astype(int))
        images.append(np.full(count, int(pictured)))
    return np.minimum(np.concatenate(lengths), 2048), np.concatenate(images)


@pytest.mark.parametrize(("max_length", "most"), [(2048, 0.125), (4096, 0.06)])
def test_rows_of_the_llava_mix_are_as_full_as_they_can_be(max_length, most):
    """Two records of 700 to 1,024 tokens leave much of 2,048 empty, and few fit beside them.

    The least possible is 11.6%, by a linear program over all fillings of a row, of a sample.
    """
    lengths, images = mix_665k(30)
    assert 800 < lengths.mean() < 900
    assert empty_share(lengths, images, max_length, 3 * max_length // 2048) < most


def next_pictures(count: int) -> list[tuple[int, int]]:
    """Sizes in three ranges, side log-uniform in each, log of the aspect normal."""
    random, sizes = np.random.default_rng(0), []
    for least, most in ((300, 700), (700, 1500), (1500, 4000)):
        side = np.exp(random.uniform(np.log(least), np.log(most), count))
        aspect = np.exp(random.normal(0, 0.3, count) / 2)
        sizes += zip((side * aspect).astype(int), (side / aspect).astype(int), strict=True)
    return [(int(width), int(height)) for width, height in sizes]


@pytest.mark.parametrize("text_only", [0.0, 0.06])
def test_rows_of_pictures_in_tiles_fill_both_budgets(text_only):
    """LLaVA-NeXT's rows of configs/llava16_7b_instruct.py: 8,192 tokens and 15 tiles."""
    spec, random = ImageSpec(336, "anyres"), np.random.default_rng(0)
    found = [layouts(spec, 576, [size])[0] for size in next_pictures(2000)]
    text = 42 + np.minimum(1500, random.gamma(2.0, 130, len(found)).astype(int))
    lengths = np.minimum([len(layout) for layout in found] + text, 4096)
    tiles = np.array([layout.tiles for layout in found])
    assert 2200 < lengths.mean() < 2800 and tiles.min() == 3 and tiles.max() == 5
    more = int(len(lengths) * text_only)
    chats = np.minimum(42 + random.gamma(2.0, 600, more).astype(int), 4096)
    lengths, tiles = np.append(lengths, chats), np.append(tiles, np.zeros(more, int))
    rows = len(plan_rows(lengths, tiles, 8192, 15, 0, 0))
    assert 1 - lengths.sum() / (rows * 8192) < 0.10
    assert 1 - tiles.sum() / (rows * 15) < 0.15


def test_the_llava_mix_is_planned_in_seconds():
    lengths, images = lengths_and_images(100_000)
    start = time.process_time()
    plan_rows(lengths, np.minimum(images, 1), 2048, 8, 0, 0)
    assert time.process_time() - start < 5  # seconds of CPU


def test_a_record_larger_than_a_row_is_refused():
    with pytest.raises(ValueError, match="larger"):
        plan_rows([5], [0], 4, 1, 0, 0)
