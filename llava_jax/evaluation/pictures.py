"""The pictures of benchmarks, for a comparison with those of a data set."""

from typing import NamedTuple

from ml_collections import ConfigDict

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.evaluation import Benchmark, load_configured


class QuestionPictures(NamedTuple):
    """What a question shows: paths, encoded bytes or videos, and what messages call all of it."""

    name: str
    images: tuple[str | bytes | Video, ...]
    image_names: tuple[str, ...]
    origin: str = ""  # as of a record


class BenchmarkPictures:
    """The pictures of each question of a benchmark; `path` is its name."""

    def __init__(self, benchmark: Benchmark):
        self.path, self._questions = benchmark.name, benchmark.questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> QuestionPictures:
        question = self._questions[index]
        name = f"question {brief(question.id)}"
        try:
            images = question.read_images()
        except LlavaError as error:
            raise RecordError("unreadable image", f"{name}: {error}") from None
        return QuestionPictures(name, images, (question.image_name,) * len(images))


def benchmark_pictures(config: ConfigDict) -> list[BenchmarkPictures]:
    """Of the benchmark of a config of eval.py, or of those of its suite.

    Raises:
      LlavaError: its files or pictures are missing or not as published.
    """
    return [BenchmarkPictures(benchmark) for _, benchmark in load_configured(config)]
