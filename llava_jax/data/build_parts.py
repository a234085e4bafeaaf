"""The work of `llava-jax build` in parts that do not depend on each other.

A part is checked, or a shard written, by whoever comes to it: this process, or a worker of a
cluster (ray_build.py). What comes out is the same.

    records       0 1 2 3 4 5 6 7 8 9 ...
    check         [ part ][ part ][ part        a digest of each record, in their order
    write         [ shard    ][ shard           as many as the size of all records calls for
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_jax.data.attachments import marked
from llava_jax.data.collection import Records
from llava_jax.data.parsing import Record
from llava_jax.data.record_boxes import as_json
from llava_jax.data.records import checked_record
from llava_jax.data.stored import Stored
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError

OPTIONAL = ("videos", "boxes", "rejected")  # features of sets that have some

# Calls a function with the records and each of the parts; gives the results in their order.
Workers = Callable[[Callable, Records, Sequence], Iterator]


def in_turn(function: Callable, records: Records, parts: Sequence) -> Iterator:
    """Workers that are this process alone."""
    return (function(records, part) for part in parts)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a part of the records holds, all of them sound.

    Attributes:
      digests: SHA-256 of each record and its files, one after another.
      size: bytes of their texts and files.
      counts: of their images, videos, boxes and rejected answers.
      ignored: key that nothing reads -> number of records.
    """

    digests: bytes = b""
    size: int = 0
    counts: Counter = dataclasses.field(default_factory=Counter)
    ignored: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Checked") -> "Checked":
        """That of two parts, of which the other follows."""
        counts, ignored = self.counts + other.counts, self.ignored + other.ignored
        return Checked(self.digests + other.digests, self.size + other.size, counts, ignored)


def check_part(records: Records, part: range) -> Checked:
    """Reads and hashes the records of a part; LlavaError for the first faulty one."""
    return sum((_checked(records, index) for index in part), Checked())


def _checked(records: Records, index: int) -> Checked:
    record = checked_record(records, index)
    example = example_of(record)
    texts = [example["id"], example["conversations"], *example["image_names"]]
    pieces = [*(text.encode() for text in texts), *example["images"], *example["videos"]]
    if record.boxes:
        pieces.append(b"boxes " + example["boxes"].encode())
    if record.rejected is not None:
        pieces.append(b"rejected " + record.rejected.encode())
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{len(piece)}:".encode() + piece)
    counts = {
        "images": len(example["images"]),
        "videos": len(example["videos"]),
        "boxes": len(record.boxes),
        "rejected": int(record.rejected is not None),
    }
    size, ignored = sum(map(len, pieces)), Counter(record.ignored_keys)
    return Checked(digest.digest(), size, Counter(counts), ignored)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the set, and what it is to hold.

    Attributes:
      optional: those of OPTIONAL that the set has.
    """

    path: Path
    part: range
    optional: tuple[str, ...]


def write_shard(records: Records, shard: Shard) -> int:
    """Writes a shard, whole or not at all, unless it is there -> its size in bytes.

    Several workers may write the same one at a time, of which one was taken for dead.
    """
    # Late: importing TFDS takes half a second.
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

    if not shard.path.exists():
        features = features_of(shard.optional)
        serializer = ExampleSerializer(features.get_serialized_info())

        def examples() -> Iterator[tuple[int, bytes]]:
            for index in shard.part:
                example = example_of(records[index])
                for kind in {*OPTIONAL} - {*shard.optional}:
                    del example[kind]
                message = serializer.get_tf_example(features.encode_example(example))
                # Otherwise each process has an order of its own for the features.
                yield index, message.SerializeToString(deterministic=True)

        partial = shard.path.with_name(f".{shard.path.name}.{uuid.uuid4().hex}")
        try:
            ArrayRecordFileAdapter.write_examples(partial, examples())
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(shard.path)
        finally:
            partial.unlink(missing_ok=True)
    return shard.path.stat().st_size


def features_of(optional: Sequence[str]):
    """The TFDS features of a set."""
    import tensorflow_datasets as tfds

    text, sequence = tfds.features.Text, tfds.features.Sequence
    features = {
        "id": text(),
        "conversations": text(doc="JSON list of {from, value}"),
        "n_images": tfds.features.Scalar(np.int32),
        "images": sequence(text(doc="encoded bytes")),
        "image_names": sequence(text()),
    }
    more = {
        "videos": sequence(text(doc="encoded bytes")),
        "boxes": text(doc="JSON"),
        "rejected": text(),
    }
    return tfds.features.FeaturesDict(features | {kind: more[kind] for kind in optional})


def example_of(record: Record) -> dict:
    """A record and its files as an example of the set, with all OPTIONAL features."""
    conversations = [
        {"from": turn.role, "value": turn.text} for turn in marked(record.turns, record.images)
    ]
    if record.system is not None:
        conversations = [{"from": "system", "value": record.system}, *conversations]
    images = [image for image in record.images if not isinstance(image, Video)]
    videos = [video.source for video in record.images if isinstance(video, Video)]
    return {
        "id": record.id,
        "conversations": json.dumps(conversations, ensure_ascii=False),
        "n_images": len(images),
        "images": [_read(image, record) for image in images],
        "videos": [_read(video, record) for video in videos],
        "image_names": list(record.image_names),
        "boxes": json.dumps(as_json(record.boxes)),
        "rejected": record.rejected or "",
    }


def _read(image: str | bytes | Stored, record: Record) -> bytes:
    try:
        if isinstance(image, Stored):
            return image.read()
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    except LlavaError as error:
        raise LlavaError(f"{record.name}: {error}") from None
    except OSError as error:
        reason = error.strerror
        if isinstance(error, IsADirectoryError):
            reason = "a data set holds files: make one of the frames, such as with ffmpeg"
        raise LlavaError(f"{record.name}: cannot read {image!r}: {reason}") from None
