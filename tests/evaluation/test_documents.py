"""ChartQA, DocVQA, InfographicVQA, OCRBench, MathVista: prompts, metrics, files for servers."""

import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.documents import anls, edits, is_nearly
from tests.evaluation.published import lines, png, prompts, stored, write_parquet

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    "text, reference, right",
    [
        ("105", "100", True),
        ("106", "100", False),
        ("5%", "0.05", True),
        ("-96", "-100", True),
        ("0.0", "0", False),  # a reference of 0 is compared as text
        ("0", "0", True),
        ("YES", "Yes", True),
        ("yes.", "Yes", False),
        ("1,000", "1000", False),
        ("nan", "7", False),
    ],
)
def test_relaxed_accuracy(text, reference, right):
    assert is_nearly(text, reference) is right


def test_chartqa(tmp_path):
    kinds = ["human_test", "augmented_test", "augmented_test"]
    rows = [{"type": kind, "question": "How many?", "answer": "20", "image": stored(i)}
            for i, kind in enumerate(kinds)]  # fmt: skip
    write_parquet(tmp_path, "data/test-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("chartqa", tmp_path, {})
    assert prompts(benchmark)[0] == "<image>\nHow many?\nAnswer the question with a single word."
    assert [q.read_images() for q in benchmark.questions] == [(png(i),) for i in range(3)]
    assert lines(benchmark.score(benchmark.questions, ["21", "21", "30"])) == {
        "human": (1, {"relaxed accuracy": 100.0}),
        "augmented": (2, {"relaxed accuracy": 50.0}),
        "overall": (3, {"relaxed accuracy": 66.6667}),
    }


def test_edits_are_the_levenshtein_distance():
    assert edits("kitten", "sitting") == 3 == edits("sitting", "kitten")
    assert edits("", "abc") == 3 and edits("abc", "abc") == 0


@pytest.mark.parametrize(
    "text, answers, value",
    [
        ("Paris", ["paris"], 1.0),
        ("pari", ["Paris", "London"], 0.8),
        ("par", ["Paris"], 0.6),
        ("pa", ["Paris"], 0.0),  # under a half
        ("a  b", ["a b"], 1.0),  # spaces are one for the edits
        ("a   c", ["a b"], 0.8),  # but the length is that of the text as written: 1 - 1/5
        ("", [""], 1.0),
    ],
)
def test_anls(text, answers, value):
    assert anls(text, answers) == pytest.approx(value)


def documents(root, name, split, answers, folder):
    rows = [{"questionId": str(70 + i), "question": "Who?", "answers": a, "image": stored(i),
             "docId": 9}
            for i, a in enumerate(answers)]  # fmt: skip
    write_parquet(root, f"{folder}/{split}-00000-of-00002.parquet", rows[:1])
    write_parquet(root, f"{folder}/{split}-00001-of-00002.parquet", rows[1:])
    return load_benchmark(name, root, {"split": split})


def test_docvqa_is_scored_by_anls(tmp_path):
    benchmark = documents(tmp_path, "docvqa", "validation", [["a b"], ["Jo", "Joe"]], "DocVQA")
    assert prompts(benchmark)[0] == f"<image>\nWho?{SHORT}"
    assert benchmark.questions[1].read_images() == (png(1),)
    assert lines(benchmark.score(benchmark.questions, ["x", "joe"])) == {
        "overall": (2, {"ANLS": 50.0})
    }
    assert {question.unit for question in benchmark.questions} == {"9"}  # one document
    assert benchmark.questions[1].reference == "Jo / Joe" and benchmark.submit is None
    with pytest.raises(LlavaError, match="record 1: it has no answers"):
        documents(tmp_path, "docvqa", "validation", [["a"], []], "DocVQA")
    with pytest.raises(LlavaError, match="unknown split 'train': choose validation or test"):
        load_benchmark("docvqa", tmp_path, {"split": "train"})


def test_infovqas_test_split_has_a_file_for_the_server(tmp_path):
    benchmark = documents(tmp_path, "infovqa", "test", [None, None], "InfographicVQA")
    assert benchmark.name == "infovqa/test" and benchmark.score is None
    path = benchmark.submit(benchmark.questions, ["x", "é"], tmp_path)
    assert path.name == "infovqa_test_submission.json"
    assert json.loads(path.read_text()) == [
        {"questionId": 70, "answer": "x"}, {"questionId": 71, "answer": "é"}]  # fmt: skip


def test_ocrbench_looks_for_an_answer_in_the_text(tmp_path):
    rows = [
        {"dataset": "IIIT5K", "question": " What is written? ", "question_type": "Regular Text",
         "answer": ["CENTRE", "center"], "image": stored()},
        {"dataset": "HME100k", "question": "Write the formula.", "question_type": "Formula",
         "answer": ["x ^ { 2 }"], "image": stored()},
    ]  # fmt: skip
    write_parquet(tmp_path, "data/test-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("ocrbench", tmp_path, {})
    assert prompts(benchmark)[0] == "<image>\nWhat is written?"
    word, formula = benchmark.questions
    texts = ["The centre.", "CEN\nTER", "ｃｅｎｔｒｅ", "cent re"]
    assert [benchmark.grade(word, text) for text in texts] == [1, 0, 1, 0]
    # Formulas: spaces do not count, but case does.
    assert [benchmark.grade(formula, text) for text in ("so x^{2} holds", "X^{2}")] == [1, 0]
    assert lines(benchmark.score(benchmark.questions, ["centre", "?"])) == {
        "Regular Text": (1, {"accuracy": 100.0}),
        "Formula": (1, {"accuracy": 0.0}),
        "overall": (2, {"points": 500.0, "accuracy": 50.0}),
    }


def test_mathvista_writes_what_its_evaluation_reads(tmp_path):
    common = {"unit": "", "precision": None, "metadata": {"split": "testmini"}, "query": "Hint",
              "image": "images/1.jpg", "decoded_image": stored(3)}  # fmt: skip
    rows = [
        {"pid": "1", "question": "How far?", "choices": None, "answer": "1.2", "unit": "m",
         "question_type": "free_form", "answer_type": "float", "precision": 1.0},
        {"pid": "2", "question": "Which?", "choices": ["x", "y"], "answer": "y",
         "question_type": "multi_choice", "answer_type": "text"},
        {"pid": "3", "question": "List.", "choices": None, "answer": "[1]",
         "question_type": "free_form", "answer_type": "list"},
    ]  # fmt: skip
    write_parquet(tmp_path, "data/testmini-00000-of-00001.parquet", [common | r for r in rows])
    benchmark = load_benchmark("mathvista", tmp_path, {"split": "testmini"})
    assert prompts(benchmark) == [
        "<image>\nHow far? (Unit: m)\nAnswer the question using a single floating-point number "
        "with one decimal place.",
        "<image>\nWhich?\nA. x\nB. y\nAnswer with the option's letter from the given choices "
        "directly.",
        "<image>\nList.\nAnswer the question using a Python list.",
    ]
    assert benchmark.score is None and benchmark.questions[0].read_images() == (png(3),)
    path = benchmark.submit(benchmark.questions, ["1.2", "B", "[1]"], tmp_path)
    written = json.loads(path.read_text())
    assert list(written) == ["1", "2", "3"] and written["2"]["response"] == "B"
    assert written["2"]["choices"] == ["x", "y"] and written["1"]["precision"] == 1.0
