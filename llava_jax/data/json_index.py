"""Where each record of a JSON or JSONL file begins: read once, block by block, then looked up.

The records stay in the file. Of a large file the index is kept, so that it is read once a run:

    [{"id": "a", ...},\\n {"id": "b", ...}]        starts: 1, 19, and the end of the list, 36
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llava_jax.data import chunks
from llava_jax.data.stored import File
from llava_jax.errors import LlavaError, brief
from llava_jax.files import whole_file

_VERSION = 1  # of the index
_BLOCK = 4 << 20  # bytes read at a time
_KEPT_FROM = 32 << 20  # bytes; a smaller file is read within a second
_AHEAD = 64  # characters, more than a number or a word of JSON has
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Index(NamedTuple):
    """What is known of a file of N records.

    starts: int64 [N + 1], the first byte of each, and the end of the last. content: SHA-256 of the
    file, in hex. chunks: hashes of each `chunks.spans(N)`, in hex; what is behind a chunk does not
    change its hash. reads_more: see `index_of`.
    """

    starts: np.ndarray
    content: str
    chunks: list[str]
    reads_more: bool

    def item(self, file: File, number: int):
        """A decoded record. LlavaError if the file was changed."""
        start, stop = self.starts[number : number + 2].tolist()
        try:
            return _DECODER.raw_decode(file.read(start, stop - start).decode())[0]
        except LlavaError:
            raise
        except (OSError, ValueError):
            raise LlavaError(f"{file.path} was changed after it was opened: start again") from None


def index_of(file: File, path: str, reads_more, cache_dir: str | os.PathLike | None) -> Index:
    """The index of a JSON or JSONL file.

    Args:
      path: the name of the file in messages.
      reads_more: whether a decoded record needs more than the first version of this reader read;
        the index says whether any does.
      cache_dir: where the index of a large file is kept, checked by the file's size and time of
        modification; None keeps nothing.

    Raises:
      LlavaError: the file cannot be read, or is no list of JSON values, or lines of them.
    """
    kept = None
    if cache_dir is not None and file.size >= _KEPT_FROM:
        name = hashlib.sha256(os.path.abspath(file.path).encode()).hexdigest()[:32]
        kept = Path(cache_dir) / f"json-{name}.npz"
        if (index := _read(kept, _state(file))) is not None:
            return index
    index = _made(file, path, reads_more)
    if kept is not None:
        about = {"state": _state(file)} | index._replace(starts=None)._asdict()
        kept.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as out:
            np.savez(out, starts=index.starts, about=json.dumps(about))
    return index


def _state(file: File) -> list:
    return [_VERSION, file.size, file.modified]


def _read(kept: Path, state: list) -> Index | None:
    try:
        with np.load(kept) as data:
            about = json.loads(str(data["about"]))
            if about.pop("state") == state:
                return Index(**about | {"starts": data["starts"]})
    except Exception:  # absent or broken: made anew
        pass
    return None


def _made(file: File, path: str, reads_more) -> Index:
    starts, more = array("q"), False
    try:
        with open(file.path, "rb") as opened:
            hashed = _Hashed(opened)
            values = _lines if file.path.suffix == ".jsonl" else _elements
            for start, value in values(hashed):
                if len(starts) % chunks.SIZE == 0:
                    hashed.cut(start)
                starts.append(start)
                more = more or value is not None and reads_more(value)
            if (len(starts) - 1) % chunks.SIZE:
                hashed.cut(starts[-1])
    except OSError as error:
        raise LlavaError(f"cannot read the data file {path}: {error.strerror}") from None
    except ValueError:
        raise _fault(file.path, path) from None
    # What is before the first record belongs to no chunk.
    return Index(np.array(starts, np.int64), hashed.whole.hexdigest(), hashed.parts[1:], more)


class _Hashed:
    """A file that is hashed as it is read, as a whole and in parts whose ends show later.

    Attributes:
      whole: SHA-256 of what was read. parts: hashes of what is between cuts, in hex.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._waiting, self._at = file, bytearray(), 0
        self.whole, self.parts = hashlib.sha256(), []

    def read(self, size: int) -> bytes:
        return self._taken(self._file.read(size))

    def __iter__(self) -> Iterator[bytes]:
        return map(self._taken, self._file)

    def _taken(self, data: bytes) -> bytes:
        self.whole.update(data)
        self._waiting += data
        return data

    def cut(self, at: int) -> None:
        """Ends a part at this byte of the file; what separates it from the next is left out."""
        size = at - self._at
        data = self._waiting[:size].rstrip(b", \t\r\n")
        self.parts.append(hashlib.sha256(data).hexdigest())
        del self._waiting[:size]
        self._at = at


