"""A conversation's questions as independent ones that share their pictures.

Where a record holds many questions about one picture, each answer can be learnt from the picture
alone: every question sees the pictures and itself, not the questions and answers before it. What
all of them begin with is stored once in the row.
"""

import re
from collections.abc import Sequence

import numpy as np

from llava_jax.errors import RecordError
from llava_jax.text.conversation import IMAGE_TOKEN, Turn
from llava_jax.text.templates import Segment, Template, check_plain_text, render
from llava_jax.text.tokenization import IGNORE_INDEX, SegmentTokenizer, TokenRow

TURNS = ("conversation", "independent")
_LEADING_IMAGES = re.compile(rf"^(?:{IMAGE_TOKEN}\s*)*")


def render_turns(
    template: Template,
    turns: Sequence[Turn],
    mode: str,
    system: str | None = None,
    placeholder: str | None = None,
) -> list[tuple[Segment, ...]]:
    """The texts of one record: a single one, or with `mode` "independent" one for each question.

    Args:
      system: replaces the template's system prompt.
      placeholder: of the model, see `check_plain_text`.
    Raises:
      RecordError: the template cannot write the turns or the system prompt; a text holds the
        placeholder; with "independent", an image stands after the start of the first question.
    """
    for text in (system or "", *(turn.text for turn in turns)):
        check_plain_text(text, placeholder)
    template = template.with_system(system)
    if mode == "conversation":
        return [render(template, turns)]
    if len(turns) % 2:
        raise RecordError("no answer", "with data.turns=independent each question needs an answer")
    images = _LEADING_IMAGES.match(turns[0].text).group()
    questions = [turns[0].text[len(images) :], *(turn.text for turn in turns[2::2])]
    if any(IMAGE_TOKEN in text for text in questions):
        raise RecordError(
            "image within the conversation",
            "with data.turns=independent all images must stand before the first question",
        )
    pairs = zip(questions, turns[1::2], strict=True)
    return [render(template, (Turn("human", images + q), answer)) for q, answer in pairs]


def token_row(
    tokenizer: SegmentTokenizer,
    texts: Sequence[tuple[Segment, ...]],
    image_lengths: Sequence[int],
) -> TokenRow:
    """The output of `render_turns` as one TokenRow; `turn_ids` number its questions.

    image_lengths: tokens of each of the record's images, which all of the texts begin with.
    """
    rows = [tokenizer(text, image_lengths) for text in texts]
    if len(rows) == 1:
        return rows[0]
    shared = _shared_length(rows)
    tails = [slice(shared, None)] * len(rows)
    parts = [(rows[0], slice(shared)), *zip(rows, tails, strict=True)]
    joined = lambda name: np.concatenate([getattr(row, name)[part] for row, part in parts])
    lengths = [shared, *(len(row) - shared for row in rows)]
    return TokenRow(
        joined("input_ids"),
        joined("labels"),
        rows[0].image_spans,
        joined("offsets"),
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    )


def _shared_length(rows: Sequence[TokenRow]) -> int:
    """Tokens all rows begin with; each keeps at least one of its own before the first label."""
    limit = min(int(np.argmax(row.labels != IGNORE_INDEX)) for row in rows) - 1
    heads = np.stack([row.input_ids[: max(limit, 0)] for row in rows])
    differing = np.flatnonzero((heads != heads[0]).any(axis=0))
    return int(differing[0]) if len(differing) else heads.shape[1]


def turn_positions(turn_ids: np.ndarray) -> np.ndarray:
    """int32 [T]: positions of a row's tokens, each turn going on where the shared part ends."""
    shared = int((turn_ids == 0).sum())
    indices = np.arange(len(turn_ids), dtype=np.int32)
    starts = np.searchsorted(turn_ids, turn_ids)  # of each token's turn; turn_ids never falls
    return indices - starts.astype(np.int32) + np.where(turn_ids > 0, shared, 0).astype(np.int32)
