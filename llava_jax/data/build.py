"""`llava-jax build`: a LLaVA JSON or JSONL file and its images -> a TFDS ArrayRecord data set.

Each example holds the record's id, its conversation as JSON and its images, and whole video files,
as encoded bytes, so the set is self-contained, randomly accessible and read back without TensorFlow
(`open_records(folder)`). Order is kept; ids may repeat.

All records are checked and hashed first, then shards are written into a hidden folder next to the
set, which takes its place when it is complete. A build that was killed and is started again checks
again, and writes the shards that are missing.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from llava_jax.data.array_records import ArrayRecords
from llava_jax.data.build_parts import (
    OPTIONAL,
    Shard,
    Workers,
    check_part,
    features_of,
    in_turn,
    write_shard,
)
from llava_jax.data.chunks import Census
from llava_jax.data.collection import Records
from llava_jax.data.records import add_columns_argument, ignored_keys_text, open_records
from llava_jax.errors import LlavaError
from llava_jax.files import locked, write_json

VERSION = "1.0.0"
FORMAT = "llava_jax records 2"  # 1 hashed all records as one text
PART = 256  # records that are checked together


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
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="check and write on a Ray cluster, whose machines see data and OUT under the same "
        "paths: auto, HOST:PORT, or local for one of this machine's cores; default: this process",
    )  # fmt: skip


def main(args) -> int:
    """Runs `llava-jax build`; returns the exit code."""
    workers = in_turn
    if args.ray:
        from llava_jax.data.ray_build import Cluster

        workers = Cluster(args.ray)
    path = build_data_set(
        args.data, args.image_root, args.out, args.name, args.split, args.overwrite,
        columns=dict(args.columns), workers=workers,
    )  # fmt: skip
    print(f"data set: {path}")
    return 0


def build_data_set(
    data, image_root, out, name: str, split: str = "train", overwrite: bool = False,
    progress: bool = True, columns: dict[str, str] | None = None, workers: Workers = in_turn,
) -> Path:  # fmt: skip
    """Writes `data` as out/name/1.0.0 and returns that folder.

    All records are checked and hashed first; what they hold and nothing reads is printed. An
    existing data set with the same hash and split is left as it is. columns: as in `open_records`.
    workers: who does it; the result does not depend on them.

    Raises:
      LlavaError: a record is faulty, or another data set is there and `overwrite` is not set.
    """
    for option, value in (("--name", name), ("--split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
            raise LlavaError(f"{option} {value!r} must be made of a-z, 0-9 and _")
    records = open_records(data, image_root, columns=columns, pairs=True)
    if isinstance(records, ArrayRecords):
        raise LlavaError(f"{data} is a data set already: give it to training as it is")
    metadata, size = _check_and_hash(records, workers, progress)
    if ignored := ignored_keys_text(records):
        print(f"{records.path}: {ignored}")
    target = Path(out) / name / VERSION
    if target.exists() and not overwrite:
        if _existing(target, split) == metadata["sha256"]:
            return target
        raise LlavaError(f"{target} holds other data: choose another --name or give --overwrite")
    scratch = Path(out).absolute() / f".{name}.building"
    scratch.mkdir(parents=True, exist_ok=True)
    busy = f"another build is writing {target}: wait for it, or choose another --name"
    with locked(scratch, busy):
        written = _write(records, scratch, name, split, metadata, size, workers, progress)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        written.rename(target)
        shutil.rmtree(scratch)
    return target


def _existing(target: Path, split: str) -> str | None:
    """The hash of the set that is there; None if it has no such split, or is none of ours."""
    try:
        records = open_records(target, split=split, pairs=True)
        if records.metadata.get("format") == FORMAT:
            return records.fingerprint()
        return _check_and_hash(records, in_turn, progress=False)[0]["sha256"]
    except Exception:
        return None


def _check_and_hash(records: Records, workers: Workers, progress: bool) -> tuple[dict, int]:
    """(counts and a hash of everything, its size in bytes); LlavaError for a faulty record.

    The records' census has their ignored keys then.
    """
    digest, size, counts, ignored = hashlib.sha256(), 0, Counter(), Counter()
    count = len(records)
    parts = [range(start, min(start + PART, count)) for start in range(0, count, PART)]
    with tqdm(total=count, desc="checking", unit=" records", disable=not progress) as bar:
        for part, checked in zip(parts, workers(check_part, records, parts), strict=True):
            digest.update(checked.digests)
            size, counts = size + checked.size, counts + checked.counts
            ignored += checked.ignored
            bar.update(len(part))
    records.census = Census(Counter(), ignored)
    return {
        "format": FORMAT,
        "source": Path(records.path).name,
        "source_sha256": records.fingerprint(),
        "sha256": digest.hexdigest(),
        "records": count,
        "images": counts["images"],
    } | {kind: counts[kind] for kind in OPTIONAL if counts[kind]}, size


def _write(
    records: Records, scratch: Path, name: str, split: str, metadata: dict, size: int,
    workers: Workers, progress: bool,
) -> Path:  # fmt: skip
    """Writes the set below `scratch`, so that nothing half-written is ever taken for a set."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils.shard_utils import ShardConfig, get_shard_boundaries

    folder = scratch / VERSION
    template = tfds.core.ShardedFileTemplate(
        folder, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    count = ShardConfig.calculate_number_shards(size, len(records))
    ends = get_shard_boundaries(len(records), count)
    optional = tuple(kind for kind in OPTIONAL if kind in metadata)
    shards = [
        Shard(Path(template.sharded_filepath(shard_index=i, num_shards=count)), part, optional)
        for i, part in enumerate(map(range, [0, *ends], ends))
    ]
    _go_on(scratch, folder, metadata | {"split": split, "shards": count})
    sizes = []
    with tqdm(total=len(records), desc="writing", unit=" records", disable=not progress) as bar:
        for shard, size in zip(shards, workers(write_shard, records, shards), strict=True):
            sizes.append(size)
            bar.update(len(shard.part))
    for partial in folder.glob(".*"):  # of workers that were killed
        partial.unlink()
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name, tfds.core.Version(VERSION), str(folder), module_name=__name__
        ),
        description="Conversations about images, in LLaVA's format.",
        features=features_of(optional),
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    lengths = [len(shard.part) for shard in shards]
    info.set_splits(
        tfds.core.SplitDict([tfds.core.SplitInfo(split, lengths, sum(sizes), template)])
    )
    info.write_to_directory(folder)
    return folder


def _go_on(scratch: Path, folder: Path, plan: dict) -> None:
    """Keeps the shards that a killed build of the same data left; removes any other rest."""
    mark = scratch / "plan.json"
    try:
        same = json.loads(mark.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        for rest in scratch.iterdir():
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    folder.mkdir(exist_ok=True)
    write_json(mark, plan)