def _lines(file: _Hashed) -> Iterator[tuple[int, object]]:
    """(first byte, value) of each line that is not blank, at last the end of the file and None.

    Not by `splitlines`: U+2028 and its like may stand inside a JSON string.
    """
    at = 0
    for line in file:
        mark = len(codecs.BOM_UTF8) if not at and line.startswith(codecs.BOM_UTF8) else 0
        text = line[mark:].decode()
        if text.strip():
            indent = len(text) - len(text.lstrip(" \t\r"))
            yield at + mark + indent, json.loads(text)
        at += len(line)
    yield at, None


def _elements(file: _Hashed) -> Iterator[tuple[int, object]]:
    """(first byte, value) of each element of a JSON list, at last the end of the list and None."""
    text = _Text(file)
    if text.next() != "[":
        raise ValueError("no list")
    text.forward(text.at + 1)
    if text.next() != "]":
        while True:
            start = text.byte
            yield start, text.value()
            if (mark := text.next()) == "]":
                break
            if mark != ",":
                raise ValueError("no comma")
            text.forward(text.at + 1)
            text.next()
    end = text.byte
    text.forward(text.at + 1)
    if text.next():
        raise ValueError("more than a list")
    yield end, None


class _Text:
    """The text of a file from a place in it on, of which a few blocks are in memory.

    Attributes:
      at: the place, in the text that is in memory. byte: the same, in the file.
    """

    def __init__(self, file: _Hashed):
        self._file, self._ended = file, False
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self.at, self.byte = "", 0, 0
        while not self._text and not self._ended:
            self._more()
        if self._text.startswith("\ufeff"):
            self.forward(1)

    def _more(self) -> None:
        block = self._file.read(max(_BLOCK, len(self._text) - self.at))
        self._text = self._text[self.at :] + self._decode(block, final=not block)
        self.at, self._ended = 0, not block

    def forward(self, at: int) -> None:
        """Moves on."""
        whole = self._text.isascii()
        self.byte += at - self.at if whole else len(self._text[self.at : at].encode())
        self.at = at

    def next(self) -> str:
        """The next character that is no white space, to which it moves; "" at the end."""
        while True:
            self.forward(_SPACE.match(self._text, self.at).end())
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._more()

    def value(self):
        """The JSON value here; moves behind it. ValueError if there is none."""
        while True:
            length = len(self._text)
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                # What is cut off by the end of a block looks broken there, and a string from its
                # first character on.
                cut = error.pos + _AHEAD > length or error.msg.startswith("Unterminated string")
                if self._ended or not cut:
                    raise
            else:
                if self._ended or end + _AHEAD < length:
                    self.forward(end)
                    return value
            self._more()


def _fault(file: Path, path: str) -> LlavaError:
    """What is wrong with a file, found by reading it whole."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return LlavaError(f"{path} is not UTF-8 text: bad byte at offset {error.start}")
    if file.suffix == ".jsonl":
        return _fault_of_lines(text, path)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        return LlavaError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
            + (" (one object a line? name it .jsonl)" if error.msg == "Extra data" else "")
        )
    found = brief(items)
    if isinstance(items, dict):
        found = f"an object with the keys {brief(', '.join(items))}"
    return LlavaError(f"{path} must hold a JSON list of records, not {found}")


def _fault_of_lines(text: str, path: str) -> LlavaError:
    count = 0
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                json.loads(line)
                count += 1
        except json.JSONDecodeError as error:
            return LlavaError(
                f"{path}, line {number} (record {count}), is not valid JSON: "
                f"{error.msg} at column {error.colno}"
            )
    return LlavaError(f"{path} was changed while it was read: start again")
