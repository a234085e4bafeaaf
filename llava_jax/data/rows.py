"""The row format, and the one schema of a batch that packing, dry run, benches and tests share.

B rows, T tokens in a row, K tiles in a row, S side of a tile, P features of a tile.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.data import sources
from llava_jax.data.augment import UNCHANGED, Augmentation
from llava_jax.data.boxes import Boxes
from llava_jax.data.media import ImageError, load_image
from llava_jax.data.parsing import Record
from llava_jax.data.record_boxes import nominal_size, placed_boxes
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError
from llava_jax.models.images import (
    IMAGE_TOKEN_ID,
    TEXT,
    ImageSpec,
    Layout,
    Source,
    layouts,
)
from llava_jax.models.taps import feature_places, inverse
from llava_jax.text.conversation import with_times
from llava_jax.text.templates import PAIR, TURNS, Segment, Template, get_template, render_turns
from llava_jax.text.tokenization import (
    IGNORE_INDEX,
    SegmentTokenizer,
    TokenRow,
    token_row,
    truncate,
    turn_positions,
)


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How records become rows: all that decides the arrays of a batch besides the records.

    Attributes:
      template: of the conversations.
      image: how pictures are cut into tiles.
      tokens_per_tile: P.
      max_length: tokens of a conversation; a longer one loses its end.
      tiles: K; a record with more tiles is refused.
      row_length: T, at least max_length; None for max_length.
      packing: several conversations in a row; otherwise one.
      turns: "conversation", or "independent": each question sees the record's pictures and itself,
        or PAIR: each of a record's two answers sees the prompt and itself.
      image_token_id: what stands in `input_ids` for a feature.
      use_im_start_end: each picture stands between <im_start> and <im_end>.
      box_convention: how the boxes of records are written (`data.boxes`).
      seen: shape and dtype of what the encoder sees of a tile, where rows have that in place of the
        tile's pixels; see `data.features`.
    """

    template: Template
    image: ImageSpec
    tokens_per_tile: int
    max_length: int
    tiles: int
    row_length: int | None = None
    packing: bool = True
    turns: str = "conversation"
    image_token_id: int = IMAGE_TOKEN_ID
    use_im_start_end: bool = False
    box_convention: str = "llava"
    seen: tuple[tuple[int, ...], np.dtype] | None = None

    def __post_init__(self):
        if self.turns not in (*TURNS, PAIR):
            raise LlavaError(f"data.turns is {self.turns!r}: choose one of {', '.join(TURNS)}")
        if self.length < self.max_length:
            raise LlavaError(
                f"data.row_length is {self.row_length}: a row must have room for a conversation of "
                f"data.max_length={self.max_length}"
            )

    @classmethod
    def of(cls, model, template: str, max_length: int, tiles: int, **options) -> "RowFormat":
        """The rows that a model (LlavaConfig) takes; `template` is the name of one."""
        return cls(
            get_template(template),
            model.image,
            model.tokens_per_tile,
            max_length,
            tiles,
            image_token_id=model.image_token_id,
            use_im_start_end=model.use_im_start_end,
            **options,
        )

    @property
    def length(self) -> int:
        """T."""
        return self.max_length if self.row_length is None else self.row_length

    @property
    def crowded(self) -> str:
        """Why a record with more than K tiles is refused."""
        what = "tiles" if self.image.by_size else "images"
        return f"more {what} than images_per_row={self.tiles}"

    @property
    def boxes(self) -> Boxes:
        """How the boxes of records are written."""
        return Boxes(self.box_convention, self.image)

    def cut(self, row: TokenRow) -> tuple[TokenRow | None, str | None]:
        """`truncate` at `max_length`; a pair is whole or of no use, since its answers compare."""
        if self.turns == PAIR and len(row) > self.max_length:
            return None, "a pair is too long"
        return truncate(row, self.max_length)

    def layouts(self, sources: Sequence[Source]) -> list[Layout]:
        """The tiles and tokens of a record's pictures and videos; see `images.layouts`."""
        return layouts(self.image, self.tokens_per_tile, sources)

    def image_key(self):
        """All that decides the tokens of a picture besides its size, for the keys of caches."""
        if not self.image.by_size:
            return self.tokens_per_tile
        return [self.tokens_per_tile, dataclasses.asdict(self.image)]

    def row_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, dtype) of each array of a row.

        input_ids, labels: as in TokenRow. position_ids: restart in each conversation, and in each
        independent turn where the part that the turns share ends. segment_ids: 0 is padding,
        conversations count from 1. turn_ids: as in TokenRow, if turns are independent or a pair.
        feature_ids, feature_places: which feature of the row's tiles stands at each position, and
        its inverse (`models.images`). Where tokens mix several features both have an axis of taps,
        and feature_weights come with them. tiles: pixels, or seen: what the encoder sees of them;
        unused ones are zero.
        """
        tokens, side = (self.length,), self.image.size
        names = ["input_ids", "labels", "position_ids", "segment_ids", "feature_ids"]
        names += ["turn_ids"] if self.turns != "conversation" else []
        shapes = dict.fromkeys(names, tokens)
        shapes["feature_places"] = (self.tiles * self.tokens_per_tile,)
        taps = (self.image.taps,) if self.image.taps > 1 else ()
        for name in ("feature_ids", "feature_places"):
            shapes[name] += taps
        spec = {name: (shape, np.dtype(np.int32)) for name, shape in shapes.items()}
        if taps:
            spec["feature_weights"] = (tokens + taps, np.dtype(np.float32))
        shape, dtype = self.seen or ((side, side, 3), np.dtype(np.uint8))
        return spec | {self.shown: ((self.tiles, *shape), dtype)}

    @property
    def shown(self) -> str:
        """The array of a row that holds its pictures: tiles or seen."""
        return "seen" if self.seen else "tiles"


def batch_spec(row_format: RowFormat, rows: int) -> dict:
    """Name -> jax.ShapeDtypeStruct of each array of a batch of so many rows."""
    import jax  # here alone: data workers need no JAX

    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype)
        for name, (shape, dtype) in row_format.row_spec().items()
    }


def pack(
    conversations: Sequence[TokenRow],
    pictures: Sequence[tuple[Layout, np.ndarray]],
    row_format: RowFormat,
) -> dict[str, np.ndarray]:
    """Conversations -> one row, padded to the shapes of `row_format.row_spec()`.

    Two conversations, the first with a picture of two features, in a row of T = 8, K = 2, P = 2:

        input_ids      1 -200 -200 2 | 5 6 | 0 0       segment_ids   1 1 1 1 2 2 0 0
        feature_ids   -1    0    1 -1 -1 -1 -1 -1      position_ids  0 1 2 3 0 1 0 0
        feature_places 1 2 -1 -1

    Args:
      pictures: layout and tiles, uint8 [N, S, S, 3], or what the encoder sees of these, of all
        pictures in the order of their tokens.

    Raises:
      ValueError: something does not fit.
    """
    f = row_format
    length, tiles = sum(map(len, conversations)), sum(layout.tiles for layout, _ in pictures)
    if length > f.length or tiles > f.tiles:
        raise ValueError(f"{length} tokens, {tiles} tiles exceed {f.length}, {f.tiles}")
    spans = [len(range(*span)) for row in conversations for span in row.image_spans]
    if spans != [len(layout) for layout, _ in pictures]:
        raise ValueError(f"pictures of {[len(p[0]) for p in pictures]} tokens for places {spans}")
    row = {name: np.zeros(shape, dtype) for name, (shape, dtype) in f.row_spec().items()}
    row["labels"][:], row["feature_ids"][:] = IGNORE_INDEX, TEXT
    start, tile, waiting = 0, 0, iter(pictures)
    for segment, conversation in enumerate(conversations, start=1):
        here = slice(start, start + len(conversation))
        row["input_ids"][here] = conversation.input_ids
        row["labels"][here] = conversation.labels
        row["segment_ids"][here] = segment
        row["position_ids"][here] = np.arange(len(conversation))
        if conversation.turn_ids is not None:
            row["position_ids"][here] = turn_positions(conversation.turn_ids)
            row["turn_ids"][here] = conversation.turn_ids
        for first, end in conversation.image_spans:
            layout, shown = next(waiting)
            places = slice(start + first, start + end)
            row["feature_ids"][places] = layout.placed(tile, f.tokens_per_tile)
            if layout.weights is not None:
                row["feature_weights"][places] = layout.weights
            row[f.shown][tile : tile + layout.tiles] = shown
            tile += layout.tiles
        start += len(conversation)
    count = len(row["feature_places"])
    if "feature_weights" in row:
        row["feature_places"] = inverse(row["feature_ids"], row["feature_weights"], count)
    else:
        row["feature_places"] = feature_places(row["feature_ids"], count)
    return row


class Batch(NamedTuple):
    """One process's part of a batch.

    arrays: name -> NumPy array, see `RowFormat.row_spec`, each with a leading axis of rows.
    record_ids: ids of the conversations in it. skipped: names of those left out for a bad image.
    """

    arrays: dict[str, np.ndarray]
    record_ids: list[str]
    skipped: list[str]


def render_record(
    row_format: RowFormat,
    records,
    record: Record,
    tokenizer: SegmentTokenizer | None,
    seen: Sequence[sources.Seen],
) -> list[tuple[Segment, ...]]:
    """`render_turns` of a record, for training; its errors name data and record.

    seen: what is known of each of the record's sources.
    """
    try:
        placeholder = tokenizer and tokenizer.placeholder
        sizes = [one.source for one in seen]
        turns = placed_boxes(record.turns, record.boxes, sizes, row_format.boxes)
        times = [one.time for one in seen]
        if any(times):
            if row_format.turns == "independent":
                raise RecordError(
                    "times of a video",
                    "the model reads the times of a video's frames before the first question: set "
                    "data.turns=conversation",
                )
            turns = with_times(turns, times)
        words = record.system, placeholder, record.rejected
        return render_turns(row_format.template, turns, row_format.turns, *words)
    except RecordError as error:
        raise RecordError(error.kind, f"{records.path}: {record.name}: {error}") from None


def is_several(record: Record) -> bool:
    """Whether a record has more than one picture; videos do not count."""
    return sum(not isinstance(source, Video) for source in record.images) > 1


def nominal(record: Record, number: int, row_format: RowFormat) -> sources.Seen:
    """What is taken for a record's picture or video, by its number, that was not looked at."""
    size = nominal_size(row_format.image.size, record.boxes, number)
    return sources.Seen((*size, 1) if isinstance(record.images[number], Video) else size)


