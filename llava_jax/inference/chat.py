"""`llava-jax chat`: one question, or a conversation, about pictures in the terminal."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from llava_jax.data.images import load_image
from llava_jax.data.records import IMAGE_TOKEN
from llava_jax.errors import LlavaError
from llava_jax.inference.model import DTYPES, Llava

HELP = "/image FILE adds a picture, /reset starts over, /quit ends"


@dataclass
class Conversation:
    """What was said so far, and the pictures that wait for the next question.

    Every picture is written as `<image>` in the question it was shown with, so the history renders
    to the same prompt each time.
    """

    history: list[tuple[str, str]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    waiting: int = 0

    def add_image(self, path: str) -> None:
        """Shows a picture with the next question; LlavaError if it cannot be read."""
        load_image(path)
        self.images.append(path)
        self.waiting += 1

    def reset(self) -> None:
        """Forgets everything, pictures too."""
        self.history, self.images, self.waiting = [], [], 0

    def ask(self, model: Llava, question: str, **settings):
        """Yields the pieces of the answer and remembers it."""
        # What the user types is text: a literal <image> would ask for a picture that is not there.
        question = question.replace(IMAGE_TOKEN, "")
        question = f"{IMAGE_TOKEN}\n" * self.waiting + question
        answer = ""
        for piece in model.stream_chat(question, self.images, self.history, **settings):
            answer += piece
            yield piece
        self.history.append((question, answer.replace(IMAGE_TOKEN, "")))
        self.waiting = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="of train.py, or Hugging Face",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask once and print only the answer")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def main(args: argparse.Namespace) -> int:
    """Answers `--prompt`, or talks until /quit or the end of the input; returns the exit code."""
    conversation = Conversation()
    for path in args.image:
        conversation.add_image(path)
    if not Path(args.checkpoint).is_dir():
        raise LlavaError(f"no checkpoint folder at {args.checkpoint}")
    model = Llava.from_pretrained(args.checkpoint, dtype=args.dtype)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    if args.prompt is not None:
        print("".join(conversation.ask(model, args.prompt, **settings)))
    else:
        talk(model, conversation, settings)
    return 0


def talk(model: Llava, conversation: Conversation, settings: dict) -> None:
    """The loop of a conversation; a wrong input is told and the conversation goes on."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line == "/quit":
            return
        try:
            _one_line(model, conversation, line, settings)
        except LlavaError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)


def _one_line(model: Llava, conversation: Conversation, line: str, settings: dict) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/image":
        conversation.add_image(rest.strip())
    elif command.startswith("/"):
        print(f"unknown command {command}: {HELP}", file=sys.stderr)
    elif line:
        for piece in conversation.ask(model, line, **settings):
            print(piece, end="", flush=True)
        print()
