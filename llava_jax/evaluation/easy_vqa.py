"""easy-VQA (https://github.com/vzhou842/easy-VQA): one coloured shape, thirteen answers.

An answer is right if it equals the reference, apart from case, surrounding white space and a full
stop at the end. Most questions can be answered without looking, so each score is shown next to the
blind baseline: the most frequent answer to the same words in the training data. Yes/no questions
have their share of yes and false-yes rate as well.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_jax.data.records import check_record, open_records
from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import (
    Benchmark,
    Question,
    Score,
    grades_of,
    mean_score,
    score_by_kind,
)
from llava_jax.evaluation.files import Folder
from llava_jax.text.conversation import IMAGE_TOKEN


def load(root: Path, split: str) -> Benchmark:
    """The benchmark over the records of `split`.json: one question each, with its `kind`.

    split: `test` or `test_1000` of the quickstart; pictures are in `images` next to the file.
    """
    source = "https://github.com/vzhou842/easy-VQA (`make quickstart` writes this file of it)"
    folder = Folder(Path(root), source)
    path = folder.path(f"{split}.json")
    records = open_records(path, path.parent / "images")
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

    def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
        lines = score_by_kind(questions, grades_of(grade, questions, predictions))
        yes = yes_rates(questions, predictions)
        return [_with(line, blind.get(line.kind, {}), yes.get(line.kind, ())) for line in lines]

    name, fingerprint = f"easy_vqa/{split}", records.fingerprint()
    return Benchmark(name, folder.source, questions, grade, score, fingerprint=fingerprint)


def grade(question: Question, text: str) -> float:
    return float(normalize(text) == normalize(question.reference))


def yes_rates(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, list[Score]]:
    """By kind, for yes/no questions: the share of yes, and that where the right answer is no."""
    groups = defaultdict(list)
    for question, text in zip(questions, predictions, strict=True):
        if normalize(question.reference) in ("yes", "no"):
            groups[question.kind].append((question, float(normalize(text) == "yes")))
    rates = {}
    for kind, pairs in groups.items():
        negative = [(q, said) for q, said in pairs if normalize(q.reference) == "no"]
        parts = {"yes": pairs, "false yes": negative}
        rates[kind] = [
            mean_score(kind, *zip(*part, strict=True), name) for name, part in parts.items() if part
        ]
    return rates


def _with(line: Score, blind: Mapping[str, float], rates: Sequence[Score]) -> Score:
    """A line of the table with more columns."""
    values, errors = {**line.values, **blind}, dict(line.errors)
    for rate in rates:
        values |= rate.values
        errors |= rate.errors
    return Score(line.kind, line.count, values, errors)


def normalize(text: str) -> str:
    """An answer in lower case, without surrounding white space and a full stop at the end."""
    return text.strip().lower().removesuffix(".").strip()


def blind_accuracy(path: Path) -> dict[str, dict[str, float]]:
    """Percent by kind, from `blind.json` next to the questions; empty without that file."""
    blind = path.with_name("blind.json")
    if not blind.exists():
        return {}
    try:
        scores = json.loads(blind.read_text(encoding="utf-8")).get(path.stem, {})
        return {kind: {"blind": 100 * float(s["accuracy"])} for kind, s in scores.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise LlavaError(f"cannot read the blind baseline {blind}: {error}") from None
