"""Server-sent events, and clients that leave."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from llava_jax.serving.replies import Reply
from llava_jax.serving.worker import Piece


class EventStream(Response):
    """Server-sent events; closed when the client leaves.

    Args:
      events: each sent as soon as it is there.
      held: closed in the end, whatever happens.
    """

    def __init__(self, events: AsyncIterator[bytes], held: contextlib.ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self.events, self.held = events, held

    async def __call__(self, scope, receive, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        with self.held:
            try:
                async with while_connected(receive):
                    await send(start)
                    async for data in self.events:
                        await send(_part(data, more=True))
                    await send(_part(b"", more=False))
            except ClientDisconnect:
                pass
            finally:
                await self.events.aclose()


def _part(data: bytes, more: bool) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}


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
