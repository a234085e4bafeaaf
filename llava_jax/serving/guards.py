"""What a request must pass before its fields are read: host name, API key, form and size."""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.requests import Request

from llava_jax.serving.api import ApiError, parse_json

OPEN_PATHS = ("/", "/health", "/ready")  # without a key: the page, and what load balancers ask
LARGE = 100_000  # bytes of JSON that are read on a thread
BODIES = 16  # of the largest size, that may be held at a time


class Guards:
    """Checks of one server.

    Args:
      hosts: names that clients may use for this machine, besides localhost and addresses.
      keys: one of them must be sent; none for no check.
      body_bytes: of a request's body.
      body_seconds: for the body to arrive.
    """

    def __init__(
        self, hosts: Sequence[str], keys: Sequence[str], body_bytes: int, body_seconds: float
    ):
        self._hosts = {"localhost", *hosts}
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._bytes, self._seconds = body_bytes, body_seconds
        self._held = 0  # bytes of bodies that are arriving, or whose pictures are being read

    def check(self, request: Request) -> None:
        """Raises ApiError for a wrong host name or key."""
        self._check_host(request.headers.get("host", ""))
        if self._digests and request.scope["path"] not in OPEN_PATHS:
            self._check_key(request.headers.get("authorization", ""))

    def _check_host(self, host: str) -> None:
        """Refuses names that were not given.

        The page of another site could have its name resolved to this machine; an address in digits
        cannot be such a name.
        """
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return
        if name not in self._hosts:
            raise ApiError(403, "this host name is not served: see --allowed_hosts", code="host")

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        known = [hmac.compare_digest(digest, one) for one in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def read_json(self, request: Request, held: contextlib.ExitStack) -> dict:
        """The body of a request, which must be a JSON object.

        Args:
          held: its bytes count as held until this is closed.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the Content-Type must be application/json", code="content_type")
        too_large = ApiError(413, f"the body has more than {self._bytes:,} bytes", code="too_large")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", 0)) > self._bytes:
                raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in request.stream():
                    self._hold(len(piece), held)
                    data += piece
                    if len(data) > self._bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        if len(data) > LARGE:  # on the loop it would hold up all streams
            return await asyncio.to_thread(parse_json, bytes(data))
        return parse_json(bytes(data))

    def _hold(self, count: int, held: contextlib.ExitStack) -> None:
        """Counts bytes as held; ApiError if all bodies together are too many."""
        if self._held + count > BODIES * self._bytes:
            raise ApiError(503, "too much is being sent", code="overloaded", retry_after=1)
        self._held += count
        held.callback(self._release, count)

    def _release(self, count: int) -> None:
        self._held -= count
