"""The images and videos of a record: which keys name them, which file or bytes each of them is."""

import functools
import os
import re
import stat
from collections.abc import Sequence

from llava_jax.data.addresses import decode_data_address
from llava_jax.data.buckets import StoredObject, Url, is_url
from llava_jax.data.forms import Part
from llava_jax.data.stored import Stored
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.text.conversation import IMAGE_TOKEN, MARKS, VIDEO_TOKEN, Turn

# Of the keys for images `image` wins, of those for videos `video`; others are used if it is absent.
IMAGE_KEYS = ("image", "images", "image_path", "image_paths", "image_file", "image_files")
VIDEO_KEYS = tuple(key.replace("image", "video") for key in IMAGE_KEYS)
NO_FILE = ("missing image", "missing video")  # kinds of fault
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256,}={0,2}\s*")  # longer than a path without a dot


def field(item: dict, keys: Sequence[str]) -> tuple[str | None, list[str]]:
    """Of the keys for images, or videos: the one that is used, and others with different values."""
    given = [key for key in keys if item.get(key)]
    if not given:
        return (keys[0] if item.get(keys[0]) is not None else None), []
    as_list = lambda value: [value] if isinstance(value, str) else value
    first = as_list(item[given[0]])
    return given[0], [key for key in given[1:] if as_list(item[key]) != first]


def sources(item: dict, kind: str, where: str) -> list[str | bytes | Stored]:
    """What the keys of a kind, image or video, hold."""
    key, different = field(item, IMAGE_KEYS if kind == "image" else VIDEO_KEYS)
    if different and key != kind:
        raise RecordError(
            f"bad {kind} field",
            f"{where} has different {kind}s in {key!r} and {different[0]!r}: keep one of them",
        )
    # A data set has the feature for every record: without bytes it has nothing there.
    sources = [] if key is None or item[key] == b"" else item[key]
    sources = sources if isinstance(sources, list) else [sources]
    sources = [_of_struct(source) for source in sources]
    if not all(isinstance(source, str | bytes | Stored) for source in sources):
        raise RecordError(
            f"bad {kind} field",
            f"{where}: {key!r} must be a path or a list of paths, not {brief(sources)}",
        )
    return sources


def _of_struct(source):
    """The bytes or the path of a picture as `datasets` writes it; any other value as it is."""
    if isinstance(source, dict) and source.keys() <= {"bytes", "path"}:
        return source.get("path") if source.get("bytes") is None else source["bytes"]
    return source


def read(kind: str, source: str | bytes | Stored, image_root: str | None, where: str) -> tuple:
    """(what it is, its name in messages) of an image or video as given."""
    return (image if kind == "image" else video)(source, image_root, where)


def of_parts(parts: Sequence[Part], given: dict, image_root: str | None, where: str) -> list:
    """(source, name) of each part of a record's messages.

    given: kind -> sources that the record itself names. Parts without a source of their own are
    these, by number or one after the other.
    """
    found, used = [], {kind: set() for kind in given}
    for part in parts:
        source, own = part.given, given[part.kind]
        if source is None or isinstance(source, int):
            number = len(used[part.kind]) if source is None else source
            used[part.kind].add(number)
            if number >= len(own):
                raise RecordError(
                    f"{part.kind} part",
                    f"{where}: a part stands for {part.kind} number {number}, but the record has "
                    f"{len(own)} {part.kind}(s)",
                )
            source = own[number]
        found.append(read(part.kind, source, image_root, where))
    for kind, own in given.items():
        if len(own) != len(used[kind]):
            raise RecordError(
                f"{kind} part",
                f"{where} has {len(own)} {kind}(s), of which its parts show {len(used[kind])}",
            )
    return found


def placed(turns: Sequence[Turn], images: list, videos: list, where: str) -> tuple:
    """Turns with `<image>` alone, and (source, name) of the images and videos in its order.

    Without any `<video>` each `<image>` stands for a video, if the record has no images.
    """
    marks = [mark for turn in turns for mark in MARKS.findall(turn.text)]
    written = marks.count(VIDEO_TOKEN)
    if not written and not images:
        return turns, videos
    if written != len(videos):
        raise RecordError(
            "<video> count",
            f"{where} has {written} {VIDEO_TOKEN} in its text but {len(videos)} video(s)"
            + (f": write one {VIDEO_TOKEN} for each" if images else ""),
        )
    images, videos = iter(images), iter(videos)
    found = [next(videos if mark == VIDEO_TOKEN else images, None) for mark in marks]
    found = [*(source for source in found if source is not None), *images]
    return tuple(Turn(t.role, t.text.replace(VIDEO_TOKEN, IMAGE_TOKEN)) for t in turns), found


