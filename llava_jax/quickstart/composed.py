"""Data sets composed of easy-VQA's pictures that one look at one square picture cannot answer.

    poster    four pictures in the corners of a large one: their shapes are lost when it is squashed
    several   two to four pictures in one prompt: which of them is red?
    video     a shape that moves, or two that appear one after the other

Each has records to train on and one question each to test with. Two have records for an ablation
besides: of the pictures in another order, and of the middle frame alone. That of posters is a
recipe, which sees one view of the same records. Pictures of the training and of the test split
never meet.
"""

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.files import write_records
from llava_jax.quickstart import easy_vqa
from llava_jax.quickstart.easy_vqa import (
    COLORS,
    SHAPES,
    Question,
    blind_scores,
    caption,
    conversation,
    read_questions,
)
from llava_jax.quickstart.folders import is_written, written_folder
from llava_jax.quickstart.packages import package_folder

SIDE = 64  # pixels of an easy-VQA picture
POSTER = 9 * SIDE // 2  # one view of 56 pixels leaves 12 of each picture, three tiles a side 37
CORNERS = ("top left", "top right", "bottom left", "bottom right")
FRAMES = 5
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SOURCES = [__file__, easy_vqa.__file__]
STRIDE = 8  # pixels that a shape moves from frame to frame
TRAIN, TEST = {"poster": 1200, "several": 2000, "video": 3000}, 400


class Shape(NamedTuple):
    """One easy-VQA picture, and what it shows; file: its name in easy-VQA's folder of pictures."""

    picture: Image.Image
    color: str
    shape: str
    file: str = ""


class Example(NamedTuple):
    """One record of a data set.

    Attributes:
      media: names of its files below `images/`, with the pictures; a video has those of its frames.
      questions: (question, answer) pairs. Training asks all, in any order; a test asks the first.
      video: the folder of the frames below `images/`; "" if the media are pictures.
    """

    media: list[tuple[str, Image.Image]]
    questions: list[tuple[str, str]]
    video: str = ""


def prepare_composed(name: str, out_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Writes one of the data sets to `out_dir`, unless it is there, complete and unchanged.

    Files: train.json, test.json (one question a record, with keys question, answer and kind),
    blind.json, images/; test_ablation.json of `several` and `video`, and train_ablation.json of
    `video`.
    """
    out_dir = Path(out_dir)
    if is_written(out_dir, SOURCES, log):
        return out_dir
    log(f"{name}: writing {out_dir} ...")
    compose = {"poster": _poster, "several": _several, "video": _video}[name]
    with written_folder(out_dir, SOURCES) as temporary:
        asked, records = [], {}
        for split, count in (("train", TRAIN[name]), ("test", TEST)):
            rng = random.Random(f"{name} {split}")
            shapes = read_shapes(split)
            examples = [compose(rng, shapes, f"{split}/{i}") for i in range(count)]
            for example in examples:
                for file, picture in example.media:
                    path = temporary / "images" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path)
            if split == "train":
                asked = [Question(*pair, 0) for e in examples for pair in e.questions]
                records |= _training(name, examples)
            else:
                records |= _tests(name, examples)
        blind = {split: blind_scores(asked, records[split]) for split in records if "test" in split}
        (temporary / "blind.json").write_text(json.dumps(blind, indent=2) + "\n")
        for split, lines in records.items():
            write_records(temporary / f"{split}.json", lines)
    log(f"{name}: " + ", ".join(f"{len(r):,} {split}" for split, r in records.items()))
    return out_dir


def read_shapes(split: str) -> list[Shape]:
    """The pictures of `train` or `test` whose colour and shape their questions settle."""
    folder = package_folder("easy_vqa", "easy-vqa") / "data" / split / "images"
    by_image = collections.defaultdict(list)
    for question in read_questions(split):
        by_image[question.image].append(question)
    shapes = []
    for image, questions in sorted(by_image.items()):
        if text := caption(questions):  # "a blue rectangle."
            _, color, shape = text.rstrip(".").split()
            with Image.open(folder / f"{image}.png") as picture:
                shapes.append(Shape(picture.convert("RGB"), color, shape, f"{split}/{image}.png"))
    return shapes


def _poster(rng: random.Random, shapes: list[Shape], name: str) -> Example:
    """Four pictures in the corners of a light square, and the question for each shape.

    Training also asks for the colour in each corner, from which it learns the corners.
    """
    level = rng.randrange(225, 250)
    poster = Image.new("RGB", (POSTER, POSTER), (level,) * 3)
    questions, colors = [], []
    for i, corner in enumerate(CORNERS):
        one = rng.choice(shapes)
        poster.paste(one.picture, ((i % 2) * (POSTER - SIDE), (i // 2) * (POSTER - SIDE)))
        questions.append((f"what shape is in the {corner} corner?", one.shape))
        colors.append((f"what color is the shape in the {corner} corner?", one.color))
    rng.shuffle(questions)
    return Example([(f"{name}.png", poster)], questions + colors)


def _several(rng: random.Random, shapes: list[Shape], name: str) -> Example:
    """Two to four pictures of different colours, and which of them a question is about.

    Training asks for the colour of each by its number as well, from which it learns the numbers.
    """
    pictures = []
    colors = rng.sample(COLORS, rng.randrange(2, 5))
    for color in colors:
        pictures.append(rng.choice([s for s in shapes if s.color == color]))
    media = [(f"{name}-{i}.png", one.picture) for i, one in enumerate(pictures)]
    numbers = range(1, len(pictures) + 1)
    pairs = list(zip(numbers, pictures, strict=True))
    questions = [(f"in which picture is the shape {one.color}?", str(i)) for i, one in pairs]
    kinds = collections.Counter(one.shape for one in pictures)
    for i, one in pairs:
        if kinds[one.shape] == 1:
            questions.append((f"in which picture is a {one.shape}?", str(i)))
    rng.shuffle(questions)
    questions += [(f"what color is the shape in picture {i}?", one.color) for i, one in pairs]
    return Example(media, questions)


def _video(rng: random.Random, shapes: list[Shape], name: str) -> Example:
    """A shape that moves, or two that appear one after the other.

    The middle frame alone answers neither: where a moving shape is then does not depend on its
    direction, and of two shapes both can be seen. Training also asks what the first and the last
    frame show, from which it learns to look into one frame.
    """
    first = rng.choice(shapes)
    background = first.picture.getpixel((0, 0))
    sprite = _sprite(first.picture)
    reach = STRIDE * (FRAMES // 2)
    frames = [Image.new("RGB", (SIDE, SIDE), background) for _ in range(FRAMES)]
    if rng.random() < 0.5:
        word = rng.choice(list(DIRECTIONS))
        step = DIRECTIONS[word]
        middle = [rng.randrange(reach, max(SIDE - side - reach, reach) + 1) for side in sprite.size]
        for i, frame in enumerate(frames):
            moved = STRIDE * (i - FRAMES // 2)
            frame.paste(sprite, tuple(m + moved * s for m, s in zip(middle, step, strict=True)))
        other = rng.choice([d for d in DIRECTIONS if d != word])
        questions = [("in which direction does the shape move?", word)]
        questions += [
            (f"does the shape move {word}?", "yes"),
            (f"does the shape move {other}?", "no"),
        ]
        questions += [
            pair for end in ("first", "last") for pair in _sides(frames[-(end == "last")], end)
        ]
    else:
        second = rng.choice([s for s in shapes if s.color != first.color])
        later = _sprite(second.picture)
        places = [(rng.randrange(0, 5), rng.randrange(0, 5)), (34, 34)]
        rng.shuffle(places)
        for i, frame in enumerate(frames):
            if i <= FRAMES // 2:
                frame.paste(sprite, places[0])
            if i >= FRAMES // 2:
                frame.paste(later, places[1])
        pair = [(first, "yes"), (second, "no")]
        rng.shuffle(pair)
        questions = [
            (f"does the {one.color} shape come before the {other.color} shape?", answer)
            for (one, answer), (other, _) in (pair, pair[::-1])
        ]
        for end, shape in (("first", first), ("last", second)):
            questions.append((f"what color is the shape in the {end} frame?", shape.color))
            questions.append((f"what shape is in the {end} frame?", shape.shape))
    media = [(f"{name}/{i}.png", frame) for i, frame in enumerate(frames)]
    return Example(media, questions, video=name)


def _sides(frame: Image.Image, end: str) -> list[tuple[str, str]]:
    """On which sides of the frame a shape is, unless it is too near the middle to tell."""
    left, top, right, bottom = box_of(frame)
    questions = []
    for middle, sides in (
        ((left + right) / 2, "left or right"),
        ((top + bottom) / 2, "up or down"),
    ):
        if abs(middle - SIDE / 2) > SIDE / 12:
            side = sides.split(" or ")[middle > SIDE / 2]
            questions.append((f"is the shape {sides} in the {end} frame?", side))
    return questions


def box_of(picture: Image.Image, level: int = 0) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels that are not the background.

    level: summed over the channels, up to which a pixel may differ from the corner, whose colour
      is the background's.
    """
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > level)
    return (*(int(v.min()) for v in (columns, rows)), *(int(v.max()) + 1 for v in (columns, rows)))


