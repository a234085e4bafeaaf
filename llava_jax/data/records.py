"""Collections of LLaVA records: a JSON file, a JSONL file or a TFDS ArrayRecord data set."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.parsing import (
    PLAIN_KEYS,
    SYSTEM_KEYS,
    UNSUPPORTED_KEYS,
    Record,
    check_record,
    count_ignored_keys,
    parse_record,
)
from llava_jax.data.record_boxes import BOX_KEYS, has_boxes
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.text.conversation import Turn  # noqa: F401  what a Record's turns are


def checked_record(records, index: int) -> Record:
    """records[index] after `check_record`; its errors begin with the path of the data."""
    try:
        record = records[index]
        check_record(record, records.image_root)
    except RecordError as error:
        raise RecordError(error.kind, f"{records.path}: {error}") from None
    return record


def shares_of(records) -> list[str]:
    """A line for each file of a mixture, of any other records none."""
    return records.shares() if hasattr(records, "shares") else []


def ignored_keys_text(records) -> str:
    """ "ignored keys: foo (2 records)" for the records of `open_records`, or ""."""
    counts = [
        f"{key[:60]} ({count:,} record{'s' * (count > 1)})"
        for key, count in records.ignored_keys().items()
    ]
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    return f"ignored keys: {', '.join(counts[:8])}{more}" if counts else ""


class JsonRecords:
    """The records of a JSON or JSONL file, in memory; pickled by path, so workers reload it."""

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None):
        self.path = str(path)
        self.image_root = str(image_root if image_root is not None else Path(path).parent)
        self._items = _load_json(Path(path))

    @functools.cached_property
    def holds_boxes(self) -> bool:
        """Whether a record has boxes."""
        return any(isinstance(item, dict) and has_boxes(item) for item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        return parse_record(self._items[index], int(index), self.image_root)

    def __getstate__(self):
        return {"path": self.path, "image_root": self.image_root}

    def __setstate__(self, state):
        self.__init__(state["path"], state["image_root"])

    def fingerprint(self) -> str:
        """SHA-256 of the file, in hex; marked if the file means more than it once did."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # What was measured, or trained on, without those images and system prompts is not reused.
        return f"{digest}-2" if any(map(_reads_more, self._items)) else digest

    def ignored_keys(self) -> dict[str, int]:
        """key that nothing reads -> number of records with it."""
        return count_ignored_keys(self._items)


def _reads_more(item) -> bool:
    """Whether a record holds something that the first version of this reader passed over."""
    if not isinstance(item, dict):
        return False
    keys = SYSTEM_KEYS if item.get("image") else (*SYSTEM_KEYS, *IMAGE_KEYS)
    return any(item.get(key) for key in (*keys, *VIDEO_KEYS)) or has_boxes(item)


def _load_json(path: Path) -> list:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LlavaError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlavaError(f"{path} is not UTF-8 text: bad byte at offset {error.start}") from None
    items = _parse_lines(text, path) if path.suffix == ".jsonl" else _parse_json(text, path)
    if not isinstance(items, list):
        found = brief(items)
        if isinstance(items, dict):
            found = f"an object with the keys {brief(', '.join(items))}"
        raise LlavaError(f"{path} must hold a JSON list of records, not {found}")
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
    """The records of a TFDS ArrayRecord data set, whose images are encoded bytes.

    `llava-jax build` writes such sets. One made by another program is read if its features are
    named like the keys of a JSON record: `conversations` is JSON text or a sequence of `from` and
    `value`, an image is an Image or a Text of its encoded bytes, a video a Text of those of a file,
    several are a sequence of them. `boxes` is the JSON text of an object with the keys of boxes;
    any other text there is ignored, as a JSON record's would be.
    """

    image_root = None

    def __init__(self, path: str | os.PathLike, split: str = "train"):
        # Only this class needs TFDS, and importing it takes half a second.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.decode import DeserializeMethod

        self.path, self.split = str(path), split
        builder = tfds.builder_from_directory(_data_set_directory(Path(path)))
        if split not in builder.info.splits:
            known = ", ".join(sorted(builder.info.splits)) or "none"
            raise LlavaError(f"{path} has no split {split!r}; it has: {known}")
        self._features, self._ignored = _read_features(tfds, builder.info.features, path)
        self._metadata = builder.info.metadata or {}
        self._files = [Path(file) for file in builder.info.splits[split].filepaths]
        raw = DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(split=split, deserialize_method=raw)

    @property
    def holds_boxes(self) -> bool:
        """Whether a record may have boxes."""
        return "boxes" in self._features

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self._features.deserialize_example_np(self._source[int(index)])
        names = tuple(name.decode() for name in example.pop("image_names", ()))
        boxes = _box_keys(example.pop("boxes", b"{}"))
        try:
            item = {key: _as_json(key, value) for key, value in example.items()}
        except ValueError as error:  # of which broken JSON and broken UTF-8 are two
            raise RecordError("bad text", f"record {index}: {error}") from None
        record = parse_record(item | boxes, int(index), None)
        return dataclasses.replace(
            record,
            image_names=names if len(names) == len(record.images) else record.image_names,
            ignored_keys=(*record.ignored_keys, *self._ignored),
        )

    def __getstate__(self):
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state):
        self.__init__(state["path"], state["split"])

    def fingerprint(self) -> str:
        """SHA-256 over every record and image, computed when the set was built.

        Of a set made by another program: over the name, size and both ends of each of its files.
        """
        if "sha256" in self._metadata:
            return self._metadata["sha256"]
        digest = hashlib.sha256(str(sorted(self._features)).encode())
        for path in self._files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
        return digest.hexdigest()

    def ignored_keys(self) -> dict[str, int]:
        """feature that nothing reads -> number of records."""
        return dict.fromkeys(self._ignored, len(self))


