"""The easy-VQA records: what is asked, what is held out, and that nothing depends on chance."""

import collections
import json

import pytest

from llava_jax.data.records import open_records
from llava_jax.errors import LlavaError
from llava_jax.quickstart import easy_vqa
from llava_jax.quickstart.easy_vqa import Question

COLOR = Question("what color is the circle?", "teal", 0)
SHAPE = Question("what shape is present?", "circle", 0)


def yes_no(text: str, answer: str) -> Question:
    return Question(text, answer, 0)


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([Question("what is the blue shape?", "rectangle", 0)], "a blue rectangle."),
        ([COLOR], "a teal circle."),
        ([SHAPE, yes_no("is there a red shape?", "yes")], "a red circle."),
        ([SHAPE, yes_no("is no red shape present?", "no")], "a red circle."),
        ([SHAPE, yes_no("is there a red shape?", "no")], None),
        (
            [
                yes_no("is there a red shape?", "yes"),
                yes_no("does the image not contain a circle?", "yes"),
                yes_no("is a triangle present?", "no"),
            ],
            "a red rectangle.",  # the only shape left
        ),
        ([], None),
    ],
)
def test_caption(questions, expected):
    assert easy_vqa.caption(questions) == expected


def test_kinds():
    assert [q.kind for q in (COLOR, SHAPE, yes_no("x", "no"))] == ["color", "shape", "yes/no"]


def example_questions(images: int = 300) -> list[Question]:
    questions = []
    for image in range(images):
        color = easy_vqa.COLORS[image % 8]
        questions += [
            Question("what color is the shape?", color, image),
            Question("what shape is present?", easy_vqa.SHAPES[image % 3], image),
        ]
        questions += [
            Question(f"is there a {c} shape?", "yes" if c == color else "no", image)
            for c in easy_vqa.COLORS
        ]
    return questions


def test_training_records():
    questions = example_questions()
    records = easy_vqa.training_records(questions)
    assert records == easy_vqa.training_records(questions)
    ids = {name: {r["id"] for r in split} for name, split in records.items()}
    assert len(ids["val_instruct"]) == 40 and len(ids["instruct"]) == 260
    assert not (ids["val_instruct"] | ids["val_align"]) & (ids["instruct"] | ids["align"])
    for record in records["instruct"]:
        texts = [turn["value"] for turn in record["conversations"]]
        assert texts[0].startswith("<image>\n") and sum("<image>" in t for t in texts) == 1
        assert len(texts) == 20
        assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * 10
    align = records["align"][0]["conversations"]
    assert align[0]["value"].startswith("<image>\n") and align[1]["value"].startswith("a ")


def test_first_turns_need_a_look():
    """Most yes/no questions ask for what is not there; the first turns do not."""
    by_image = collections.defaultdict(list)
    for question in example_questions():
        by_image[question.image].append(question)
    first = collections.Counter()
    for image, own in by_image.items():
        ordered = easy_vqa.order_questions(own, f"seed {image}")
        assert sorted(ordered) == sorted(own)
        first[ordered[0].answer if ordered[0].kind == "yes/no" else "name"] += 1
    assert all(70 < first[group] < 130 for group in ("yes", "no", "name"))


def test_fixed_part():
    records = easy_vqa.test_records(example_questions())
    part = easy_vqa.fixed_part(records)
    assert part == easy_vqa.fixed_part(records) and len(part) == 1000
    assert len({r["id"] for r in part}) == 1000
    kinds = collections.Counter(r["kind"] for r in part)
    assert kinds == {"yes/no": 800, "shape": 100, "color": 100}
    assert [r["id"] for r in part] == [r["id"] for r in records if r in part]


def test_blind_scores():
    train = [yes_no("is it?", a) for a in ("yes", "yes", "no")] + [SHAPE]
    test = easy_vqa.test_records(
        [yes_no("is it?", "yes"), yes_no("is it?", "no"), SHAPE, yes_no("never seen?", "no")]
    )
    scores = easy_vqa.blind_scores(train, test)
    assert scores["overall"] == {"accuracy": 0.5, "correct": 2, "total": 4}
    assert scores["yes/no"]["correct"] == 1 and scores["shape"]["accuracy"] == 1.0
    assert "color" not in scores


def test_unknown_answers_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "questions.json"
    path.write_text('[["what is it?", "a cat", 0]]')
    monkeypatch.setattr(easy_vqa, "package_file", lambda *_: path)
    with pytest.raises(LlavaError, match="easy-vqa 1.0"):
        easy_vqa.read_questions("train")


@pytest.mark.slow
def test_the_real_data_set(tmp_path):
    """The package as it is: counts, the published blind baseline, and readable both ways."""
    pytest.importorskip("easy_vqa")
    out = easy_vqa.prepare_easy_vqa(tmp_path / "easy", lambda line: None)
    before = (out / "checksums.json").stat().st_mtime_ns
    easy_vqa.prepare_easy_vqa(out, lambda line: None)
    assert (out / "checksums.json").stat().st_mtime_ns == before
    read = lambda name: json.loads((out / name).read_text())
    assert len(read("instruct.json")) == 3960 and len(read("test.json")) == 9673
    assert len(list((out / "images").rglob("*.png"))) == 5000
    blind = read("blind.json")["test"]
    assert [blind[k]["total"] for k in easy_vqa.KINDS] == [7136, 1257, 1280]
    assert [blind[k]["accuracy"] for k in ("overall", *easy_vqa.KINDS)] == pytest.approx(
        [0.670, 0.825, 0.348, 0.120], abs=6e-4
    )
    from_json = open_records(out / "instruct.json", str(out / "images"))
    from_tfds = open_records(out / "tfds" / "easy_vqa_instruct")
    assert len(from_json) == len(from_tfds)
    for index in (0, 1234, 3899):
        assert from_json[index].turns == from_tfds[index].turns
        assert from_json[index].id == from_tfds[index].id
