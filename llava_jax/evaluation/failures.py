"""A page of what a model got wrong: picture, question, answer, reference.

The page is one file that loads nothing. Everything from outside is text in it, whatever it says.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from llava_jax.data.media import ImageError, load_image
from llava_jax.evaluation.benchmark import Benchmark, Question

MOST = 200  # failures on a page
SIDE = 320  # pixels of a picture's longer side

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px sans-serif; margin: 2em; }}
article {{ display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em 0; }}
dl {{ margin: 0; }} dt {{ color: #777; }} dd {{ margin: 0 0 .6em; white-space: pre-wrap; }}
</style></head><body><h1>{title}</h1><p>{count}</p>
{articles}</body></html>
"""


def write_failures(path: Path, benchmark: Benchmark, predictions: Sequence[str]) -> None:
    """Writes the worst graded answers, in the order of the benchmark, to an HTML page."""
    pairs = list(zip(benchmark.questions, predictions, strict=True))
    grades = [benchmark.grade(question, text) for question, text in pairs]
    wrong = [i for i, grade in enumerate(grades) if grade < 1]
    shown = sorted(sorted(wrong, key=grades.__getitem__)[:MOST])
    count = f"{len(wrong):,} of {len(pairs):,} answers are not fully right"
    if len(shown) < len(wrong):
        count += f"; the {len(shown)} worst are shown"
    articles = "\n".join(_article(benchmark, *pairs[i], grades[i]) for i in shown)
    title = escape(f"{benchmark.name}: failures")
    page = _PAGE.format(title=title, count=count, articles=articles)
    # A file's name that is no UTF-8 comes as halves of characters.
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


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
    return f"<article>{_picture(benchmark, question, text)}<dl>{facts}</dl></article>"


def _picture(benchmark: Benchmark, question: Question, text: str) -> str:
    """An <img> with the picture inside, or a word why there is none."""
    if not question.images:
        return "<div>no picture</div>"
    try:
        image = load_image(question.images[0], question.image_name)
    except ImageError as error:
        return f"<div>{escape(str(error))}</div>"
    if benchmark.draw:
        image = benchmark.draw(image, question, text)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" src="data:image/jpeg;base64,{data}">'