def marked(turns: Sequence[Turn], sources: Sequence) -> list[Turn]:
    """The turns as a file has them, with `<video>` for each video among their sources."""
    is_video = iter([isinstance(source, Video) for source in sources])
    mark = lambda match: VIDEO_TOKEN if next(is_video) else IMAGE_TOKEN
    return [Turn(t.role, re.sub(re.escape(IMAGE_TOKEN), mark, t.text)) for t in turns]


def image(source: str | bytes | Stored, image_root: str | None, where: str):
    """An image as given -> (path below the root, or encoded bytes; its name in messages)."""
    if isinstance(source, Stored):
        return source, source.name
    if isinstance(source, bytes):
        is_text = len(source) < 1000 and source.isascii() and source.decode().isprintable()
        return source, brief(source.decode()) if is_text else f"of {len(source):,} bytes"
    if source[:5].lower() == "data:":
        try:
            data = decode_data_address(source)
        except LlavaError as error:
            raise RecordError("bad image field", f"{where}: {error}") from None
        return data, f"{source.partition(',')[0][:40]} ({len(data):,} bytes)"
    if "://" in source[:10]:
        raise RecordError(
            "image is an address", f"{where}: image {brief(source)} is an address; download it"
        )
    if _BASE64.fullmatch(source):
        raise RecordError(
            "bad image field",
            f"{where}: image {brief(source)} is not a path; if it is base64, write "
            "data:image/png;base64, before it",
        )
    return _join_root(image_root, source, where), source


def video(source: str | bytes | Stored, image_root: str | None, where: str) -> tuple[Video, str]:
    """A video as given -> (the video below the root, or of encoded bytes; its name in messages)."""
    if isinstance(source, Stored):
        return Video(source), source.name
    if isinstance(source, bytes):
        return Video(source), f"of {len(source):,} bytes"
    if source[:5].lower() == "data:" or "://" in source[:10]:
        raise RecordError(
            "video is an address",
            f"{where}: video {brief(source)} is an address: save it as a file below the image root",
        )
    return Video(_join_root(image_root, source, where, "video")), source


def _join_root(
    image_root: str | None, name: str, where: str, kind: str = "image"
) -> str | StoredObject:
    parts = name.replace("\\", "/").split("/")
    article = "an" if kind == "image" else "a"
    if not name:
        raise RecordError(
            f"bad {kind} field",
            f"{where}: {article} {kind} path is empty; a text-only record has no {kind!r}",
        )
    if "\0" in name or os.path.isabs(name) or ".." in parts:
        raise RecordError(
            f"{kind} outside the root",
            f"{where}: {kind} path {brief(name)} must be relative to the image root and stay "
            "inside it",
        )
    if image_root is not None and is_url(image_root):
        return StoredObject(str(Url(image_root) / name))
    return os.path.join(image_root or "", name)


def check_file(path: str, name: str, image_root: str | None, where: str, kind: str) -> None:
    """Raises RecordError unless there is a file (or folder, of a video) inside `image_root`."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(path)
            real = os.path.realpath(path)
        else:
            real = os.path.join(_real_directory(os.path.dirname(path)), os.path.basename(path))
    except OSError as error:
        raise RecordError(
            f"missing {kind}", f"{where}: no {kind} file {_path(path)} ({error.strerror})"
        ) from None
    is_folder = kind == "video" and stat.S_ISDIR(status.st_mode)
    if not stat.S_ISREG(status.st_mode) and not is_folder:
        raise RecordError(f"missing {kind}", f"{where}: {_path(path)} is not a file")
    if image_root is not None:
        root = _real_directory(image_root)
        if os.path.commonpath([root, real]) != root:
            raise RecordError(
                f"{kind} outside the root",
                f"{where}: {kind} {_path(name)} links to a file outside the image root "
                f"{image_root!r}",
            )


def _path(path: str) -> str:
    """`repr` of a path for a message: its end is what tells paths apart."""
    return repr(path if len(path) <= 300 else f"…{path[-80:]}")


@functools.lru_cache(maxsize=4096)
def _real_directory(path: str) -> str:
    return os.path.realpath(path)
