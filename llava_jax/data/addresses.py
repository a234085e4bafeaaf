"""Addresses in place of a file: which text is one, and the bytes within a `data:` address."""

import base64

from llava_jax.errors import LlavaError


def scheme(source: str) -> str:
    """What stands before the first colon, in lower case; "" if there is no colon."""
    name, colon, _ = source.partition(":")
    return name.lower() if colon else ""


def is_address(source: str) -> bool:
    """Whether the text begins like a `data:`, http or https address, and not like a path."""
    return scheme(source) in ("data", "http", "https")


def decode_data_address(source: str) -> bytes:
    """The bytes of `data:image/...;base64,...`; LlavaError if the text is malformed."""
    head, comma, data = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise LlavaError(f"{head[:40]!r} must be data:image/...;base64, and the encoded picture")
    try:
        return base64.b64decode("".join(data.split()), validate=True)  # lines may be wrapped
    except ValueError as error:  # of which binascii.Error is one
        raise LlavaError(f"a picture's base64 data cannot be decoded: {error}") from None
