"""MM-Vet and LLaVA-Bench: bare questions, and the files their graders read."""

import json

from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.report import comparison
from tests.evaluation.published import prompts, write


def test_mmvet(tmp_path):
    items = {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x in the equation?", "answer": "-1"},
        "v1_1": {"imagename": "v1_1.png", "question": "What is d?", "answer": "1"},
    }
    write(tmp_path, "mm-vet.json", items)
    benchmark = load_benchmark("mmvet", tmp_path, {})
    assert prompts(benchmark)[0] == "<image>\nWhat is x in the equation?"
    assert benchmark.questions[1].images == (str(tmp_path / "images/v1_1.png"),)
    path = benchmark.submit(benchmark.questions, ["x is -1", "d"], tmp_path)
    assert json.loads(path.read_text()) == {"v1_0": "x is -1", "v1_1": "d"}
    line = "mmvet: not scored here (LLaVA-1.5 7B 31.1, 1.5 13B 36.1, 1.6 Vicuna 7B 43.9, "
    assert comparison("mmvet", []).startswith(line)


def test_llava_bench(tmp_path):
    item = {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"}
    write(tmp_path, "questions.jsonl", [item])
    benchmark = load_benchmark("llava_bench", tmp_path, {})
    assert prompts(benchmark) == ["<image>\nWhat is it?"]
    path = benchmark.submit(benchmark.questions, ["Diamond Head\nin Hawaii"], tmp_path)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert {key: line[key] for key in ("question_id", "prompt", "text")} == {
        "question_id": 0,
        "prompt": "What is it?",
        "text": "Diamond Head\nin Hawaii",
    }
