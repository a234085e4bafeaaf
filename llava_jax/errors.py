"""The one exception that means "the user can fix this", and words for messages."""

import difflib
import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
            errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)  # fmt: skip


class LlavaError(ValueError):
    """Invalid user input. The message is one sentence: what is wrong and how to fix it.

    It has no full stop at the end. Command lines print it without a traceback and exit with 1.
    """


class RecordError(LlavaError):
    """A fault of one record; `kind` is a short name of the fault, by which faults are counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        return RecordError, (self.kind, str(self))


def file_fault(error: OSError) -> str:
    """The message for a full disk or an unusable path; any other error is raised again."""
    if error.errno in _NO_ROOM:
        return f"no room to write {error.filename or 'a file'}: {error.strerror}"
    if error.errno in _NO_PATH and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    raise error


def brief(value) -> str:
    """`repr` of a value for a message, at most 80 characters."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def closest(keys, known) -> str:
    """ " (did you mean 'image' instead of 'imgae'?)", or ""."""
    for key in map(str, keys):
        for match in difflib.get_close_matches(key, known, 1, 0.75):
            return f" (did you mean {match!r} instead of {brief(key)}?)"
    return ""
