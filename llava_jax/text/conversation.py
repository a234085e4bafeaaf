"""A conversation: its turns, and the mark that stands for a picture in their text."""

from dataclasses import dataclass

IMAGE_TOKEN = "<image>"
ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Turn:
    """One message: role "human" or "gpt", and its text."""

    role: str
    text: str
