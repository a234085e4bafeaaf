"""AMBER: the answer no, and nouns of descriptions compared with the objects of a picture."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import amber as module
from llava_jax.evaluation import load_benchmark
from tests.evaluation.published import lines, prompts, write

SUFFIX = "\nAnswer the question using a single word or phrase."


RELATIONS = {"sky": [], "dog": ["puppy", "animal"], "cat": ["animal", "kitten"],
             "person": ["man"], "light": [], "car": []}  # fmt: skip


def amber(root, part="discriminative"):
    queries = [{"id": 1004 + i, "image": "AMBER_1.jpg", "query": f"Is the sky {i}?"}
               for i in range(1, 7)]  # fmt: skip
    types = ["discriminative-attribute-state", "discriminative-hallucination", "relation",
             "discriminative-relation", "discriminative-attribute-number",
             "discriminative-attribute-action"]  # fmt: skip
    truths = ["yes", "no", "no", "yes", "no", "no"]
    notes = [{"id": 1, "type": "generative", "truth": ["dog", "sky"], "hallu": ["cat", "person"]}]
    notes += [{"id": 1005 + i, "type": kind, "truth": truth}
              for i, (kind, truth) in enumerate(zip(types, truths, strict=True))]  # fmt: skip
    write(root, "data/query/query_discriminative.json", queries)
    write(root, "data/annotations.json", notes)
    write(root, "data/query/query_generative.json",
          [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])  # fmt: skip
    write(root, "data/relation.json", RELATIONS)
    write(root, "data/safe_words.txt", "orange\nlight\n")
    (root / "image").mkdir()
    return load_benchmark("amber", root, {"part": part})


def test_amber_scores_the_answer_no(tmp_path):
    benchmark = amber(tmp_path)
    assert prompts(benchmark)[0] == f"<image>\nIs the sky 1?{SUFFIX}"
    assert benchmark.questions[0].images == (str(tmp_path / "image/AMBER_1.jpg"),)
    answers = ["Yes", "No, there is none", "yes", "Yes", "no", "unsure"]
    scores = lines(benchmark.score(benchmark.questions, answers))
    assert list(scores) == ["state", "existence", "relation", "number", "action", "overall"]
    # No is right four times and said twice, both times rightly; three answers are yes.
    assert scores["overall"] == (6, {"F1 of no": 66.6667, "accuracy": 66.6667, "precision": 100.0,
                                     "recall": 50.0, "yes": 50.0, "false yes": 25.0})  # fmt: skip
    assert scores["relation"][0] == 2 and scores["relation"][1]["accuracy"] == 50


class Language:
    """Every word is a noun; a word and its form with a Q at the end are near-synonyms."""

    def nouns(self, text):
        return text.split()

    def alike(self, a, b):
        return a.rstrip("Q") == b.rstrip("Q")


@pytest.mark.parametrize(
    "text, values",
    [
        # puppy is another word for dog; light is safe; stone is no word of AMBER's.
        ("puppy sky light stone", {"CHAIR": 0, "Cover": 100, "Hal": 0, "Cog": 0}),
        # animal is first found as another word for dog, which is there.
        ("animal", {"CHAIR": 0, "Cover": 50, "Hal": 0, "Cog": 0}),
        # car is wrong and nobody expected it; man is wrong and was expected.
        ("dog car man dog", {"CHAIR": 50, "Cover": 50, "Hal": 100, "Cog": 50}),
        ("", {"CHAIR": 0, "Cover": 0, "Hal": 0, "Cog": 0}),
    ],
)
def test_descriptions_are_scored_by_their_nouns(tmp_path, monkeypatch, text, values):
    monkeypatch.setattr(module, "Language", Language)
    benchmark = amber(tmp_path, "generative")
    assert prompts(benchmark) == ["<image>\nDescribe this image."]
    assert benchmark.name == "amber/generative"
    assert lines(benchmark.score(benchmark.questions, [text])) == {"overall": (1, values)}
    assert benchmark.grade(benchmark.questions[0], text) == (values["Hal"] == 0)


def test_near_synonyms_count_as_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Language", Language)
    monkeypatch.setitem(RELATIONS, "skyQ", [])
    monkeypatch.setitem(RELATIONS, "kittenQ", [])
    benchmark = amber(tmp_path, "generative")
    assert lines(benchmark.score(benchmark.questions, ["skyQ kittenQ"])) == {
        "overall": (1, {"CHAIR": 50, "Cover": 50, "Hal": 100, "Cog": 50})
    }


def test_missing_language_parts_are_one_sentence(tmp_path):
    try:
        module.Language()
    except LlavaError:
        with pytest.raises(LlavaError, match="needs NLTK and spaCy with their models: pip install"):
            amber(tmp_path, "generative")
    else:
        assert module.Language().nouns("Two dogs run.") == ["dog"]
    with pytest.raises(LlavaError, match="unknown part of AMBER 'all': choose discriminative or"):
        load_benchmark("amber", tmp_path, {"part": "all"})
