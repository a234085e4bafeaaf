"""The records of a TFDS ArrayRecord data set."""

import dataclasses
import json
import os
from pathlib import Path

from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.chunks import Chunk, spans
from llava_jax.data.collection import Records, ends_of_files
from llava_jax.data.forms import ANSWER, LISTS, QUESTION
from llava_jax.data.pairs import PAIR_KEYS
from llava_jax.data.parsing import PLAIN_KEYS, SYSTEM_KEYS, UNSUPPORTED_KEYS, Record
from llava_jax.data.record_boxes import BOX_KEYS
from llava_jax.errors import LlavaError, RecordError


class ArrayRecords(Records):
    """The records of a TFDS ArrayRecord data set, whose images are encoded bytes.

    `llava-jax build` writes such sets. One made by another program is read if its features are
    named like the keys of a JSON record, or by `columns`: turns are JSON text or a sequence of
    texts such as `from` and `value`, an image is an Image or a Text of its encoded bytes, a video a
    Text of those of a file, several are a sequence of them. `boxes` is the JSON text of an object
    with the keys of boxes; any other text there is ignored, as a JSON record's would be.

    Attributes:
      metadata: what `llava-jax build` noted about the set; empty for one of another program.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        columns: dict[str, str] | None = None,
        image_root: None = None,
        folder: Path | None = None,
    ):
        """folder: what to read, where `path` is a URL."""
        # Only this class needs TFDS, and importing it takes half a second.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.decode import DeserializeMethod

        super().__init__(path, image_root, columns, split=split, folder=folder)
        builder = tfds.builder_from_directory(_data_set_directory(Path(folder or path)))
        if split not in builder.info.splits:
            known = ", ".join(sorted(builder.info.splits)) or "none"
            raise LlavaError(f"{path} has no split {split!r}; it has: {known}")
        self.check_named(builder.info.features)
        self._features, self._ignored = _read_features(
            tfds, builder.info.features, path, self.columns
        )
        self.metadata = builder.info.metadata or {}
        self._files = [Path(file) for file in builder.info.splits[split].filepaths]
        raw = DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(split=split, deserialize_method=raw)

    def __len__(self) -> int:
        return len(self._source)

    def item(self, index: int) -> dict:
        return self._example(index)[0]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        item, names = self._example(int(index))
        record = self._parsed(item, int(index))
        return dataclasses.replace(
            record,
            image_names=names if len(names) == len(record.images) else record.image_names,
            ignored_keys=(*record.ignored_keys, *self._ignored),
        )

    def stored_chunks(self) -> list[Chunk]:
        """Nothing is ever added to such a set, and none of its files changes."""
        content = self.content()
        return [Chunk(*span, f"{content} {span[0]} {span[1]}") for span in spans(len(self))]

    def _example(self, index: int) -> tuple[dict, tuple[str, ...]]:
        """A record as it is stored, and the names that its images had as files."""
        example = self._features.deserialize_example_np(self._source[int(index)])
        names = tuple(name.decode() for name in example.pop("image_names", ()))
        ours = {theirs: name for name, theirs in self.columns.items()}
        boxes = _box_keys(example.pop("boxes", b"{}"))
        try:
            item = {key: _as_json(ours.get(key, key), value) for key, value in example.items()}
        except ValueError as error:  # of which broken JSON and broken UTF-8 are two
            raise RecordError("bad text", f"record {index}: {error}") from None
        if not item.get("rejected"):  # the feature is there for all records
            item.pop("rejected", None)
        return item | boxes, names

    def content(self) -> str:
        """SHA-256 over every record and image, computed when the set was built.

        Of a set made by another program: over the name, size and both ends of each of its files.
        """
        if "sha256" in self.metadata:
            return self.metadata["sha256"]
        return ends_of_files(self._files, str(sorted(self._features)))


def _read_features(tfds, features, path, columns: dict[str, str]) -> tuple:
    """(the features that are read, as they are stored; names of those that nothing reads)."""
    text, sequence = tfds.features.Text, tfds.features.Sequence
    found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    if not columns and not any(name in features for name in (*LISTS, ANSWER, "rejected")):
        raise LlavaError(
            f"{path} is not a data set of LLaVA records: its features are {found}, none is "
            "'conversations'; write one with `llava-jax build`"
        )

    def is_text(feature) -> bool:
        return isinstance(feature, text)

    def stored(feature):
        """An image as the bytes that it is stored as: TFDS decodes it without its palette."""
        if is_text(feature) or isinstance(feature, tfds.features.Image):
            return text()
        inner = getattr(feature, "feature", None)
        return sequence(text()) if inner is not None and stored(inner) is not None else None

    read, ignored, ours = {}, [], {theirs: name for name, theirs in columns.items()}
    for theirs, feature in features.items():
        name = ours.get(theirs, theirs)
        if name in UNSUPPORTED_KEYS:
            raise LlavaError(f"{path} has a feature {name!r}: only images and videos are supported")
        if name in LISTS:
            turn = getattr(feature, "feature", None)
            nested = isinstance(turn, tfds.features.FeaturesDict) and all(
                map(is_text, turn.values())
            )
            read[theirs] = feature if is_text(feature) or nested else None
        elif name in IMAGE_KEYS:
            read[theirs] = stored(feature)
        elif name in VIDEO_KEYS:
            inner = getattr(feature, "feature", None)
            whole = is_text(feature) or inner is not None and is_text(inner)
            read[theirs] = stored(feature) if whole else None
        elif name in (*SYSTEM_KEYS, QUESTION, ANSWER):
            read[theirs] = feature if is_text(feature) else None
        elif name in ("boxes", *PAIR_KEYS) and is_text(feature):  # another's may be a list
            read[theirs] = feature
        elif name == "id":
            read[theirs] = feature if feature.shape == () else None
        elif name == "image_names":
            read[theirs] = stored(feature)
        elif name not in (*PLAIN_KEYS, "n_images"):
            ignored.append(theirs)
    unknown = [name for name, feature in read.items() if feature is None]
    if unknown:
        raise LlavaError(
            f"{path}: cannot read the feature {unknown[0]!r} among {found}; expected: id (Text or "
            "a number), conversations (Text of JSON, or a Sequence of from and value), image or "
            "images (Text of encoded bytes, Image, or a Sequence), video or videos (Text of the "
            "bytes of a file, or a Sequence), system (Text)"
        )
    return tfds.features.FeaturesDict(read), tuple(ignored)


def _as_json(key: str, value):
    """A feature's value as a JSON record has it; images and videos stay bytes."""
    if key in (*IMAGE_KEYS, *VIDEO_KEYS):
        return value if isinstance(value, bytes) else [bytes(image) for image in value]
    if key in LISTS and not isinstance(value, bytes):
        if isinstance(value, dict):  # of a Sequence: a list for each key; a Dataset gives turns
            value = [
                dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)
            ]
        return [{name: text.decode() for name, text in turn.items()} for turn in value]
    if isinstance(value, bytes):
        value = value.decode()
        return json.loads(value) if key in LISTS else value
    return value.item() if hasattr(value, "item") else value


def _box_keys(text: bytes) -> dict:
    """The keys of a record's boxes that `llava-jax build` wrote; else the text is another's own."""
    try:
        keys = json.loads(text)
    except ValueError:  # of which broken UTF-8 is one
        keys = None
    if isinstance(keys, dict) and keys.keys() <= {*BOX_KEYS}:
        return keys
    return {"boxes": text.decode(errors="replace")}


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
