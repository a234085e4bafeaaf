"""Data that are not on this machine: in buckets (gs://, s3://), on the hub (hf://), on web servers.

fsspec and its packages do the talking; credentials are those that they find. Here are the names,
second tries and messages. Loose pictures are read when they are needed; files of records are
copied first, see `data.copies`.
"""

import fnmatch
import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llava_jax.data.stored import Stored
from llava_jax.errors import LlavaError, RecordError

# What it takes to be let in, by scheme; the web has neither folders nor accounts.
_LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "log in with `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "hf": "log in with `hf auth login`, or set HF_TOKEN",
    "https": "the file has to be public",
    "http": "the file has to be public",
}
_WEB = ("https", "http")
_WAITS = (1, 2, 4, 8)  # seconds before each further try
# Keys, in what stores say of an object, of what changes with its content; the first one counts.
_TAGS = ("etag", "ETag", "blob_id", "generation", "Content-MD5", "Last-Modified", "LastModified",
         "updated", "created")  # fmt: skip
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


class Unreachable(LlavaError):
    """A store does not answer, or refuses to: no fault of the data, nothing is left out for it."""


class Object(NamedTuple):
    """What a store says of an object. tag: changes with its content; "" if there is none."""

    url: str
    size: int
    tag: str


class Url(PurePosixPath):
    """A URL, with the names and some of the questions of a `Path`.

    Url("gs://bucket/data") / "train.json"  is  gs://bucket/data/train.json
    """

    def __str__(self) -> str:
        return _SCHEME.sub(r"\1://", super().__str__(), count=1)

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    def is_dir(self) -> bool:
        return self.scheme not in _WEB and _kind(self) == "directory"

    def exists(self) -> bool:
        return _kind(self) is not None

    def is_file(self) -> bool:
        return _kind(self) == "file"

    def files(self, depth: int) -> list["Url"]:
        """The files in a folder and up to so many below; what starts with a dot is passed over."""
        found = []
        for name, item in _entries(self).items():
            if not name.startswith("."):
                if item is not None:
                    found.append(self / name)
                elif depth:
                    found += (self / name).files(depth - 1)
        return found

    def matching(self, parts: tuple[str, ...]) -> list["Url"]:
        """The files below a folder whose path fits a pattern, given part by part."""
        (part, *rest), found = parts, []
        if not re.search(r"[*?\[]", part):
            if rest:
                return (self / part).matching(tuple(rest))
            return [self / part] if (self / part).is_file() else []
        if "**" in part or self.scheme in _WEB:
            known = "* is not known" if self.scheme in _WEB else "** is not read"
            raise LlavaError(
                f"{self / part}: {known} there: name the files, as in {{000..012}}.tar"
            )
        for name, item in sorted(_entries(self).items()):
            if fnmatch.fnmatchcase(name, part) and (part[0] == "." or name[0] != "."):
                if rest and item is None:
                    found += (self / name).matching(tuple(rest))
                elif not rest and item is not None:
                    found.append(self / name)
        return found


def is_url(path) -> bool:
    """Whether a path is a URL of a scheme that is read."""
    return str(path).partition("://")[0] in _LOGIN and "://" in str(path)


def place(path) -> Path | Url:
    """A path as what it is; LlavaError if it has a scheme that is not read."""
    if is_url(path):
        if ".." in Url(path).parts:
            raise LlavaError(f"{path} leads out of a folder with ..: give it without")
        return Url(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)):
        schemes = ", ".join(f"{scheme}://" for scheme in _LOGIN)
        raise LlavaError(f"{path} cannot be read: give a path, or a URL that begins with {schemes}")
    return Path(path)


def below(base: Path | Url, name: str) -> Path | Url:
    """What a name means in a file of `base`: a URL and an absolute path mean themselves."""
    return place(name) if is_url(name) or name.startswith("/") else base / name


def may_be_folder(path: Path | Url) -> bool:
    """Whether it is a folder; of a web server's nothing is known."""
    return path.is_dir() or isinstance(path, Url) and path.scheme in _WEB


def ask(url, question: Callable):
    """question(file system, path), asked again where the answer does not come.

    Raises:
      FileNotFoundError: there is no such object.
      Unreachable: it needs a package, or credentials, or the last try failed as well.
    """
    scheme = str(url).partition("://")[0]
    for wait in (*_WAITS, None):
        try:
            # The hub's may not be shared by threads. Another would log in once in each of them.
            thread = threading.get_ident() if scheme == "hf" else None
            files = _file_system(scheme, os.getpid(), thread)
            return question(files, files._strip_protocol(str(url)))
        except ImportError as error:
            raise Unreachable(
                f"{url} needs packages that are not installed: pip install "
                f"'llava_jax[buckets]' ({error})"
            ) from None
        except Exception as error:  # each store has its own kinds
            if isinstance(error, FileNotFoundError):
                if not _is_refusal(error.__cause__):
                    raise
                # The hub hides what is private, and what is missing from those without an account.
                error = error.__cause__
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")[:300]
            if _is_refusal(error):
                raise Unreachable(
                    f"{url} may not be read ({reason}): {_LOGIN[scheme]}; the account needs the "
                    "right to read and to list"
                ) from None
            if wait is None:
                raise Unreachable(
                    f"{url} cannot be read, after {len(_WAITS) + 1} tries: {reason}; start again "
                    "when the connection works"
                ) from None
        time.sleep(wait * random.uniform(0.5, 1))


