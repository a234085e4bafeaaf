"""Where did it look? The answer to a question about a picture, as two maps of the picture.

*Attention* is what the model's attention gave to each part of the picture while it chose a token of
the answer. It is cheap, and tells where information was read, not whether it was used: much of it
goes to a few tokens whatever they show, and the mean over heads and layers hides what single ones
do (https://arxiv.org/abs/1902.10186).

*Drop* is the honest check: how much less probable the answer becomes when a part of the picture is
blanked (https://arxiv.org/abs/1311.2901). It shows what the answer depends on.

A tokens of the answer, n of the picture, r windows along a side, H height, W width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from llava_jax.data.media import preprocess
from llava_jax.errors import LlavaError
from llava_jax.inference.answer import Answer
from llava_jax.inference.jobs import Request, picture_places
from llava_jax.inference.pictures import ImageSource, deal_sources
from llava_jax.inference.prompts import History
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.images import Size
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.places import picture_map

if TYPE_CHECKING:  # model.py imports this module
    from llava_jax.inference.model import Llava

SPAN = 3  # steps of a window, which is moved by one
WINDOWS, FEWEST_WINDOWS, MOST_WINDOWS = 8, SPAN, 32  # along a side
Shape = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a model looked on a picture for an answer, see the two maps above.

    Attributes:
      picture: upright, in RGB.
      answer: its text.
      tokens: the text of each of its A tokens; what ends an answer is none of them.
      logprobs: float32[A], the log probability of each token.
      shares: float32[A, n], the share of each of the picture's tokens in the attention to the
        prompt, by which the token was chosen: the mean over all heads of all layers.
      drops: float32[A, r, r], how much of its log probability a token loses with each window of the
        picture blanked, by row and column; see `window_boxes`.
      config: of the model.
      several: it is one of several pictures of the prompt.
    """

    picture: Image.Image
    answer: str
    tokens: tuple[str, ...]
    logprobs: np.ndarray
    shares: np.ndarray
    drops: np.ndarray
    config: LlavaConfig
    several: bool = False

    def attention(self, token: int | None = None, shape: Shape | None = None) -> np.ndarray:
        """The share of attention that fell on each pixel, float32[H, W], in all at most 1.

        It says where information was read, not that the answer rests on it: that is `drop`.

        Args:
          token: of the answer; by default the mean of all.
          shape: (H, W) of the map; by default a value for each pixel.
        """
        shares = self.shares.mean(0) if token is None else self.shares[token]
        return picture_map(self.config, self.picture.size, shares, self.several, shape)

    def drop(self, token: int | None = None, shape: Shape | None = None) -> np.ndarray:
        """The log probability that blanking each pixel costs, float32[H, W], in nats.

        A pixel has the mean of the nine windows that cover it. Below 0 blanking helps.

        Arguments as in `attention`, but by default of the whole answer.
        """
        drops = self.drops.sum(0) if token is None else self.drops[token]
        of_steps = sliding_window_view(drops, (SPAN, SPAN)).mean((2, 3))
        width, height = self.picture.size
        axes = zip((height, width), shape or (height, width), strict=True)
        rows, columns = (_step_of(side, pixels, len(drops)) for side, pixels in axes)
        return of_steps[np.ix_(rows, columns)].astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Writes both maps of the whole answer over the picture, as PNG or by the path's suffix."""
        from matplotlib.figure import Figure

        picture_format = format_of(path)
        width, height = self.picture.size
        figure = Figure(
            figsize=(10, 1 + 5 * min(max(height / width, 0.3), 2)), layout="constrained"
        )
        panels = (("attention", self.attention()), ("blanking: drop in nats", self.drop()))
        for axes, (title, values) in zip(figure.subplots(1, 2), panels, strict=True):
            axes.imshow(self.picture.convert("L"), cmap="gray", vmin=-255, vmax=255)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            heat = axes.imshow(values, cmap="inferno", alpha=0.6, extent=extent)
            figure.colorbar(heat, ax=axes, shrink=0.8)
            axes.set(title=title, xticks=[], yticks=[])
        title = f"{self.answer[:80]!r}, probability {np.exp(self.logprobs.sum()):.3g}"
        figure.suptitle(title, parse_math=False)  # prices are no formulas
        try:
            # Without a format, a path that has none would get a suffix.
            figure.savefig(path, dpi=100, format=picture_format)
        except OSError as error:
            raise LlavaError(f"cannot write {str(path)!r}: {error}") from None


def format_of(path: str | Path) -> str:
    """What `Explanation.save` writes to a path; LlavaError if it can write nothing there."""
    from matplotlib.figure import Figure

    path, known = Path(path), Figure().canvas.get_supported_filetypes()
    name = path.suffix[1:].lower() or "png"
    if name not in known:
        raise LlavaError(f"cannot write {str(path)!r}: give it a suffix of {', '.join(known)}")
    if not path.parent.is_dir():
        raise LlavaError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    return name


def peak(values: np.ndarray) -> tuple[float, float]:
    """(x, y) in pixels of a map's largest value; of several pixels that have it, their centre."""
    rows, columns = np.nonzero(values == values.max())
    return columns.mean() + 0.5, rows.mean() + 0.5


def steps_of(count: int) -> int:
    """The steps of a side by which so many windows move along it."""
    return count - SPAN + 1


def _edges(side: int, count: int) -> np.ndarray:
    """int[steps + 1]: where the steps of a side begin, and its end."""
    return np.round(np.linspace(0, side, steps_of(count) + 1)).astype(int)


