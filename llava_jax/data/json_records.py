"""The records of a LLaVA JSON or JSONL file."""

import os
from pathlib import Path

from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.buckets import place
from llava_jax.data.chunks import Chunk, spans
from llava_jax.data.collection import Records
from llava_jax.data.json_index import index_of
from llava_jax.data.parsing import SYSTEM_KEYS
from llava_jax.data.record_boxes import has_boxes
from llava_jax.data.stored import File


class JsonRecords(Records):
    """The records of a JSON or JSONL file, read from it one at a time."""

    def __init__(
        self,
        path: str | os.PathLike,
        image_root: str | os.PathLike | None = None,
        columns: dict[str, str] | None = None,
        file: Path | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        """file: what to read, where `path` is a URL. cache_dir: as in `index_of`."""
        root = place(path).parent if image_root is None else image_root
        super().__init__(path, root, columns)
        self._file = File.of(Path(path) if file is None else file)
        self._index = index_of(self._file, self.path, _reads_more, cache_dir)
        self.check_named()

    def __len__(self) -> int:
        return len(self._index.starts) - 1

    def item(self, index: int) -> dict:
        return self._index.item(self._file, index)

    def stored_chunks(self) -> list[Chunk]:
        found = zip(spans(len(self)), self._index.chunks, strict=True)
        return [Chunk(*span, content) for span, content in found]

    def content(self) -> str:
        """SHA-256 of the file, in hex; marked if the file means more than it once did."""
        # What was trained on without those images and system prompts is not continued.
        return f"{self._index.content}-2" if self._index.reads_more else self._index.content

    def __getstate__(self):
        return self.__dict__  # with the index

    def __setstate__(self, state):
        self.__dict__ = state


def _reads_more(item) -> bool:
    """Whether a record holds something that the first version of this reader passed over."""
    if not isinstance(item, dict):
        return False
    keys = SYSTEM_KEYS if item.get("image") else (*SYSTEM_KEYS, *IMAGE_KEYS)
    return any(item.get(key) for key in (*keys, *VIDEO_KEYS)) or has_boxes(item)
