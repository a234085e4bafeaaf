"""Rendered segments -> token ids, labels and the places of the images.

As in LLaVA's tokenizer_image_token, the text is cut at `<image>` and each chunk is tokenized whole
and on its own: what a tokenizer does at the start of a text (the Llama-2 one writes a space there)
happens after each image too. Labels come from character offsets: a token is supervised iff it
overlaps a supervised segment, so nothing is ever searched in the text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer, models

from llava_jax.errors import LlavaError
from llava_jax.models.images import IMAGE_TOKEN_ID
from llava_jax.text.conversation import BREAK, IMAGE_TOKEN
from llava_jax.text.counting import TokenCounter
from llava_jax.text.templates import Segment, check_plain_text

IGNORE_INDEX = -100
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"
_CUTS = re.compile(f"{re.escape(IMAGE_TOKEN)}|{BREAK}")
_ANCHORS = ("\n", "0", "~", "a")  # put before a text that continues another


@dataclass(frozen=True)
class TokenRow:
    """One conversation as tokens.

    input_ids, labels: int32 [T]; labels are aligned with input_ids (not shifted) and -100 where
    there is no loss. image_spans: for each image the half-open range of its placeholder ids.
    offsets: int64 [T, 2], the characters of the rendered text that each token stands for; (-1, -1)
    for placeholders and for a BOS that the tokenizer added. turn_ids: int32 [T] where the row
    holds independent questions: 0 for what they share, then 1, 2, …; None otherwise.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_spans: tuple[tuple[int, int], ...]
    offsets: np.ndarray
    turn_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def fast_core(tokenizer) -> Tokenizer:
    """A private copy of the tokenizer's Rust core whose offsets keep leading spaces."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise LlavaError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} "
            f"({type(tokenizer).__name__}) gives no character offsets; "
            "labels need a fast tokenizer (a tokenizer.json)"
        )
    copied = Tokenizer.from_str(core.to_str())
    copied.no_truncation()
    copied.no_padding()
    # Changed as text, which is short without the vocabulary.
    ends = Tokenizer(models.BPE())
    ends.post_processor = core.post_processor
    state = json.loads(ends.to_str())
    _keep_spaces(state["post_processor"])
    copied.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
    return copied


def _keep_spaces(processor) -> None:
    # Byte-level post-processors cut the space off the offsets of " word", and leave a token of
    # spaces with an empty range; only the offsets change, never the ids.
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for inner in processor.get("processors", ()):
            _keep_spaces(inner)


def placeholder(tokenizer, image_token_id: int) -> str | None:
    """The text of the token that stands for an image's features; None if it is no token.

    Most LLaVAs call it `<image>`; some take another special token.

    Raises:
      LlavaError: it is an ordinary token of text.
    """
    core = tokenizer.backend_tokenizer
    token = core.id_to_token(image_token_id) if image_token_id >= 0 else None
    if token is not None and image_token_id not in core.get_added_tokens_decoder():
        if core.token_to_id(IMAGE_TOKEN) is not None:
            raise other_models(tokenizer, image_token_id)
        raise LlavaError(
            f"the tokenizer in {tokenizer.name_or_path} has {image_token_id}, which config.json "
            f"gives as image_token_index, for the text {token!r}: an image needs a token of its "
            f"own, such as a special token {IMAGE_TOKEN}"
        )
    return token


def other_models(tokenizer, image_token_id: int) -> LlavaError:
    """The error of a tokenizer whose `<image>` is not the model's placeholder."""
    return LlavaError(
        f"the tokenizer in {tokenizer.name_or_path} has {IMAGE_TOKEN} as "
        f"{tokenizer.backend_tokenizer.token_to_id(IMAGE_TOKEN)} and config.json has "
        f"image_token_index={image_token_id}: they belong to different models"
    )


