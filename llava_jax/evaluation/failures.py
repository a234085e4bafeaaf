"""A page of a model's wrong answers: pictures, question, answer, reference.

The page is one file that loads nothing else. Questions and answers are escaped: they are shown as
text, whatever they contain.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from llava_jax.data.media import ImageError, load_image
from llava_jax.data.video import Video, frames
from llava_jax.data.web_page import embedded, write_page
from llava_jax.evaluation.benchmark import Benchmark, Question

MAX_FAILURES = 200
FRAMES = 3  # shown of a video


def write_failures(path: Path, benchmark: Benchmark, predictions: Sequence[str]) -> None:
    """Writes the answers with the lowest grades, in the benchmark's order, to an HTML page."""
    pairs = list(zip(benchmark.questions, predictions, strict=True))
    grades = [benchmark.grade(question, text) for question, text in pairs]
    wrong = [i for i, grade in enumerate(grades) if grade < 1]
    shown = sorted(sorted(wrong, key=grades.__getitem__)[:MAX_FAILURES])
    count = f"{len(wrong):,} of {len(pairs):,} answers are not fully right"
    if len(shown) < len(wrong):
        count += f"; the {len(shown)} worst are shown"
    articles = "\n".join(_article(benchmark, *pairs[i], grades[i]) for i in shown)
    write_page(path, f"{benchmark.name}: failures", f"<p>{count}</p>\n{articles}")


def _article(benchmark: Benchmark, question: Question, text: str, grade: float) -> str:
    rows = {
        "question": question.text,
        "answer": text,
        "reference": question.reference,
        "kind": question.kind,
        "grade": f"{grade:.2f}",
        "id": question.id,
        "picture": question.image_name,
    }
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    images = [
        picture
        for image in question.read_images()
        for picture in _pictures(benchmark, question, text, image)
    ]
    pictures = "".join(images) or "<div>no picture</div>"
    return f"<article>{pictures}<dl>{facts}</dl></article>"


def _pictures(
    benchmark: Benchmark, question: Question, text: str, source: str | bytes | Video
) -> list[str]:
    """An <img> with the picture, or some frames of the video, inside; or why there is none."""
    try:
        if isinstance(source, Video):
            images = frames(source, question.image_name, FRAMES)
        else:
            images = [load_image(source, question.image_name)]
    except ImageError as error:
        return [f"<div>{escape(str(error))}</div>"]
    if benchmark.draw:
        images = [benchmark.draw(image, question, text) for image in images]
    return [embedded(image) for image in images]
