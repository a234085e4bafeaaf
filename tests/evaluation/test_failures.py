"""The page of failures: what is wrong is on it, as text whatever it says, with its pictures."""

import io
import re
from dataclasses import replace

from PIL import Image

from llava_jax.evaluation.benchmark import Benchmark, ask, graded
from llava_jax.evaluation.failures import MAX_FAILURES, write_failures

EVIL = "<script>alert('x')</script>\"'&"


def benchmark(questions) -> Benchmark:
    return Benchmark("b<i>", "", questions, **graded(lambda q, text: float(text == q.reference)))


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_failures_are_shown_with_their_pictures_as_text(tmp_path):
    questions = [ask(i, f"question {i} {EVIL}", png("red"), EVIL, "yes", EVIL) for i in range(3)]
    write_failures(tmp_path / "f.html", benchmark(questions), ["yes", EVIL, "no"])
    page = (tmp_path / "f.html").read_text()
    assert "2 of 3 answers are not fully right" in page
    assert "question 0" not in page and "question 1" in page and "question 2" in page
    assert "<script" not in page and "&lt;script&gt;" in page and "<title>b&lt;i&gt;" in page
    assert page.count('src="data:image/jpeg;base64,') == 2 and "http://" not in page
    assert re.search(r"default-src 'none'", page)


def test_halves_of_characters_are_written_as_escapes(tmp_path):
    """Which the name of a file has where it is no UTF-8."""
    question = ask(0, "what?", png("red"), "caf\udce9.png", "\ud800")
    write_failures(tmp_path / "f.html", benchmark([question]), ["x"])
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert "caf\\udce9.png" in page and "\\ud800" in page


def test_boxes_and_missing_pictures(tmp_path):
    questions = [
        ask(0, "where?", png("black"), reference="x"),
        ask(1, "gone?", str(tmp_path / "<gone>.png"), reference="x"),
        ask(2, "no picture?", None, reference="x"),
    ]
    drawn = []

    def draw(image, question, text):
        drawn.append((image.size, question.id, text))
        return image

    write_failures(tmp_path / "f.html", replace(benchmark(questions), draw=draw), ["a", "b", "c"])
    page = (tmp_path / "f.html").read_text()
    assert drawn == [((400, 200), "0", "a")]  # before it is made small
    assert "&lt;gone&gt;.png" in page and "no picture" in page


def test_the_worst_are_shown_when_there_are_many(tmp_path):
    questions = [ask(i, f"question {i}.", None) for i in range(MAX_FAILURES + 50)]
    grade = lambda q, text: float(text)
    many = Benchmark("many", "", questions, **graded(grade))
    answers = ["0.5"] * 50 + ["0.0"] * MAX_FAILURES
    write_failures(tmp_path / "f.html", many, answers)
    page = (tmp_path / "f.html").read_text()
    assert f"the {MAX_FAILURES} worst are shown" in page
    assert "question 49." not in page and "question 50." in page
