"""easy-VQA (https://github.com/vzhou842/easy-VQA): one coloured shape, thirteen answers.

The answer counts as right when it is the reference but for case, white space around it and a full
stop behind it. The blind baseline, the commonest training answer to the same words, stands beside
each score: most questions can be answered without looking.
"""

import json
import os
from pathlib import Path

from llava_jax.data.records import IMAGE_TOKEN, check_record, open_records
from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, score_by_kind


def load(data: str | os.PathLike, image_root: str | os.PathLike | None = None) -> Benchmark:
    """The benchmark over a file of one-question records that also have a `kind`.

    Args:
      data: `test.json` or `test_1000.json` of the quickstart, or records of the same form.
      image_root: where image paths start; default `images` beside the file.
    """
    path = Path(data)
    records = open_records(path, image_root or path.parent / "images")
    questions = []
    for item, record in zip(json.loads(path.read_text(encoding="utf-8")), records, strict=True):
        check_record(record, records.image_root)
        if len(record.turns) != 2 or not isinstance(item.get("kind"), str):
            raise LlavaError(
                f"{path}, {record.name}: expected one question, one answer and their 'kind'"
            )
        prompt, reference = (turn.text for turn in record.turns)
        questions.append(
            Question(
                id=record.id,
                text=prompt.replace(IMAGE_TOKEN, "").strip(),
                prompt=prompt,
                reference=reference,
                images=record.images,
                image_name=", ".join(record.image_names),
                kind=item["kind"],
            )
        )
    blind = blind_accuracy(path)

    def score(predictions) -> list[Score]:
        right = [
            normalize(text) == normalize(question.reference)
            for text, question in zip(predictions, questions, strict=True)
        ]
        return score_by_kind(questions, right, blind)

    return Benchmark(f"easy_vqa/{path.stem}", records.fingerprint(), questions, score)


def normalize(text: str) -> str:
    """An answer without case, surrounding white space and full stop."""
    return text.strip().lower().removesuffix(".").strip()


def blind_accuracy(path: Path) -> dict[str, float]:
    """By kind, from `blind.json` beside the questions; nothing where it is missing."""
    blind = path.with_name("blind.json")
    if not blind.exists():
        return {}
    try:
        scores = json.loads(blind.read_text(encoding="utf-8")).get(path.stem, {})
        return {kind: float(score["accuracy"]) for kind, score in scores.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise LlavaError(f"cannot read the blind baseline {blind}: {error}") from None
