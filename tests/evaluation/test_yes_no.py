"""POPE and MME: prompts, the scorers' own readings of an answer, points."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.yes_no import COGNITION, PERCEPTION, mme_answer, pope_answer
from tests.evaluation.published import lines, prompts, write

SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes. No.", "yes"),  # only the first sentence is read
        ("NO", "yes"),  # only these spellings count: No, no, not
        ("no\nyes", "yes"),  # words end at spaces only
        ("None", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(text, answer):
    assert pope_answer(text) == answer


def pope(root, **labels):
    for split in ("adversarial", "popular", "random"):
        items = [
            {"question_id": i + 1, "image": f"COCO_val2014_{i:012d}.jpg", "label": label,
             "text": "Is there a snowboard in the image?"}
            for i, label in enumerate(labels.get(split, ["yes", "no"]))
        ]  # fmt: skip
        write(root, f"coco/coco_pope_{split}.json", items)
    return load_benchmark("pope", root, {})


def test_pope_scores_by_split(tmp_path):
    benchmark = pope(tmp_path, adversarial=["yes", "yes", "yes", "no", "no"])
    assert prompts(benchmark)[0] == f"<image>\nIs there a snowboard in the image?{SUFFIX}"
    assert benchmark.questions[0].images == (
        str(tmp_path / "val2014/COCO_val2014_000000000000.jpg"),
    )
    # adversarial: 2 true yes, 1 missed, 1 false yes; popular: perfect; random: always no.
    answers = ["Yes", "Yes", "No", "Yes", "No", "Yes", "No", "No", "No"]
    assert lines(benchmark.score(benchmark.questions, answers)) == {
        "adversarial": (5, {"F1": 66.6667, "accuracy": 60.0, "precision": 66.6667,
                            "recall": 66.6667, "yes": 60.0, "false yes": 50.0}),
        "popular": (2, {"F1": 100.0, "accuracy": 100.0, "precision": 100.0, "recall": 100.0,
                        "yes": 50.0, "false yes": 0.0}),
        "random": (2, {"F1": 0.0, "accuracy": 50.0, "precision": 0.0, "recall": 0.0, "yes": 0.0,
                       "false yes": 0.0}),
        "mean": (9, {"F1": 55.5556, "accuracy": 70.0, "precision": 55.5556, "recall": 55.5556,
                     "yes": 36.6667, "false yes": 16.6667}),
    }  # fmt: skip


def test_pope_refuses_other_labels_and_names_a_missing_split(tmp_path):
    with pytest.raises(LlavaError, match=r"pope_popular.json, record 1: the label 'maybe'"):
        pope(tmp_path, popular=["yes", "maybe"])
    pope(tmp_path)
    (tmp_path / "coco/coco_pope_random.json").unlink()
    pattern = r"coco_pope_random.json is missing: it is published at https://github.com/AoiDragon"
    with pytest.raises(LlavaError, match=pattern):
        load_benchmark("pope", tmp_path, {})


def test_pope_has_standard_errors_by_picture(tmp_path):
    benchmark = pope(tmp_path, adversarial=["yes"] * 8 + ["no"] * 8)
    questions = [q for q in benchmark.questions if q.kind == "adversarial"]
    answers = ["Yes"] * 6 + ["No"] * 10  # each about another picture
    split, mean = benchmark.score(questions, answers)
    assert split.errors["accuracy"] == pytest.approx(100 * (0.875 * 0.125 / 16) ** 0.5, rel=0.1)
    assert 0 < split.errors["F1"] < 15 and split.errors["false yes"] == 0
    assert mean.errors == pytest.approx(split.errors)


def test_repope_is_pope_with_other_labels(tmp_path):
    for split in ("adversarial", "popular", "random"):
        items = [{"question_id": 7, "image": "COCO_val2014_000000000007.jpg", "label": "no",
                  "text": "Is there a car in the image?"}]  # fmt: skip
        write(tmp_path, f"repope/annotations/coco_repope_{split}.json", items)
    (tmp_path / "pope/val2014").mkdir(parents=True)  # POPE's pictures are found next to it
    benchmark = load_benchmark("repope", tmp_path / "repope", {})
    assert benchmark.name == "repope" and len(benchmark.questions) == 3
    assert prompts(benchmark)[0] == f"<image>\nIs there a car in the image?{SUFFIX}"
    assert benchmark.questions[0].images == (
        str(tmp_path / "repope/../pope/val2014/COCO_val2014_000000000007.jpg"),
    )
    assert lines(benchmark.score(benchmark.questions, ["No", "Yes", "Yes"]))["mean"] == (
        3, {"F1": 0.0, "accuracy": 33.3333, "precision": 0.0, "recall": 0.0, "yes": 66.6667,
            "false yes": 66.6667})  # fmt: skip


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("Not at all", "no"),
        ("know", "no"),  # anywhere in the first four letters
        ("The answer is yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_four_letters(text, answer):
    assert mme_answer(text) == answer


def mme(root):
    for category in PERCEPTION + COGNITION:
        folder, texts = root / "MME_Benchmark_release_version" / category, ""
        images = folder
        if category in ("artwork", "celebrity", "landmark", "posters", "scene"):
            images, texts = folder / "images", "questions_answers_YN/"
        images.mkdir(parents=True)
        (images / "0020.png").touch()
        asked = "Is a python code shown in the picture? Please answer yes or no.\tYes\n"
        asked += "Is a c++ code shown in the picture?  Please answer yes or no.\tNo\n"
        name = f"MME_Benchmark_release_version/{category}/{texts}0020.txt"
        write(root, name, asked)
    images = root / "MME_Benchmark_release_version/count"
    (images / "0021.jpg").touch()
    write(images, "0021.txt", "Is it one?\tYes\n\nIs it two?\tNo\n")
    return load_benchmark("mme", root, {})


def test_mme_asks_in_the_originals_words(tmp_path):
    benchmark = mme(tmp_path)
    assert prompts(benchmark)[:2] == [
        f"<image>\nIs a python code shown in the picture?{SUFFIX}",
        f"<image>\nIs a c++ code shown in the picture?{SUFFIX}",
    ]
    assert len(benchmark.questions) == 2 * 15
    images = {question.images[0] for question in benchmark.questions}
    assert str(tmp_path / "MME_Benchmark_release_version/artwork/images/0020.png") in images


def test_mme_counts_accuracy_and_whole_pictures(tmp_path):
    benchmark = mme(tmp_path)
    answers = []
    for question in benchmark.questions:
        right = question.reference.capitalize()
        # Of the two pictures of `count` one has both right, the other one of two.
        answers.append("perhaps" if question.id == "count/0021.jpg/1" else right)
    scores = lines(benchmark.score(benchmark.questions, answers))
    assert scores["count"] == (4, {"points": 125.0, "accuracy": 75.0, "accuracy+": 50.0,
                                   "yes": 50.0, "false yes": 0.0})  # fmt: skip
    assert scores["OCR"][1]["points"] == 200
    assert scores["cognition"] == (8, {"points": 800.0, "yes": 50.0, "false yes": 0.0})
    assert scores["perception"] == (22, {"points": 1925.0, "yes": 50.0, "false yes": 0.0})
    assert list(scores)[-1] == "perception"


def test_mme_without_a_picture_or_category_is_reported(tmp_path):
    mme(tmp_path)
    release = tmp_path / "MME_Benchmark_release_version"
    (release / "count/0021.jpg").unlink()
    with pytest.raises(LlavaError, match="no picture for the questions of 0021.txt"):
        load_benchmark("mme", tmp_path, {})
    (release / "count").rename(release / "counting")
    with pytest.raises(LlavaError, match=r"count is missing: it is published at"):
        load_benchmark("mme", tmp_path, {})


def test_mme_files_that_are_not_whole_are_reported(tmp_path):
    mme(tmp_path)
    file = tmp_path / "MME_Benchmark_release_version/count/0021.txt"
    file.write_text("Is it one?\tYes\n")
    with pytest.raises(LlavaError, match="0021.txt has 1 questions, not two"):
        load_benchmark("mme", tmp_path, {})
    for path in file.parent.glob("*.txt"):
        path.unlink()
    with pytest.raises(LlavaError, match="count has no questions: they are published at"):
        load_benchmark("mme", tmp_path, {})
