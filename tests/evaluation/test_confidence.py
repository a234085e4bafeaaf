"""A minimum confidence for yes: how it is read, what it changes, and its curve."""

import json
import math

import numpy as np
import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, ask, graded
from llava_jax.evaluation.confidence import LIMITS, curve, limited, yes_confidence
from llava_jax.evaluation.runner import answer_settings, evaluate
from llava_jax.inference.answer import Answer, TokenLogprob
from llava_jax.inference.sampling import SamplingParams
from tests.tiny_model import random_image, tiny_llava


class Words:
    """A tokenizer whose ids are places in a list of words."""

    words = ("Yes", " yes", "No", "NO", "The", "yesterday")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def answered(first: int, **shares: float) -> Answer:
    """An answer that begins with a word, and what was likely there."""
    answer = Answer(Words(), (), ())
    top = {Words.words.index(name.replace("_", " ")): math.log(p) for name, p in shares.items()}
    answer.logprobs = [TokenLogprob(first, top[first], top)]
    return answer


def test_the_confidence_adds_up_all_ways_to_write_a_word():
    answer = answered(0, Yes=0.4, _yes=0.2, No=0.1, NO=0.1, The=0.1, yesterday=0.1)
    assert yes_confidence(answer, Words()) == pytest.approx(0.75)
    assert yes_confidence(answered(2, No=0.6), Words()) == 0
    assert yes_confidence(answered(0, Yes=0.6, The=0.4), Words()) == 1


def test_an_answer_that_begins_with_another_word_has_none():
    assert yes_confidence(answered(4, The=0.6, Yes=0.4), Words()) is None
    assert yes_confidence(answered(5, yesterday=0.6, Yes=0.4), Words()) is None
    assert yes_confidence(Answer(Words(), (), ()), Words()) is None


@pytest.mark.parametrize(
    "text, confidence, limit, expected",
    [
        ("Yes, two.", 0.6, 0.5, "Yes, two."),
        ("Yes, two.", 0.6, 0.7, "No"),
        ("no", 0.4, 0.5, "no"),
        ("no", 0.4, 0.3, "Yes"),
        ("red", None, 0.7, "red"),
    ],
)
def test_below_the_limit_the_answer_is_no(text, confidence, limit, expected):
    assert limited(text, confidence, limit) == expected


def test_the_curve_trades_false_yes_for_missed_yes():
    confidences = [0.9, 0.65, 0.35, 0.75, 0.1, None, 0.5]
    references = ["yes", "yes", "yes", "no", "No", "yes", "red"]
    questions = [ask(i, "?", f"{i}.png", reference=text) for i, text in enumerate(references)]
    lines = {
        float(line.kind.removeprefix("yes from ")): line for line in curve(questions, confidences)
    }
    assert tuple(lines) == LIMITS and {line.count for line in lines.values()} == {5}
    third = 100 / 3
    for limit, false, missed in (
        (0.05, 100, 0),
        (0.5, 50, third),
        (0.7, 50, 2 * third),
        (0.8, 0, 2 * third),
    ):
        assert lines[limit].values["false yes"] == false
        assert lines[limit].values["missed yes"] == pytest.approx(missed)
    assert lines[0.5].values["accuracy"] == 60 and lines[0.5].errors["accuracy"] > 0
    assert curve(questions[-2:], confidences[-2:]) == []
    assert "missed yes" not in curve(questions[3:5], confidences[3:5])[0].values


@pytest.fixture(scope="module")
def llava():
    """A model with a tokenizer in which every other token reads as yes, the rest as no."""
    model = tiny_llava()
    decode = model.tokenizer.decode
    model.tokenizer.decode = lambda ids, **options: (
        decode(ids, **options) if options or len(ids) != 1 else ("no", "yes")[ids[0] % 2]
    )
    return model


def test_the_runner_asks_with_a_limit_and_with_contrast(llava, tmp_path):
    """Confidences are the model's, answers follow them, and other settings are not mixed in."""
    questions = [
        ask(i, f"question {i}?", path if i else None, reference=("yes", "no")[i % 2])
        for i, path in enumerate(str(tmp_path / f"{i}.png") for i in range(6))
    ]
    for i in range(6):
        random_image(i).save(tmp_path / f"{i}.png")
    right = graded(lambda question, text: float(text.lower() == question.reference))
    benchmark = Benchmark("yes", "", questions, **right)
    sampling = {"contrast": "blur", "contrast_beta": 0.0}
    out = tmp_path / "out"
    run = lambda **values: evaluate(llava, benchmark, out, 3, 4, sampling=sampling, **values)
    scores = run(min_yes=0.5)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    for question, line in zip(questions, lines, strict=True):
        off = {} if question.images else {"contrast": None, "contrast_beta": 0.1}
        params = SamplingParams.from_names({"max_tokens": 3, "logprobs": 20} | sampling | off)
        request = llava.request(question.prompt, question.read_images(), params)
        ((answer,),) = llava.answers([request], 4)
        ids = np.array(list(answer.logprobs[0].top))
        share = np.exp(list(answer.logprobs[0].top.values()))
        expected = share[ids % 2 == 1].sum() / share.sum()
        assert line["yes"] == pytest.approx(expected, abs=1e-5)
        says_yes = answer.text.strip().lower().startswith("yes")
        unchanged = says_yes == (expected >= 0.5)
        assert line["prediction"] == (
            answer.text if unchanged else ("No", "Yes")[int(expected >= 0.5)]
        )
    kinds = [score.kind for score in scores]
    assert kinds == [*(f"yes from {limit}" for limit in LIMITS), "overall"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["sampling"] == sampling and metrics["min_yes"] == 0.5
    assert set(kinds) == set(metrics["scores"])
    with pytest.raises(LlavaError, match="different: min_yes"):
        run(min_yes=0.9)
    with pytest.raises(LlavaError, match="different: min_yes"):
        run()


def test_a_limit_that_limits_nothing_is_reported(tmp_path, caplog):
    random_image(0).save(tmp_path / "0.png")
    said = {}
    for word, reference in (("no", "red"), ("red", "red"), ("no", "no")):
        model = tiny_llava()
        model.tokenizer.decode = lambda ids, word=word, **options: word
        questions = [ask(0, "question?", str(tmp_path / "0.png"), reference=reference)]
        right = graded(lambda question, text: float(text == question.reference))
        benchmark = Benchmark("kinds", "", questions, **right)
        caplog.clear()
        evaluate(model, benchmark, tmp_path / f"{word} {reference}", 1, 1, min_yes=0.5)
        said[word, reference] = caplog.text
    assert "kinds: none of the questions answered with yes or no" in said["no", "red"]
    assert "kinds: no answer begins with yes or no, so min_yes" in said["red", "red"]
    assert "kinds" not in said["no", "no"]


def test_wrong_settings_are_refused():
    with pytest.raises(LlavaError, match="min_yes must be from 0 to 1, not 2"):
        answer_settings(8, {}, 2)
    with pytest.raises(LlavaError, match="contrast must be one of"):
        answer_settings(8, {"contrast": "dark"})