class SegmentTokenizer:
    """Tokenizes rendered conversations for one model; picklable.

    Args:
      tokenizer: a Hugging Face fast tokenizer.
      image_token_id: the placeholder id.
      use_im_start_end: wrap each image in `<im_start>` and `<im_end>`, as LLaVA v1 could; both must
        be tokens of the tokenizer.
    """

    def __init__(
        self, tokenizer, image_token_id: int = IMAGE_TOKEN_ID, use_im_start_end: bool = False
    ):
        self.image_token_id = int(image_token_id)
        self.use_im_start_end = use_im_start_end
        self._core = fast_core(tokenizer)
        self._count = TokenCounter(self._core)
        self._learnt_ids: dict[str, int] = {}  # of the tokens of templates, once asked for
        self.placeholder = placeholder(tokenizer, self.image_token_id)
        added = self._core.get_added_tokens_decoder().values()
        self.special = tuple(token.content for token in added if token.special)
        if use_im_start_end:
            for token in (IM_START_TOKEN, IM_END_TOKEN):
                if self._core.token_to_id(token) is None:
                    raise LlavaError(
                        f"use_im_start_end needs the token {token} but the tokenizer "
                        f"{getattr(tokenizer, 'name_or_path', '')!r} has none"
                    )

    def fingerprint(self, images) -> str:
        """All that decides the ids, as text; `images`: what decides an image's number of tokens."""
        options = [images, self.image_token_id, self.use_im_start_end]
        return json.dumps(options) + self._core.to_str()

    def __call__(self, segments: Sequence[Segment], image_lengths: Sequence[int] = ()) -> TokenRow:
        """The tokens of one conversation.

        Args:
          segments: the rendered conversation.
          image_lengths: tokens of each image, in the order of their `<image>`.
        """
        chunks, spans = self._chunks(segments)
        encodings = self._core.encode_batch([text for _, text, _ in chunks])
        return self._row(chunks, encodings, spans, image_lengths)

    def measure(
        self,
        conversations: Sequence[Sequence[Segment]],
        image_lengths: Sequence[Sequence[int]],
        limit: int | None = None,
    ) -> tuple[np.ndarray, dict[int, TokenRow]]:
        """The number of tokens of each conversation, much faster than from its row.

        Returns:
          int64 [N] lengths, and number -> row of the conversations longer than `limit`.
        """
        pieces = [_pieces(self._checked_text(segments)) for segments in conversations]
        # Each text once, such as that before the first image.
        texts = list({text: None for row in pieces for _, text, mark in row if mark != BREAK})
        counts = dict(zip(texts, self._count(texts), strict=True))
        leading = self._leading_specials()
        lengths, rows = np.zeros(len(pieces), np.int64), {}
        for i, (row, images) in enumerate(zip(pieces, image_lengths, strict=True)):
            lengths[i] = leading + sum(images)
            for _, text, mark in row:
                is_new = mark != BREAK
                lengths[i] += counts[text] if is_new else len(continued(self._core, text)[0])
            if limit is not None and lengths[i] > limit:
                rows[i] = self(conversations[i], images)
        return lengths, rows

    def _leading_specials(self) -> int:
        mask = np.array(self._core.encode("a").special_tokens_mask)
        return int(np.argmin(mask)) if len(mask) else 0

    def text(self, segments: Sequence[Segment]) -> str:
        """The rendered conversation; each `<image>` in it stands for one image."""
        return "".join(self._segment_text(segment) for segment in segments)

    def _segment_text(self, segment: Segment) -> str:
        if not self.use_im_start_end:
            return segment.text
        return segment.text.replace(IMAGE_TOKEN, IM_START_TOKEN + IMAGE_TOKEN + IM_END_TOKEN)

    def _checked_text(self, segments: Sequence[Segment]) -> str:
        text = self.text(segments)
        check_plain_text(text, self.placeholder)
        return text

    def _chunks(self, segments: Sequence[Segment]):
        """The `_pieces` of the text, and [(start, end, segment)]."""
        spans, position = [], 0
        for segment in segments:
            end = position + len(self._segment_text(segment))
            spans.append((position, end, segment))
            position = end
        return _pieces(self._checked_text(segments)), spans

    def _row(self, chunks, encodings: Sequence[Encoding], spans, image_lengths) -> TokenRow:
        ids, offsets, images = [], [], []
        found = sum(before == IMAGE_TOKEN for _, _, before in chunks)
        if found != len(image_lengths):
            raise ValueError(f"{len(image_lengths)} image lengths for {found} images")
        length, lengths = 0, iter(image_lengths)
        for (position, text, before), encoding in zip(chunks, encodings, strict=True):
            if before == IMAGE_TOKEN:
                image = next(lengths)
                images.append((length, length + image))
                ids.append(np.full(image, self.image_token_id, np.int32))
                offsets.append(np.full((image, 2), -1, np.int64))
                length += image
            if before == BREAK:
                chunk_ids, chunk_offsets = continued(self._core, text, position)
            else:
                chunk_ids, chunk_offsets = _chunk_tokens(encoding, position, first=not before)
            ids.append(chunk_ids)
            offsets.append(chunk_offsets)
            length += len(chunk_ids)
        ids, offsets = np.concatenate(ids), np.concatenate(offsets)
        return TokenRow(ids, self._labels(ids, offsets, spans), tuple(images), offsets)

    def _labels(self, ids: np.ndarray, offsets: np.ndarray, spans) -> np.ndarray:
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        for start, end, segment in spans:
            leading, tokens = segment.leading_supervised_tokens, segment.learnt_tokens
            if not (segment.supervised or leading or tokens):
                continue
            here = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
            if tokens:
                here = here[np.isin(ids[here], [self._learnt_id(token) for token in tokens])]
            elif not segment.supervised:
                here = here[:leading]
            labels[here] = ids[here]
        return labels

    def _learnt_id(self, token: str) -> int:
        if token not in self._learnt_ids:
            ids = self._core.encode(token, add_special_tokens=False).ids
            if len(ids) != 1:
                raise LlavaError(f"{token!r}, which is to be learnt, is no token of the tokenizer")
            self._learnt_ids[token] = ids[0]
        return self._learnt_ids[token]