def _step_of(side: int, pixels: int, count: int) -> np.ndarray:
    """int[pixels]: the step that each pixel of a map is in, by its centre."""
    centres = (np.arange(pixels) + 0.5) * side / pixels
    return np.searchsorted(_edges(side, count)[1:-1], centres, side="right")


def window_boxes(size: Size, count: int) -> Iterator[Box]:
    """The count x count windows of a picture, row by row, in pixels.

    Each is SPAN steps wide and high, and its neighbour is one step on. The first and the last hang
    over the edge, so that every step is covered by as many windows:

        count 5     aa|a..|     b|bb.|     |ccc|     |.dd|d     |..e|ee
    """
    for top, bottom in _extents(size[1], count):
        for left, right in _extents(size[0], count):
            yield left, top, right, bottom


def _extents(side: int, count: int) -> list[tuple[int, int]]:
    """Where each of the windows along a side begins and ends."""
    edges = _edges(side, count).tolist()
    padded = edges[:1] * (SPAN - 1) + edges + edges[-1:] * (SPAN - 1)
    return list(zip(padded[:-SPAN], padded[SPAN:], strict=True))


def blanked(picture: Image.Image, box: Box) -> Image.Image:
    """The picture with a box filled with the picture's mean colour."""
    colour = np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int)
    picture = picture.copy()
    picture.paste(tuple(colour.tolist()), box)
    return picture


class Inquiry:
    """The requests that explain an answer, and the explanation of what an engine makes of them.

    Args:
      request: what was answered; its last picture is explained.
      answer: the text.
      windows: along a side of the picture, each of which costs a pass.

    Attributes:
      requests: the first of the whole picture, the others each with a window blanked.

    Raises:
      LlavaError: there is no picture, or no answer; the prompt with its answer is too long.
    """

    def __init__(self, model: "Llava", request: Request, answer: str, windows: int = WINDOWS):
        if type(windows) is not int or not FEWEST_WINDOWS <= windows <= MOST_WINDOWS:
            raise LlavaError(
                f"windows must be a whole number from {FEWEST_WINDOWS} to {MOST_WINDOWS}, "
                f"not {windows!r}"
            )
        numbers = [i for i, picture in enumerate(request.pictures) if not picture.is_video]
        if not numbers:
            raise LlavaError(
                "there is no picture on which to show where the model looked: give one"
            )
        self._model, self._answer, self._windows = model, answer, windows
        self._number, self._several = numbers[-1], len(numbers) > 1
        whole = model.traced(request, answer)
        self._picture = whole.pictures[self._number].original()
        boxes = window_boxes(self._picture.size, windows)
        self.requests = [whole, *(self._with_blank(whole, box) for box in boxes)]

    def _with_blank(self, request: Request, box: Box) -> Request:
        pictures, shown = list(request.pictures), request.pictures[self._number]
        # Made when the turn of its job comes: a large picture is in memory a few times only.
        load = functools.partial(self._tiles, box)
        pictures[self._number] = dataclasses.replace(shown, load=load, key=(shown.key, box))
        return dataclasses.replace(request, pictures=tuple(pictures))

    def _tiles(self, box: Box) -> np.ndarray:
        spec = self._model.config.image
        return preprocess(blanked(self._picture, box), spec, several=self._several)

    def explanation(self, answers: Sequence[Answer]) -> Explanation:
        """What the answers to `requests` say, one each."""
        request, count = self.requests[0], self._windows
        whole, *others = (answer.trace for answer in answers)
        drops = np.stack([whole.logprobs - one.logprobs for one in others], axis=1)  # [A, r * r]
        places = picture_places(request, self._model.config)[self._number]
        ids = request.input_ids[-request.traced :].tolist()
        return Explanation(
            picture=self._picture,
            answer=self._answer,
            tokens=tuple(self._model.tokenizer.decode([token]) for token in ids),
            logprobs=whole.logprobs,
            shares=whole.attention[:, places],
            drops=drops.reshape(-1, count, count),
            config=self._model.config,
            several=self._several,
        )


def explain(
    model: "Llava",
    questions: str | Sequence[str],
    images: Sequence | ImageSource | None,
    answers: str | Sequence[str] | None = None,
    *,
    history: History = (),
    system: str | None = None,
    windows: int = WINDOWS,
    batch_size: int = 32,
) -> Explanation | list[Explanation]:
    """Where a model looked on the picture of each question; of several pictures on the last.

    Args:
      questions: a single str gives a single result.
      images: for each question an image or a list of them, as in `Llava.stream_chat`.
      answers: to be explained; by default the model's likeliest.
      history, system: of each question, as in `Llava.stream_chat`.
      windows: along a side of the picture; their square is the number of passes.
      batch_size: the most requests that are taken at once.
    """
    if isinstance(questions, str):
        options = {"history": history, "system": system, "windows": windows}
        given = None if answers is None else [answers]
        return explain(model, [questions], [images], given, batch_size=batch_size, **options)[0]
    sources = deal_sources(images, len(questions))
    requests = [
        model.request(question, of_question, SamplingParams(), history, system)
        for question, of_question in zip(questions, sources, strict=True)
    ]
    if answers is None:
        answers = model.answer(requests, batch_size)
    texts = not isinstance(answers, str) and all(isinstance(answer, str) for answer in answers)
    if not texts or len(answers) != len(questions):
        raise LlavaError(f"answers must be a list of {len(questions)} texts, one a question")
    pairs = zip(requests, answers, strict=True)
    inquiries = [Inquiry(model, request, answer, windows) for request, answer in pairs]
    explanations = []
    for inquiry in inquiries:  # one after the other, as their traces are large
        traced = model.answers(inquiry.requests, batch_size)
        explanations.append(inquiry.explanation([answer for (answer,) in traced]))
    return explanations
