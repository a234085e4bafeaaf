"""POST /v1/boxes: boxes in an answer, for a client that draws them."""

import asyncio
import contextlib
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llava_jax.data.boxes import Boxes
from llava_jax.serving.api import ApiError, Limits
from llava_jax.serving.messages import check_length

if TYPE_CHECKING:  # app.py imports this module
    from llava_jax.serving.app import Server

LONGEST_SIDE = 1 << 20


async def boxes(server: "Server", request: Request) -> Response:
    """Where the boxes of a text are on a picture."""
    server.check_open()
    with contextlib.ExitStack() as held:
        body = await server.guards.read_json(request, held)
    found = await asyncio.to_thread(boxes_in, body, server.model.boxes, server.options.limits)
    return JSONResponse(found)


def boxes_in(body: dict, boxes: Boxes, limits: Limits) -> dict:
    """The answer to POST /v1/boxes: where the boxes of a text are on a picture.

        {"text": "[0.25, 0.25, 0.75, 0.5]", "width": 200, "height": 100}
        ->  {"boxes": [[50, 0, 150, 50]]}

    They are left, top, right, bottom in pixels of the picture, and cut to it. With `several` it is
    one of several pictures of its prompt.

    Args:
      boxes: how the model writes them.
    """
    text, several = body.get("text"), body.get("several", False)
    if not isinstance(text, str):
        raise ApiError(400, "text must be a string", "text", "invalid_type")
    check_length(len(text), limits, "text")
    if not isinstance(several, bool):
        raise ApiError(400, "several must be true or false", "several", "invalid_type")
    size = body.get("width"), body.get("height")
    for name, side in zip(("width", "height"), size, strict=True):
        if type(side) is not int or not 1 <= side <= LONGEST_SIDE:
            raise ApiError(
                400, f"{name} must be that of a picture in pixels", name, "invalid_value"
            )
    return {"boxes": boxes.drawable(text, size, several)}
