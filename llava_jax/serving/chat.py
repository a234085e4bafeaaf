"""`llava-jax chat`: one question, or a conversation, about pictures and videos in the terminal."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_jax.data.attachments import marked
from llava_jax.data.boxes import Boxes, draw_boxes
from llava_jax.data.media import load_image
from llava_jax.data.sources import look_at
from llava_jax.data.video import Video, inspect_video
from llava_jax.errors import LlavaError
from llava_jax.inference.model import Llava
from llava_jax.inference.pictures import fetch, source_name
from llava_jax.inference.sampling import CONTRAST_FIELDS, CONTRASTS, SamplingParams
from llava_jax.models.llava import LlavaConfig
from llava_jax.serving.command_line import add_model_arguments, load_from_arguments
from llava_jax.text.conversation import IMAGE_TOKEN, MARKS, ROLES, Turn

HELP = """/image FILE shows a picture with the next question
/video FILE shows a video, or a folder of frames, with the next question
/boxes FILE writes the last picture there, with the last answer's boxes drawn
/explain FILE writes the last picture there, with where the model looked for the last answer
/save FILE writes the conversation there
/reset starts over
/quit ends"""


@dataclass
class Conversation:
    """A conversation so far, and the pictures and videos that wait for the next question.

    Each of them is written as `<image>` in the question it was shown with, so the history is
    rendered to the same prompt each time.
    """

    allow_urls: bool = False
    history: list[tuple[str, str]] = field(default_factory=list)
    images: list[Image.Image | Video] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    waiting: int = 0

    def add_image(self, source: str) -> None:
        """Shows a picture with the next question; LlavaError if it cannot be read."""
        name = source_name(source, "picture")
        self.add(load_image(fetch(source, self.allow_urls), name), name)

    def add(self, shown: Image.Image | Video, name: str) -> None:
        """Shows a picture or a video with the next question."""
        self.images.append(shown)
        self.names.append(name)
        self.waiting += 1

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of its pictures."""
        return [image.size for image in self.images if isinstance(image, Image.Image)]

    def reset(self) -> None:
        """Forgets everything, pictures too."""
        self.history, self.images, self.names, self.waiting = [], [], [], 0

    def save(self, path: str) -> None:
        """Writes it as a LLaVA record, which `llava-jax show` and training read."""
        turns = [
            Turn(role, text)
            for pair in self.history
            for role, text in zip(ROLES, pair, strict=True)
        ]
        if not turns:
            raise LlavaError("nothing was said yet: there is nothing to save")
        count = len(self.names) - self.waiting
        record = {"id": Path(path).stem}
        for name, shown in zip(self.names[:count], self.images, strict=False):
            key = "video" if isinstance(shown, Video) else "image"
            record.setdefault(key, []).append(name)
        turns = [
            {"from": turn.role, "value": turn.text} for turn in marked(turns, self.images[:count])
        ]
        try:
            Path(path).write_text(
                json.dumps([record | {"conversations": turns}], ensure_ascii=False, indent=2)
                + "\n",
                encoding="utf-8",
            )
        except OSError as error:
            raise LlavaError(f"cannot write {path!r}: {error.strerror}") from None

    def save_boxes(self, path: str, boxes: Boxes) -> None:
        """Writes the last picture of a question, with the boxes of the last answer drawn on it.

        boxes: how the model writes them.
        """
        shown = self.images[: len(self.images) - self.waiting]
        shown = [image for image in shown if not isinstance(image, Video)]
        if self.history and not shown:
            raise LlavaError("no picture was shown: there is nothing to draw on")
        found = []
        if self.history:
            found = boxes.drawable(self.history[-1][1], shown[-1].size, len(shown) > 1)
        if not found:
            example = boxes.write((2, 1, 8, 9), (10, 10))
            raise LlavaError(f"the last answer has no box such as {example} on the picture")
        drawn = draw_boxes(shown[-1], found, "red")
        try:
            drawn.save(path)
        except (OSError, ValueError) as error:  # the latter: an unknown suffix
            raise LlavaError(f"cannot write {path!r}: {error}") from None

    def save_explanation(self, path: str, model: Llava, system: str | None) -> None:
        """Writes the last picture of a question, with where the model looked for the last answer.

        See `llava_jax.inference.explain`.
        """
        if not self.history:
            raise LlavaError("nothing was asked yet: there is no answer to explain")
        (question, answer), shown = self.history[-1], self.images[: len(self.images) - self.waiting]
        history = self.history[:-1]
        model.explain(question, shown, answer, history=history, system=system).save(path)

    def ask(self, model: Llava, question: str, **settings):
        """Yields the pieces of the answer and remembers it."""
        # The user types text: a literal <image> would ask for a picture that is not there.
        question = MARKS.sub("", question)
        question = f"{IMAGE_TOKEN}\n" * self.waiting + question
        answer = ""
        for piece in model.stream_chat(question, self.images, self.history, **settings):
            answer += piece
            yield piece
        self.history.append((question, MARKS.sub("", answer)))
        self.waiting = 0


