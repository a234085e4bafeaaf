"""LLaVA records from a JSON file, a JSONL file or a TFDS ArrayRecord data set.

A record is one conversation about no, one or several images (the format of LLaVA,
https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md):

    {"id": "7", "image": "cats/7.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}]}

`image` is a path below the image root, a list of paths, or absent. A record without an id is
called by its index.
"""

import functools
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.conversation import IMAGE_TOKEN, ROLES, Turn


@dataclass(frozen=True)
class Record:
    """One conversation and its images.

    images: for each image its path on disk (str) or its encoded bytes, in `<image>` order.
    image_names: for each image the name by which people know it (its path in the source file).
    """

    index: int
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    image_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How error messages call this record."""
        return f"record {self.index} (id {self.id!r})"


def parse_record(item, index: int, image_root: str | None) -> Record:
    """One decoded JSON object -> Record with images joined to `image_root`.

    Raises RecordError where the object has not the form given at the top of this module.
    """
    where = f"record {index}"
    if not isinstance(item, dict):
        raise RecordError("not an object", f"{where}: expected a JSON object, found {item!r:.80}")
    record_id = str(item.get("id", index))
    where = f"{where} (id {record_id!r})"
    turns = _parse_turns(item.get("conversations"), where)
    names = item.get("image")
    names = () if names is None else (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise RecordError(
            "bad image field",
            f"{where}: 'image' must be a path or a list of paths, not {names!r:.80}",
        )
    paths = tuple(_join_root(image_root, name, where) for name in names)
    return Record(index, record_id, turns, paths, tuple(names))


def _parse_turns(conversations, where: str) -> tuple[Turn, ...]:
    if conversations is None:
        raise RecordError("no conversations", f"{where} has no 'conversations'")
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("no conversations", f"{where}: 'conversations' must be a non-empty list")
    turns = []
    for position, message in enumerate(conversations):
        if not isinstance(message, dict) or "from" not in message or "value" not in message:
            raise RecordError(
                "bad turn", f"{where}, turn {position}: expected an object with 'from' and 'value'"
            )
        role, text = message["from"], message["value"]
        if role not in ROLES:
            raise RecordError(
                "unknown role",
                f"{where}, turn {position}: unknown role {role!r}; it must be 'human' or 'gpt'",
            )
        if not isinstance(text, str):
            raise RecordError(
                "bad turn", f"{where}, turn {position}: 'value' must be a string, not {text!r:.80}"
            )
        if not text.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in text):
            raise RecordError(
                "bad text", f"{where}, turn {position}: the text holds half a surrogate pair"
            )
        turns.append(Turn(role, text))
    return tuple(turns)


def _join_root(image_root: str | None, name: str, where: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or os.path.isabs(name) or ".." in parts:
        raise RecordError(
            "image outside the root",
            f"{where}: image path {name!r} must be relative to the image root and stay inside it",
        )
    return os.path.join(image_root or "", name)


def check_record(record: Record, image_root: str | None = None) -> None:
    """Raise RecordError unless the record can be trained on; reads no pixel.

    Checks the order of the turns (human first, then alternating, gpt last: unlike the original,
    which drops a leading gpt turn in silence), the number of `<image>`, and that each image file
    exists and lies, links resolved, below `image_root`.
    """
    where = record.name
    for position, turn in enumerate(record.turns):
        expected = ROLES[position % 2]
        if turn.role != expected:
            raise RecordError(
                "turns do not alternate",
                f"{where}, turn {position}: expected {expected!r}, found {turn.role!r}; "
                "turns must alternate, human first",
            )
        if turn.role == "gpt" and IMAGE_TOKEN in turn.text:
            raise RecordError(
                "<image> in an answer", f"{where}, turn {position}: an answer may not hold <image>"
            )
    if not record.turns:
        raise RecordError("no conversations", f"{where} has no conversations")
    if len(record.turns) % 2:
        raise RecordError("last turn unanswered", f"{where} ends with a human turn; add its answer")
    places = sum(turn.text.count(IMAGE_TOKEN) for turn in record.turns)
    if places != len(record.images):
        raise RecordError(
            "<image> count",
            f"{where} has {places} <image> in its text but {len(record.images)} image(s)",
        )
    for path, name in zip(record.images, record.image_names, strict=True):
        if isinstance(path, str):
            _check_image_file(path, name, image_root, where)


def _check_image_file(path: str, name: str, image_root: str | None, where: str) -> None:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(path)
            real = os.path.realpath(path)
        else:
            real = os.path.join(_real_directory(os.path.dirname(path)), os.path.basename(path))
    except OSError as error:
        raise RecordError(
            "missing image", f"{where}: no image file {path!r} ({error.strerror})"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise RecordError("missing image", f"{where}: {path!r} is not a file")
    if image_root is not None:
        root = _real_directory(image_root)
        if os.path.commonpath([root, real]) != root:
            raise RecordError(
                "image outside the root",
                f"{where}: image {name!r} links to a file outside the image root {image_root!r}",
            )


@functools.lru_cache(maxsize=4096)
def _real_directory(path: str) -> str:
    return os.path.realpath(path)


def checked_record(records, index: int) -> Record:
    """records[index] after `check_record`; its errors begin with the path of the data."""
    try:
        record = records[index]
        check_record(record, records.image_root)
    except RecordError as error:
        raise RecordError(error.kind, f"{records.path}: {error}") from None
    return record


class JsonRecords:
    """The records of a JSON or JSONL file, in memory; pickled by path, so workers reload it."""

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None):
        self.path = str(path)
        self.image_root = str(image_root if image_root is not None else Path(path).parent)
        self._items = _load_json(Path(path))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        return parse_record(self._items[index], int(index), self.image_root)

    def __getstate__(self):
        return {"path": self.path, "image_root": self.image_root}

    def __setstate__(self, state):
        self.__init__(state["path"], state["image_root"])

    def fingerprint(self) -> str:
        """SHA-256 of the file, in hex."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _load_json(path: Path) -> list:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LlavaError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlavaError(f"{path} is not UTF-8 text: bad byte at offset {error.start}") from None
    items = _parse_lines(text, path) if path.suffix == ".jsonl" else _parse_json(text, path)
    if not isinstance(items, list):
        raise LlavaError(f"{path} must hold a JSON list of records, not {type(items).__name__}")
    if not items:
        raise LlavaError(f"{path} holds no records")
    return items


