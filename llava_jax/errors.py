"""The one exception that means "the user can fix this"."""


class LlavaError(ValueError):
    """A wrong input, told in one sentence that names the culprit and what to do.

    Command lines print it without a traceback and exit 1.
    """