def picture_words(config: LlavaConfig, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """How each picture of a conversation with pictures of such sizes is looked at.

    >>> picture_words(llava16_7b, [(640, 480)])
    ['picture 1: 640x480 pixels, 2x2 tiles and the whole, 2,340 tokens']
    """
    cut = lambda grid: f"{grid[0]}x{grid[1]} tiles and the whole" if grid else "one tile"
    looks = zip(sizes, config.layouts(sizes), strict=True)
    return [
        f"picture {i}: {width}x{height} pixels, {cut(layout.grid)}, {len(layout):,} tokens"
        for i, ((width, height), layout) in enumerate(looks, 1)
    ]


def video_words(config: LlavaConfig, path: str) -> str:
    """What a video takes: "video: 640x480 pixels, 32 frames, 6,273 tokens".

    LlavaError if the model takes none, or its head cannot be read.
    """
    width, height, frames = source = look_at(Video(path), config.image, path).source
    (layout,) = config.layouts([source])
    return f"video: {width}x{height} pixels, {frames} frames, {len(layout):,} tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE",
        help="a picture to ask about; may be given several times")  # fmt: skip
    add("--video", action="append", default=[], metavar="FILE",
        help="a video file, or a folder of frames, to ask about")  # fmt: skip
    add("--prompt", metavar="TEXT", help="ask once and print only the answer")
    add("--system", metavar="TEXT", help="system prompt; default: the template's own")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="length limit of an answer")
    add("--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the likeliest token each time, higher values draw more freely")  # fmt: skip
    add("--top_p", type=float, default=1.0, metavar="P",
        help="draw only among the likeliest tokens that together are this probable")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the draw")
    add("--contrast", choices=CONTRASTS,
        help="decode against blurred, noised or absent pictures, to see fewer things that are not "
        "there; default: off")  # fmt: skip
    add("--contrast_alpha", type=float, default=1.0, metavar="A",
        help="how much of the worse pictures' logits is taken away")  # fmt: skip
    add("--contrast_beta", type=float, default=0.1, metavar="B",
        help="only tokens at least this likely, relative to the likeliest")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Answers `--prompt`, or talks until /quit or the end of the input; returns the exit code."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", *CONTRAST_FIELDS)
    settings = {name: getattr(args, name) for name in names}
    SamplingParams.from_names(settings)  # reports a wrong value before the model is loaded
    conversation = Conversation(args.allow_urls)
    for path in args.image:
        conversation.add_image(path)
    for path in args.video:
        inspect_video(Video(path), path)  # reports a wrong one before the model is loaded
        conversation.add(Video(path), path)
    model = load_from_arguments(args)
    if args.system is not None:
        settings["system"] = args.system
    if args.prompt is not None:
        print("".join(conversation.ask(model, args.prompt, **settings)))
    else:
        words = picture_words(model.config, conversation.sizes)
        for line in (*words, *(video_words(model.config, path) for path in args.video)):
            print(line, file=sys.stderr)
        talk(model, conversation, settings)
    return 0


def talk(model: Llava, conversation: Conversation, settings: dict) -> None:
    """The loop of a conversation; after a wrong input its error is printed and it goes on."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not in every Python
            import readline  # noqa: F401  arrow keys edit the line
    if hasattr(sys.stdin, "reconfigure"):  # a byte that is not UTF-8 is a fault of its line alone
        sys.stdin.reconfigure(errors="surrogateescape")
    print(f"{HELP}\nanswers end at {model.describe_stops()}", file=sys.stderr)
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
            print(f"llava-jax chat: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)


def _one_line(model: Llava, conversation: Conversation, line: str, settings: dict) -> None:
    command, _, rest = line.partition(" ")
    path = os.path.expanduser(rest.strip())
    if command == "/reset":
        conversation.reset()
    elif command == "/image":
        conversation.add_image(path)
        print(picture_words(model.config, conversation.sizes)[-1], file=sys.stderr)
    elif command == "/video":
        print(video_words(model.config, path), file=sys.stderr)
        conversation.add(Video(path), path)
    elif command == "/boxes":
        conversation.save_boxes(path, model.boxes)
    elif command == "/explain":
        conversation.save_explanation(path, model, settings.get("system"))
    elif command == "/save":
        conversation.save(path)
    elif command.startswith("/"):
        print(f"unknown command {command}\n{HELP}", file=sys.stderr)
    elif line:
        for piece in conversation.ask(model, line, **settings):
            print(piece, end="", flush=True)
        print()
