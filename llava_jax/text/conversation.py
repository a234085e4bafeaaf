"""A conversation: its turns, and the mark that stands for a picture or video in their text."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"  # read in place of IMAGE_TOKEN where videos are given; never kept
MARKS = re.compile(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}")
ROLES = ("human", "gpt")
# How files and requests of other programs write them.
ROLE_NAMES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt",
              "bing": "gpt", "bard": "gpt"}  # fmt: skip
SYSTEM_ROLES = ("system", "developer")
# Types of the parts of a message.
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text"), ("image_url", "input_image")
VIDEO_PARTS = ("video", "video_url")
# No token reaches across this character, which is part of no text (a Unicode noncharacter) and is
# removed when a text is tokenized.
BREAK = "\ufdd0"


@dataclass(frozen=True)
class Turn:
    """One message: role "human" or "gpt", and its text."""

    role: str
    text: str

    @property
    def images(self) -> int:
        """Pictures that the text has a place for."""
        return images_in(self.text)


def images_in(text: str) -> int:
    """How many pictures a text has a place for."""
    return text.count(IMAGE_TOKEN)


def with_times(turns: Sequence[Turn], times: Sequence[str]) -> list[Turn]:
    r"""Turns with the sentences about the times of their videos, as LLaVA-Video reads them.

        "<image>\nWhat?" and "The video ..."  ->  "<image>\nThe video ...\n\nWhat?"

    Args:
      times: for each `<image>` the sentences that follow it, "" for none.
    """
    found, waiting = [], iter(times)
    for turn in turns:
        here, text = [next(waiting) for _ in range(turn.images)], turn.text
        if len(here) == 1 and here[0]:
            text = f"{IMAGE_TOKEN}\n{here[0]}\n{text.replace(IMAGE_TOKEN, '')}"
        elif any(here):
            first, *rest = text.split(IMAGE_TOKEN)
            behind = [time and f"\n{time}\n" for time in here]
            pieces = [IMAGE_TOKEN + time + t for time, t in zip(behind, rest, strict=True)]
            text = first + "".join(pieces)
        found.append(Turn(turn.role, text))
    return found


def spelled_out(text: str, marks: Iterable[str]) -> str:
    """A text in which each of `marks` is plain text: read letter by letter, never as one token.

    spelled_out("a <image>", ["<image>"])  ->  "a <" + BREAK + "image>"
    """
    for mark in marks:
        if len(mark) > 1 and mark in text:
            text = text.replace(mark, mark[0] + BREAK + mark[1:])
    return text
