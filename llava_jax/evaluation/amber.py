"""AMBER (https://arxiv.org/abs/2311.07397): yes/no questions, and descriptions scored by word.

The second part finds nouns with NLTK and near-synonyms with spaCy's word vectors, as the authors
do; both need models that their own tools download.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, score_of_sums
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.short_answers import SHORT
from llava_jax.evaluation.statistics import ratio

KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
SIMILARITY = 0.8  # of word vectors; above it two nouns are near-synonyms


def load(root: Path, part: str) -> Benchmark:
    """The `discriminative` questions, or the `generative` descriptions.

    Discriminative: objects that are there or not (existence), their attributes (state, number,
    action) and relations. AMBER counts the answer no: its precision, recall and F1 are those of no.

    Generative: CHAIR, the share of nouns that are not in the picture; Cover, the share of the
    picture's objects that are named; Hal, the share of descriptions with a wrong noun; Cog, the
    share of named objects among those that people would expect and that are not there.
    """
    if part not in ("discriminative", "generative"):
        raise LlavaError(f"unknown part of AMBER {part!r}: choose discriminative or generative")
    folder = Folder(root, "https://github.com/junyangwang0410/AMBER")
    path = folder.path(f"data/query/query_{part}.json", f"query_{part}.json")
    items = folder.json(str(path.relative_to(root)))
    notes = {n["id"]: n for n in folder.json("data/annotations.json", "annotations.json")}
    pictures = folder.path("image", "images", "AMBER")
    source = f"{folder.source} (its README links the pictures)"

    def yes_no(item) -> Question:
        note = notes[item["id"]]
        if note["truth"] not in ("yes", "no"):
            raise LlavaError(f"the answer {note['truth']!r} is neither yes nor no")
        return ask(
            item["id"],
            f"{item['query']}\n{SHORT}",
            str(pictures / item["image"]),
            reference=note["truth"],
            kind=KINDS[note["type"]],
        )

    def description(item) -> Question:
        note = notes[item["id"]]
        truth, expected = tuple(note["truth"]), tuple(note["hallu"])
        return ask(
            item["id"],
            item["query"],
            str(pictures / item["image"]),
            reference=", ".join(truth),
            label=(truth, expected),
        )

    name = f"amber/{part}"
    if part == "discriminative":
        questions = each(items, path, yes_no)
        return Benchmark(name, source, questions, grade_amber, score_amber)
    words = Words(
        folder.json("data/relation.json", "relation.json"),
        folder.path("data/safe_words.txt", "safe_words.txt").read_text("utf-8").splitlines(),
        Language(),
    )
    questions = each(items, path, description)
    grade = lambda q, text: float(words.row(text, *q.label)[0] == 0)

    def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
        pairs = zip(questions, predictions, strict=True)
        rows = np.array([words.row(text, *q.label) for q, text in pairs], float)
        units = [question.unit for question in questions]
        return [score_of_sums("overall", len(rows), units, rows, description_metrics)]

    return Benchmark(name, source, questions, grade, score)


class Language:
    """Nouns of a text, by NLTK, and near-synonyms, by spaCy's en_core_web_lg."""

    def __init__(self):
        """LlavaError if a part is not installed."""
        try:
            import nltk
            import spacy

            self._nltk, self._vectors = nltk, spacy.load("en_core_web_lg")
            self.nouns("a dog")
        except (ImportError, OSError, LookupError):
            raise LlavaError(
                "AMBER's generative part needs NLTK and spaCy with their models: "
                "pip install 'llava_jax[amber]', python -m spacy download en_core_web_lg, "
                "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
            ) from None

    def nouns(self, text: str) -> list[str]:
        """The nouns of a text in the singular."""
        singular = self._nltk.stem.WordNetLemmatizer().lemmatize
        tagged = self._nltk.pos_tag(self._nltk.word_tokenize(text))
        return [singular(word) for word, tag in tagged if tag.startswith("NN")]

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 (one object lives as long as the program)
    def alike(self, a: str, b: str) -> bool:
        return self._vectors(a).similarity(self._vectors(b)) > SIMILARITY


