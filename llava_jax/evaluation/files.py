"""Reads a benchmark's published files; an error names a missing file and its source."""

import contextlib
import csv
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Question
from llava_jax.evaluation.parquet import ParquetRow, rows

# The exceptions that a record raises if it does not have the published form.
NOT_AS_EXPECTED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class MissingFile(LlavaError):
    """A published file is not in the benchmark's folder."""


@dataclass(frozen=True)
class Folder:
    """The folder that holds a benchmark's files.

    Attributes:
      root: the user's `config.data_root`.
      source: where the files are published.
    """

    root: Path
    source: str

    def path(self, *names: str) -> Path:
        """The first of `names` that exists below the folder; MissingFile if none does."""
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        raise MissingFile(
            f"{self.root / names[0]} is missing: it is published at {self.source}; put it there "
            "or set config.data_root to the folder that holds it"
        )

    def pictures(self, *names: str) -> Path:
        """The first of `names` that exists below the folder, else the first."""
        paths = [self.root / name for name in names]
        return next((path for path in paths if path.exists()), paths[0])

    def json(self, *names: str) -> Any:
        path = self.path(*names)
        with readable(path):
            return json.loads(path.read_text(encoding="utf-8-sig"))

    def json_lines(self, *names: str) -> list[Any]:
        path = self.path(*names)
        with readable(path):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            return [json.loads(line) for line in lines if line.strip()]

    def csv(self, *names: str, delimiter: str = ",") -> list[dict[str, str]]:
        """Rows as dicts, from a file with the quoting of pandas."""
        path = self.path(*names)
        csv.field_size_limit(2**31 - 1)  # a cell may hold a picture
        with readable(path), open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter=delimiter))

    def parquet(
        self, pattern: str, *columns: str, folders: Sequence[str] = ("", "data")
    ) -> list[ParquetRow]:
        """Rows of all Parquet files that match `pattern`, in order of name.

        Args:
          columns: those to read now; pictures are read when they are needed.
          folders: where to look below the root; the first with a match counts.
        """
        for folder in folders:
            if paths := sorted(self.root.glob(str(Path(folder, pattern)))):
                return list(rows(paths, columns))
        raise MissingFile(
            f"{self.root} has no file {pattern}: it is published at {self.source}; put it there or "
            "set config.data_root to the folder that holds it"
        )

    def plain_pickle(self, *names: str) -> Any:
        """A pickle of numbers, texts, lists and dicts; a pickle that names a class is refused."""
        path = self.path(*names)
        with readable(path), open(path, "rb") as file:
            try:
                return _PlainUnpickler(file, encoding="utf-8").load()
            except (pickle.UnpicklingError, EOFError, *NOT_AS_EXPECTED) as error:
                raise ValueError(error) from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which no data file needs")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns a fault inside the block into a LlavaError that names the file at `path`."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        raise LlavaError(f"cannot read {path}: {error}") from None


def questions_of(
    records: Sequence[Any], path: Path | str, make: Callable[[Any], Question]
) -> list[Question]:
    """`make` of each record; LlavaError with the number of a record without the published form."""
    if not isinstance(records, Sequence) or not records:
        raise LlavaError(f"{path} holds no list of records: is it the published file?")
    questions = []
    for i, record in enumerate(records):
        try:
            questions.append(make(record))
        except LlavaError as error:
            raise LlavaError(f"{path}, record {i}: {error}") from None
        except NOT_AS_EXPECTED as error:
            fault = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise LlavaError(f"{path}, record {i}: {fault}: is it the published file?") from None
    return questions


def check_images(questions: Sequence[Question], source: str) -> None:
    """MissingFile if a picture or video of a question does not exist."""
    images = [image for q in questions for image in q.images]
    videos = {image.source for image in images if isinstance(image, Video)}
    paths = {image for image in images if isinstance(image, str)}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    missing += sorted(path for path in videos if not os.path.exists(path))
    if missing:
        what = "videos" if videos else "pictures"
        raise MissingFile(
            f"{len(missing):,} of {len(paths | videos):,} {what} are missing, for example "
            f"{missing[0]}: they are published at {source}"
        )
