"""Server-sent events, and clients that leave."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from llava_jax.serving.api import Reply
from llava_jax.serving.worker import Piece

LOG = logging.getLogger(__name__)


class EventStream(Response):
    """Server-sent events; closed when the client leaves, or does not read for `seconds`.

    Args:
      events: each sent as soon as it is there.
      held: closed in the end, whatever happens.
    """

    def __init__(self, events: AsyncIterator[bytes], seconds: float, held: contextlib.ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self.events, self.seconds, self.held = events, seconds, held

    async def __call__(self, scope, receive, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        with self.held:
            try:
                async with while_connected(receive):
                    await send(start)
                    async for data in self.events:
                        await self._send(send, data, more=True)
                    await self._send(send, b"", more=False)
            except ClientDisconnect:
                pass
            finally:
                await self.events.aclose()

    async def _send(self, send, data: bytes, more: bool) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            LOG.info("a client stopped reading its stream, which is closed")
            raise ClientDisconnect from None


@contextlib.asynccontextmanager
async def while_connected(receive) -> AsyncIterator[None]:
    """Ends what is inside with ClientDisconnect when the client leaves.

    Args:
      receive: of ASGI; the body must have been read.
    """
    task, left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


def events_of(pieces: Sequence[Piece], reply: Reply) -> bytes:
    """The events of some pieces; a comment for none, which keeps the connection open."""
    events = []
    for piece in pieces:
        if piece.text or piece.logprobs:
            events.append(event(reply.chunk(piece.index, piece.text, piece.logprobs)))
        if piece.reason:
            events.append(event(reply.last_chunk(piece.index, piece.reason)))
    return b"".join(events) or b": waiting\n\n"


def event(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
