"""The records of a LLaVA JSON or JSONL file."""

import functools
import hashlib
import json
import os
from pathlib import Path

from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.buckets import place
from llava_jax.data.collection import Records
from llava_jax.data.parsing import SYSTEM_KEYS
from llava_jax.data.record_boxes import has_boxes
from llava_jax.errors import LlavaError, brief


class JsonRecords(Records):
    """The records of a JSON or JSONL file, in memory."""

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        columns: dict[str, str] | None = None,
        file: Path | None = None,
    ):
        """file: what to read, where `path` is a URL."""
        root = place(path).parent if image_root is None else image_root
        super().__init__(path, root, columns, file=file)
        self._file = Path(path) if file is None else file
        self._items = _load_json(self._file, self.path)
        if self.columns:
            self.check_named(
                {key for item in self._items if isinstance(item, dict) for key in item}
            )

    @functools.cached_property
    def holds_boxes(self) -> bool:
        """Whether a record has boxes."""
        return super().holds_boxes

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> dict:
        return self._items[index]

    def content(self) -> str:
        """SHA-256 of the file, in hex; marked if the file means more than it once did."""
        with open(self._file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # What was measured, or trained on, without those images and system prompts is not reused.
        return f"{digest}-2" if any(map(_reads_more, self._items)) else digest


def _reads_more(item) -> bool:
    """Whether a record holds something that the first version of this reader passed over."""
    if not isinstance(item, dict):
        return False
    keys = SYSTEM_KEYS if item.get("image") else (*SYSTEM_KEYS, *IMAGE_KEYS)
    return any(item.get(key) for key in (*keys, *VIDEO_KEYS)) or has_boxes(item)


def _load_json(file: Path, path: str) -> list:
    """path: the name of the file in messages."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LlavaError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlavaError(f"{path} is not UTF-8 text: bad byte at offset {error.start}") from None
    items = _parse_lines(text, path) if file.suffix == ".jsonl" else _parse_json(text, path)
    if not isinstance(items, list):
        found = brief(items)
        if isinstance(items, dict):
            found = f"an object with the keys {brief(', '.join(items))}"
        raise LlavaError(f"{path} must hold a JSON list of records, not {found}")
    return items


def _parse_json(text: str, path: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LlavaError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
            + (" (one object a line? name it .jsonl)" if error.msg == "Extra data" else "")
        ) from None


def _parse_lines(text: str, path: str) -> list:
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
