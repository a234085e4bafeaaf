"""POST /v1/explain: where the model looked for an answer, for a client that draws it."""

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.explain import (
    FEWEST_WINDOWS,
    MOST_WINDOWS,
    WINDOWS,
    Explanation,
    Inquiry,
    steps_of,
)
from llava_jax.inference.jobs import Job, Picture
from llava_jax.inference.sampling import SamplingParams
from llava_jax.serving.api import ApiError, read_model
from llava_jax.serving.messages import Messages, read_answered
from llava_jax.serving.streams import while_connected
from llava_jax.serving.worker import Ticket

if TYPE_CHECKING:  # app.py imports this module
    from llava_jax.serving.app import Server

CELLS = 32  # of a map of attention, along the picture's longer side


async def explain(server: "Server", request: Request) -> Response:
    """The explanation of the last message, an assistant's, on the last picture before it.

        {"messages": [{"role": "user", "content": [...]}, {"role": "assistant", "content": "red"}]}
        ->  {"width": 64, "height": 64, "tokens": ["red"], "logprobs": [-0.01],
             "attention": [[[0.001, ...], ...]], "drop": [[[0.2, ...], ...]], ...}

    Both maps have rows of cells of equal size for each token, and cover the picture. Attention is
    the share that fell on a cell, drop the log probability that blanking it costs. `windows` is as
    in `llava_jax.inference.explain`; each of their square takes a place in the queue.
    """
    options = server.options
    server.check_room(1)
    if not options.explanations:
        raise ApiError(400, "explanations are turned off on this server: see --explain", code="off")
    with contextlib.ExitStack() as held:
        # To the end: the pictures are kept as they came.
        body = await server.guards.read_json(request, held)
        model = read_model(body.get("model"), options.names)
        messages, answer = read_answered(body.get("messages"), options.limits)
        windows = _windows(body.get("windows"), options.queue)
        held.enter_context(server.room(windows**2 + 1))
        async with while_connected(request.receive):
            shown = messages.images, messages.names
            pictures = await server.pictures.read(*shown, originals=True)
            inquiry, jobs = await asyncio.to_thread(
                _inquire, server, messages, pictures, answer, windows
            )
            pieces = asyncio.Queue()
            ticket = Ticket(jobs, pieces.put_nowait)
            held.callback(server.worker.cancel, ticket)
            server.worker.submit(ticket)
            left = len(jobs)
            while left:
                piece = await pieces.get()
                if piece.error:
                    raise piece.error
                left -= piece.reason is not None
            answers = [job.answer for job in jobs]
            return await asyncio.to_thread(_response, model, inquiry, answers)


def _windows(value, queue: int) -> int:
    """The windows along a side, by default as many as the queue has room for, at most WINDOWS."""
    most = min(MOST_WINDOWS, math.isqrt(queue - 1))
    value = min(WINDOWS, most) if value is None else value
    if type(value) is not int or not FEWEST_WINDOWS <= value <= most:
        message = (
            f"windows must be a whole number from {FEWEST_WINDOWS} to {most}, for which the queue "
            "has room"
        )
        raise ApiError(400, message, "windows", "invalid_value")
    return value


def _inquire(
    server: "Server", messages: Messages, pictures: list[Picture], answer: str, windows: int
) -> tuple[Inquiry, list[Job]]:
    """What the engine is asked; runs on a thread."""
    model = server.model
    try:
        request = model.conversation_request(
            messages.turns, pictures, SamplingParams(), messages.system
        )
        inquiry = Inquiry(model, request, answer, windows)
    except LlavaError as error:
        raise ApiError(400, str(error), "messages", "invalid_prompt") from None
    if (length := len(inquiry.requests[0].input_ids)) > server.context:
        message = f"the prompt and its answer have {length} tokens, the context {server.context}"
        raise ApiError(400, message, "messages", "context_length_exceeded")
    return inquiry, [model.jobs(request)[0] for request in inquiry.requests]


def _response(model: str, inquiry: Inquiry, answers: list[Answer]) -> Response:
    """The maps of all tokens as JSON, which may be megabytes; runs on a thread."""
    maps = _maps(inquiry.explanation(answers))
    return JSONResponse({"object": "explanation", "model": model, **maps})


def _maps(found: Explanation) -> dict:
    width, height = found.picture.size
    scale = min(1, CELLS / max(width, height))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    steps = (steps_of(found.drops.shape[1]),) * 2
    tokens = range(len(found.tokens))
    return {
        "width": width,
        "height": height,
        "tokens": found.tokens,
        "logprobs": _short(found.logprobs),
        "attention": [_short(found.attention(token, shape)) for token in tokens],
        "drop": [_short(found.drop(token, steps)) for token in tokens],
    }


def _short(values: np.ndarray) -> list:
    """An array as nested lists of numbers of four digits."""
    return np.vectorize(lambda value: float(f"{value:.4g}"), otypes=[float])(values).tolist()