@dataclasses.dataclass(frozen=True)
class RowBuilder:
    """Record numbers -> one packed row; everything it needs, picklable.

    Attributes:
      usable: int [U], the numbers of the records that can be used.
      max_pixels: as in `load_image`.
      skip_bad_images: leave a record out whose image cannot be decoded, instead of raising.
      room: int [U, 2], tokens, before cutting, and tiles that each record was measured to take.
      augment: what happens to the pictures first. A change for which a record would need more room
        than it was measured to take is not made.
      look: as `sources.tiles`, or of a store of what the encoder sees.
    """

    records: Sequence[Record]
    usable: np.ndarray
    tokenizer: SegmentTokenizer
    row_format: RowFormat
    max_pixels: int
    skip_bad_images: bool
    room: np.ndarray
    augment: Augmentation = UNCHANGED
    look: Callable = sources.tiles

    def __call__(
        self, members: np.ndarray, row: int = 0
    ) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
        """One packed row.

        Args:
          members: [M] numbers into `usable`.
          row: number of the row in the run.

        Returns:
          The row, ids of the records in it, names of skipped ones.
        """
        conversations, pictures, ids, skipped = [], [], [], []
        for place, member in enumerate(members):
            record = self.records[int(self.usable[member])]
            try:
                is_video = any(isinstance(source, Video) for source in record.images)
                if self.augment and record.images and not is_video:
                    made = self._changed(record, self.room[member], row, place)
                else:
                    made = self._conversation(record)
            except ImageError as error:
                if not self.skip_bad_images:
                    raise LlavaError(f"{self.records.path}: {record.name}: {error}") from None
                skipped.append(record.name)
                continue
            conversations.append(made[0])
            pictures += made[1]
            ids.append(record.id)
        return pack(conversations, pictures, self.row_format), ids, skipped

    def _changed(
        self, record: Record, room: np.ndarray, row: int, place: int
    ) -> tuple[TokenRow, list[tuple[Layout, np.ndarray]]]:
        """`_conversation` of the record, its pictures changed or, see `augment`, as they are."""
        named = zip(record.images, record.image_names, strict=True)
        images = tuple(load_image(source, name, self.max_pixels) for source, name in named)
        try:
            whole, found = self._whole(self.augment(record, images, row, place))
            if len(whole) <= room[0] and sum(layout.tiles for layout, _ in found) <= room[1]:
                return self._cut(whole, record), found
        except RecordError:  # of the change
            pass
        return self._conversation(dataclasses.replace(record, images=images))

    def _conversation(self, record: Record) -> tuple[TokenRow, list[tuple[Layout, np.ndarray]]]:
        """The tokens of a record, and layout and tiles of each of its pictures and videos."""
        whole, found = self._whole(record)
        return self._cut(whole, record), found

    def _whole(self, record: Record) -> tuple[TokenRow, list[tuple[Layout, np.ndarray]]]:
        """`_conversation` before it is cut at `max_length`."""
        found, seen = self._sources(record)
        texts = render_record(self.row_format, self.records, record, self.tokenizer, seen)
        return token_row(self.tokenizer, texts, [len(layout) for layout, _ in found]), found

    def _cut(self, whole: TokenRow, record: Record) -> TokenRow:
        row, reason = self.row_format.cut(whole)
        if row is None:
            raise RecordError(
                "changed",
                f"{self.records.path}: {record.name} changed since it was measured: {reason}",
            )
        return row

    def _sources(self, record: Record) -> tuple[list[tuple[Layout, np.ndarray]], list]:
        """Layout and tiles of each of a record's pictures and videos, and what is known of it."""
        spec, several = self.row_format.image, is_several(record)
        found = [
            self.look(source, spec, name, self.max_pixels, several)
            for source, name in zip(record.images, record.image_names, strict=True)
        ]
        seen, tiles = [seen for seen, _ in found], [tiles for _, tiles in found]
        layouts = self.row_format.layouts([one.source for one in seen])
        return list(zip(layouts, tiles, strict=True)), seen


def stack(rows) -> Batch | LlavaError:
    """Rows of `RowBuilder` -> a batch; the first error, if there is one among them."""
    for row in rows:
        if isinstance(row, LlavaError):
            return row
    arrays = {key: np.stack([row[0][key] for row in rows]) for key in rows[0][0]}
    ids = [record_id for row in rows for record_id in row[1]]
    return Batch(arrays, ids, [name for row in rows for name in row[2]])
