"""A request as a JSON object, from a file or a client, as what the engine answers.

Keys: `prompt`, and if wanted `id`, `images` or `image` (one or a list: a path below the root of
images, a `data:` address or, if allowed, an http one), `videos` or `video` (one or a list of paths
below that root: files, or folders of frames), `history` (a list of [question, answer]), `system`,
and any sampling parameter by vLLM's or Hugging Face's name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llava_jax.data.addresses import is_address
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Request
from llava_jax.inference.model import Llava
from llava_jax.inference.pictures import ImageSource
from llava_jax.inference.sampling import SamplingParams
from llava_jax.text.conversation import IMAGE_TOKEN, MARKS, VIDEO_TOKEN

OWN_KEYS = ("id", "prompt", "image", "images", "video", "videos", "history", "system")


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
    texts = [text for pair in history for text in pair if isinstance(text, str)]
    images = _sources(item, image_root, "".join([*texts, prompt]))
    return model.request(prompt, images, params, [tuple(pair) for pair in history], system)


def _sources(item: Mapping, root: Path, text: str) -> list[ImageSource]:
    """Pictures and videos in the order of their marks; without marks the pictures come first."""
    images = [_image(source, root) for source in _given(item, "image", "paths or addresses")]
    videos = [Video(root / path) for path in _given(item, "video", "paths")]
    marks = MARKS.findall(text)
    if not (images and videos and marks):
        return [*images, *videos]
    if marks.count(VIDEO_TOKEN) != len(videos) or len(marks) != len(images) + len(videos):
        raise LlavaError(
            f"{len(images)} image(s) and {len(videos)} video(s), but the text has "
            f"{marks.count(IMAGE_TOKEN)} {IMAGE_TOKEN} and {marks.count(VIDEO_TOKEN)} "
            f"{VIDEO_TOKEN}: write one for each, or none"
        )
    rest = {IMAGE_TOKEN: iter(images), VIDEO_TOKEN: iter(videos)}
    return [next(rest[mark]) for mark in marks]


def _image(source: str | bytes, root: Path) -> ImageSource:
    return source if isinstance(source, bytes) or is_address(source) else root / source


def _given(item: Mapping, kind: str, wanted: str) -> list[str | bytes]:
    """The values of `image` or `images`, `video` or `videos`."""
    given = [key for key in (f"{kind}s", kind) if item.get(key) is not None]
    if len(given) > 1:
        raise LlavaError(f"give {kind}s in {kind}s or in {kind}, not in both")
    values = item[given[0]] if given else []
    values = values if isinstance(values, list) else [values]
    kinds = str | bytes if kind == "image" else str
    if not all(isinstance(value, kinds) and value for value in values):
        raise LlavaError(f"{given[0]} must be {wanted}, none empty")
    if kind == "video" and any(map(is_address, values)):
        raise LlavaError(f"{given[0]} must be paths: save a video that has an address as a file")
    return values