def _pieces(text: str) -> list[tuple[int, str, str]]:
    """What is tokenized on its own: (position in the text, piece, what is before it).

    Before a piece is nothing (""), an image or a BREAK.
    """
    pieces, start, before = [], 0, ""
    for match in _CUTS.finditer(text):
        pieces.append((start, text[start : match.start()], before))
        start, before = match.end(), match.group()
    pieces.append((start, text[start:], before))
    return pieces


def continued(core: Tokenizer, text: str, position: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text that follows another, with none across the seam.

    What a tokenizer does at the beginning of a text, such as writing a space, it does before an
    anchor, whose tokens are dropped.

    Args:
      position: of the text in the whole, for the offsets.

    Returns:
      int32 [T] ids and int64 [T, 2] offsets.
    """
    for anchor in _ANCHORS:
        encoding = core.encode(anchor + text)
        ids, offsets = _chunk_tokens(encoding, position - len(anchor), first=False)
        if not ((offsets[:, 0] < position) & (offsets[:, 1] > position)).any():
            break
    kept = offsets[:, 0] >= position
    return ids[kept], offsets[kept]


def _chunk_tokens(encoding: Encoding, position: int, first: bool):
    """int32 [T] ids and int64 [T, 2] offsets in the whole text, (-1, -1) for an added BOS.

    Of the tokens the tokenizer adds by itself only those before the first chunk are kept. They are
    known by the tokenizer's own mark, not by their id: ChatML begins with <|im_start|>, which is
    the BOS of SmolLM2.
    """
    ids = np.array(encoding.ids, np.int32)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + position
    added = np.array(encoding.special_tokens_mask, bool)
    # A token that stands for no character (a prefix) belongs to the character after it.
    offsets[:, 1] = np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    offsets[added] = -1
    keep = ~added
    if first:
        keep |= np.cumsum(~added) == 0
    return ids[keep], offsets[keep]


def truncate(row: TokenRow, max_length: int) -> tuple[TokenRow | None, str | None]:
    """The row cut at the right to `max_length` tokens, or (None, why it cannot be used)."""
    if len(row) <= max_length:
        return row, None
    kept = [span for span in row.image_spans if span[0] < max_length]
    if kept != list(row.image_spans):
        return None, "an image would be cut off"
    if any(end > max_length for _, end in kept):
        return None, "an image would be cut in two"
    labels = row.labels[:max_length]
    if (labels == IGNORE_INDEX).all():
        return None, "no supervised token is left"
    ids, offsets = row.input_ids[:max_length], row.offsets[:max_length]
    turn_ids = None if row.turn_ids is None else row.turn_ids[:max_length]
    return TokenRow(ids, labels, row.image_spans, offsets, turn_ids), None


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
