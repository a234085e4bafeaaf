"""Pictures and videos of requests: their order, and what is refused."""

from pathlib import Path

import pytest

from llava_jax.data.video import Video
from llava_jax.errors import LlavaError
from llava_jax.serving.requests import read_request


class Recorder:
    def request(self, prompt, images, params, history, system):
        return images


def sources(**item) -> list[str]:
    """The names of a request's sources below the root; of a video with a +."""
    images = read_request(Recorder(), {"prompt": "?"} | item, Path("root"))
    name = lambda s: f"+{s.source}" if isinstance(s, Video) else str(s)
    return [name(source).replace("root/", "") for source in images]


@pytest.mark.parametrize(
    "item, expected",
    [
        ({"image": "a.png"}, ["a.png"]),
        ({"video": "a.mp4"}, ["+a.mp4"]),
        ({"videos": ["a.mp4", "frames"], "images": ["b.png"]}, ["b.png", "+a.mp4", "+frames"]),
        (
            {"prompt": "<video> <image>?", "videos": ["a.mp4"], "images": ["b.png"]},
            ["+a.mp4", "b.png"],
        ),
        (
            {"prompt": "<video>?", "history": [["<image>?", "x"]], "video": "a", "image": "b"},
            ["b", "+a"],
        ),
    ],
)
def test_sources_stand_in_the_order_of_their_marks(item, expected):
    assert sources(**item) == expected


@pytest.mark.parametrize(
    "item, message",
    [
        ({"video": "a", "videos": ["a"]}, "give videos in videos or in video, not in both"),
        ({"image": "a", "images": ["a"]}, "give images in images or in image, not in both"),
        ({"video": [3]}, "video must be paths, none empty"),
        ({"videos": [""]}, "videos must be paths, none empty"),
        ({"video": "http://a/b.mp4"}, "video must be paths: save a video that has an address"),
        (
            {"prompt": "<image> <image>", "video": "a", "image": "b"},
            "1 image.* and 1 video.* has 2 <image> and 0 <video>: write one for each, or none",
        ),
    ],
)
def test_what_is_refused(item, message):
    with pytest.raises(LlavaError, match=message):
        sources(**item)
