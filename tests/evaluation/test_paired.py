"""HallusionBench, NaturalBench and MMVP: prompts, readings, and scores of pairs and sets."""

import pytest

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.paired import first_word, mmvp_answer
from tests.evaluation.published import lines, png, prompts, stored, write, write_parquet

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    "text, word",
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("No, there is not. Yes?", "no"),
        ("I know nothing", ""),  # whole words only
        ("", ""),
    ],
)
def test_the_first_word_decides(text, word):
    assert first_word(text, ("yes", "no")) == word


def hallusionbench(root, **changes):
    def item(category, figure, question, answer, seen="1"):
        return {"category": category, "subcategory": "chart", "visual_input": seen, "set_id": "3",
                "figure_id": figure, "question_id": question, "question": f"Is it {question}?",
                "gt_answer": answer, "gt_answer_details": "", "filename": None}  # fmt: skip

    items = [
        item("VD", "0", "0", "1"), item("VD", "0", "1", "0"), item("VD", "1", "0", "0"),
        item("VD", "1", "1", "1"), item("VS", "0", "0", "1", "0"), item("VS", "1", "0", "1"),
    ]  # fmt: skip
    items[0] |= changes
    write(root, "HallusionBench.json", items)
    return load_benchmark("hallusionbench", root, {})


def test_hallusionbench_counts_answers_pictures_and_question_pairs(tmp_path):
    benchmark = hallusionbench(tmp_path)
    assert prompts(benchmark)[0] == f"<image>\nIs it 0?{SHORT}"
    assert prompts(benchmark)[4] == f"Is it 0?{SHORT}"  # a VS question without its picture
    assert benchmark.questions[2].images == (str(tmp_path / "VD/chart/3_1.png"),)
    # VD: picture 0 right, of picture 1 one answer wrong, so question 1 is right in both pictures.
    # VS: uncertain without the picture, which counts; right with it.
    answers = ["Yes", "No", "Yes", "Yes", "I cannot tell", "yes"]
    scores = lines(benchmark.score(benchmark.questions, answers))
    assert scores["VD"] == (4, {"aAcc": 75.0, "fAcc": 50.0, "qAcc": 50.0, "yes": 75.0,
                                "false yes": 50.0})  # fmt: skip
    assert scores["VS"] == (2, {"aAcc": 100.0, "fAcc": 100.0, "qAcc": 100.0, "yes": 50.0,
                                "false yes": 0.0})  # fmt: skip
    assert scores["overall"][1]["fAcc"] == pytest.approx(66.6667)
    assert scores["overall"][1]["qAcc"] == pytest.approx(66.6667)
    # Uncertain is wrong as soon as there is a picture.
    assert benchmark.grade(benchmark.questions[5], "I cannot tell") == 0
    with pytest.raises(LlavaError, match="record 0: the answer '2' is neither 0 nor 1"):
        hallusionbench(tmp_path, gt_answer="2")


def naturalbench(root):
    def row(kind, yes, no):
        return {"Index": 0, "Image_0": stored(1), "Image_1": stored(2),
                "Question_0": "Is it one?", "Question_1": "Is it two?", "Question_Type": kind,
                "Image_0_Question_0": yes, "Image_1_Question_0": no,
                "Image_0_Question_1": no, "Image_1_Question_1": yes}  # fmt: skip

    rows = [row("yes_no", "Yes", "No"), row("multiple_choice", "A", "B"), row("yes_no", "Yes", "X")]
    write_parquet(root, "data/train-00000-of-00001.parquet", rows[:2])
    return rows


def test_naturalbench_counts_groups_questions_and_images(tmp_path):
    rows = naturalbench(tmp_path)
    benchmark = load_benchmark("naturalbench", tmp_path, {})
    assert prompts(benchmark)[:2] == ["<image>\nIs it one? Please answer Yes or No."] * 2
    suffix = "Please output the letter corresponding to the correct option."
    assert prompts(benchmark)[-1] == f"<image>\nIs it two? {suffix}"
    read = [question.read_images() for question in benchmark.questions[:4]]
    assert read == [(png(1),), (png(2),), (png(1),), (png(2),)]
    # In the order q0 i0, q0 i1, q1 i0, q1 i1: all right, then question 1 of picture 0 wrong.
    answers = ["Yes", "No", "no, none", "Yes", "A", "B", "A.", "(A)"]
    (line,) = benchmark.score(benchmark.questions, answers)
    assert line.count == 8
    assert line.values == {"group": 50, "question": 75, "image": 75, "accuracy": 87.5, "yes": 50,
                           "false yes": 0}  # fmt: skip
    assert line.errors["group"] > 0
    write_parquet(tmp_path, "data/train-00000-of-00001.parquet", rows)
    with pytest.raises(LlavaError, match=r"record 9: the answer 'X' is none of \('Yes', 'No'\)"):
        load_benchmark("naturalbench", tmp_path, {})


def test_a_parquet_file_that_is_none_or_is_missing_is_reported(tmp_path):
    with pytest.raises(LlavaError, match=r"has no file \*.parquet: it is published at .*NaturalB"):
        load_benchmark("naturalbench", tmp_path, {})
    write(tmp_path, "train.parquet", "no parquet")
    with pytest.raises(LlavaError, match=r"cannot read .*train.parquet"):
        load_benchmark("naturalbench", tmp_path, {})
    write_parquet(tmp_path, "train.parquet", [{"Question_0": "a", "Question_1": "b",
                                               "Question_Type": "yes_no"}])  # fmt: skip
    with pytest.raises(LlavaError, match="record 0: no 'Image_0_Question_0'"):
        load_benchmark("naturalbench", tmp_path, {})


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("(b)", "B"),
        ("B. Closed", "B"),
        ("The answer is (A)", "A"),
        ("I take option B", "B"),
        ("Closed", ""),
        ("", ""),
    ],
)
def test_mmvp_reads_a_letter(text, letter):
    assert mmvp_answer(text) == letter


def test_mmvp_counts_pairs(tmp_path):
    table = (
        "lndex,Question,Options,Correct Answer\n"
        "1,Is it open?,(a) Open (b) Closed,(a)\n"
        "2,Is it open?,(a) Open (b) Closed,(b)\n"
        '3,"Left, or right?",(a) Left (b) Right,(a)\n'
        '4,"Left, or right?",(a) Left (b) Right,(b)\n'
    )
    write(tmp_path, "Questions.csv", table)
    benchmark = load_benchmark("mmvp", tmp_path, {})
    assert prompts(benchmark)[2] == (
        "<image>\nLeft, or right?\nA. Left\nB. Right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert benchmark.questions[3].images == (str(tmp_path / "MMVP Images/4.jpg"),)
    (line,) = benchmark.score(benchmark.questions, ["A", "B", "A", "A"])
    assert (line.count, line.values) == (4, {"pairs": 50, "accuracy": 75})
    write(tmp_path, "Questions.csv", table.replace("(a)\n", "(c)\n", 1))
    with pytest.raises(LlavaError, match=r"record 0: no two options with an answer"):
        load_benchmark("mmvp", tmp_path, {})
