"""easy-VQA (https://github.com/vzhou842/easy-VQA): one coloured shape, thirteen answers.

The answer counts as right when it is the reference but for case, white space around it and a full
stop behind it. The blind baseline, the commonest training answer to the same words, stands beside
each score: most questions can be answered without looking.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from llava_jax.data.records import check_record, open_records
from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, graded
from llava_jax.evaluation.files import Folder
from llava_jax.text.conversation import IMAGE_TOKEN


def load(root: Path, split: str) -> Benchmark:
    """The benchmark over one-question records that also have a `kind`, in `split`.json.

    split: `test` or `test_1000` of the quickstart; image paths start in `images` beside the file.
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
        lines = graded(grade)["score"](questions, predictions)
        return [
            Score(line.kind, line.count, {**line.values, **blind.get(line.kind, {})})
            for line in lines
        ]

    name, fingerprint = f"easy_vqa/{split}", records.fingerprint()
    return Benchmark(name, folder.source, questions, grade, score, fingerprint=fingerprint)


def grade(question: Question, text: str) -> float:
    return float(normalize(text) == normalize(question.reference))


def normalize(text: str) -> str:
    """An answer without case, surrounding white space and full stop."""
    return text.strip().lower().removesuffix(".").strip()


def blind_accuracy(path: Path) -> dict[str, dict[str, float]]:
    """By kind, from `blind.json` beside the questions, in percent; nothing where it is missing."""
    blind = path.with_name("blind.json")
    if not blind.exists():
        return {}
    try:
        scores = json.loads(blind.read_text(encoding="utf-8")).get(path.stem, {})
        return {kind: {"blind": 100 * float(s["accuracy"])} for kind, s in scores.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise LlavaError(f"cannot read the blind baseline {blind}: {error}") from None
