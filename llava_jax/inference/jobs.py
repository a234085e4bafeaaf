"""A request, and the same on its way through the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llava_jax.inference.answer import Answer
from llava_jax.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt as the model reads it, and how to answer it.

    Attributes:
      input_ids: int32[T] with the placeholder ids of the images.
      images: for each image, in the order of the placeholders, a function that gives it as
        uint8[side, side, 3]; called when the request's turn comes.
      pictures: what tells whether two requests are about the same images.
    """

    input_ids: np.ndarray
    images: tuple[Callable[[], np.ndarray], ...]
    params: SamplingParams
    pictures: tuple = ()


@dataclass
class Job:
    """A request on its way: what it waits with, then the row it is answered in.

    Attributes:
      stops: tokens that end the answer.
      budget: tokens that it may have.
      contents: int64[T], the prompt as `RowSlots` compares them.
      feature_ids: int32[T], as in `Prompts`.
      row: of the cache.
      shared: tokens at the start of the prompt that other rows hold.
      sources: int32[T], the row that computes, or has computed, each token.
      produced: tokens so far.
    """

    request: Request
    answer: Answer
    images: list[np.ndarray]
    stops: tuple[int, ...]
    budget: int
    contents: np.ndarray | None = None
    feature_ids: np.ndarray | None = None
    row: int = 0
    shared: int = 0
    sources: np.ndarray | None = None
    produced: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.input_ids)

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are to be read."""
        return self.length - self.shared

    @property
    def need(self) -> int:
        """Cache slots for the prompt and its answer."""
        return self.length + self.budget
