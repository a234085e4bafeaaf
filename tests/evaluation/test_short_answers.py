"""VQAv2, GQA, VizWiz and TextVQA: the original's prompts, scores, the servers' files."""

import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from tests.evaluation.published import lines, prompts, write

SUFFIX = "\nAnswer the question using a single word or phrase."


def vqa_questions(*ids):
    return {"questions": [{"question_id": i, "image_id": i // 1000, "question": f"What is {i}?"}
                          for i in ids]}  # fmt: skip


def test_vqav2_test_dev_fills_the_servers_file(tmp_path):
    write(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json", vqa_questions(16002, 16001))
    write(tmp_path, "v2_OpenEnded_mscoco_test2015_questions.json", vqa_questions(1, 16001, 16002))
    benchmark = load_benchmark("vqav2", tmp_path, {"split": "test-dev2015"})
    assert prompts(benchmark)[0] == f"<image>\nWhat is 16002?{SUFFIX}"
    assert benchmark.questions[0].images == (
        str(tmp_path / "test2015/COCO_test2015_000000000016.jpg"),
    )
    assert benchmark.score is None and benchmark.grade is None
    path = benchmark.submit(benchmark.questions, ["Two dogs.", "A cat"], tmp_path)
    assert json.loads(path.read_text()) == [
        {"question_id": 1, "answer": ""},
        {"question_id": 16001, "answer": "cat"},
        {"question_id": 16002, "answer": "2 dogs"},
    ]


def test_vqav2_val_is_scored_by_answer_type(tmp_path):
    write(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", vqa_questions(1, 2, 3))

    def annotation(i, kind, answers):
        listed = [{"answer": a, "answer_id": n} for n, a in enumerate(answers)]
        return {"question_id": i, "answer_type": kind, "answers": listed}

    annotations = [
        annotation(3, "number", ["2"] * 8 + ["3"] * 2),
        annotation(1, "yes/no", ["yes"] * 10),
        annotation(2, "yes/no", ["no"] * 9 + ["yes"]),
    ]
    write(tmp_path, "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    benchmark = load_benchmark("vqav2", tmp_path, {"split": "val2014"})
    scores = lines(benchmark.score(benchmark.questions, ["Yes.", "yes", "two"]))
    assert scores == {
        "yes/no": (2, {"accuracy": 65.0}),  # 1 and 9/10 * 1/3
        "number": (1, {"accuracy": 100.0}),
        "overall": (3, {"accuracy": 76.6667}),
    }
    assert benchmark.questions[1].reference == "no / yes"
    with pytest.raises(LlavaError, match="unknown VQAv2 split 'train2014'"):
        load_benchmark("vqav2", tmp_path, {"split": "train2014"})


def test_gqa_matches_exactly_after_case_and_full_stops(tmp_path):
    types = {"structural": "verify"}, {"structural": "query"}
    items = {
        "201307251": {"question": "Is it overcast?", "imageId": "n161313", "answer": "no",
                      "types": types[0], "isBalanced": True},
        "201640614": {"question": "Who is wearing the dress?", "imageId": "n235859",
                      "answer": "woman", "types": types[1], "isBalanced": True},
    }  # fmt: skip
    write(tmp_path, "data/testdev_balanced_questions.json", items)
    (tmp_path / "data/images").mkdir()
    benchmark = load_benchmark("gqa", tmp_path, {})
    assert prompts(benchmark)[0] == f"<image>\nIs it overcast?{SUFFIX}"
    assert benchmark.questions[1].images == (str(tmp_path / "data/images/n235859.jpg"),)
    scores = lines(benchmark.score(benchmark.questions, ["No..", "the woman"]))
    assert scores == {
        "binary": (1, {"accuracy": 100.0}),
        "open": (1, {"accuracy": 0.0}),
        "overall": (2, {"accuracy": 50.0}),
    }
    path = benchmark.submit(benchmark.questions, ["No.", "The Woman"], tmp_path)
    assert json.loads(path.read_text())[1] == {
        "questionId": "201640614",
        "prediction": "the woman",
    }


def test_vizwiz_asks_for_unanswerable_and_fills_the_servers_file(tmp_path):
    question = "Can you tell me what type of pill these are please. If its Tylenol, Advil, or that."
    items = [{"image": "VizWiz_test_00000025.jpg", "question": question},
             {"image": "VizWiz_test_00000007.jpg", "question": "What is this? "}]  # fmt: skip
    write(tmp_path, "test.json", items)
    benchmark = load_benchmark("vizwiz", tmp_path, {})
    unanswerable = (
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SUFFIX
    )
    assert prompts(benchmark) == [
        "<image>\nCan you tell me what type of pill these are please. if its tylenol, advil, or "
        f"that.{unanswerable}",
        f"<image>\nWhat is this? {unanswerable}",
    ]
    assert benchmark.questions[1].images == (str(tmp_path / "test/VizWiz_test_00000007.jpg"),)
    path = benchmark.submit(benchmark.questions, ["Unanswerable", "The half & half"], tmp_path)
    assert json.loads(path.read_text()) == [
        {"image": "VizWiz_test_00000025.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000007.jpg", "answer": "half & half"},
    ]


def textvqa(root, answers):
    write(root, "TextVQA_0.5.1_val.json", {"data": [
        {"question_id": 34602, "image_id": "003a8ae2ef43b901", "answers": answers,
         "question": "what is the brand of this camera?"},
        {"question_id": 34603, "image_id": "97b1112b17015396", "answers": ["12"] * 10,
         "question": "whats the lowest number yard line that you can see?"}]})  # fmt: skip
    write(root, "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [
        {"image_id": "97b1112b17015396", "ocr_tokens": []},
        {"image_id": "003a8ae2ef43b901",
         "ocr_tokens": ["DAKOTA", "DIGITAL", "Single-Use", "Camera", "Pire", "digitat"]},
    ]})  # fmt: skip


def test_textvqa_hints_at_the_words_that_were_read(tmp_path):
    textvqa(tmp_path, ["dakota"] * 2 + ["dakota digital"] * 8)
    benchmark = load_benchmark("textvqa", tmp_path, {})
    assert prompts(benchmark) == [
        "<image>\nWhat is the brand of this camera?\nReference OCR token: "
        f"DAKOTA, DIGITAL, Single-Use, Camera, Pire, digitat{SUFFIX}",
        "<image>\nWhats the lowest number yard line that you can see?\n"
        f"Reference OCR token: {SUFFIX}",
    ]
    assert benchmark.questions[0].images == (str(tmp_path / "train_images/003a8ae2ef43b901.jpg"),)
    scores = lines(benchmark.score(benchmark.questions, ["Dakota", "12."]))
    assert scores == {"overall": (2, {"accuracy": 80.0})}  # 0.6 and 1


def test_textvqa_scores_a_question_asked_twice_by_the_last_answers(tmp_path):
    first = {"question_id": 1, "image_id": "0a", "question": "What is it?", "answers": ["1st"] * 10}
    items = [first, first | {"question_id": 2, "answers": ["last"] * 10, "question": "what is it?"}]
    write(tmp_path, "TextVQA_0.5.1_val.json", {"data": items})
    read = [{"image_id": "0a", "ocr_tokens": []}]
    write(tmp_path, "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": read})
    benchmark = load_benchmark("textvqa", tmp_path, {})
    grades = [benchmark.grade(question, "last") for question in benchmark.questions]
    assert grades == [1, 1] and len(benchmark.questions) == 2


def test_textvqa_needs_ten_answers(tmp_path):
    textvqa(tmp_path, ["dakota"] * 9)
    with pytest.raises(LlavaError, match=r"val.json, record 0: 9 answers, not ten"):
        load_benchmark("textvqa", tmp_path, {})
