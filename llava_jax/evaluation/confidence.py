"""A minimum confidence for yes: how sure a model is, and what it answers under a limit.

The confidence of an answer that begins with yes or no is P(yes) / (P(yes) + P(no)) at its first
token, over all ways to write them (`Yes`, ` yes`, `NO`) among the likeliest tokens.
"""

import math
from collections.abc import Sequence

from llava_jax.evaluation.benchmark import Question, Score, mean_score
from llava_jax.inference.answer import Answer

LIMITS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the curve


def yes_confidence(answer: Answer, tokenizer) -> float | None:
    """The confidence of an answer with log probabilities; None if it begins with another token."""
    if not answer.logprobs:
        return None
    first = answer.logprobs[0]
    words = {"yes": 0.0, "no": 0.0}
    chosen = None
    for token, logprob in ({first.token: first.logprob} | first.top).items():
        word = tokenizer.decode([token]).strip().lower()
        if word in words:
            words[word] += math.exp(logprob)
            chosen = word if token == first.token else chosen
    return chosen and words["yes"] / (words["yes"] + words["no"])


def limited(text: str, confidence: float | None, limit: float) -> str:
    """The answer to a yes/no question if yes needs this confidence; other answers as they are.

    ("Yes, two.", 0.6, 0.5) -> "Yes, two."; ("Yes, two.", 0.6, 0.7) -> "No".
    """
    if confidence is None or says_yes(text) == (confidence >= limit):
        return text
    return "Yes" if confidence >= limit else "No"


def says_yes(text: str) -> bool:
    return text.strip().lower().startswith("yes")


def why_no_curve(confidences: Sequence[float | None]) -> str:
    """What there is to say where `curve` has no lines."""
    if all(confidence is None for confidence in confidences):
        return "no answer begins with yes or no, so min_yes changed nothing"
    return "none of the questions answered with yes or no has one of them as its right answer"


def curve(questions: Sequence[Question], confidences: Sequence[float | None]) -> list[Score]:
    """A line for each of LIMITS, over the questions whose right answer is yes or no.

    `false yes` is the share of those that are no and were answered with yes, `missed yes` of those
    that are yes and were answered with no. Questions answered with neither are left out.
    """
    truth = [question.reference.strip().lower() for question in questions]
    known = [i for i, c in enumerate(confidences) if c is not None and truth[i] in ("yes", "no")]
    parts = {
        "accuracy": known,
        "false yes": [i for i in known if truth[i] == "no"],
        "missed yes": [i for i in known if truth[i] == "yes"],
    }
    lines = []
    for limit in LIMITS if known else ():
        line = Score(f"yes from {limit}", len(known), {}, {})
        for name, part in parts.items():
            right = [(confidences[i] >= limit) == (truth[i] == "yes") for i in part]
            grades = [float(r == (name == "accuracy")) for r in right]
            if part:
                score = mean_score(line.kind, [questions[i] for i in part], grades, name)
                line.values.update(score.values)
                line.errors.update(score.errors)
        lines.append(line)
    return lines
