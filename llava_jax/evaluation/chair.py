"""CHAIR (https://arxiv.org/abs/1809.02156): objects in a description that the picture lacks.

Objects are found in a text by the published list of synonyms, a file of the authors' repository
that the user provides. A picture contains the objects of its COCO annotations and captions.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, score_of_sums
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.statistics import ratio

PROMPT = "Please describe this image in detail."
# "baby bird" names a bird, not a baby; "passenger train" no passenger.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
           "animal", "cub")  # fmt: skip
VEHICLES = ("jet", "train")
PHRASES = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in VEHICLES},
    **{phrase: phrase for phrase in ("home plate", "train track")},  # neither is an object
    "bow tie": "tie",
    "toilet seat": "toilet",
}
IRREGULAR = {"geese": "goose", "mice": "mouse", "oxen": "ox", "children": "child",
             "people": "person"}  # fmt: skip
PLURALS = (("men", "man"), ("ies", "y"), ("ves", "fe"), ("ves", "f"), ("es", ""), ("s", ""))


class Objects:
    """Finds COCO's objects in a text.

    "Two puppies on a fire hydrant" -> ["dog", "fire hydrant"].
    """

    def __init__(self, lines: Sequence[str]):
        """lines: each an object's name and its synonyms, with commas between."""
        groups = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        self.names: dict[str, str] = {}
        for group in filter(None, groups):
            self.names |= {word: group[0] for word in group}
        if not self.names:
            raise LlavaError("the list of synonyms is empty")
        pairs = {word: word for word in self.names if word.count(" ") == 1}
        self.phrases = pairs | PHRASES
        self.words = {part for phrase in [*self.names, *self.phrases] for part in phrase.split()}

    def singular(self, word: str) -> str:
        """The word of the list that this is the plural of, else the word itself."""
        if word in self.words:
            return word
        candidates = [IRREGULAR.get(word, "")]
        candidates += [word[: -len(a)] + b for a, b in PLURALS if word.endswith(a)]
        return next((c for c in candidates if c in self.words), word)

    def find(self, text: str) -> list[str]:
        """The objects that a text mentions, in order, as often as it does."""
        words = [self.singular(word) for word in re.findall(r"[a-z0-9-]+", text.lower())]
        merged = []
        while words:
            phrase = " ".join(words[:2])
            merged.append(self.phrases.get(phrase, words[0]))
            words = words[2 if phrase in self.phrases else 1 :]
        if "toilet" in merged:  # "the seat of the toilet" is not a chair
            merged = [word for word in merged if word != "seat"]
        return [self.names[word] for word in merged if word in self.names]


def load(root: Path, count: int, seed: int) -> Benchmark:
    """`count` pictures of COCO val2014, drawn with `seed` from those with annotated objects."""
    folder = Folder(root, "https://cocodataset.org/#download (val2014 and its annotations)")
    words = Folder(root, "https://github.com/LisaAnne/Hallucination (data/synonyms.txt)")
    objects = Objects(words.path("synonyms.txt").read_text(encoding="utf-8").splitlines())
    name = "annotations/instances_val2014.json"
    data = folder.json(name)
    truths = _objects_of_pictures(data, folder.json("annotations/captions_val2014.json"), objects)
    pictures = folder.pictures("val2014", "../pope/val2014", "../coco_captions/val2014")
    images = sorted((i for i in data["images"] if truths[i["id"]]), key=lambda image: image["id"])
    if not 1 <= count <= len(images):
        raise LlavaError(f"count must be from 1 to {len(images):,}, not {count}")

    def make(image) -> Question:
        truth = truths[image["id"]]
        return ask(
            image["id"],
            PROMPT,
            str(pictures / image["file_name"]),
            reference=", ".join(sorted(truth)),
            label=frozenset(truth),
        )

    chosen = random.Random(seed).sample(images, count)
    questions = each(chosen, root / name, make)

    def grade(question: Question, text: str) -> float:
        return float(set(objects.find(text)) <= question.label)

    def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
        rows = [_row(q, objects.find(text), text)
                for q, text in zip(questions, predictions, strict=True)]  # fmt: skip
        units = [question.unit for question in questions]
        return [score_of_sums("overall", len(rows), units, np.array(rows, float), _metrics)]

    return Benchmark("chair", f"{folder.source}; {words.source}", questions, grade, score)


def _objects_of_pictures(
    instances: Mapping, captions: Mapping, objects: Objects
) -> dict[int, set[str]]:
    """The objects of each picture, by its id: annotated, or in one of its captions."""
    categories = {item["id"]: item["name"] for item in instances["categories"]}
    unknown = sorted(set(categories.values()) - set(objects.names))
    if unknown:
        raise LlavaError(f"synonyms.txt lacks COCO's {unknown[0]!r}: is it the published file?")
    truths = defaultdict(set)
    for item in instances["annotations"]:
        truths[item["image_id"]].add(objects.names[categories[item["category_id"]]])
    for item in captions["annotations"]:
        truths[item["image_id"]].update(objects.find(item["caption"]))
    return truths


def _row(question: Question, mentioned: Sequence[str], text: str) -> tuple[int, ...]:
    """Wrong mentions, mentions, whether any is wrong, 1, true objects found, true, words."""
    wrong = sum(name not in question.label for name in mentioned)
    found = len(question.label & set(mentioned))
    return (wrong, len(mentioned), wrong > 0, 1, found, len(question.label), len(text.split()))


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    wrong, mentioned, any_wrong, count, found, true, words = sums.T
    return {
        "CHAIR_i": ratio(wrong, mentioned),  # share of the mentions
        "CHAIR_s": ratio(any_wrong, count),  # share of the descriptions
        "recall": ratio(found, true),
        "words": words / count,
    }
