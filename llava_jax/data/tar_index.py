"""What a tar of samples holds and where: read once, kept in a file, then looked up.

Members of one sample have one name up to the first dot, as webdataset has it:

    0007.jpg  0007.json  0008.0.png  0008.1.png  0008.json

A sample is a row of a pyarrow table: its key, and of each of its members what comes after the first
dot, where its bytes begin, how many they are, and of small texts the bytes themselves.
"""

import hashlib
import itertools
import json
import os
import re
import tarfile
from pathlib import Path

from llava_jax.data.arrow import mapped
from llava_jax.data.chunks import spans
from llava_jax.data.stored import File
from llava_jax.errors import LlavaError, brief
from llava_jax.files import whole_file

_VERSION = "2"  # of the index
JSON = ("json", "jsn")
TEXTS = (*JSON, "txt", "text", "caption", "transcript", "cls", "cls2", "class", "id", "index")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")


def kind(extension: str) -> str:
    """What the last part of an extension says of a member: `0.png` -> png."""
    return extension.rpartition(".")[2].lower()


def index_of(file: File, cache_dir: str | os.PathLike | None):
    """The table of a tar's samples; its schema's metadata hold hashes: of its `content`, and of
    each of its `chunks`, a JSON list.

    cache_dir: where it is kept, checked by the tar's size and time of modification; None keeps
    nothing.

    Raises:
      LlavaError: the file is no tar, is compressed or cut off, or a sample has a member twice.
    """
    import pyarrow

    place = None
    if cache_dir is not None:
        name = hashlib.sha256(os.path.abspath(file.path).encode()).hexdigest()[:32]
        place = Path(cache_dir) / f"tar-{name}.arrow"
        if (table := mapped(place, _state(file))) is not None:
            return table
    table = _table(file)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as out, pyarrow.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    return table


def _state(file: File) -> bytes:
    return f"{_VERSION} {file.size} {file.modified}".encode()


def _table(file: File):
    import pyarrow

    samples = _samples(file)
    digest, chunks, waiting = hashlib.sha256(), [], iter(samples.items())
    for first, end in spans(len(samples)):
        chunk = hashlib.sha256()
        for key, members in itertools.islice(waiting, end - first):
            for extension, (start, size, text) in members.items():
                for one in (digest, chunk):
                    one.update(f"{key}\0{extension}\0{start} {size}\0".encode())
                    one.update(text or b"")
        chunks.append(chunk.hexdigest())
    columns = {
        "key": (pyarrow.string(), [key for key in samples]),
        "names": (pyarrow.list_(pyarrow.string()), [[*m] for m in samples.values()]),
    }
    for i, (name, item) in enumerate(
        [("starts", pyarrow.int64()), ("sizes", pyarrow.int64()), ("texts", pyarrow.binary())]
    ):
        values = [[member[i] for member in members.values()] for members in samples.values()]
        columns[name] = pyarrow.list_(item), values
    arrays = {name: pyarrow.array(values, of) for name, (of, values) in columns.items()}
    content = {"content": digest.hexdigest(), "chunks": json.dumps(chunks)}
    metadata = {"state": _state(file)} | content
    return pyarrow.table(arrays).replace_schema_metadata(metadata)


def _samples(file: File) -> dict[str, dict[str, tuple[int, int, bytes | None]]]:
    """key -> {extension: (start, size, text)}, in the order of the tar."""
    samples = {}
    try:
        with tarfile.open(file.path, "r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                if not member.isfile() or match is None:
                    continue
                key, extension = match[1], match[2]
                if member.sparse is not None:
                    raise LlavaError(f"{file.path}: {member.name!r} is sparse: write it anew")
                if any(0xD800 <= ord(letter) < 0xE000 for letter in member.name):
                    raise LlavaError(
                        f"{file.path}: the name {member.name!r} is not UTF-8: write it anew"
                    )
                if member.offset_data + member.size > file.size:
                    raise LlavaError(
                        f"{file.path} is cut off: {member.name!r} would end at byte "
                        f"{member.offset_data + member.size:,} of {file.size:,}"
                    )
                text = None
                if kind(extension) in TEXTS:
                    text = file.read(member.offset_data, member.size)
                members = samples.setdefault(key, {})
                if extension in members:
                    raise LlavaError(f"{file.path} has two members {member.name!r}")
                members[extension] = member.offset_data, member.size, text
            _check_end(file, tar.offset)
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        if isinstance(error, LlavaError):
            raise
        with open(file.path, "rb") as opened:
            head = opened.read(4)
        compressed = head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd" or head[:3] == b"BZh"
        reason = (
            "it is compressed, so that no member can be found: unpack it" if compressed else error
        )
        raise LlavaError(f"cannot read {file.path}: {reason}") from None
    if not samples:
        raise LlavaError(f"{file.path} holds no files of samples such as {brief('7.json')}")
    return samples


def _check_end(file: File, end: int) -> None:
    """LlavaError unless after the last member there are only the zeros that end a whole tar.

    tarfile takes damage and the end of the file for the end of the tar, and so would members be
    lost.
    """
    if file.size - end < tarfile.BLOCKSIZE:
        raise LlavaError(f"{file.path} is cut off at byte {file.size:,}, or still being written")
    with open(file.path, "rb") as opened:
        opened.seek(end)
        while rest := opened.read(1 << 20):
            if rest.strip(b"\0"):
                raise LlavaError(
                    f"{file.path} is no tar from byte {end:,} on: it is damaged there, or another "
                    "tar begins, which should be a file of its own"
                )
