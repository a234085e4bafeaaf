"""The records of a data set, whatever kind of file it is stored in."""

import argparse
import os
from pathlib import Path

from llava_jax.data import shards
from llava_jax.data.array_records import ArrayRecords
from llava_jax.data.buckets import LISTINGS, Url, may_be_folder, place
from llava_jax.data.copies import local, local_set
from llava_jax.data.json_records import JsonRecords
from llava_jax.data.parsing import Record, check_record
from llava_jax.data.table_records import TableRecords
from llava_jax.data.tar_records import TarRecords
from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import Turn  # noqa: F401  what a Record's turns are

_FILES = (
    "expected a .json or .jsonl file, Parquet files, tars that are not compressed, a .yaml that "
    "lists data sets, or the folder of one"
)


def checked_record(records, index: int) -> Record:
    """records[index] after `check_record`; its errors begin with the path of the data."""
    try:
        record = records[index]
        check_record(record, records.image_root)
    except RecordError as error:
        raise RecordError(error.kind, f"{records.path}: {error}") from None
    return record


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    """`--columns`, the pairs of `columns` of `open_records` on a command line."""
    parser.add_argument(
        "--columns", metavar="NAME=KEY", nargs="+", type=_column, default=[],
        help="names of keys of the data: question=query answer=label",
    )  # fmt: skip


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=KEY")
    return ours, theirs


def about(records) -> list[str]:
    """Lines for the log: the forms that were recognised, the files of a mixture."""
    lines = [f"read as {', '.join(forms)}"] if (forms := records.forms()) else []
    return lines + (records.shares() if hasattr(records, "shares") else [])


def ignored_keys_text(records) -> str:
    """ "ignored keys: foo (2 records)" for the records of `open_records`, or ""."""
    counts = [
        f"{key[:60]} ({count:,} record{'s' * (count > 1)})"
        for key, count in records.ignored_keys().items()
    ]
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    return f"ignored keys: {', '.join(counts[:8])}{more}" if counts else ""


def holds_images(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of a TFDS data set, which takes no image root."""
    path = place(path)
    return path.is_dir() and not any(shards.files_below(path).values())


def open_records(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    split: str | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    cache_dir: str | os.PathLike | None = None,
    pairs: bool = False,
):
    """The records of a data set.

    path: a LLaVA JSON or JSONL file; a Parquet file or a tar, a pattern of several, such as
    `data/train-*.parquet` or `{000..012}.tar`, or a folder of them; the YAML file of a mixture; the
    folder of a TFDS ArrayRecord data set (its version folder or a parent of it). Of a URL, see
    `data.buckets`, the files are copied to this machine first.
    image_root: the folder that image paths start from (default: the folder of the file); of a URL
    each picture is read when it is needed.
    split: of a folder; default "train".
    seed: of what a mixture draws.
    columns: our names of keys -> those of the data; see `forms.check_columns`.
    cache_dir: where it is kept what tars hold, where records of large files begin, and the texts
      of Parquet files; None keeps nothing.
    pairs: records with a rejected answer are pairs; see `data.pairs`.
    Gives a picklable sequence with random access, whose items are parsed but not checked
    (`check_record`). Raises LlavaError, naming the file and the place.
    """
    records = _opened(place(path), image_root, split, seed, columns, cache_dir)
    records.pairs = pairs
    return records


def _opened(path: Path | Url, image_root, split, seed, columns, cache_dir):
    LISTINGS.forget()
    if image_root is not None and not may_be_folder(place(image_root)):
        raise LlavaError(f"the image root {image_root} is not a folder")
    if path.is_dir():
        if files := shards.in_folder(path, split or "train"):
            return _of_files(path, files, path, image_root, columns, cache_dir)
        if image_root is not None:
            raise LlavaError(f"{path} is a data set that holds its images: leave image_root out")
        return _not_empty(ArrayRecords(path, split or "train", columns, folder=local_set(path)))
    is_pattern = shards.is_pattern(path)
    is_there = is_pattern or path.exists()
    if split is not None and is_there:
        raise LlavaError(f"{path} names files and has no splits: leave split out")
    if is_pattern:
        files = shards.matching(str(path))
        return _of_files(path, files, files[0].parent, image_root, columns, cache_dir)
    if not is_there:
        raise LlavaError(f"no data file or data set at {path}")
    if path.suffix in (".yaml", ".yml"):
        from llava_jax.data.mixture import MixedRecords  # late: it is made of the records above

        return MixedRecords(path, image_root, seed, columns, cache_dir)
    if path.suffix in (".json", ".jsonl"):
        return _not_empty(JsonRecords(path, image_root, columns, *local([path]), cache_dir))
    if path.suffix in shards.SUFFIXES:
        return _of_files(path, [path], path.parent, image_root, columns, cache_dir)
    raise LlavaError(f"{path}: {_FILES}")


def _of_files(path, files: list[Path | Url], folder, image_root, columns, cache_dir):
    root, files = folder if image_root is None else image_root, local(files)
    if files[0].suffix == ".tar":
        return TarRecords(path, root, columns, files, cache_dir)
    return _not_empty(TableRecords(path, root, columns, files, cache_dir))


def _not_empty(records):
    if not len(records):
        raise LlavaError(f"{records.path} holds no records")
    return records
