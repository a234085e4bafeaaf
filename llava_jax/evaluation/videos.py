"""MVBench, Video-MME and NExT-QA: questions with options about videos.

Prompts and readings are those of lmms-eval. Which frames are shown is up to the model, as when it
is asked otherwise (`VideoSpec`).
"""

import re
from pathlib import Path

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.evaluation.answer_accuracy import strip_punctuation
from llava_jax.evaluation.benchmark import Benchmark, Question, ask, graded
from llava_jax.evaluation.exams import HUB
from llava_jax.evaluation.files import Folder, each
from llava_jax.evaluation.letters import mmmu_letter, option_letter
from llava_jax.evaluation.multiple_choice import ALPHABET, LETTER, with_options

# MVBench's tasks, in the order of the paper's table, and the folders of their videos.
MVBENCH = {
    "action_sequence": "star/Charades_segment",
    "action_prediction": "star/Charades_segment",
    "action_antonym": "ssv2_video_mp4",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video_segment",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "counterfactual_inference": "clevrer/video_validation",
}
FOLDER_RATE = 3.0  # frames a second of the folders of frames of episodic_reasoning
VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video and the "
    "subtitles. Respond with only the letter (A, B, C, or D) of the correct option."
)
VIDEOMME_ENDINGS = {"answer": "The best answer is:", "letter": f"\n{LETTER}"}


def load_mvbench(root: Path) -> Benchmark:
    """MVBench (https://arxiv.org/abs/2311.17005): 20 tasks of 200 questions about short videos."""
    folder = Folder(root, f"{HUB}/OpenGVLab/MVBench (json/ and the unpacked video/)")
    rows = [
        (task, number, row)
        for task in MVBENCH
        for number, row in enumerate(folder.json(f"json/{task}.json", f"{task}.json"))
    ]

    def make(entry) -> Question:
        task, number, row = entry
        place = f"{MVBENCH[task]}/{row['video']}"
        path = folder.pictures(f"video/{place}", place, f"video/data0613/{place}")
        if row["answer"] not in row["candidates"]:
            raise LlavaError(f"the answer {row['answer']!r} is not among the options")
        options = zip(ALPHABET, row["candidates"], strict=False)
        lines = "".join(f"({letter}) {option}\n" for letter, option in options)
        letter = ALPHABET[row["candidates"].index(row["answer"])]
        return ask(
            f"{task}/{number}",
            f"Question:{row['question']}\nOption:\n{lines}Only give the best option.\n",
            Video(path, rate=FOLDER_RATE),
            reference=f"{letter}. {row['answer']}",
            kind=task,
            label=letter,
        )

    questions = each(rows, root, make)
    return Benchmark("mvbench", folder.source, questions, **graded(grade_mvbench))


def grade_mvbench(question: Question, text: str) -> float:
    return float(mvbench_letter(text) == question.label)


def mvbench_letter(text: str) -> str:
    """The letter that lmms-eval reads in an answer to MVBench, or an empty text.

    The letter before a full stop at the start of a single line; else the first single letter from A
    to E in any case, so that "a dog" is A.
    """
    if match := re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE):
        return match[1].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    match = re.search(r"\b[a-e]\b", strip_punctuation(text).lower())
    return match[0].upper() if match else ""


def load_videomme(root: Path, ending: str) -> Benchmark:
    """Video-MME (https://arxiv.org/abs/2405.21075), without subtitles: short, medium, long videos.

    Args:
      ending: of the prompt: `answer`, "The best answer is:", with which lmms-eval asks LLaVA-Video,
        or `letter`, with which it asks other models.
    """
    if ending not in VIDEOMME_ENDINGS:
        raise LlavaError(f"unknown ending {ending!r}: choose one of {', '.join(VIDEOMME_ENDINGS)}")
    folder = Folder(root, f"{HUB}/lmms-lab/Video-MME (videomme/ and the unpacked data/)")
    columns = ("question_id", "videoID", "duration", "question", "options", "answer")
    rows = folder.parquet("test-*.parquet", *columns, folders=("videomme", "", "data"))

    def make(row) -> Question:
        names = [f"data/{row['videoID']}.{suffix}" for suffix in ("mp4", "MP4", "mkv")]
        options = "\n".join(row["options"])
        return ask(
            row["question_id"],
            f"{VIDEOMME}\n{row['question']}\n{options}\n{VIDEOMME_ENDINGS[ending]}",
            Video(folder.pictures(*names)),
            reference=row["answer"],
            kind=row["duration"],
        )

    questions = each(rows, root, make)
    grade = lambda q, text: float(option_letter(text) == q.reference)
    return Benchmark("videomme", folder.source, questions, **graded(grade))


def load_nextqa(root: Path, seed: int) -> Benchmark:
    """NExT-QA (https://arxiv.org/abs/2105.08276), the questions with five options.

    If no option can be read in an answer, one is drawn: by lmms-eval at random, here by `seed` and
    the question's id.
    """
    folder = Folder(root, f"{HUB}/lmms-lab/NExTQA (MC/ and the unpacked NExTVideo/)")
    columns = ("video", "qid", "type", "question", "answer", *(f"a{i}" for i in range(5)))
    rows = folder.parquet("test-*.parquet", *columns, folders=("MC", "", "data"))

    def make(row) -> Question:
        options = [row[f"a{i}"].strip() for i in range(5)]
        names = [f"NExTVideo/{row['video']}.{suffix}" for suffix in ("mp4", "MP4")]
        return ask(
            f"{row['video']}/{row['qid']}",
            with_options(row["question"].strip(), options),
            Video(folder.pictures(*names)),
            reference=ALPHABET[row["answer"]],
            kind=NEXTQA_KINDS[row["type"][0]],
            label=dict(zip(ALPHABET, options, strict=False)),
        )

    def grade(question: Question, text: str) -> float:
        return float(
            mmmu_letter(text, question.label, f"{seed}/{question.id}") == question.reference
        )

    questions = each(rows, root, make)
    return Benchmark("nextqa", folder.source, questions, **graded(grade))


NEXTQA_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
