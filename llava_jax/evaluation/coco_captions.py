"""COCO captions: one sentence about a picture, scored by CIDEr."""

import importlib.util
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, Score, ask, mean_score
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.short_answers import write_rows

CAPTION = "Provide a one-sentence caption for the provided image."


def load(root: Path, split: str) -> Benchmark:
    """The pictures of val2014 or val2017 with their five captions; `submit` writes COCO's file."""
    if split not in ("val2014", "val2017"):
        raise LlavaError(f"unknown COCO split {split!r}: choose val2014 or val2017")
    _require_scorer()
    folder = Folder(root, "https://cocodataset.org/#download")
    name = f"annotations/captions_{split}.json"
    data = folder.json(name)
    captions = defaultdict(list)
    for item in data["annotations"]:
        captions[item["image_id"]].append(item["caption"])

    def make(image) -> Question:
        references = captions[image["id"]]
        if not references:
            raise LlavaError(f"image {image['id']} has no caption")
        return ask(
            image["id"],
            CAPTION,
            str(root / split / image["file_name"]),
            reference=" / ".join(references),
            label=tuple(references),
        )

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        pairs = zip(questions, predictions, strict=True)
        rows = [{"image_id": int(q.id), "caption": one_line(text)} for q, text in pairs]
        return write_rows(output / f"captions_{split}_llava_results.json", rows)

    questions = each(data["images"], root / name, make)
    return Benchmark(f"coco_captions/{split}", folder.source, questions, score=score, submit=submit)


def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[Score]:
    """CIDEr x 100 (https://arxiv.org/abs/1411.5726), with COCO's own package pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    pairs = list(zip(questions, predictions, strict=True))
    references = {q.id: [{"caption": one_line(text)} for text in q.label] for q, _ in pairs}
    answers = {q.id: [{"caption": one_line(text)}] for q, text in pairs}
    _, scores = Cider().compute_score(tokenizer.tokenize(references), tokenizer.tokenize(answers))
    return [mean_score("overall", questions, scores, "CIDEr")]


def one_line(text: str) -> str:
    """A caption without line breaks; the tokenizer takes some of them for the next caption."""
    return " ".join(text.split())


def _require_scorer() -> None:
    """LlavaError if pycocoevalcap or Java is missing: better now than after all answers."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise LlavaError("CIDEr needs pycocoevalcap: pip install 'llava_jax[captions]'")
    if shutil.which("java") is None:
        raise LlavaError("CIDEr's tokenizer is a Java program, but `java` is not installed")
