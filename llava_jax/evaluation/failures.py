"""A page of a model's wrong answers: pictures, question, answer, reference.

The page is one file that loads nothing else. Questions and answers are escaped: they are shown as
text, whatever they contain.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from llava_jax.data.media import ImageError, load_image
from llava_jax.data.video import Video, frames
from llava_jax.evaluation.benchmark import Benchmark, Question
from llava_jax.files import whole_file

MAX_FAILURES = 200
SIDE = 320  # longer side of a picture in pixels
FRAMES = 3  # shown of a video

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
    """Writes the answers with the lowest grades, in the benchmark's order, to an HTML page."""
    pairs = list(zip(benchmark.questions, predictions, strict=True))
    grades = [benchmark.grade(question, text) for question, text in pairs]
    wrong = [i for i, grade in enumerate(grades) if grade < 1]
    shown = sorted(sorted(wrong, key=grades.__getitem__)[:MAX_FAILURES])
    count = f"{len(wrong):,} of {len(pairs):,} answers are not fully right"
    if len(shown) < len(wrong):
        count += f"; the {len(shown)} worst are shown"
    articles = "\n".join(_article(benchmark, *pairs[i], grades[i]) for i in shown)
    title = escape(f"{benchmark.name}: failures")
    page = _PAGE.format(title=title, count=count, articles=articles)
    # A file name that is not UTF-8 contains lone surrogates, which cannot be encoded.
    with whole_file(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


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
    return [_embedded(image) for image in images]


def _embedded(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" src="data:image/jpeg;base64,{data}">'
