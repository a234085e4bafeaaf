"""The chat page: one file, which loads nothing but itself and what it asks of the server."""

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

# The page's one script and one style are named by their digests; nothing else runs.
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> Response:
    """GET /."""
    text, policy = read_page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(text, media_type="text/html", headers=headers)


@functools.cache
def read_page() -> tuple[bytes, str]:
    """The page and its content security policy."""
    text = resources.files("llava_jax.serving").joinpath("static/index.html").read_bytes()

    def digest(tag: bytes) -> str:
        inside = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.DOTALL)[1]
        return f"sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}"

    return text, POLICY.format(script=digest(b"script"), style=digest(b"style"))
