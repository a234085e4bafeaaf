"""The one exception that means "the user can fix this", and how a full disk is told."""

import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LlavaError(ValueError):
    """A wrong input, told in one sentence that names the culprit and what to do.

    Command lines print it without a traceback and exit 1.
    """


def no_room(error: OSError) -> str:
    """The sentence about a full disk or quota; raises the error again where it is another."""
    if error.errno not in _NO_ROOM:
        raise error
    return f"no room to write {error.filename or 'a file'}: {error.strerror}"
