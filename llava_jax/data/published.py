"""Files of data sets as others published them; an error names the file and the record."""

import contextlib
import csv
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError

# The exceptions that a record raises if it does not have the published form.
NOT_AS_EXPECTED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class MissingFile(LlavaError):
    """A published file is not in its folder."""


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns a fault inside the block into a LlavaError that names the file at `path`."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        raise LlavaError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    with readable(path):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def plain_pickle(path: Path) -> Any:
    """A pickle of numbers, texts, lists and dicts; a pickle that names a class is refused."""
    with readable(path), open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except (pickle.UnpicklingError, EOFError, *NOT_AS_EXPECTED) as error:
            raise ValueError(error) from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which no data file needs")


def each(records: Sequence[Any], path: Path | str, make: Callable[[Any], Any]) -> list:
    """`make` of each record; LlavaError with the number of a record without the published form."""
    if not isinstance(records, Sequence) or isinstance(records, str) or not records:
        raise LlavaError(f"{path} holds no list of records: is it the published file?")
    made = []
    for i, record in enumerate(records):
        try:
            made.append(make(record))
        except LlavaError as error:
            raise LlavaError(f"{path}, record {i}: {error}") from None
        except NOT_AS_EXPECTED as error:
            fault = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise LlavaError(f"{path}, record {i}: {fault}: is it the published file?") from None
    return made