@functools.lru_cache(maxsize=64)
def _file_system(scheme: str, process: int, thread: int | None):
    import fsspec

    del process, thread  # it must not be used in a process that was forked off
    # Zonal buckets are an experiment of gcsfs, and it asks for credentials, which a public bucket
    # does not need, before every request.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    # What was found a while ago may have changed. The hub's remembers it all the same, and would
    # hand it on to its next instance.
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a store refuses, rather than fails."""
    response = getattr(error, "response", None)  # of botocore it is a dict
    codes = [getattr(error, name, None) for name in ("code", "status")]
    codes.append(getattr(response, "status_code", None))
    return (
        isinstance(error, PermissionError)
        or bool({401, 403, "401", "403"} & {code for code in codes if isinstance(code, int | str)})
        or "Credential" in type(error).__name__
        or str(error).startswith("Forbidden")  # gcsfs, of a 403
    )


def find(url, anew: bool = False) -> Object | None:
    """The object at a URL, asked for alone; None if there is none.

    anew: whatever a file system remembers of this run; that of the hub remembers folders.

    Raises:
      LlavaError: it is a folder, or as `ask`.
    """

    def question(files, path):
        if anew:
            files.invalidate_cache()
        return files.info(path)

    try:
        found = ask(url, question)
    except FileNotFoundError:
        return None
    if found["type"] == "directory":
        raise LlavaError(f"{url} is a folder: name a file")
    return _object(str(url), found)


def read(url: str, size: int | None = None, start: int | None = None) -> bytes:
    """The bytes of an object, all or from byte `start` on.

    size: how many have to come, if that is known; others are asked for again.

    Raises:
      FileNotFoundError: there is no such object.
      LlavaError: as `ask`.
    """
    part = {} if start is None else {"start": start, "end": start + size}

    def question(files, path):
        data = files.cat_file(path, **part)
        if size is not None and len(data) != size:
            raise OSError(f"{len(data):,} bytes came in place of {size:,} from {start or 0:,} on")
        return data

    return ask(url, question)


def _object(url: str, found: dict) -> Object:
    if found.get("size") is None:
        raise LlavaError(f"{url}: the server does not say how large it is: copy it to this machine")
    tag = next((str(found[key]) for key in _TAGS if found.get(key)), "")
    return Object(url, int(found["size"]), tag.strip('"'))


def _kind(url: Url) -> str | None:
    try:
        return ask(url, lambda files, path: files.info(path)["type"])
    except FileNotFoundError:
        return None


def _entries(folder: Url) -> dict[str, Object | None]:
    """`Url.entries`; {} of a folder that is not there."""

    def question(files, path):
        found = files.ls(path, detail=True)
        # Some tools keep an object of no bytes for the folder itself.
        return [item for item in found if item["name"].rstrip("/") != path.rstrip("/")]

    try:
        found = ask(folder, question)
    except FileNotFoundError:
        return {}
    entries = {}
    for item in found:
        name = item["name"].rstrip("/").rpartition("/")[2]
        is_folder = item["type"] == "directory"
        entries[name] = None if is_folder else _object(str(folder / name), item)
    return entries


class _Listings:
    """The folders that were asked for, each listed once; threads may share it."""

    def __init__(self):
        self._lock, self._found = threading.Lock(), {}

    def find(self, url: str) -> Object | None:
        """An object by the listing of its folder: a request for thousands of them."""
        place = Url(url)
        if place.scheme in _WEB:
            return find(url)
        folder = str(place.parent)
        with self._lock:
            if folder not in self._found:
                self._found[folder] = _entries(place.parent)
        return self._found[folder].get(place.name)

    def forget(self) -> None:
        with self._lock:
            self._found.clear()
        _file_system.cache_clear()


LISTINGS = _Listings()


@dataclass(frozen=True)
class StoredObject(Stored):
    """A picture or a video that is an object of its own, below an image root that is a URL."""

    url: str

    @property
    def name(self) -> str:
        return self.url

    def read(self) -> bytes:
        try:
            return read(self.url)
        except FileNotFoundError:
            raise LlavaError(f"there is no {self.url}") from None

    def check(self, kind: str, where: str) -> None:
        if LISTINGS.find(self.url) is None:
            hint = "; a folder of frames has to be on this machine" if kind == "video" else ""
            raise RecordError(f"missing {kind}", f"{where}: no {kind} file {self.url!r}{hint}")

    def state(self) -> bytes:
        return "\0".join(map(str, LISTINGS.find(self.url) or (self.url,))).encode() + b"\0"
