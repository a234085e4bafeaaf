"""`llava-jax serve`: a model behind OpenAI's HTTP interface, and a page to chat with it."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax

from llava_jax.errors import LlavaError
from llava_jax.inference.engine import Engine
from llava_jax.inference.explain import FEWEST_WINDOWS
from llava_jax.inference.jobs import pages_of
from llava_jax.inference.lookup import check_lookup
from llava_jax.inference.paging import check_cache_tokens
from llava_jax.inference.prefill import cache_bucket
from llava_jax.inference.replicas import Replicas
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.cache import PAGE
from llava_jax.models.images import cells_a_side
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel import hosts
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments

LOG = logging.getLogger(__name__)
ROOM = 1024  # tokens of the default context for a question and its answer


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
        help="tokens of a prompt and its answer (2048, or the largest picture and 1024 more)",
    )  # fmt: skip
    work.add_argument(
        "--dry_run", metavar="TOPOLOGY",
        help="serve nothing; compile for devices such as h100:1 or v5e:2x2 and report the cost",
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
        "--url_hosts", nargs="+", metavar="NAME",
        help="download pictures from these hosts alone; --allow_urls is for every public host",
    )  # fmt: skip
    work.add_argument(
        "--drain_seconds", type=float, default=30.0,
        help="time for running answers to end after SIGTERM (%(default)s)",
    )  # fmt: skip
    work.add_argument(
        "--strict", action="store_true", help="refuse requests with fields that are not known"
    )
    work.add_argument(
        "--explain", action="store_true",
        help="allow /v1/explain, and its button in the page: where the model looked, for 65 passes",
    )  # fmt: skip
    work.add_argument(
        "--prompt_logprobs", action="store_true", help="allow prompt_logprobs, which cost a pass"
    )
    work.add_argument(
        "--contrast", action="store_true",
        help="allow contrast, which takes two rows; nearly twice as many programs are compiled",
    )  # fmt: skip


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
    from llava_jax.serving.connections import http_protocol

    if place := hosts.place():
        LOG.info(
            "this is process %d of %d, each a server of its own: put a load balancer before them",
            place.index,
            place.count,
        )
    server = make_server(args)
    listening_on = listen(args.host, args.port)
    config = uvicorn.Config(
        server,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        http=http_protocol(),
        timeout_graceful_shutdown=5,
    )
    return asyncio.run(_serve(args, server, config, listening_on))


def check_arguments(args) -> None:
    """LlavaError if a number among the arguments makes no sense, whatever the model."""
    if args.batch_size < 1 or args.max_queue < 1:
        raise LlavaError("--batch_size and --max_queue must be at least 1")
    if args.explain and args.max_queue <= (least := FEWEST_WINDOWS**2):
        raise LlavaError(f"--explain needs --max_queue to be at least {least + 1}")
    if args.replicas < 1 or args.tensor < 1:
        raise LlavaError("--replicas and --tensor must be at least 1")
    if args.max_images < 0 or args.drain_seconds < 0:
        raise LlavaError("--max_images and --drain_seconds must be at least 0")
    check_lookup(args.lookup)
    check_cache_tokens(args.cache_tokens)
    if args.contrast and args.batch_size <= args.replicas:
        raise LlavaError(
            f"--contrast takes two rows of a copy: give a --batch_size of at least "
            f"{args.replicas + 1}, not {args.batch_size}"
        )
    SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens or 1)  # raises
    if args.max_tokens is not None and args.max_tokens < 1:
        raise LlavaError(f"--max_tokens must be at least 1, not {args.max_tokens}")


def make_server(args):
    """The application of the arguments, without its model."""
    from llava_jax.serving.api import Defaults, Limits
    from llava_jax.serving.app import Options, Server

    check_arguments(args)
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
            explanations=args.explain,
            limits=Limits(
                images=args.max_images,
                max_tokens=args.max_tokens,
                prompt_logprobs=args.prompt_logprobs,
                contrast=args.contrast,
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
        except UnicodeDecodeError:
            raise LlavaError(f"--api_key_file {path} is not text in UTF-8") from None
        if not keys:
            raise LlavaError(f"--api_key_file {path} holds no key")
    return keys


def load(args, server) -> None:
    """Loads the model and compiles everything that requests can need; reports in `progress`."""
    model = load_from_arguments(args)
    context = context_length(args.max_model_len, model.config)
    check_cache(args, context)

    def report(done: int, count: int) -> None:
        server.progress = f"compiling {done} of {count} programs"
        if done % 10 == 0 or done == count:
            LOG.info("%s", server.progress)

    few = not args.all_shapes
    model.engine.warm_up(args.batch_size, context, report, few, args.contrast, args.explain)
    LOG.info("%s", describe_memory(model.engine))
    LOG.info("%s", describe_pictures(model.config, context))
    hosts = [name.lower() for name in args.url_hosts or ()]
    urls = hosts if hosts or args.allow_urls else None
    server.attach(model, context, args.batch_size, urls)


def context_length(wanted: int | None, config: LlavaConfig) -> int:
    """Tokens of a prompt and its answer: --max_model_len, or `default_context`."""
    limit = config.decoder.max_position_embeddings
    context = wanted or default_context(config)
    if not 16 <= context <= limit:
        raise LlavaError(f"--max_model_len must be from 16 to {limit}, the model's, not {context}")
    return context


def check_cache(args, context: int) -> None:
    """LlavaError if --cache_tokens leaves no room for a request as long as the context."""
    least = pages_of(context) * PAGE * (2 if args.contrast else 1)
    if args.cache_tokens is not None and args.cache_tokens < least:
        raise LlavaError(
            f"--cache_tokens {args.cache_tokens} holds no request of {context} tokens"
            f"{', twice for --contrast' if args.contrast else ''}: give at least {least}, or a "
            "smaller --max_model_len"
        )


def default_context(config: LlavaConfig) -> int:
    """Tokens of a prompt and its answer: 2048, or more if the model's pictures take more.

    The largest picture, a question and an answer fit, unless the model itself reads less.
    """
    room = config.most_tokens + ROOM
    return min(config.decoder.max_position_embeddings, max(2048, cache_bucket(room)))


def describe_memory(engine: Engine | Replicas) -> str:
    """What an engine and its copies keep on their devices, for people to read."""
    devices = [one.device for one in getattr(engine, "engines", [engine])]
    gigabytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9
    return (
        f"the cache of {sum(device.pages for device in devices) * PAGE:,} tokens takes "
        f"{sum(gigabytes(device.state.cache) for device in devices):.2f} GB, the features of "
        f"{devices[0].tile_slots} tiles {sum(gigabytes(device.store) for device in devices):.2f} GB"
    )


def describe_pictures(config: LlavaConfig, context: int) -> str:
    """How much of a context pictures take, for people to read."""
    most = config.most_tokens
    if config.image.tiling is None:
        return f"a picture takes {most:,} tokens: at most {context // most} fit"
    least = cells_a_side(config.image, config.tokens_per_tile) ** 2
    words = "the largest fits" if most < context else "larger ones are refused: --max_model_len"
    return f"a picture takes from {least:,} to {most:,} tokens, by its size: {words}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; LlavaError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise LlavaError(
            f"--host {host} --port {port} cannot be listened on: {words}; choose another"
        ) from None


async def _serve(args, server, config, listening_on: socket.socket) -> int:
    import uvicorn

    class Listener(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # SIGTERM is ours: `/ready` must say so before the socket closes

    listener, loop, signals = Listener(config), asyncio.get_running_loop(), []
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        signals.append(1)
        first.set()
        if len(signals) > 1:
            second.set()
        if len(signals) > 2:
            os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    listening = asyncio.create_task(listener.serve(sockets=[listening_on]))
    loading = asyncio.create_task(asyncio.to_thread(load, args, server))
    stopping = asyncio.create_task(first.wait())
    await asyncio.wait({listening, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():  # a thread that compiles cannot be ended
        os._exit(0)
    await loading
    server.start(loop)
    address, port = listening_on.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    LOG.info("ready: http://%s:%d, after %.0f s of CPU", host, port, time.process_time())
    failed = asyncio.create_task(server.failed())
    await asyncio.wait({listening, stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
    clean = stopping.done() and await _drain(args, server, second)
    server.stop()
    listener.should_exit = True
    await listening
    await asyncio.to_thread(server.worker.join, 5)
    if server.worker.is_alive():  # in a call of the device, which nobody can end
        os._exit(1)
    return 0 if clean else 1


async def _drain(args, server, at_once: asyncio.Event) -> bool:
    """Waits for the running answers, until the time is over or a second signal comes."""
    LOG.info("draining: %d answers are running or waiting", server.admitted)
    drained = asyncio.create_task(server.drain(args.drain_seconds))
    hurried = asyncio.create_task(at_once.wait())
    await asyncio.wait({drained, hurried}, return_when=asyncio.FIRST_COMPLETED)
    if drained.done() and drained.result():
        return True
    LOG.warning("stopped with %d answers unfinished", server.admitted)
    return False
