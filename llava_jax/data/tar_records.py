"""The records of tars, as webdataset and others write them.

The `.json` of a sample is the record, or the list of its turns. Its pictures and videos are the
record's, in the natural order of their names, unless the record names them in another order. Other
texts, such as `.txt` and `.cls`, are keys of the record. Where the record has no conversation and
the recipe names none, `.txt` is a caption: the answer to a question of pictures alone.
"""

import bisect
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_jax.data import forms
from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS, field
from llava_jax.data.chunks import Chunk, spans
from llava_jax.data.collection import Records, state_of_files
from llava_jax.data.pairs import PAIR_KEYS
from llava_jax.data.stored import File, Stored
from llava_jax.data.tar_index import JSON, TEXTS, index_of, kind
from llava_jax.errors import LlavaError, RecordError, brief

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEOS = ("mp4", "webm", "mkv", "avi", "mov", "m4v")
_READ = (*TEXTS, *_IMAGES, *_VIDEOS)
_CAPTION = "txt"


@dataclass(frozen=True)
class StoredMember(Stored):
    """A member of a tar: so many bytes from the byte `start`; `member` is its name."""

    file: File
    member: str
    start: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.member} of {self.file.path.name}"

    def read(self) -> bytes:
        try:
            return self.file.read(self.start, self.size)
        except LlavaError:  # the tar is gone, or another one
            raise
        except (OSError, ValueError) as error:
            raise LlavaError(f"{self.file.path}: cannot read {self.member!r}: {error}") from None


class _Shard:
    """One tar and its index."""

    def __init__(self, path: Path, cache_dir):
        self.file = File.of(path)
        self.table = index_of(self.file, cache_dir)

    def key(self, row: int) -> str:
        return self.table.column("key")[row].as_py()

    def members(self, row: int) -> tuple[str, dict[str, StoredMember], dict[str, bytes]]:
        """(key, what is not text by extension, texts by extension) of a sample."""
        values = [self.table.column(name)[row].as_py() for name in self.table.column_names]
        key, *lists = values
        stored, texts = {}, {}
        for extension, start, size, text in zip(*lists, strict=True):
            if text is None:
                name = f"{key}.{extension}"
                stored[extension] = StoredMember(self.file, name, start, size)
            else:
                texts[extension] = text
        return key, stored, texts


class TarRecords(Records):
    """The samples of tars, one tar after the other."""

    def __init__(self, path, image_root, columns=None, files: list[Path] = (), cache_dir=None):
        super().__init__(path, image_root, columns, files=files, cache_dir=cache_dir)
        self._shards = [_Shard(file, cache_dir) for file in files]
        self._ends = np.cumsum([shard.table.num_rows for shard in self._shards]).tolist()
        self.check_named()

    def __len__(self) -> int:
        return self._ends[-1]

    def item(self, index: int) -> dict:
        shard, row = self._place(index)
        key, stored, texts = shard.members(row)
        where, item = f"record {index}", {}
        for extension, data in texts.items():
            try:
                text = data.decode()
                value = json.loads(text) if kind(extension) in JSON else text.rstrip("\r\n")
            except ValueError as error:
                raise RecordError("bad text", f"{where}: {key}.{extension}: {error}") from None
            if extension.lower() not in JSON:
                item.setdefault(extension, value)
            elif isinstance(value, dict):
                item |= value
            elif isinstance(value, list):
                item["conversations"] = value
            else:
                raise RecordError(
                    "not an object", f"{where}: {key}.{extension} holds {brief(value)}"
                )
        item.setdefault("id", key)
        if item.get(_CAPTION) and self._has_no_talk(item, where):
            item["texts"] = [{"user": "", "assistant": item.pop(_CAPTION)}]
        named = {*self.columns.values()} & {*stored}
        for keys, kinds in ((IMAGE_KEYS, _IMAGES), (VIDEO_KEYS, _VIDEOS)):
            of_kind = {e: m for e, m in stored.items() if kind(e) in kinds and e not in named}
            if of_kind and keys[0] not in self.columns:
                used, _ = field(item, keys)
                given = (item.pop(used, None) if used else None) or None
                for other in keys:  # the pictures of the sample are what all of them name
                    item.pop(other, None)
                item[keys[0]] = _ordered(of_kind, given, where)
        return item | {extension: stored[extension] for extension in named}

    def _has_no_talk(self, item: dict, where: str) -> bool:
        """Whether neither a record nor the recipe says what is asked and answered."""
        if {*forms.TALK, *PAIR_KEYS} & {*self.columns} or self.pairs and {*PAIR_KEYS} & {*item}:
            return False
        return forms.talk_key(item, {}, where) is None

    def origin(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{shard.key(row)} of {shard.file.path.name}"

    def _place(self, index: int) -> tuple[_Shard, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    def content(self) -> str:
        """SHA-256 over the names, places, sizes and texts of all members."""
        digest = hashlib.sha256(b"tar 1")
        for shard in self._shards:
            digest.update(shard.table.schema.metadata[b"content"])
        return digest.hexdigest()

    def stored_chunks(self) -> list[Chunk]:
        found, first = [], 0
        for shard in self._shards:
            state = state_of_files([shard.file.path])
            contents = json.loads(shard.table.schema.metadata[b"chunks"])
            for span, content in zip(spans(shard.table.num_rows), contents, strict=True):
                found.append(Chunk(first + span[0], first + span[1], content, state))
            first += shard.table.num_rows
        return found

    def unread(self, index: int) -> tuple[str, ...]:
        shard, row = self._place(index)
        named = self.columns.values()
        names = shard.table.column("names")[row].as_py()
        return tuple(name for name in names if kind(name) not in _READ and name not in named)

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [("", f" in {len(self._shards)} tar{'s' * (len(self._shards) > 1)}")]


def _ordered(members: dict[str, StoredMember], given, where: str) -> list[StoredMember]:
    """The members of a kind, as the record names them, else in the natural order of their names."""
    natural = lambda extension: [
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", extension)
    ]
    found = [members[extension] for extension in sorted(members, key=natural)]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return found
    if len(names) != len(found):
        raise RecordError(
            "<image> count",
            f"{where} names {len(names)} files, {brief(', '.join(names))}, but its sample holds "
            f"{len(found)}: {brief(', '.join(members))}",
        )
    by_name = {name: member for member in found for name in _names(member)}
    chosen = [by_name.get(name, by_name.get(Path(name).name)) for name in names]
    return chosen if None not in chosen and len({*chosen}) == len(chosen) else found


def _names(member: StoredMember) -> tuple[str, str, str]:
    """Names under which a record may mention a member: whole, without folders, without the key."""
    last = member.member.rpartition("/")[2]
    return member.member, last, last.partition(".")[2]
