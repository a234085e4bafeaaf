"""ScienceQA, MMBench and SEED-Bench: prompts, which answers count, submissions."""

import base64
import io
import json
import zipfile

import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.evaluation import load_benchmark
from llava_jax.evaluation.multiple_choice import mmbench_answer, scienceqa_answer
from tests.evaluation.published import lines, prompts, write

SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def scienceqa(root):
    problems = {
        "11": {"question": "What is the name of the colony shown?", "hint": "", "answer": 1,
               "choices": ["Maryland", "New Hampshire", "Rhode Island", "Vermont"],
               "image": "image.png"},
        "26": {"question": "How long does it take to bake lasagna in the oven?",
               "hint": "Select the better estimate.", "image": None, "answer": 0,
               "choices": ["33 minutes", "33 hours"]},
        "7": {"question": "Of another split?", "hint": "", "image": None, "answer": 0,
              "choices": ["yes", "no"]},
    }  # fmt: skip
    write(root, "problems.json", problems)
    write(root, "pid_splits.json", {"test": ["11", "26"], "train": ["7"]})
    return load_benchmark("scienceqa", root, {})


def test_scienceqa_prompts_are_the_originals(tmp_path):
    benchmark = scienceqa(tmp_path)
    assert prompts(benchmark) == [
        "<image>\nWhat is the name of the colony shown?\nA. Maryland\nB. New Hampshire\n"
        f"C. Rhode Island\nD. Vermont{SUFFIX}",
        "Context: Select the better estimate.\nHow long does it take to bake lasagna in the oven?"
        f"\nA. 33 minutes\nB. 33 hours{SUFFIX}",
    ]
    assert benchmark.questions[0].images == (str(tmp_path / "images/test/11/image.png"),)
    assert benchmark.questions[1].images == ()


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B. New Hampshire", "B"),
        ("The answer is B.", "B"),
        ("I think. The answer is B, I think", "B"),  # any character may follow the letter
        ("The answer is B", ""),  # one must
        ("The answer is A. The answer is B.", ""),
        ("b", ""),
        ("B.", ""),
        ("(B)", ""),
        (" B", ""),
        ("AB", ""),
        ("F", ""),
        ("", ""),
    ],
)
def test_scienceqa_reads_a_letter_by_three_rules(text, letter):
    assert scienceqa_answer(text) == letter


def test_scienceqa_reports_questions_with_a_picture_last(tmp_path):
    benchmark = scienceqa(tmp_path)
    scores = lines(benchmark.score(benchmark.questions, ["B", "C"]))  # 26 has no option C
    assert list(scores.items()) == [
        ("text", (1, {"accuracy": 0.0})),
        ("overall", (2, {"accuracy": 50.0})),
        ("IMG", (1, {"accuracy": 100.0})),
    ]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "PNG")
    return buffer.getvalue()


QUESTION = "Which part of an apple tree might grow into a new tree?"
HINT = "This diagram shows the life cycle of an apple tree."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
           "l2-category", "comment", "split"]  # fmt: skip


def mmbench(root, rows=None, columns=COLUMNS, language="en"):
    picture = base64.b64encode(png()).decode()
    tail = ["structure", picture, "reasoning", "attribute", "", "dev"]
    rows = rows or [
        ["267", QUESTION, HINT, "a seed", "a leaf", "", "", "A", *tail],
        ["1000267", QUESTION, HINT, "a leaf", "a seed", "nan", "", "B", *tail],
        ["300", 'What is\n"it"?', "nan", "cat", "dog", "N/A", "cow", "B", *tail],
    ]
    lines = [columns, *rows]
    quoted = ["\t".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
    write(root, "dev.tsv", "\n".join(quoted) + "\n")
    return load_benchmark("mmbench", root, {"file": "dev.tsv", "language": language})


def test_mmbench_prompts_are_the_originals(tmp_path):
    benchmark = mmbench(tmp_path)
    assert prompts(benchmark) == [
        f"<image>\n{HINT}\n{QUESTION}\nA. a seed\nB. a leaf{SUFFIX}",
        f"<image>\n{HINT}\n{QUESTION}\nA. a leaf\nB. a seed{SUFFIX}",
        f'<image>\nWhat is\n"it"?\nA. cat\nB. dog{SUFFIX}',
    ]
    assert benchmark.questions[0].images == (png(),)
    chinese = mmbench(tmp_path, language="cn")
    assert prompts(chinese)[2] == '<image>\nWhat is\n"it"?\nA. cat\nB. dog\n请直接回答选项字母。'


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a leaf", "B"),
        ("The answer is B", "B"),
        ("A leaf", "A"),  # a word that is an option's letter, whatever it means
        ("a leaf", "B"),
        ("It is a LEAF.", "B"),
        ("A or B", ""),
        ("a seed or a leaf", ""),
        ("b", ""),
        ("B is the letter of what I choose here", ""),  # too far from the end
        ("B, I think, it is a leaf", "B"),  # too far, so the text of an option counts
        ("A or B: a seed", "A"),  # two letters, one text
        ("Z", ""),  # none of them, whatever follows
        ("Z a leaf", ""),
        ("a leaf, as everybody who has seen a tree knows", ""),  # too long to be an option
        ("C", ""),
    ],
)
def test_mmbench_reads_a_letter_or_one_options_text(text, letter):
    assert mmbench_answer(text, {"A": "a seed", "B": "a leaf"}) == letter


