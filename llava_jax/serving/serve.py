"""`llava-jax serve`: a model behind OpenAI's HTTP interface, and a page to chat with it."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments

LOG = logging.getLogger(__name__)
HEADER_SECONDS = 15  # for a new connection to send the head of a request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-jax serve`."""
    add_model_arguments(parser)
    where = parser.add_argument_group("where and for whom")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    where.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    where.add_argument(
        "--name", action="append", metavar="NAME",
        help="name of the model for clients; may be given several times (the folder's name)",
    )  # fmt: skip
    where.add_argument(
        "--api_key_file", metavar="FILE",
        help="one key a line that clients must send; LLAVA_API_KEY in the environment works too",
    )  # fmt: skip
    where.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="NAME",
        help="names of this machine that clients may use, besides localhost and addresses",
    )  # fmt: skip
    work = parser.add_argument_group("how much")
    work.add_argument("--batch_size", type=int, default=8, help="answers at a time (%(default)s)")
    work.add_argument(
        "--max_model_len", type=int, metavar="N",
        help="tokens of a prompt and its answer (the model's, at most 2048)",
    )  # fmt: skip
    work.add_argument(
        "--all_shapes", action="store_true",
        help="compile four times as many programs at the start, which pad prompts less",
    )  # fmt: skip
    work.add_argument(
        "--max_queue", type=int, default=128, metavar="N",
        help="answers that may run or wait; more are refused with 503 (%(default)s)",
    )  # fmt: skip
    work.add_argument(
        "--max_images", type=int, default=8, metavar="N", help="pictures a request (%(default)s)"
    )
    work.add_argument(
        "--max_tokens", type=int, metavar="N",
        help="length of answers to requests that name none (what the context leaves)",
    )  # fmt: skip
    work.add_argument(
        "--temperature", type=float, default=0.0,
        help="of requests that name none (%(default)s: the likeliest token)",
    )  # fmt: skip
    work.add_argument(
        "--url_hosts", nargs="*", metavar="NAME",
        help="allow pictures from http(s) addresses of these hosts; of every public host if none "
        "is named (off)",
    )  # fmt: skip
    work.add_argument(
        "--drain_seconds", type=float, default=30.0,
        help="time for running answers to end after SIGTERM (%(default)s)",
    )  # fmt: skip
    work.add_argument(
        "--strict", action="store_true", help="refuse requests with fields that are not known"
    )
    work.add_argument(
        "--prompt_logprobs", action="store_true", help="allow prompt_logprobs, which cost a pass"
    )


def main(args) -> int:
    """Runs `llava-jax serve` until SIGTERM or Ctrl-C; returns the exit code."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise LlavaError(f"{error.name} is not installed: pip install 'llava_jax[serve]'") from None
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("llava_jax").setLevel(logging.INFO)
    server = make_server(args)
    config = uvicorn.Config(
        server,
        host=args.host,
        port=args.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        http=http_protocol(),
        timeout_graceful_shutdown=5,
    )
    return asyncio.run(_serve(args, server, config))


def make_server(args):
    """The application of the arguments, without its model."""
    from llava_jax.serving.api import Defaults, Limits
    from llava_jax.serving.app import Options, Server

    if args.batch_size < 1 or args.max_queue < 1:
        raise LlavaError("--batch_size and --max_queue must be at least 1")
    keys = _keys(args.api_key_file)
    if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        LOG.warning("anybody who reaches %s can ask the model: set an API key", args.host)
    names = args.name or [Path(args.checkpoint).resolve().name or args.checkpoint]
    return Server(
        Options(
            names=names,
            queue=args.max_queue,
            keys=keys,
            hosts=[name.lower() for name in args.allowed_hosts],
            strict=args.strict,
            limits=Limits(
                images=args.max_images,
                max_tokens=args.max_tokens,
                prompt_logprobs=args.prompt_logprobs,
            ),
            defaults=Defaults(temperature=args.temperature),
        ),
        version("llava_jax"),
    )


def _keys(path: str | None) -> list[str]:
    """API keys of the file and of the environment."""
    keys = os.environ.get("LLAVA_API_KEY", "").split()
    if path is not None:
        try:
            keys += Path(path).read_text(encoding="utf-8").split()
        except OSError as error:
            raise LlavaError(f"--api_key_file {path} cannot be read: {error.strerror}") from None
        if not keys:
            raise LlavaError(f"--api_key_file {path} holds no key")
    return keys


def load(args, server) -> None:
    """Loads the model and compiles everything that requests can need; reports in `progress`."""
    model = load_from_arguments(args)
    limit = model.config.decoder.max_position_embeddings
    context = args.max_model_len or min(limit, 2048)
    if not 16 <= context <= limit:
        raise LlavaError(f"--max_model_len must be from 16 to {limit}, the model's, not {context}")

    def report(done: int, count: int) -> None:
        server.progress = f"compiling {done} of {count} programs"
        if done % 10 == 0 or done == count:
            LOG.info("%s", server.progress)

    model.engine.warm_up(args.batch_size, context, report, few=not args.all_shapes)
    server.attach(model, context, args.batch_size, args.url_hosts)


async def _serve(args, server, config) -> int:
    import uvicorn

    class Listener(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # SIGTERM is ours: `/ready` must say so before the socket closes

    listener, loop, stop = Listener(config), asyncio.get_running_loop(), asyncio.Event()
    listening = asyncio.create_task(listener.serve())
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        stop.set()
        if signals > 1:
            LOG.warning("stopped at once")
            os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loading = asyncio.create_task(asyncio.to_thread(load, args, server))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({listening, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if listening.done():  # the port is taken, which uvicorn has logged
        os._exit(1)
    if stopping.done():  # a thread that compiles cannot be ended
        os._exit(0)
    try:
        await loading
    except LlavaError as error:
        print(f"llava-jax serve: {error}", file=sys.stderr)
        return 1
    server.start(loop)
    LOG.info("ready: http://%s:%d", args.host, args.port)
    failed = asyncio.create_task(server.failed())
    await asyncio.wait({listening, stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        LOG.info("draining: %d answers are running or waiting", server.admitted)
        await server.drain(args.drain_seconds)
    listener.should_exit = True
    await listening
    return 1 if failed.done() else 0


def http_protocol(seconds: float = HEADER_SECONDS):
    """uvicorn's HTTP/1.1, which also closes connections that send no request for some seconds."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self.close_if_idle)

        def close_if_idle(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Protocol
