"""What a frozen encoder sees of pictures and videos, computed once and kept on disk.

FOLDER/1f0c.../8a31....features   what an encoder sees of tiles, [N, P, D]
FOLDER/1f0c.../8a31....json       which encoder, and of which pictures; written after them

A picture is known by its content, so a changed one is another. Files appear whole and are never
changed: a kill damages none, and several processes and programs may write to one folder at once.

P features of a tile as the encoder gives them, D their size.
"""

import contextlib
import hashlib
import json
import math
import time
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.data import sources
from llava_jax.data.sources import Media, Seen
from llava_jax.data.stored import File
from llava_jax.errors import LlavaError
from llava_jax.files import whole_file, write_json
from llava_jax.models.images import ImageSpec

FILE_BYTES = 1 << 28  # what a kill may cost, and what is read of one open file
_ABANDONED = 24 * 3600.0  # seconds since a half-written file was touched


class Kept(NamedTuple):
    """Where what was seen of a picture or video is.

    file: its number. first: the row of its first tile there. tiles: how many it has. check: CRC-32
    of its rows. together: tiles that the encoder was given at once, on a device.
    """

    file: int
    first: int
    tiles: int
    check: int
    together: int
    seen: Seen


class FeatureStore:
    """What one encoder sees of pictures; picklable, and read by any number of processes.

    Args:
      folder: of this and other encoders.
      about: all that decides what is seen besides the picture, as JSON values.
      shape: (P, D).
    """

    def __init__(self, folder: Path, about: dict, shape: tuple[int, ...], dtype: np.dtype):
        text = json.dumps(about, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.tile_bytes = math.prod(shape) * self.dtype.itemsize
        self.about, self._files = about, []
        self._known: set[str] = set()  # names of the files that were looked at
        self._kept: dict[str, Kept] = {}

    def create(self) -> None:
        """Makes the folder; removes what a killed program left half-written there long ago."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def refresh(self) -> list[str]:
        """Finds the files that have come since; returns the paths of damaged ones, left out."""
        damaged = []
        for path in sorted(self.folder.glob("*.json")):
            if path.name in self._known:
                continue
            self._known.add(path.name)
            try:
                index = json.loads(path.read_text(encoding="utf-8"))
                file = File.of(path.with_suffix(".features"))
                number, kept = len(self._files), {}
                for key, first, tiles, check, source, times in index["pictures"]:
                    seen = Seen(tuple(source), times)
                    kept[key] = Kept(number, first, tiles, check, index["together"], seen)
                rows = sum(tiles for _, _, tiles, *_ in index["pictures"])
                if file.size != rows * self.tile_bytes:
                    raise ValueError("not as long as its index says")
            except (OSError, ValueError, KeyError, TypeError, LlavaError):
                damaged.append(str(path.with_suffix(".features")))
                continue
            self._files.append(file)
            self._kept |= kept
        return damaged

    def key(self, media: Media, spec: ImageSpec, name: str, several: bool) -> str:
        """The name of a picture or video here; arguments and errors as of `sources.tiles`."""
        one_view = several and spec.tiling is not None and spec.tiling.one_view
        return hashlib.sha256(sources.digest(media, name) + bytes([one_view])).hexdigest()[:40]

    def get(self, key: str) -> Kept | None:
        """Where a picture is, None if it is not stored."""
        return self._kept.get(key)

    def taken(self) -> int:
        """Bytes that the folders of all encoders take."""
        return sum(path.stat().st_size for path in self.folder.parent.glob("*/*"))

    def look(
        self, media: Media, spec: ImageSpec, name: str, max_pixels: int, several: bool = False
    ) -> tuple[Seen, np.ndarray]:
        """What a picture or video is, and what the encoder sees of its tiles, [N, P, D].

        Arguments and errors as of `sources.tiles`.
        """
        kept = self._kept.get(self.key(media, spec, name, several))
        if kept is None:
            sources.tiles(media, spec, name, max_pixels, several)  # raises for what cannot be shown
            raise LlavaError(
                f"{name!r} is not the picture that was stored at the start of the run: start again"
            )
        file, start = self._files[kept.file], kept.first * self.tile_bytes
        try:
            rows = file.read(start, kept.tiles * self.tile_bytes)
        except (OSError, ValueError) as error:
            raise LlavaError(f"cannot read {file.path}: {error}") from None
        if zlib.crc32(rows) != kept.check:
            raise LlavaError(
                f"{file.path} is damaged: delete it and start again, and its pictures are encoded "
                "anew"
            )
        return kept.seen, np.frombuffer(rows, self.dtype).reshape(kept.tiles, *self.shape)


class FeatureWriter:
    """Adds pictures to a store; used by `with`.

    What was added before a LlavaError stays, and before any other error the files that are full.

    Args:
      together: see `Kept`.
    """

    def __init__(self, store: FeatureStore, together: int):
        self._store, self._together = store, together
        self._stack, self._pictures, self._tiles = contextlib.ExitStack(), [], 0

    def add(self, key: str, seen: Seen, rows: np.ndarray) -> None:
        """What the encoder sees of a picture's tiles, [N, P, D]."""
        if not self._pictures:
            self._path = self._store.folder / f"{uuid.uuid4().hex}.features"
            self._file = self._stack.enter_context(whole_file(self._path))
        data = rows.astype(self._store.dtype, copy=False).tobytes()
        self._file.write(data)
        self._pictures.append((key, self._tiles, len(rows), zlib.crc32(data), *seen))
        self._tiles += len(rows)
        if self._tiles * self._store.tile_bytes >= FILE_BYTES:
            self._finish()

    def _finish(self) -> None:
        self._stack.close()
        index = {"about": self._store.about, "together": self._together}
        index["pictures"] = self._pictures
        write_json(self._path.with_suffix(".json"), index)
        self._pictures, self._tiles = [], 0

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._pictures and (error is None or isinstance(error, LlavaError)):
            self._finish()
        else:
            self._stack.__exit__(kind, error, trace)
