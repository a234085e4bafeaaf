"""Copies of pictures, within a data set and in two; what is no copy."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llava_jax.data.duplicates import BITS, groups, leaks, near_hashes
from llava_jax.data.fingerprints import Collector, picture_set
from llava_jax.data.records import open_records
from tests.data.conftest import record


def photo(seed, size=(200, 150)):
    """Smooth at first sight, noisy in detail, as photos are."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(
        (pixels + random.integers(-9, 10, pixels.shape)).clip(0, 255).astype("u1")
    )


def shape(seed):
    """One flat shape on a pale ground, as in Easy-VQA."""
    random = np.random.default_rng(seed)
    ground = tuple(random.integers(225, 250, 3).tolist())
    image = Image.new("RGB", (64, 64), ground)
    colour = ((220, 20, 20), (20, 30, 210), (20, 130, 30), (120, 60, 20))[random.integers(4)]
    x, y = random.integers(2, 40, 2).tolist()
    side = int(random.integers(12, 22))
    draw = ImageDraw.Draw(image)
    place = (x, y, x + side, y + side)
    (draw.rectangle, draw.ellipse)[random.integers(2)](place, fill=colour)
    return image


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def fingerprints(files):
    """Of encoded pictures, one a record."""
    collector = Collector()
    for number, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        collector.use(number, 0, collector.add(data, image))
    return collector.finish()


def half(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES = {
    "same bytes": encoded,
    "same pixels": lambda image: encoded(image, "BMP"),
    "jpeg": lambda image: encoded(image, "JPEG", quality=60),
    "webp": lambda image: encoded(image, "WEBP", quality=60),
    "half": lambda image: encoded(half(image)),
    "half jpeg": lambda image: encoded(half(image), "JPEG", quality=75),
    "square": lambda image: encoded(image.resize((224, 224), Image.Resampling.BICUBIC)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_found_among_others(how):
    files = [encoded(photo(seed)) for seed in range(40)]
    copies = [COPIES[how](photo(seed)) for seed in (3, 17, 31)]
    kind = how if how in ("same bytes", "same pixels") else "near-duplicate"
    found = groups(fingerprints(files + copies))
    assert [(g.kind, g.rows.tolist()) for g in found] == [(kind, [s, 40 + i]) for i, s in
                                                           enumerate((3, 17, 31))]  # fmt: skip
    others = [encoded(photo(seed)) for seed in range(100, 110)]
    found = leaks(fingerprints(files), fingerprints([*others, *copies]))
    assert [(leak.kind, leak.ours.tolist(), leak.theirs) for leak in found] == [
        (kind, [3], 10), (kind, [17], 11), (kind, [31], 12)
    ]  # fmt: skip


def test_other_pictures_are_no_copies():
    assert groups(fingerprints([encoded(photo(seed)) for seed in range(300)])) == []


def test_flat_shapes_are_told_apart_and_their_copies_found():
    files = [encoded(shape(seed)) for seed in range(600)]
    assert len(groups(fingerprints(files))) <= 1  # two may look the same by chance
    doubled = [encoded(shape(seed).resize((128, 128))) for seed in range(0, 600, 20)]
    found = {leak.theirs: leak.ours for leak in leaks(fingerprints(files), fingerprints(doubled))}
    assert all(20 * theirs in ours for theirs, ours in found.items()) and len(found) == 30


def test_pictures_of_one_colour():
    grounds = [
        encoded(Image.new("RGB", (40, 30), (level, level, 200))) for level in range(0, 256, 50)
    ]
    assert groups(fingerprints(grounds)) == []
    again = encoded(Image.new("RGB", (80, 60), (50, 50, 200)))
    assert [group.rows.tolist() for group in groups(fingerprints([*grounds, again]))] == [[1, 6]]


def test_a_group_takes_the_weakest_kind_and_a_leak_the_strongest():
    first = photo(1)
    files = [encoded(first), encoded(first, "BMP"), encoded(first, "JPEG", quality=70)]
    (group,) = groups(fingerprints([*files, encoded(photo(2))]))
    assert group.kind == "near-duplicate" and group.rows.tolist() == [0, 1, 2]
    (leak,) = leaks(fingerprints(files), fingerprints([encoded(photo(9)), encoded(first)]))
    assert leak.kind == "same bytes" and leak.ours.tolist() == [0, 1, 2] and leak.theirs == 1


def test_no_pair_of_hashes_is_missed():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 400, np.uint64)
    for flips in range(9):  # copies with that many other bits
        for number in range(20):
            bits = random.choice(64, flips, replace=False).astype(np.uint64)
            mask = np.bitwise_or.reduce(np.uint64(1) << bits) if flips else np.uint64(0)
            hashes = np.append(hashes, hashes[20 * flips + number] ^ mask)
    found = {tuple(sorted(pair)) for a, b in near_hashes(hashes) for pair in zip(a, b, strict=True)}
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert found == {(a, b) for a, b in np.argwhere(distance <= BITS).tolist() if a < b}
    assert len(found) == 20 * (BITS + 1)


def test_a_picture_that_several_records_use_is_one():
    collector = Collector()
    numbers = [collector.add(encoded(photo(seed)), photo(seed)) for seed in (5, 6, 7)]
    for user, place, number in ((2, 0, 2), (4, 0, 0), (4, 2, 0), (9, 0, 2)):  # not the second
        collector.use(user, place, numbers[number])
    found = collector.finish()
    assert len(found) == 2 and groups(found) == []
    assert found.rows.tolist() == [0, 1, 1, 0]  # in the order of use, whoever came first
    assert found.users(np.array([0])) == [2, 9] and found.users(np.array([1])) == [4]
    assert found.first_use(0) == (2, 0) and found.first_use(1) == (4, 0)
    (leak,) = leaks(found, fingerprints([encoded(photo(5))]))
    assert leak.ours.tolist() == [1]


def test_nothing():
    empty = Collector().finish()
    assert groups(empty) == [] and leaks(empty, empty) == []


def test_a_record_that_a_mixture_repeats_is_no_copy(tmp_path):
    picture = base64.b64encode(encoded(photo(5))).decode()
    items = [record("a", "<image>What?", "b", f"data:image/png;base64,{picture}")]
    (tmp_path / "inside.json").write_text(json.dumps(items))
    (tmp_path / "mix.yaml").write_text("datasets:\n  - path: inside.json\n    repeat: 3\n")
    found = picture_set(open_records(tmp_path / "mix.yaml"), threads=1, progress=False)
    assert len(found.fingerprints) == 1 and found.fingerprints.users(np.array([0])) == [0, 1, 2]
    (tmp_path / "twice.json").write_text(json.dumps(items * 2))
    found = picture_set(open_records(tmp_path / "twice.json"), threads=1, progress=False)
    assert [group.kind for group in groups(found.fingerprints)] == ["same bytes"]
