"""AI2D, RealWorldQA, MMStar, MMMU, MuirBench: prompts, pictures, scores."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from tests.evaluation.published import lines, png, prompts, stored, write_parquet

DIRECTLY = "Answer with the option's letter from the given choices directly"
FILE = "data/test-00000-of-00001.parquet"


def test_ai2d(tmp_path):
    rows = [{"question": "Which letter is the leaf?", "options": ["A", "b", "C", "d"],
             "answer": answer, "image": stored()} for answer in ("1", "2")]  # fmt: skip
    write_parquet(tmp_path, FILE, rows)
    benchmark = load_benchmark("ai2d", tmp_path, {})
    assert prompts(benchmark)[0] == (
        f"<image>\nWhich letter is the leaf?\nA. A\nB. b\nC. C\nD. d\n{DIRECTLY}."
    )
    first = benchmark.questions[0]
    assert first.reference == "B. b"
    texts = ["B", "b", "(B)", "B. leaf", "B leaf", "A"]
    assert [benchmark.grade(first, text) for text in texts] == [1, 1, 1, 1, 0, 0]


def test_realworldqa(tmp_path):
    rows = [{"question": "Which way?\n\nA. Left\nB. Right\nAnswer directly. ", "answer": "B",
             "image": stored()},
            {"question": "How many?", "answer": "Two", "image": stored()}]  # fmt: skip
    write_parquet(tmp_path, FILE, rows)
    benchmark = load_benchmark("realworldqa", tmp_path, {})
    assert prompts(benchmark)[0] == "<image>\nWhich way?\n\nA. Left\nB. Right\nAnswer directly."
    assert lines(benchmark.score(benchmark.questions, ["(B) Right", " two."])) == {
        "options": (1, {"accuracy": 100.0}),
        "open": (1, {"accuracy": 100.0}),
        "overall": (2, {"accuracy": 100.0}),
    }
    assert benchmark.grade(benchmark.questions[1], "two of them") == 0


def test_mmstar_is_a_mean_of_means(tmp_path):
    kinds = [("math", "geometry"), ("math", "geometry"), ("math", "statistics"), ("logic", "code")]
    rows = [{"index": i, "question": "Which?\nOptions: A: x, B: y", "answer": "A",
             "category": kind, "l2_category": part, "image": png(i)}
            for i, (kind, part) in enumerate(kinds)]  # fmt: skip
    write_parquet(tmp_path, "mmstar.parquet", rows)
    benchmark = load_benchmark("mmstar", tmp_path, {})
    assert prompts(benchmark)[0] == f"<image>\nWhich?\nOptions: A: x, B: y\n{DIRECTLY}"
    assert benchmark.questions[2].read_images() == (png(2),)  # here without a file name
    scores = lines(benchmark.score(benchmark.questions, ["A", "B", "A", "B"]))
    # geometry 50, statistics 100, code 0
    assert scores == {
        "math": (3, {"accuracy": 75.0}),
        "logic": (1, {"accuracy": 0.0}),
        "average": (4, {"accuracy": 50.0}),
    }


def mmmu(root, file="data/validation-00000-of-00001.parquet", **changes):
    rows = [
        {"id": "validation_Art_Theory_1", "question": "What is in <image 2>, not <image 1>?",
         "options": "['<image 3>', \"a 'b'\"]", "answer": "B", "question_type": "multiple-choice"},
        {"id": "validation_Math_4", "question": "How long is <image 1>?", "options": "[]",
         "answer": "['24', 'two dozen']", "question_type": "open"},
    ]  # fmt: skip
    rows[0] |= changes
    pictures = {f"image_{i}": stored(i) for i in range(1, 4)}
    write_parquet(root, file, [row | pictures for row in rows])
    return load_benchmark("mmmu", root, {"seed": 0})


def test_mmmu(tmp_path):
    benchmark = mmmu(tmp_path)
    first, second = benchmark.questions
    assert first.prompt == (
        "<image> <image> <image>\nWhat is in <image 2>, not <image 1>?\nA. <image 3>\nB. a 'b'"
        f"\n\n{DIRECTLY}."
    )
    assert first.read_images() == (png(1), png(2), png(3)) and first.kind == "Art_Theory"
    assert second.prompt == (
        "<image>\nHow long is <image 1>?\n\nAnswer the question using a single word or phrase."
    )
    assert [benchmark.grade(first, text) for text in ("B", "(A)")] == [1, 0]
    assert [benchmark.grade(second, t) for t in ("24 cm", "Two dozen", "12")] == [1, 1, 0]
    assert lines(benchmark.score(benchmark.questions, ["B", "12"]))["overall"] == (
        2, {"accuracy": 50.0})  # fmt: skip
    with pytest.raises(LlavaError, match="record 0: the answer 'F' is not among the options"):
        mmmu(tmp_path, answer="F")
    with pytest.raises(LlavaError, match="record 0: the options are not a list of texts"):
        mmmu(tmp_path, options="3")


def test_mmmus_own_folders_are_read_as_well(tmp_path):
    """The authors publish a folder per subject, lmms-eval all subjects in `data`."""
    benchmark = mmmu(tmp_path, "Math/validation-00000-of-00001.parquet")
    assert len(benchmark.questions) == 2


def test_cvbench_is_the_mean_of_2d_and_3d(tmp_path):
    sources = ["ADE20K", "ADE20K", "COCO", "Omni3D"]
    rows = [{"idx": i, "prompt": "Which? (A) x (B) y (C) z", "choices": ["x", "y", "z"],
             "answer": "(B)", "source": source, "image": stored(i)}
            for i, source in enumerate(sources)]  # fmt: skip
    write_parquet(tmp_path, "test_2d.parquet", rows[:3])
    write_parquet(tmp_path, "test_3d.parquet", rows[3:])
    benchmark = load_benchmark("cvbench", tmp_path, {})
    assert prompts(benchmark)[0] == (
        "<image>\nNote: You only need to respond with A, B, C without providing any additional "
        "information.\n\nWhich? (A) x (B) y (C) z"
    )
    first = benchmark.questions[0]
    texts = ["B", "(B) y", " b", "Both", "The B", ""]  # the first letter, even of a word
    assert [benchmark.grade(first, text) for text in texts] == [1, 1, 1, 1, 0, 0]
    assert lines(benchmark.score(benchmark.questions, ["B", "A", "B", "A"])) == {
        "ADE20K": (2, {"accuracy": 50.0}),
        "COCO": (1, {"accuracy": 100.0}),
        "Omni3D": (1, {"accuracy": 0.0}),
        "overall": (4, {"accuracy": 50.0}),
        "2D and 3D": (4, {"accuracy": 37.5}),
    }
    write_parquet(tmp_path, "test_3d.parquet", [rows[3] | {"source": "KITTI"}])
    with pytest.raises(LlavaError, match="record 3: the source 'KITTI' is none of ADE20K"):
        load_benchmark("cvbench", tmp_path, {})


def muirbench(root, question="Which of <image> and <image> is it?", options=("<image>", "none")):
    rows = [{"idx": "7", "question": question, "options": list(options), "answer": "B",
             "task": "Counting", "image_list": [stored(i) for i in range(3)]},
            {"idx": "8", "question": "Is it <image>?", "options": list("uvwxyz"), "answer": "F",
             "task": "Ordering", "image_list": [stored(9)]}]  # fmt: skip
    write_parquet(root, FILE, rows)
    return load_benchmark("muirbench", root, {})


def test_muirbench_has_its_pictures_inside_the_text(tmp_path):
    benchmark = muirbench(tmp_path)
    first, second = benchmark.questions
    assert first.prompt == (
        f"Which of <image> and <image> is it?\nA. <image>\nB. none\n{DIRECTLY}."
    )
    assert first.read_images() == (png(0), png(1), png(2)) and second.read_images() == (png(9),)
    assert first.image_name == "test-00000-of-00001.parquet, group 0, row 0, image_list"
    assert "\nF. z\n" in second.prompt
    assert [benchmark.grade(first, t) for t in ("B", "b", "B. none", "B none")] == [1, 1, 1, 0]
    assert list(lines(benchmark.score(benchmark.questions, ["B", "A"]))) == [
        "Counting", "Ordering", "overall"]  # fmt: skip
    with pytest.raises(LlavaError, match="record 0: its text has 2 <image> for 3 pictures"):
        muirbench(tmp_path, options=("one", "none"))