def test_mmbench_takes_the_picture_of_another_row_by_its_index(tmp_path):
    picture = base64.b64encode(png()).decode()
    row = ["7", QUESTION, HINT, "a", "b", "", "", "A", "c", picture, "r", "l", "", "dev"]
    rotated = ["1000007", *row[1:9], "7", *row[10:]]
    assert [q.images for q in mmbench(tmp_path, [rotated, row]).questions] == [(png(),)] * 2


def test_mmbench_is_circular_and_plain(tmp_path):
    benchmark = mmbench(tmp_path)
    scores = lines(benchmark.score(benchmark.questions, ["A", "A", "B"]))
    assert scores == {
        "attribute": (2, {"accuracy": 50.0}),
        "plain": (2, {"accuracy": 100.0}),
        "circular": (2, {"accuracy": 50.0}),
    }
    scores = lines(benchmark.score(benchmark.questions, ["A", "B", "A"]))
    assert scores["plain"][1] == scores["circular"][1] == {"accuracy": 50.0}
    assert list(scores)[-1] == "circular"


def test_mmbench_takes_an_answer_behind_an_empty_option(tmp_path):
    picture = base64.b64encode(png()).decode()
    row = ["1", "Which?", "", "a", "None", "c", "", "C", "", picture, "", "", "", ""]
    benchmark = mmbench(tmp_path, [row])
    (question,) = benchmark.questions
    assert question.prompt == f"<image>\nWhich?\nA. a{SUFFIX}" and question.reference == "C. c"
    assert [benchmark.grade(question, text) for text in ("A", "B", "C")] == [0, 0, 1]
    row[7] = "E"
    with pytest.raises(LlavaError, match="record 0: no 'E'"):
        mmbench(tmp_path, [row])


def test_mmbench_writes_the_servers_workbook(tmp_path):
    benchmark = mmbench(tmp_path)
    path = benchmark.submit(benchmark.questions, ["A", "<b> & \x00", ""], tmp_path)
    sheet = zipfile.ZipFile(path).read("xl/worksheets/sheet1.xml").decode()
    assert "&lt;b&gt; &amp; <" in sheet and "\x00" not in sheet
    openpyxl = pytest.importorskip("openpyxl")
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (267, QUESTION, "a seed", "a leaf", None, None, "A", "A", "dev"),
        (1000267, QUESTION, "a leaf", "a seed", None, None, "<b> & ", "B", "dev"),
        (300, 'What is\n"it"?', "cat", "dog", None, "cow", None, "B", "dev"),
    ]


def test_mmbench_without_answers_has_no_score(tmp_path):
    columns = [column for column in COLUMNS if column != "answer"]
    row = [
        "1",
        "What?",
        "",
        "x",
        "y",
        "",
        "",
        "c",
        base64.b64encode(png()).decode(),
        "",
        "",
        "",
        "",
    ]
    benchmark = mmbench(tmp_path, [row], columns)
    assert benchmark.score is None and benchmark.grade is None and benchmark.submit
    row[8] = "not base64!"
    with pytest.raises(LlavaError, match="record 0: its picture is not base64"):
        mmbench(tmp_path, [row], columns)


def seed(root):
    def item(id, type_id, kind, answer):
        options = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
        return {"question_id": id, "question_type_id": type_id, "data_type": kind, "answer": answer,
                "data_id": f"{id}.jpg", "question": "How many?", **options}  # fmt: skip

    data = {
        "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
        "questions": [
            item("101669", 1, "image", "A"),
            item("101670", 1, "image", "B"),
            item("200001", 10, "video", "D"),
        ],
    }
    write(root, "SEED-Bench.json", data)
    return load_benchmark("seed", root, {})


def test_seed_counts_the_bare_letter(tmp_path):
    benchmark = seed(tmp_path)
    assert prompts(benchmark)[0] == (
        f"<image>\nHow many?\nA. option a\nB. option b\nC. option c\nD. option d{SUFFIX}"
    )
    assert [question.images[0] for question in benchmark.questions] == [
        str(tmp_path / "SEED-Bench-image/101669.jpg"),
        str(tmp_path / "SEED-Bench-image/101670.jpg"),
        str(tmp_path / "SEED-Bench-video-image/10_200001.png"),
    ]
    answers = ["A", "B.", "D"]
    assert lines(benchmark.score(benchmark.questions, answers)) == {
        "Scene Understanding": (2, {"accuracy": 50.0}),
        "Action Recognition": (1, {"accuracy": 100.0}),
        "image": (2, {"accuracy": 50.0}),
        "video": (1, {"accuracy": 100.0}),
        "overall": (3, {"accuracy": 66.6667}),
    }
    path = benchmark.submit(benchmark.questions, answers, tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question_id": "101669", "prediction": "A"},
        {"question_id": "101670", "prediction": "B."},
        {"question_id": "200001", "prediction": "D"},
    ]
