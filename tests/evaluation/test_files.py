"""What is missing or of another form is one sentence with the file and where it is published."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import check_images, load_benchmark
from llava_jax.evaluation.benchmark import Benchmark, ask
from tests.evaluation.published import write

OPTIONS = {
    "vqav2": {"split": "test-dev2015"},
    "mmbench": {"file": "dev.tsv", "language": "en"},
    "refcoco": {"name": "refcoco", "split": "val"},
    "easy_vqa": {"split": "test_1000"},
    "amber": {"part": "discriminative"},
    "chair": {"count": 500, "seed": 0},
    "docvqa": {"split": "validation"},
    "mmmu": {"seed": 0},
}


@pytest.mark.parametrize(
    "name, file, source",
    [
        ("vqav2", "v2_OpenEnded_mscoco_test-dev2015_questions.json", "https://visualqa.org"),
        ("gqa", "testdev_balanced_questions.json", "https://cs.stanford.edu"),
        ("vizwiz", "test.json", "https://vizwiz.org"),
        ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", "https://textvqa.org"),
        ("scienceqa", "problems.json", "https://github.com/lupantech/ScienceQA"),
        ("pope", "coco/coco_pope_adversarial.json", "https://github.com/AoiDragon/POPE"),
        ("mme", "commonsense_reasoning", "https://github.com/BradyFU"),
        ("mmbench", "dev.tsv", "https://download.openmmlab.com"),
        ("seed", "SEED-Bench.json", "https://github.com/AILab-CVC/SEED-Bench"),
        ("mmvet", "mm-vet.json", "https://github.com/yuweihao/MM-Vet"),
        ("llava_bench", "questions.jsonl", "https://huggingface.co/datasets/liuhaotian"),
        ("refcoco", "refcoco/instances.json", "https://github.com/lichengunc/refer"),
        ("easy_vqa", "test_1000.json", "make quickstart"),
        ("repope", "annotations/coco_repope_adversarial.json", "https://github.com/YanNeu/RePOPE"),
        ("amber", "query_discriminative.json", "https://github.com/junyangwang0410/AMBER"),
        ("chair", "synonyms.txt", "https://github.com/LisaAnne/Hallucination"),
        ("hallusionbench", "HallusionBench.json", "https://github.com/tianyi-lab"),
        ("mmvp", "Questions.csv", "https://huggingface.co/datasets/MMVP/MMVP"),
        ("chartqa", "test-*.parquet", "https://huggingface.co/datasets/lmms-lab/ChartQA"),
        ("docvqa", "validation-*.parquet", "https://huggingface.co/datasets/lmms-lab/DocVQA"),
        ("mmmu", "validation-*.parquet", "https://huggingface.co/datasets/lmms-lab/MMMU"),
    ],
)
def test_a_missing_file_is_reported_with_its_source(tmp_path, name, file, source):
    with pytest.raises(LlavaError) as error:
        load_benchmark(name, tmp_path, OPTIONS.get(name, {}))
    text = str(error.value)
    assert file in text and source in text and "config.data_root" in text and "\n" not in text


@pytest.mark.parametrize(
    "value, message",
    [
        ("{", r"cannot read .*test.json: Expecting"),
        ({"question": "no list"}, r"test.json holds no list of records"),
        ([], r"test.json holds no list of records"),
        ([{"image": "a.jpg", "question": "What?"}, {"image": "b.jpg"}],
         r"test.json, record 1: no 'question': is it the published file"),
        ([{"image": "a.jpg", "question": 5}], r"test.json, record 0: 'int' object"),
        (["text"], r"test.json, record 0: string indices"),
        ([{"image": "a.jpg", "question": "What?"}] * 2, r"two questions have the id 'a.jpg'"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_reported_by_record(tmp_path, value, message):
    write(tmp_path, "test.json", value)
    with pytest.raises(LlavaError, match=message):
        load_benchmark("vizwiz", tmp_path, {})


def test_a_file_of_another_form_altogether_is_reported(tmp_path):
    write(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"answers": []})
    with pytest.raises(LlavaError, match=r"vqav2: the files below .* are not as published"):
        load_benchmark("vqav2", tmp_path, OPTIONS["vqav2"])


def test_missing_pictures_are_reported_at_the_start(tmp_path):
    (tmp_path / "a.jpg").touch()
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "b.jpg")]
    questions = [ask(i, "What?", path) for i, path in enumerate(paths)]
    check_images(questions[:1], "https://example.org")
    with pytest.raises(
        LlavaError, match=r"2 of 3 pictures are missing, .*for example .*b.jpg: they .*exa"
    ):
        check_images(questions, "https://example.org")
    folder = ask(9, "?", str(tmp_path))
    with pytest.raises(LlavaError, match="1 of 1 pictures are missing"):
        check_images([folder], "https://example.org")


def test_a_literal_image_mark_in_a_question_is_no_picture():
    assert ask(0, "what does <image> mean?", b"x").prompt == "<image>\nwhat does  mean?"


def test_the_fingerprint_sees_what_is_asked_and_expected():
    def of(*question, **more):
        return Benchmark("b", "", [ask(*question, **more)]).fingerprint

    base = of(0, "a?", None, reference="x")
    assert base == of(0, "a?", None, reference="x")
    assert of(0, "a?", "/here/p.jpg") == of(0, "a?", "/there/p.jpg") != of(0, "a?", "/here/q.jpg")
    others = [of(1, "a?", None, reference="x"), of(0, "b?", None, reference="x")]
    others += [of(0, "a?", "p.jpg", reference="x"), of(0, "a?", None, reference="y")]
    assert base not in others
