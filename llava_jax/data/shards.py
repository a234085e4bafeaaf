"""Which files a data set is made of: a pattern, or a folder with one or several splits.

    data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet   split train
    validation.parquet   train/0000.parquet   my_set-dev-3.tar             by the word
    part-7.parquet       00012.tar                                         train, without one
    train/data-00000-of-00001.arrow                                        saved by `datasets`

Files in different folders whose names are no splits are different data sets.
"""

import glob
import itertools
import os
import re
from pathlib import Path

from llava_jax.data.buckets import Url, place
from llava_jax.errors import LlavaError, brief

_DEPTH = 3
SUFFIXES = (".parquet", ".tar", ".arrow")
_OF = re.compile(r"(?:(.+)-)?(\d+)-of-(\d+)(?:-[0-9a-f]{16})?")
_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "test": "test", "testing": "test",
          "eval": "test", "evaluation": "test"}  # fmt: skip
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_pattern(path: str | os.PathLike) -> bool:
    """Whether a path that is no file stands for several, with `{000..012}`, `{a,b}`, `*` or `?`."""
    return bool(re.search(r"[*?\[{]", str(path))) and not place(path).exists()


def is_there(path: str | os.PathLike) -> bool:
    """Whether a path is a file or folder, or a pattern of which no file is missing."""
    try:
        return place(path).exists() or is_pattern(path) and bool(matching(str(path)))
    except LlavaError:
        return False


def matching(pattern: str) -> list[Path | Url]:
    """The files that a pattern stands for, each once; those of braces in their order.

    Raises:
      LlavaError: there is none for a pattern, or for what its braces stand for.
    """
    found: dict[Path | Url, None] = {}
    for name in _expanded(pattern):
        files = _files_at(name)
        if not files:
            raise LlavaError(f"no data file at {name}, of the pattern {pattern}")
        found |= dict.fromkeys(files)
    if len({file.suffix for file in found}) > 1 or next(iter(found)).suffix not in SUFFIXES:
        raise LlavaError(
            f"{pattern} stands for {brief([file.name for file in found])}: only Parquet files, "
            "Arrow files and tars may be several"
        )
    return list(found)


def _files_at(name: str) -> list[Path | Url]:
    """The file of a name, or the files that fit it, in order."""
    path = place(name)
    if path.is_file():
        return [path]
    if isinstance(path, Url):
        return Url(*path.parts[:2]).matching(path.parts[2:])
    return [Path(file) for file in sorted(glob.glob(name, recursive=True)) if os.path.isfile(file)]


def _expanded(pattern: str) -> list[str]:
    """{000..012} counts, {a,b} lists; both may occur several times."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise LlavaError(f"{pattern}: {match[0]} counts down, so it stands for no file")
        names = [str(i).zfill(len(span[1])) for i in range(first, last + 1)]
    else:
        names = match[1].split(",")
    tails = _expanded(pattern[match.end() :])
    return [
        pattern[: match.start()] + name + tail for name, tail in itertools.product(names, tails)
    ]


def in_folder(folder: Path | Url, split: str) -> list[Path | Url]:
    """The Parquet files or tars of a split below a folder, in order of name; [] if it has neither.

    Raises:
      LlavaError: it holds both, or several data sets, or has no such split, or one of the files
        `train-00000-of-00002` is missing.
    """
    files = files_below(folder)
    kinds = [suffix for suffix in SUFFIXES if files[suffix]]
    if not kinds:
        return []
    if len(kinds) > 1:
        raise LlavaError(f"{folder} holds {' and '.join(kinds)} files: name those of one kind")
    placed = [(*_place(folder, file), file) for file in files[kinds[0]]]
    if len(sets := sorted({home for home, *_ in placed})) > 1:
        names = ", ".join(str(folder / home) for home in sets)
        raise LlavaError(f"{folder} holds several data sets; name one: {names}")
    splits = sorted({name for _, name, _ in placed})
    found = [file for _, name, file in placed if name == split]
    if not found:
        raise LlavaError(f"{folder} has no split {split!r}; it has: {', '.join(splits)}")
    _check_whole(folder, found)
    return found


def files_below(folder: Path | Url) -> dict[str, list[Path | Url]]:
    """Suffix -> files of that kind in and below a folder, in order of name."""
    every = folder.files(_DEPTH) if isinstance(folder, Url) else None
    return {suffix: sorted(_below(folder, suffix, every)) for suffix in SUFFIXES}


def _below(folder: Path | Url, suffix: str, every: list[Url] | None) -> list[Path | Url]:
    """Files up to three folders down; what starts with a dot is half-written or a cache."""
    patterns = ["/".join(["[!.]*"] * depth) + f"/[!.]*{suffix}" for depth in range(_DEPTH + 1)]
    if every is None:
        found = (file for pattern in patterns for file in folder.glob(pattern.lstrip("/")))
    else:
        found = (file for file in every if file.suffix == suffix)
    return [file for file in found if not file.name.startswith("cache-")]  # those of `datasets`


def _place(folder: Path | Url, file: Path | Url) -> tuple[str, str]:
    """(the part of the path that names the data set, the split) of a file."""
    *parents, _ = file.relative_to(folder).parts
    match = _OF.fullmatch(file.stem)
    split = match[1] if match and match[1] not in (None, "data") else _word(file.stem)
    home = []
    for parent in parents:
        word = _word(parent) if parent.lower() in _WORDS else None
        split = split or word
        if parent != "data" and word is None:
            home.append(parent)
    return "/".join(home), split or "train"


def _word(stem: str) -> str | None:
    """The split that a word of a name stands for."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _check_whole(folder: Path | Url, files: list[Path | Url]) -> None:
    numbered = [(match, file) for file in files if (match := _OF.fullmatch(file.stem))]
    counts = sorted({int(match[3]) for match, _ in numbered})
    numbers = sorted(int(match[2]) for match, _ in numbered)
    wanted = [[*range(first, first + count)] for count in counts for first in (0, 1)]
    if numbered and (len(counts) > 1 or numbers not in wanted):
        missing = f"{len(numbers)}, not {' or '.join(map(str, counts))}"
        if [len(numbers)] == counts:
            missing = f"the numbers {brief(numbers)}"
        raise LlavaError(
            f"{folder}: of the files {numbered[0][1].name} and its like there are {missing}: get "
            "the rest, or name the files with a pattern"
        )
