"""The one exception that means "the user can fix this": its text names the culprit and the remedy."""


class LlavaError(ValueError):
    """A wrong input, told in one sentence; command lines print it without a traceback and exit 1."""
