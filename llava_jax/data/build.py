"""`llava-jax build`: a LLaVA JSON or JSONL file and its images -> a TFDS ArrayRecord data set.

Each example holds the record's id, its conversation as JSON and its images, and whole video files,
as encoded bytes, so the set is self-contained, randomly accessible and read back without TensorFlow
(`open_records(folder)`). Order is kept; ids may repeat.
"""

import argparse
import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_jax.data.array_records import ArrayRecords
from llava_jax.data.attachments import marked
from llava_jax.data.parsing import Record
from llava_jax.data.record_boxes import as_json
from llava_jax.data.records import (
    add_columns_argument,
    checked_record,
    ignored_keys_text,
    open_records,
)
from llava_jax.data.stored import Stored
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError

VERSION = "1.0.0"


def add_arguments(parser) -> None:
    """The arguments of `llava-jax build`."""
    parser.add_argument("data", help="file, pattern, mixture or folder of a data set")
    parser.add_argument(
        "--image_root", help="folder that image paths start from (default: the folder of the file)"
    )
    add_columns_argument(parser)
    parser.add_argument("--out", required=True, help="folder to hold the data set")
    parser.add_argument("--name", required=True, help="name of the data set: a-z, 0-9, _")
    parser.add_argument("--split", default="train", help="name of its split (default: train)")
    parser.add_argument("--overwrite", action="store_true", help="replace a different data set")
    parser.add_argument(  # the name it had before
        "--force", action="store_true", dest="overwrite", help=argparse.SUPPRESS
    )


def main(args) -> int:
    """Runs `llava-jax build`; returns the exit code."""
    path = build_data_set(
        args.data, args.image_root, args.out, args.name, args.split, args.overwrite,
        columns=dict(args.columns),
    )  # fmt: skip
    print(f"data set: {path}")
    return 0


def build_data_set(
    data, image_root, out, name: str, split: str = "train", overwrite: bool = False,
    progress: bool = True, columns: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Writes `data` as out/name/1.0.0 and returns that folder.

    All records are checked and hashed first; what they hold and nothing reads is printed. An
    existing data set with the same hash and split is left as it is. columns: as in `open_records`.

    Raises:
      LlavaError: a record is faulty, or another data set is there and `overwrite` is not set.
    """
    for option, value in (("--name", name), ("--split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
            raise LlavaError(f"{option} {value!r} must be made of a-z, 0-9 and _")
    records = open_records(data, image_root, columns=columns, pairs=True)
    if isinstance(records, ArrayRecords):
        raise LlavaError(f"{data} is a data set already: give it to training as it is")
    if ignored := ignored_keys_text(records):
        print(f"{records.path}: {ignored}")
    metadata = _check_and_hash(records, progress)
    target = Path(out) / name / VERSION
    if target.exists() and not overwrite:
        if _existing(target, split) == metadata["sha256"]:
            return target
        raise LlavaError(f"{target} holds other data: choose another --name or give --overwrite")
    written = _write(records, Path(out), name, split, metadata, progress)
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    written.rename(target)
    shutil.rmtree(_scratch(Path(out), name))
    return target


def _existing(target: Path, split: str) -> str | None:
    try:
        return open_records(target, split=split).fingerprint()
    except Exception:  # another split, or no data set of ours at all
        return None


def _check_and_hash(records, progress: bool) -> dict:
    """Counts and a hash of everything; raises LlavaError for the first faulty record."""
    digest, images, videos, boxes, pairs = hashlib.sha256(), 0, 0, 0, 0
    for index in tqdm(range(len(records)), "checking", unit=" records", disable=not progress):
        record = checked_record(records, index)
        example = _example(record)
        images, videos = images + len(example["images"]), videos + len(example["videos"])
        boxes += len(record.boxes)
        for part in (example["id"], example["conversations"], *example["image_names"]):
            digest.update(f"{len(part.encode())}:{part}".encode())
        for encoded in (*example["images"], *example["videos"]):
            digest.update(f"{len(encoded)}:".encode() + encoded)
        if record.boxes:
            digest.update(example["boxes"].encode())
        if record.rejected is not None:
            pairs += 1
            digest.update(f"rejected {len(record.rejected)}:{record.rejected}".encode())
    counts = {"videos": videos, "boxes": boxes, "rejected": pairs}
    return {
        "format": "llava_jax records 1",
        "source": Path(records.path).name,
        "source_sha256": records.fingerprint(),
        "sha256": digest.hexdigest(),
        "records": len(records),
        "images": images,
    } | {kind: count for kind, count in counts.items() if count}


def _example(record: Record) -> dict:
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


def _scratch(out: Path, name: str) -> Path:
    return out / f".{name}.building"


def _write(records, out: Path, name: str, split: str, metadata: dict, progress: bool) -> Path:
    """Writes the set next to its place, so that nothing half-written is ever taken for a set."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """LLaVA records, one split."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            encoded = tfds.features.Sequence(tfds.features.Text(doc="encoded bytes"))
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "conversations": tfds.features.Text(doc="JSON list of {from, value}"),
                    "n_images": tfds.features.Scalar(np.int32),
                    "images": encoded,
                    "image_names": tfds.features.Sequence(tfds.features.Text()),
                }
                | ({"videos": encoded} if "videos" in metadata else {})
                | ({"boxes": tfds.features.Text(doc="JSON")} if "boxes" in metadata else {})
                | ({"rejected": tfds.features.Text()} if "rejected" in metadata else {})
            )
            return tfds.core.DatasetInfo(
                builder=self,
                description="Conversations about images, in LLaVA's format.",
                features=features,
                metadata=tfds.core.MetadataDict(metadata),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            bar = tqdm(range(len(records)), "writing", unit=" records", disable=not progress)
            for index in bar:
                example = _example(records[index])
                for kind in {"videos", "boxes", "rejected"} - metadata.keys():
                    del example[kind]
                yield index, example

    Builder.name = name
    scratch = _scratch(out, name)
    if scratch.exists():  # left by a killed run
        shutil.rmtree(scratch)
    tfds.disable_progress_bar()
    builder = Builder(data_dir=scratch, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download and this folder
        builder.download_and_prepare()
    return Path(builder.data_dir)
