"""HTTP/1.1 of uvicorn, which closes connections that hold a place and do nothing with it."""

import asyncio
import json
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_jax.serving.api import ApiError

LOG = logging.getLogger(__name__)
HEAD_SECONDS = 15.0  # for the head of a request, from the connection or the last response on
WRITE_SECONDS = 30.0  # for a client to take what is being sent


def http_protocol(head: float = HEAD_SECONDS, write: float = WRITE_SECONDS) -> type[H11Protocol]:
    """The protocol class of a server.

    Args:
      head: seconds after which a connection without a whole head of a request is closed.
      write: seconds after which one whose client does not read is cut.
    """

    class Protocol(H11Protocol):
        _head = _write = None  # timers

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # pauses as soon as anything must wait
            self._expect_head()

        def on_response_complete(self) -> None:
            self._expect_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._head, self._write):
                if timer:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = self.loop.call_later(write, self._cut)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write:
                self._write.cancel()

        def send_400_response(self, msg: str) -> None:
            """The answer to what is no HTTP, in the form of all other errors."""
            body = json.dumps(ApiError(400, "this is no valid HTTP request").body()).encode()
            lines = (
                "HTTP/1.1 400 Bad Request", "content-type: application/json",
                f"content-length: {len(body)}", "connection: close", "", "",
            )  # fmt: skip
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write("\r\n".join(lines).encode() + body)
            self.transport.close()

        def _expect_head(self) -> None:
            if self._head:
                self._head.cancel()
            self._head = self.loop.call_later(head, self._close_if_idle, self.cycle)

        def _close_if_idle(self, cycle) -> None:
            if self.cycle is cycle and not self.transport.is_closing():  # no request since then
                self.transport.close()

        def _cut(self) -> None:
            LOG.info("a client stopped reading, and its connection is cut")
            self.transport.abort()

    return Protocol
