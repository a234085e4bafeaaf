"""The HTTP side of `llava-jax serve`: routes, guards and streams (ASGI, by Starlette).

One event loop reads and writes; the engine runs on a thread of its own (worker.py). A request
passes in this order: host, key, size and form of the body, fields, room in the queue, pictures,
tokens, engine.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_jax.errors import LlavaError
from llava_jax.inference.fingerprint import weights_fingerprint
from llava_jax.inference.jobs import Job, Picture
from llava_jax.inference.model import Llava
from llava_jax.serving import api
from llava_jax.serving.api import ApiError, Asked, Defaults, Limits, picture_card, read_settings
from llava_jax.serving.boxes import boxes
from llava_jax.serving.explanations import explain
from llava_jax.serving.guards import Guards
from llava_jax.serving.messages import Messages, read_messages, read_prompt
from llava_jax.serving.metrics import TYPE, Metrics
from llava_jax.serving.page import page
from llava_jax.serving.pictures import PictureReader
from llava_jax.serving.replies import Reply, TokenTexts
from llava_jax.serving.streams import EventStream, event, events_of, while_connected
from llava_jax.serving.worker import Piece, Ticket, Worker

LOG = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)  # of a client, which its response bears
KEEP_ALIVE = 15.0  # seconds of silence after which a stream sends a comment


@dataclass
class Options:
    """How the server behaves; see `llava-jax serve --help`."""

    names: Sequence[str]
    queue: int = 128  # answers that may wait or run
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    strict: bool = False
    explanations: bool = False
    body_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)


class Server:
    """The application, and what it knows while it runs.

    Args:
      version: of llava_jax.

    Attributes:
      progress: a sentence about the start, for `/ready`.
      context: tokens that a prompt and its answer may have.
      admitted: answers of requests that are being worked on.
      draining: running requests end, new ones are refused.
    """

    def __init__(self, options: Options, version: str):
        self.options, self.version_text = options, version
        self.metrics = Metrics(options.names[0])
        self.model: Llava | None = None
        self.worker: Worker | None = None
        self.draining, self.progress = False, "loading the model"
        self.context, self.admitted, self.started = 0, 0, int(time.time())
        self.guards = Guards(
            options.hosts, options.keys, options.limits.body_bytes, options.body_seconds
        )
        self._logged: set[str] = set()
        self.app = Starlette(
            routes=[
                Route("/", page, methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/ready", self.is_ready, methods=["GET"]),
                Route("/version", self.version, methods=["GET"]),
                Route("/metrics", self.metrics_text, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/boxes", functools.partial(boxes, self), methods=["POST"]),
                Route("/v1/explain", functools.partial(explain, self), methods=["POST"]),
            ],
            exception_handlers={
                ApiError: self._on_api_error,
                HTTPException: self._on_http_error,
                ClientDisconnect: self._on_disconnect,
                Exception: self._on_bug,
            },
        )

    def attach(self, model: Llava, context: int, batch_size: int, url_hosts=None) -> None:
        """Gives the server its model, whose engine is warmed up."""
        self.model, self.context, self._batch_size = model, context, batch_size
        self.pictures = PictureReader(model.picture, url_hosts=url_hosts)
        self._tokens = TokenTexts(model.tokenizer)
        self._fingerprint = weights_fingerprint(model.engine.params)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes requests from now on."""
        self.worker = Worker(self.model.engine, self._batch_size, loop, self.metrics)
        self.worker.start()
        self._lag = loop.create_task(self._watch_lag())

    async def _watch_lag(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(1)
            self.metrics.loop_lag.observe(max(0.0, time.monotonic() - began - 1))

    async def failed(self) -> None:
        """Returns when the engine was given up."""
        while not self.worker.dead:
            await asyncio.sleep(0.2)

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for the running ones -> whether all ended in time."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.admitted and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.admitted

    def stop(self) -> None:
        """Ends what still runs: streams get an error event."""
        self.draining = True
        self.worker.fail_all(
            lambda: ApiError(503, "the server is shutting down", code="unavailable"), dead=True
        )
        self.worker.close()

    async def __call__(self, scope, receive, send):
        """ASGI; guards every path but the open ones before any route runs."""
        request, began, status = Request(scope), time.monotonic(), 0  # without one: the client left
        name = request.headers.get("x-request-id", "")
        name = name if REQUEST_ID.fullmatch(name) else secrets.token_hex(8)

        async def send_named(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            self.guards.check(request)
        except ApiError as error:
            return await self._error(error)(scope, receive, send_named)
        try:
            await self.app(scope, receive, send_named)
        finally:
            if scope["method"] == "POST":
                LOG.info("%s: status %d, %.2f s", name, status, time.monotonic() - began)

    # Endpoints.

    async def health(self, request: Request) -> Response:
        """200 as long as the process can answer; 503 once the engine was given up."""
        failed = self.worker is not None and self.worker.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def is_ready(self, request: Request) -> Response:
        """200 if new requests are taken."""
        status = "draining" if self.draining else "ready" if self._open else self.progress
        return JSONResponse({"status": status}, 200 if self._open else 503)

    @property
    def _open(self) -> bool:
        return self.worker is not None and not self.draining and not self.worker.dead

    async def version(self, request: Request) -> Response:
        """What runs here."""
        import jax

        return JSONResponse({"version": self.version_text, "jax": jax.__version__})

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' text."""
        if self.worker:
            self.worker.measure()
        return Response(self.metrics.text(), media_type=TYPE)

    def _card(self, name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "llava_jax",
            "max_model_len": self.context,
            "default_temperature": self.options.defaults.temperature,
            "explanations": self.options.explanations,
            **picture_card(self.model.config),
        }

    async def models(self, request: Request) -> Response:
        """The served names; 503 until they can be asked."""
        self.check_open()
        return JSONResponse({"object": "list", "data": list(map(self._card, self.options.names))})

    async def one_model(self, request: Request) -> Response:
        """One of the served names."""
        self.check_open()
        name = request.path_params["name"]
        if name not in self.options.names:
            raise ApiError(404, "no such model is served here", "model", "model_not_found")
        return JSONResponse(self._card(name))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions: a text that is continued, without a template."""
        return await self._answer(request, chat=False)

    def _read(self, body: dict, chat: bool) -> tuple[Asked, Messages]:
        """What a body asks for."""
        limits = self.options.limits
        asked = self._settings(body, chat)
        if chat:
            return asked, read_messages(body.get("messages"), limits)
        return asked, read_prompt(body.get("prompt"), limits)

    def _settings(self, body: dict, chat: bool) -> Asked:
        options = self.options
        asked = read_settings(body, options.names, options.limits, options.defaults, chat)
        if asked.unknown and options.strict:
            raise ApiError(400, f"unknown field: {asked.unknown[0]:.80}", asked.unknown[0][:80])
        for name in asked.unknown:
            if name not in self._logged and len(self._logged) < 100:
                self._logged.add(name)
                LOG.warning("requests have the unknown field %.80r, which is not read", name)
        return asked

    async def _answer(self, request: Request, chat: bool) -> Response:
        """The response to a request.

        Everything that it holds, its place in the queue and its rows, is in one stack: freed when
        the answer is complete or the client leaves, whichever comes first.
        """
        began = time.monotonic()
        self.check_room(1)  # before a body is read for nothing
        with contextlib.ExitStack() as held:
            arriving = held.enter_context(contextlib.ExitStack())
            asked, messages = self._read(await self.guards.read_json(request, arriving), chat)
            held.enter_context(self.room(asked.params.n))
            async with while_connected(request.receive):
                pictures = await self.pictures.read(messages.images, messages.names)
                messages = dataclasses.replace(messages, images=())  # they may be megabytes
                arriving.close()
                self.metrics.images.inc(len(pictures))
                jobs = await asyncio.to_thread(self._jobs, asked, messages, pictures)
                queue = asyncio.Queue()
                ticket = Ticket(jobs, queue.put_nowait)
                held.callback(self.worker.cancel, ticket)
                self.worker.submit(ticket)
                reply = Reply(chat, asked.model, self._fingerprint, self._tokens, asked.logprobs)
                pieces = self._pieces(ticket, queue, began)
                if not asked.stream:
                    async for _ in pieces:
                        pass
                    return JSONResponse(reply.whole(jobs))
                first = await anext(pieces)  # a fault before the first token still has a status
            events = self._events(first, pieces, ticket, reply, asked.include_usage)
            return EventStream(events, held.pop_all())

    def check_open(self) -> None:
        """ApiError unless requests are taken."""
        if not self._open:
            state = "shutting down" if self.draining else "not ready"
            raise ApiError(503, f"the server is {state}", code="unavailable", retry_after=5)

    def check_room(self, answers: int) -> None:
        """ApiError unless so many answers have room in the queue now."""
        self.check_open()
        if self.admitted + answers > self.options.queue:
            raise ApiError(503, "the queue is full", code="overloaded", retry_after=1)

    @contextlib.contextmanager
    def room(self, answers: int):
        """A place in the queue; ApiError if it is full."""
        if answers > self.options.queue:
            raise ApiError(400, f"n may be at most {self.options.queue}", "n", "invalid_value")
        self.check_room(answers)
        self.admitted += answers
        try:
            yield
        finally:
            self.admitted -= answers

    def _jobs(self, asked: Asked, messages: Messages, pictures: list[Picture]) -> list[Job]:
        """The engine's jobs, one for each answer; runs on a thread."""
        params, field_name = asked.params, "prompt" if messages.continued else "messages"
        try:
            if messages.continued:
                request = self.model.text_request(messages.turns[0].text, params)
            else:
                conversation = messages.turns, pictures, params, messages.system
                request = self.model.conversation_request(*conversation)
            jobs = self.model.jobs(request)
        except LlavaError as error:
            raise api.refused_prompt(error, field_name) from None
        room = self.context - len(request.input_ids)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(request.input_ids)} tokens, and the context holds "
                f"{self.context} with the answer: shorten it or send fewer pictures",
                field_name,
                "context_length_exceeded",
            )
        for reading in [reading for job in jobs for reading in job.readings]:
            reading.budget = min(reading.budget, room)
        return jobs

    async def _pieces(
        self, ticket: Ticket, queue: asyncio.Queue, began: float
    ) -> AsyncIterator[list[Piece]]:
        """News of a request as it comes; an empty list after some silence."""
        left, latest = len(ticket.jobs), None
        while left:
            try:
                pieces = [await asyncio.wait_for(queue.get(), KEEP_ALIVE)]
            except TimeoutError:
                yield []
                continue
            while not queue.empty():  # what came while the reader was slow goes out together
                pieces.append(queue.get_nowait())
            for piece in pieces:
                if piece.error:
                    raise piece.error
                if piece.reason:
                    left -= 1
                    self.metrics.ended(piece.reason)
            now = time.monotonic()
            delay = self.metrics.between if latest else self.metrics.first_token
            delay.observe(now - (latest or began))
            latest = now
            yield pieces
        self.metrics.whole.observe(time.monotonic() - began)

    async def _events(
        self,
        first: list[Piece],
        pieces: AsyncIterator[list[Piece]],
        ticket: Ticket,
        reply: Reply,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        """The server-sent events of a streamed answer."""
        try:
            heads = [reply.first_chunk(index) for index in range(len(ticket.jobs))]
            yield b"".join(event(head) for head in heads if head)
            yield events_of(first, reply)
            async with contextlib.aclosing(pieces):
                async for some in pieces:
                    yield events_of(some, reply)
            if include_usage:
                yield event(reply.usage_chunk(ticket.jobs))
        except ApiError as error:
            yield event(error.body())
        except Exception:  # the status is sent already
            LOG.exception("a stream failed")
            yield event(ApiError(500, "the server failed", code="internal").body())
        yield b"data: [DONE]\n\n"

    def _error(self, error: ApiError) -> Response:
        self.metrics.rejected(error.status)
        return JSONResponse(error.body(), error.status, error.headers())

    async def _on_api_error(self, request: Request, error: ApiError) -> Response:
        return self._error(error)

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        texts = {404: "there is no such address", 405: "this method is not allowed here"}
        return self._error(ApiError(error.status_code, texts.get(error.status_code, "refused")))

    async def _on_disconnect(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        LOG.error("a request failed", exc_info=error)
        return self._error(ApiError(500, "the server failed", code="internal"))