@dataclass(frozen=True)
class Words:
    """AMBER's words.

    Attributes:
      relations: other words for each object.
      safe: words that never count as wrong.
    """

    relations: Mapping[str, Sequence[str]]
    safe: Sequence[str]
    language: Language

    def row(self, text: str, truth: Sequence[str], expected: Sequence[str]) -> tuple[int, ...]:
        """Counts of one description, in the order of `description_metrics`.

        Args:
          truth: the objects in the picture.
          expected: objects that people would expect and that are not there.
        """
        known = {*self.relations, *(word for words in self.relations.values() for word in words)}
        nouns = [noun for noun in self.language.nouns(text) if noun in known]
        named, imagined, wrong = set(), set(), 0
        for noun in nouns:
            if noun in self.safe:
                continue
            if (place := self._find(noun, truth)) is not None:
                named.add(place)
                continue
            imagined |= {self._find(noun, expected), self._find_alike(noun, expected)}
            place = self._find_alike(noun, truth)
            wrong += place is None
            named.add(place)
        named, imagined = named - {None}, imagined - {None}
        return (wrong, len(nouns), len(named), len(truth), wrong > 0, 1, len(imagined),
                len(expected))  # fmt: skip

    def _forms(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """Other words for all objects, then the objects, each with the object's place."""
        others = [(w, i) for i, name in enumerate(objects) for w in self.relations.get(name, ())]
        return [*others, *((name, i) for i, name in enumerate(objects))]

    def _find(self, noun: str, objects: Sequence[str]) -> int | None:
        return next((i for word, i in self._forms(objects) if word == noun), None)

    def _find_alike(self, noun: str, objects: Sequence[str]) -> int | None:
        forms = self._forms(objects)
        return next((i for word, i in forms if self.language.alike(noun, word)), None)


def description_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Percentages from the eight sums of `Words.row`."""
    wrong, nouns, named, truth, any_wrong, count, imagined, expected = sums.T
    return {
        "CHAIR": ratio(wrong, nouns),
        "Cover": ratio(named, truth),
        "Hal": ratio(any_wrong, count),
        "Cog": ratio(imagined, expected),
    }


def amber_answer(text: str) -> str:
    """yes or no, whichever the answer contains (yes first), else other."""
    return next((word for word in ("yes", "no") if word in text.lower()), "other")


def grade_amber(question: Question, text: str) -> float:
    return float(amber_answer(text) == question.reference)


def score_amber(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """A line per kind of question, and all."""
    answers = np.array([amber_answer(text) for text in predictions])
    is_no = np.array([question.reference == "no" for question in questions])
    said_no, said_yes = answers == "no", answers == "yes"
    right = np.where(is_no, said_no, said_yes)
    columns = [said_no & is_no, said_no, is_no, right, said_yes, said_yes & is_no, is_no | True]
    counts = np.stack(columns, axis=1) * 1.0
    kinds = np.array([question.kind for question in questions])
    lines = []
    for kind in [*dict.fromkeys(kinds), "overall"]:
        own = np.flatnonzero((kinds == kind) | (kind == "overall"))
        units = [questions[i].unit for i in own]
        lines.append(score_of_sums(str(kind), len(own), units, counts[own], amber_metrics))
    return lines


def amber_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Percentages from the seven sums of `score_amber`."""
    both, said_no, is_no, right, said_yes, false_yes, count = np.moveaxis(sums, -1, 0)
    return {
        "F1 of no": ratio(2 * both, said_no + is_no),
        "accuracy": ratio(right, count),
        "precision": ratio(both, said_no),
        "recall": ratio(both, is_no),
        "yes": ratio(said_yes, count),
        "false yes": ratio(false_yes, is_no),
    }
