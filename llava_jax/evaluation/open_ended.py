"""MM-Vet and LLaVA-Bench: free answers, which a language model has to grade."""

from collections.abc import Sequence
from pathlib import Path

from llava_jax.evaluation.benchmark import Benchmark, Question, ask
from llava_jax.evaluation.files import Folder, each
from llava_jax.files import json_line, whole_file, write_json


def load_mmvet(root: Path) -> Benchmark:
    """MM-Vet (https://arxiv.org/abs/2308.02490); `submit` writes its evaluator's file."""
    folder = Folder(root, "https://github.com/yuweihao/MM-Vet/releases (mm-vet.zip)")
    items = folder.json("mm-vet.json")

    def make(pair) -> Question:
        id, item = pair
        picture = str(root / "images" / item["imagename"])
        return ask(id, item["question"], picture, reference=item["answer"])

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        answers = {q.id: text for q, text in zip(questions, predictions, strict=True)}
        path = output / "mmvet_submission.json"
        write_json(path, answers)
        return path

    questions = each(list(items.items()), root / "mm-vet.json", make)
    return Benchmark("mmvet", folder.source, questions, submit=submit)


def load_llava_bench(root: Path) -> Benchmark:
    """LLaVA-Bench (In-the-Wild); `submit` writes the answers file for its GPT-4 reviewer."""
    folder = Folder(root, "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild")

    def make(item) -> Question:
        picture = str(root / "images" / item["image"])
        return ask(item["question_id"], item["text"], picture, kind=item["category"], label=item)

    def submit(questions: Sequence[Question], predictions: Sequence[str], output: Path) -> Path:
        path = output / "llava_bench_answers.jsonl"
        with whole_file(path) as file:
            for i, (q, text) in enumerate(zip(questions, predictions, strict=True)):
                line = {"question_id": q.label["question_id"], "prompt": q.text, "text": text,
                        "answer_id": str(i), "model_id": "llava_jax", "metadata": {}}  # fmt: skip
                file.write(json_line(line))
        return path

    path = root / "questions.jsonl"
    questions = each(folder.json_lines("questions.jsonl"), path, make)
    return Benchmark("llava_bench", folder.source, questions, submit=submit)
