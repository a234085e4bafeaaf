"""Training from stored features: each picture of a run is encoded once, before the first step.

The encoder is called with as many tiles as a step gives it, since sums are rounded otherwise for
other numbers: a step then computes, bit for bit, what it would with the encoder in it.
"""

import dataclasses
import functools
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from llava_jax.data import sources
from llava_jax.data.features import FeatureStore, FeatureWriter
from llava_jax.data.media import ImageError
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.rows import is_several
from llava_jax.data.sources import Seen
from llava_jax.errors import LlavaError
from llava_jax.models.images import layouts
from llava_jax.models.llava import LlavaModel
from llava_jax.parallel import hosts
from llava_jax.parallel.sharding import batch_sharding
from llava_jax.training.checkpoint import bit_sums
from llava_jax.training.stage import Stage
from llava_jax.training.step import COMPILER_OPTIONS

_THREADS = 8  # that read and decode pictures


class Picture(NamedTuple):
    """A picture or video to be encoded: number `place` of a record of `data`."""

    data: TrainingData
    record: int
    place: int
    key: str
    seen: Seen
    tiles: int


def train_from_features(stage: Stage, frozen: dict, data_sets: Sequence[TrainingData]) -> None:
    """Stores what the encoder sees of the pictures that a run uses; the data then give that.

    To be called within the stage's `scope`.

    Args:
      frozen: the frozen parameters, the encoder among them.

    Raises:
      LlavaError: there is no room, a picture cannot be read, or not all processes see the folder.
    """
    folder = Path(stage.config.features.folder)
    store = FeatureStore(folder, _about(stage, frozen), *stage.seen)
    hosts.first_alone(lambda: _in_folder(folder, store.create))
    for path in store.refresh():
        hosts.report(f"{path} is damaged: its pictures are encoded anew")
    found = _pictures(stage, store, data_sets)
    missing = [picture for picture in found.values() if picture is not None]
    keys = "".join(picture.key for picture in missing)
    hosts.check_same({f"what {folder} lacks": hashlib.sha256(keys.encode()).hexdigest()})
    if missing:
        hosts.first_alone(lambda: _check_room(stage, store, missing))
        bad = _in_folder(folder, lambda: _encode(stage, frozen, store, missing))
        hosts.wait("features")
        store.refresh()
        absent = sum(store.get(picture.key) is None for picture in missing)
        if absent > hosts.total(bad):
            raise LlavaError(
                f"{absent} pictures are not in {store.folder}, where another process stored them: "
                "name a config.features.folder that all processes see"
            )
    kept = [store.get(key) for key in found]
    others = sum(one is not None and one.together != tiles_at_once(stage) for one in kept)
    if others:
        hosts.report(
            f"{others:,} of {len(found):,} pictures were not encoded {tiles_at_once(stage)} tiles "
            "at once, as this run's steps would: rounding may differ from a run without features"
        )
    for data in data_sets:
        data.take_from(store, stage.batch_format)


def tiles_at_once(stage: Stage) -> int:
    """How many a device encodes in a microbatch."""
    rows = stage.config.batch_size // stage.microbatches // stage.batch_shards
    return rows * stage.row_format.tiles


def _about(stage: Stage, frozen: dict) -> dict:
    """All that decides what is seen of a picture, besides how many are encoded at once."""
    model = stage.model.config
    sums = "".join(f"{path} {total} " for path, total in sorted(bit_sums(frozen["vision"]).items()))
    return {
        "weights": hashlib.sha256(sums.encode()).hexdigest(),
        "vision": dataclasses.asdict(model.vision),
        "feature_layer": model.feature_layer,
        "keep_class_token": model.keep_class_token,
        "drop_first_patch": model.drop_first_patch,
        "image": dataclasses.asdict(stage.row_format.image),
        "dtype": stage.model.dtype.name,
        "products": jax.config.jax_default_matmul_precision,
        "platform": stage.platform,
    }


def _in_folder(folder: Path, action: Callable):
    """The result of an action that writes there; a LlavaError if it cannot."""
    try:
        return action()
    except OSError as error:
        reason = error.strerror or error
        raise LlavaError(f"config.features.folder {folder} cannot be written: {reason}") from None


def _pictures(stage: Stage, store: FeatureStore, data_sets) -> dict[str, Picture | None]:
    """Key -> each picture that the run uses, None if it is stored, in the order of first use."""
    found = {}
    for data in data_sets:
        look = functools.partial(_look, store, data, stage.config.data.bad_image == "skip")
        numbers = data.used()
        seen = ahead(look, numbers.tolist())
        title = "looking for features"
        for some in tqdm(seen, title, len(numbers), unit=" records", disable=not hosts.is_first()):
            for key, picture in some:
                found.setdefault(key, picture)
    return found


def _look(
    store: FeatureStore, data: TrainingData, skip: bool, number: int
) -> list[tuple[str, Picture | None]]:
    """Those of a record; none that cannot be read, with `skip`."""
    record, rows, found = data.records[number], data.row_format, []
    several = is_several(record)
    for place, (media, name) in enumerate(zip(record.images, record.image_names, strict=True)):
        try:
            key = store.key(media, rows.image, name, several)
            if store.get(key) is not None:
                found.append((key, None))
                continue
            seen = sources.look_at(media, rows.image, name, several=several)
        except ImageError as error:
            if not skip:
                raise LlavaError(f"{data.records.path}: {record.name}: {error}") from None
            continue
        (layout,) = layouts(rows.image, rows.tokens_per_tile, [seen.source], several)
        found.append((key, Picture(data, number, place, key, seen, layout.tiles)))
    return found