def _parse_json(text: str, path: Path):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LlavaError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
            + (" (one object a line? name it .jsonl)" if error.msg == "Extra data" else "")
        ) from None


def _parse_lines(text: str, path: Path) -> list:
    items = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise LlavaError(
                f"{path}, line {number} (record {len(items)}), is not valid JSON: "
                f"{error.msg} at column {error.colno}"
            ) from None
    return items


class ArrayRecords:
    """The records of a data set written by `llava-jax build`; images as encoded bytes."""

    image_root = None

    def __init__(self, path: str | os.PathLike, split: str = "train"):
        # Only this class needs TFDS, and importing it takes half a second.
        import tensorflow_datasets as tfds

        self.path, self.split = str(path), split
        builder = tfds.builder_from_directory(_data_set_directory(Path(path)))
        if split not in builder.info.splits:
            known = ", ".join(sorted(builder.info.splits)) or "none"
            raise LlavaError(f"{path} has no split {split!r}; it has: {known}")
        if "conversations" not in builder.info.features:
            raise LlavaError(
                f"{path} is not a data set of LLaVA records; write one with `llava-jax build`"
            )
        self._metadata = builder.info.metadata or {}
        self._source = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self._source[int(index)]
        item = {
            "id": example["id"].decode(),
            "image": [name.decode() for name in example["image_names"]],
            "conversations": json.loads(example["conversations"]),
        }
        record = parse_record(item, int(index), None)
        images = tuple(example["images"])
        return Record(record.index, record.id, record.turns, images, record.image_names)

    def __getstate__(self):
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state):
        self.__init__(state["path"], state["split"])

    def fingerprint(self) -> str:
        """SHA-256 over every record and image, computed when the set was built."""
        return self._metadata["sha256"]


def _data_set_directory(path: Path) -> Path:
    """The version folder itself, from it or from one of its parents."""
    found = []
    for pattern in ("", "[!.]*/", "[!.]*/[!.]*/"):  # what starts with a dot is half-written
        found = found or sorted(p.parent for p in path.glob(f"{pattern}dataset_info.json"))
    if not found:
        raise LlavaError(f"{path} holds no data set: there is no dataset_info.json in or below it")
    if len(found) > 1:
        raise LlavaError(f"{path} holds several data sets; name one: {', '.join(map(str, found))}")
    return found[0]


def open_records(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None, split: str | None = None
) -> JsonRecords | ArrayRecords:
    """The records of a LLaVA JSON or JSONL file, or of a data set built by `llava-jax build`.

    path: the file, or the folder of the data set (its version folder or a parent of it).
    image_root: the folder that image paths start from (default: the folder of the file).
    split: of a data set only; default "train".
    Gives a picklable sequence with random access; its items are parsed but not checked
    (`check_record`). Raises LlavaError, naming the file and the place.
    """
    path = Path(path)
    if path.is_dir():
        if image_root is not None:
            raise LlavaError(f"{path} is a data set that holds its images: leave image_root out")
        return ArrayRecords(path, split or "train")
    if not path.exists():
        raise LlavaError(f"no data file or data set at {path}")
    if split is not None:
        raise LlavaError(f"{path} is a file and has no splits: leave split out")
    if path.suffix not in (".json", ".jsonl"):
        raise LlavaError(f"{path}: expected a .json or .jsonl file, or the folder of a data set")
    if image_root is not None and not Path(image_root).is_dir():
        raise LlavaError(f"the image root {image_root} is not a folder")
    return JsonRecords(path, image_root)