def _read_features(tfds, features, path) -> tuple:
    """(the features that are read, as they are stored; names of those that nothing reads)."""
    text, sequence = tfds.features.Text, tfds.features.Sequence
    found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    if "conversations" not in features:
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

    read, ignored = {}, []
    for name, feature in features.items():
        if name in UNSUPPORTED_KEYS:
            raise LlavaError(f"{path} has a feature {name!r}: only images and videos are supported")
        if name == "conversations":
            turn = getattr(feature, "feature", None)
            nested = isinstance(turn, tfds.features.FeaturesDict) and all(
                key in turn and is_text(turn[key]) for key in ("from", "value")
            )
            read[name] = feature if is_text(feature) or nested else None
        elif name in IMAGE_KEYS:
            read[name] = stored(feature)
        elif name in VIDEO_KEYS:
            inner = getattr(feature, "feature", None)
            whole = is_text(feature) or inner is not None and is_text(inner)
            read[name] = stored(feature) if whole else None
        elif name in SYSTEM_KEYS:
            read[name] = feature if is_text(feature) else None
        elif name == "boxes" and is_text(feature):  # another program's may be a list
            read[name] = feature
        elif name == "id":
            read[name] = feature if feature.shape == () else None
        elif name == "image_names":
            read[name] = stored(feature)
        elif name not in (*PLAIN_KEYS, "n_images"):
            ignored.append(name)
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
    if key == "conversations" and not isinstance(value, bytes):
        if isinstance(value, dict):  # of a Sequence: a list for each key; a Dataset gives turns
            value = [
                {"from": role, "value": text}
                for role, text in zip(value["from"], value["value"], strict=True)
            ]
        return [{name: turn[name].decode() for name in ("from", "value")} for turn in value]
    if isinstance(value, bytes):
        value = value.decode()
        return json.loads(value) if key == "conversations" else value
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


def open_records(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    split: str | None = None,
    seed: int = 0,
):
    """The records of a LLaVA JSON or JSONL file, a mixture of such, or a TFDS ArrayRecord data set.

    path: the file, the YAML file of a mixture, or the folder of the data set (its version folder or
    a parent of it).
    image_root: the folder that image paths start from (default: the folder of the file).
    split: of a data set only; default "train".
    seed: of what a mixture draws.
    Gives a picklable sequence with random access, whose items are parsed but not checked
    (`check_record`). Raises LlavaError, naming the file and the place.
    """
    path = Path(path)
    if path.is_dir():
        if image_root is not None:
            raise LlavaError(f"{path} is a data set that holds its images: leave image_root out")
        return _not_empty(ArrayRecords(path, split or "train"))
    if not path.exists():
        raise LlavaError(f"no data file or data set at {path}")
    if split is not None:
        raise LlavaError(f"{path} is a file and has no splits: leave split out")
    if path.suffix not in (".json", ".jsonl", ".yaml", ".yml"):
        raise LlavaError(
            f"{path}: expected a .json or .jsonl file, a .yaml that lists such files, or the "
            "folder of a data set"
        )
    if image_root is not None and not Path(image_root).is_dir():
        raise LlavaError(f"the image root {image_root} is not a folder")
    if path.suffix in (".yaml", ".yml"):
        from llava_jax.data.mixture import MixedRecords  # late: it is made of the records above

        return MixedRecords(path, image_root, seed)
    return _not_empty(JsonRecords(path, image_root))


def _not_empty(records):
    if not len(records):
        raise LlavaError(f"{records.path} holds no records")
    return records
