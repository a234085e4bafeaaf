"""A conversation: its turns, and the mark that stands for a picture in their text."""

from collections.abc import Iterable
from dataclasses import dataclass

IMAGE_TOKEN = "<image>"
ROLES = ("human", "gpt")
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


def spelled_out(text: str, marks: Iterable[str]) -> str:
    """A text in which each of `marks` is plain text: read letter by letter, never as one token.

    spelled_out("a <image>", ["<image>"])  ->  "a <" + BREAK + "image>"
    """
    for mark in marks:
        if len(mark) > 1 and mark in text:
            text = text.replace(mark, mark[0] + BREAK + mark[1:])
    return text
