"""A request as a JSON object, from a file or a client, as what the engine answers.

Keys: `prompt`, and if wanted `id`, `images` or `image` (one or a list: a path below the root of
images, a `data:` address or, if allowed, an http one), `history` (a list of [question, answer]),
`system`, and any sampling parameter by vLLM's or Hugging Face's name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llava_jax.data.addresses import is_address
from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.pictures import ImageSource
from llava_jax.inference.sampling import SamplingParams

OWN_KEYS = ("id", "prompt", "image", "images", "history", "system")


def read_line(line: bytes) -> dict:
    """The JSON object of a line; LlavaError if it is none."""
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"not a line of JSON: {error}") from None
    if not isinstance(item, dict):
        raise LlavaError("a request must be a JSON object with a text 'prompt'")
    return item


def read_request(
    model: Llava, item: Mapping, image_root: Path, sampling: Mapping | None = None
) -> Request:
    """The request of a JSON object.

    Args:
      image_root: folder of the paths in `images`.
      sampling: parameters for requests that do not give their own.

    Raises:
      LlavaError: the request is wrong.
    """
    names = {key: value for key, value in item.items() if key not in OWN_KEYS}
    params = SamplingParams.from_names(sampling or {}, names, other_names=OWN_KEYS)
    prompt, history, system = item.get("prompt"), item.get("history", []), item.get("system")
    if not isinstance(prompt, str):
        raise LlavaError("a request must be a JSON object with a text 'prompt'")
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise LlavaError("history must be a list of [question, answer]")
    if not isinstance(system, str | None):
        raise LlavaError(f"system must be a text, not {system!r:.80}")
    images = _images(item, image_root)
    return model.request(prompt, images, params, [tuple(pair) for pair in history], system)


def _images(item: Mapping, root: Path) -> list[ImageSource]:
    given = [key for key in ("images", "image") if item.get(key) is not None]
    if len(given) > 1:
        raise LlavaError("give the pictures in images or in image, not in both")
    images = item[given[0]] if given else []
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise LlavaError(f"{given[0]} must be paths or addresses, none empty")
    return [image if is_address(image) else root / image for image in images]
