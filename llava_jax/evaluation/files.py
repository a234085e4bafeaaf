"""Reads a benchmark's published files; an error names a missing file and its source."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.data.published import (
    NOT_AS_EXPECTED,
    MissingFile,
    each,
    read_json,
    readable,
)
from llava_jax.data.video import Video
from llava_jax.evaluation.benchmark import Question
from llava_jax.evaluation.parquet import ParquetRow, rows


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
        return read_json(self.path(*names))

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


__all__ = [
    "NOT_AS_EXPECTED",
    "Folder",
    "MissingFile",
    "check_images",
    "each",
    "readable",
]