def _check_room(stage: Stage, store: FeatureStore, missing: list[Picture]) -> None:
    options, tiles = stage.config.features, sum(picture.tiles for picture in missing)
    needed, taken = tiles * store.tile_bytes, store.taken()
    free = shutil.disk_usage(store.folder).free
    gigabytes = lambda size: f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
    what = (
        f"what the encoder sees of {len(missing):,} pictures ({tiles:,} tiles) takes "
        f"{gigabytes(needed)}"
    )
    if taken + needed > options.gigabytes * 1e9:
        raise LlavaError(
            f"{what} and {options.folder} holds {gigabytes(taken)}: more than "
            f"config.features.gigabytes={options.gigabytes:g}, so allow more or delete old folders "
            "in it"
        )
    if needed > free:
        raise LlavaError(
            f"{what}, and {options.folder} has {gigabytes(free)} free: make room, or name another "
            "config.features.folder"
        )
    hosts.report(f"{what} in {store.folder}: encoding them once")


def _encode(stage: Stage, frozen: dict, store: FeatureStore, missing: list[Picture]) -> int:
    """Encodes this process's share; returns how many pictures of it cannot be read."""
    index, count = stage.part
    size = tiles_at_once(stage) * stage.batch_shards // count
    shares = [missing[i::count] for i in range(count)]
    # All processes call the encoder equally often, as its weights may be spread over them.
    calls = max(-(-sum(picture.tiles for picture in share) // size) for share in shares)
    see = jax.jit(
        lambda vision, tiles: stage.model.apply(
            {"params": {"vision": vision}}, tiles, method=LlavaModel.see
        ),
        out_shardings=batch_sharding(stage.mesh),
        compiler_options=COMPILER_OPTIONS.get(stage.platform),
    )
    skip, bad, waiting = stage.config.data.bad_image == "skip", [], deque()

    def readable(share: list[Picture]) -> Iterator[np.ndarray]:
        decode = functools.partial(_decode, store, skip)
        for picture, tiles in zip(share, ahead(decode, share), strict=True):
            if tiles is None:
                bad.append(picture)
            else:
                waiting.append(picture)
                yield tiles

    side = stage.row_format.image.size
    batches = _cut(readable(shares[index]), np.zeros((size, side, side, 3), np.uint8))
    rows = np.zeros((0, *store.shape), store.dtype)
    title = f"encoding {len(missing):,} pictures"
    bar = tqdm(range(calls), title, unit=" calls", disable=not hosts.is_first())
    with FeatureWriter(store, tiles_at_once(stage)) as writer:
        for batch, _ in zip(batches, bar, strict=False):
            seen = see(frozen["vision"], stage.put({"tiles": batch})["tiles"])
            rows = np.concatenate([rows, _of_this_process(seen)])
            while waiting and len(rows) >= waiting[0].tiles:
                picture = waiting.popleft()
                if _is_writer(seen):
                    writer.add(picture.key, picture.seen, rows[: picture.tiles])
                rows = rows[picture.tiles :]
    return len(bad) if _is_writer(seen) else 0


def _decode(store: FeatureStore, skip: bool, picture: Picture) -> np.ndarray | None:
    """Its tiles; None, with `skip`, if it cannot be read."""
    data, spec = picture.data, picture.data.row_format.image
    record = data.records[picture.record]
    media, name = record.images[picture.place], record.image_names[picture.place]
    several = is_several(record)
    where = f"{data.records.path}: {record.name}"
    try:
        _, tiles = sources.tiles(media, spec, name, several=several)
        changed = store.key(media, spec, name, several) != picture.key
    except ImageError as error:
        if skip:
            return None
        raise LlavaError(f"{where}: {error}") from None
    if changed or len(tiles) != picture.tiles:
        raise LlavaError(f"{where}: {name!r} was changed while it was encoded: start again")
    return tiles


def _cut(pictures: Iterable[np.ndarray], empty: np.ndarray) -> Iterator[np.ndarray]:
    """Tiles of pictures -> batches of the shape of `empty`, which follow the last without end."""
    size, ready = len(empty), empty[:0]
    for tiles in pictures:
        ready = np.concatenate([ready, tiles])
        while len(ready) >= size:
            yield ready[:size]
            ready = ready[size:]
    if len(ready):
        yield np.concatenate([ready, empty[len(ready) :]])
    while True:
        yield empty


def _of_this_process(array: jax.Array) -> np.ndarray:
    """The rows that its devices hold, in their order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _is_writer(array: jax.Array) -> bool:
    """Whether this process is the first of those that hold the same rows."""
    return any(shard.replica_id == 0 for shard in array.addressable_shards)


def ahead(function: Callable, items: Iterable, threads: int = _THREADS) -> Iterator:
    """`map` in threads, a few results ahead of their use and no more."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