def _sprite(picture: Image.Image) -> Image.Image:
    """The shape of a picture with nothing around it, at most 28 pixels a side."""
    cut = picture.crop(box_of(picture))
    cut.thumbnail((28, 28))
    return cut


def _training(name: str, examples: list[Example]) -> dict[str, list[dict]]:
    splits = {"train": examples}
    if name == "video":  # no other ablation trains on records of its own
        splits["train_ablation"] = [_middle(example) for example in examples]
    return {
        split: [_record(e, _shuffled(e.questions, i), f"train-{i}") for i, e in enumerate(some)]
        for split, some in splits.items()
    }


def _shuffled(questions: list, seed: int) -> list:
    return random.Random(seed).sample(questions, len(questions))


def _tests(name: str, examples: list[Example]) -> dict[str, list[dict]]:
    """One question of each example, and the ablation's record of it if that is another."""
    splits = {"test": examples}
    if name in ABLATED:
        splits["test_ablation"] = [ABLATED[name](example) for example in examples]
    return {
        split: [_test(name, example, f"test-{i}") for i, example in enumerate(some)]
        for split, some in splits.items()
    }


def _test(name: str, example: Example, key: str) -> dict:
    question, answer = example.questions[0]
    scored = {"question": question, "answer": answer, "kind": _kind(name, question)}
    return _record(example, [(question, answer)], key) | scored


def _middle(example: Example) -> Example:
    return example._replace(media=[example.media[FRAMES // 2]], video="")


def _moved_on(example: Example) -> Example:
    """Every picture in another place."""
    return example._replace(media=example.media[1:] + example.media[:1])


ABLATED = {"several": _moved_on, "video": _middle}  # what an ablation is asked about


def _kind(name: str, question: str) -> str:
    if name == "poster":
        return "shape"
    if name == "several":
        return "shape" if any(shape in question for shape in SHAPES) else "color"
    return "order" if question.startswith("does") else "direction"


def _record(example: Example, questions: list[tuple[str, str]], key: str) -> dict:
    if example.video:
        return {"id": key, "conversations": conversation(questions), "video": example.video}
    files = [file for file, _ in example.media]
    return {
        "id": key,
        "conversations": conversation(questions, pictures=len(files)),
        "image": files if len(files) > 1 else files[0],
    }
