"""The page of `validate`: what it shows is text, whatever the data say, and it loads nothing."""

import json

import pytest

from llava_jax.data.duplicates import leaks
from llava_jax.data.fingerprints import picture_set
from llava_jax.data.records import open_records
from llava_jax.data.report_page import Shared, write_report_page
from llava_jax.data.rows import RowFormat
from llava_jax.data.validate import validate
from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.text.templates import get_template
from tests.data.conftest import record
from tests.data.test_duplicates import photo

EVIL = "<script>alert('x')</script>\"'&"
FORMAT = RowFormat(get_template("chatml"), ImageSpec(28, "pad"), 4, max_length=300, tiles=2)


def data_of(folder, name, pictures, answer=EVIL):
    """Records of the pictures {file: how to save it}, one each and one without."""
    folder.mkdir(exist_ok=True)
    items = [record(f"{name}{EVIL}", "What?", answer)]
    for file, save in pictures.items():
        save(folder / file)
        items.append(record(f"{name} {file}{EVIL}", f"<image>\n{EVIL}?", answer, file))
    (folder / f"{name}.json").write_text(json.dumps(items))
    return open_records(folder / f"{name}.json")


def saved(seed, **options):
    return lambda path: photo(seed).save(path, **options)


@pytest.fixture
def page(tmp_path, tokenizers):
    """page(others) -> (leaks with them, the HTML)."""

    def page(others):
        pictures = {"a.png": saved(1), "b'\"<b>&.png": saved(2), "c.jpg": saved(1, quality=70)}
        records = data_of(tmp_path / "ours", "ours", pictures)
        report = validate(records, FORMAT, tokenizers["smollm"], progress=False, fingerprints=True)
        assert not report.faults
        theirs = picture_set(others, progress=False)
        shared = Shared(report.pictures, theirs, leaks(report.fingerprints, theirs.fingerprints))
        write_report_page(tmp_path / "r.html", [report], [shared])
        return shared.leaks, (tmp_path / "r.html").read_text()

    return page


def test_the_page_shows_all_as_text(page, tmp_path):
    pictures = {"d.png": saved(9), "e.webp": lambda path: photo(2).resize((90, 70)).save(path)}
    found, text = page(data_of(tmp_path / "theirs", "theirs", pictures))
    assert [leak.kind for leak in found] == ["near-duplicate"]
    assert "<script" not in text and "&lt;script&gt;" in text and "http:" not in text
    assert "default-src 'none'" in text and "<b>&" not in text
    for words in ("tokens a record: min", "tokens an answer: min", "questions a record: min",
                  "most common answers", "Latin", "1 of 2 pictures", "2 pictures, near-duplicate",
                  "no faults"):  # fmt: skip
        assert words in text, words
    # Three of records, two of a group, two of a leak.
    assert text.count('src="data:image/jpeg;base64,') == 7
    assert "record 1 (id" in text and "<p>2</p>" in text  # the record to leave out


def test_a_benchmark_with_unreadable_pictures(page, tmp_path):
    pictures = {"d.png": lambda path: path.write_text("<html>"), "e.png": saved(3)}
    others = data_of(tmp_path / "theirs", "theirs", pictures)
    found, text = page(others)
    assert not found and "1 records of" in text and "is not an image" in text
    (tmp_path / "theirs/e.png").unlink()
    with pytest.raises(LlavaError, match=r"has no picture to compare with; the first .*d\.png"):
        picture_set(others, progress=False)
