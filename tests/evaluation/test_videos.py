"""MVBench, Video-MME and NExT-QA: prompts, videos, readings, scores."""

import pytest

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.evaluation import MissingFile, check_images, load_benchmark
from llava_jax.evaluation.failures import write_failures
from llava_jax.evaluation.videos import MVBENCH, mvbench_letter
from tests.evaluation.published import lines, prompts, write, write_parquet
from tests.videos import frame


@pytest.fixture
def mvbench(tmp_path):
    item = {"video": "a.mp4", "question": "What moved?", "candidates": ["Cup", "Dog"],
            "answer": "Dog", "start": 1.0}  # fmt: skip
    for task in MVBENCH:
        write(tmp_path, f"json/{task}.json", [item, item | {"answer": "Cup"}])
    folder = tmp_path / "video/tvqa/video_fps3_hq_segment/a.mp4"
    folder.mkdir(parents=True)
    for number in range(6):
        frame(number).save(folder / f"{number}.png")
    return tmp_path


def test_mvbench(mvbench):
    benchmark = load_benchmark("mvbench", mvbench, {})
    assert len(benchmark.questions) == 40
    assert set(prompts(benchmark)) == {
        "<image>\nQuestion:What moved?\nOption:\n(A) Cup\n(B) Dog\nOnly give the best option.\n"
    }
    first = benchmark.questions[0]
    path = mvbench / "video/star/Charades_segment/a.mp4"
    assert first.read_images() == (Video(path, rate=3.0),) and first.image_name == str(path)
    assert (first.label, first.kind) == ("B", "action_sequence")
    scores = lines(benchmark.score(benchmark.questions, ["(B)", "(B)"] * 20))
    assert len(scores) == 21 and scores["overall"] == (40, {"accuracy": 50.0})
    with pytest.raises(MissingFile, match="10 of 11 videos are missing, for example .*a.mp4: they"):
        check_images(benchmark.questions, benchmark.source)
    check_images([q for q in benchmark.questions if q.kind == "episodic_reasoning"], "")


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("(b)", "B"), ("B. Dog", "B"), ("b.dog", "B"), ("Option B", "B"),
        ("a dog", "A"),  # an article is a letter
        ("dog", ""), ("", ""), ("B. Dog\nis it", "B"), ("The answer is (C).", "C"), ("F", ""),
        ("B-", "B"), ("AB", ""),
    ],
)  # fmt: skip
def test_letters_of_mvbench(text, letter):
    assert mvbench_letter(text) == letter


def test_an_answer_that_is_no_option_is_named(mvbench):
    write(mvbench, "json/scene_transition.json",
          [{"video": "a", "question": "?", "candidates": ["x"], "answer": "y"}])  # fmt: skip
    with pytest.raises(LlavaError, match="the answer 'y' is not among the options"):
        load_benchmark("mvbench", mvbench, {})


def test_the_page_of_failures_shows_frames(mvbench, tmp_path):
    benchmark = load_benchmark("mvbench", mvbench, {})
    write_failures(tmp_path / "failures.html", benchmark, ["A"] * 40)
    page = (tmp_path / "failures.html").read_text()
    assert page.count("<img ") == 3 and page.count("no video file") == 19


@pytest.mark.parametrize(
    "ending, tail",
    [
        ("answer", "The best answer is:"),
        ("letter", "\nAnswer with the option's letter from the given choices directly."),
    ],
)
def test_videomme(tmp_path, ending, tail):
    rows = [{"question_id": f"{i}-1", "videoID": f"x{i}", "duration": duration, "question": "Who?",
             "options": ["A. He.", "B. She."], "answer": "B"}
            for i, duration in enumerate(["short", "medium", "long", "long"])]  # fmt: skip
    write_parquet(tmp_path, "videomme/test-00000-of-00001.parquet", rows)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x1.mkv").touch()
    benchmark = load_benchmark("videomme", tmp_path, {"ending": ending})
    assert prompts(benchmark)[0] == (
        "<image>\nSelect the best answer to the following multiple-choice question based on the "
        "video and the subtitles. Respond with only the letter (A, B, C, or D) of the correct "
        f"option.\nWho?\nA. He.\nB. She.\n{tail}"
    )
    assert [q.images[0].source[-6:] for q in benchmark.questions[:2]] == ["x0.mp4", "x1.mkv"]
    scores = lines(benchmark.score(benchmark.questions, ["B", "A", "(B)", "The answer is A."]))
    assert {kind: values["accuracy"] for kind, (_, values) in scores.items()} == {
        "short": 100.0, "medium": 0.0, "long": 50.0, "overall": 50.0,
    }  # fmt: skip
    with pytest.raises(LlavaError, match="unknown ending 'x': choose one of answer, letter"):
        load_benchmark("videomme", tmp_path, {"ending": "x"})


def test_nextqa(tmp_path):
    rows = [{"video": 24, "qid": i, "type": kind, "question": "why did he run ", "answer": 1,
             **{f"a{k}": f"option {k}" for k in range(5)}}
            for i, kind in enumerate(["CW", "TN", "DO"])]  # fmt: skip
    write_parquet(tmp_path, "MC/test-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("nextqa", tmp_path, {"seed": 0})
    assert prompts(benchmark)[0] == (
        "<image>\nwhy did he run\nA. option 0\nB. option 1\nC. option 2\nD. option 3\nE. option 4"
    )
    assert benchmark.questions[0].images[0].source.endswith("NExTVideo/24.mp4")
    scores = lines(benchmark.score(benchmark.questions, ["B", "I think that he saw option 1", "E"]))
    assert {kind: values["accuracy"] for kind, (_, values) in scores.items()} == {
        "causal": 100.0, "temporal": 100.0, "descriptive": 0.0, "overall": 66.6667,
    }  # fmt: skip
