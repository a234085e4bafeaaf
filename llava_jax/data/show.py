"""One record as the model reads it in training."""

import numpy as np
from PIL import Image

from llava_jax.data import sources
from llava_jax.data.attachments import NO_FILE
from llava_jax.data.boxes import draw_boxes
from llava_jax.data.media import MAX_PIXELS, ImageError, load_image
from llava_jax.data.parsing import Record
from llava_jax.data.record_boxes import box_texts
from llava_jax.data.records import checked_record
from llava_jax.data.rows import RowFormat, is_several, nominal, render_record
from llava_jax.data.video import Video
from llava_jax.errors import LlavaError, RecordError, brief
from llava_jax.text.conversation import BREAK, IMAGE_TOKEN
from llava_jax.text.tokenization import (
    IGNORE_INDEX,
    SegmentTokenizer,
    TokenRow,
    token_row,
    turn_positions,
)

_GREEN, _CYAN, _PLAIN = "\033[32m", "\033[36m", "\033[0m"


def show(
    records, index: int, row_format: RowFormat, tokenizer, max_pixels: int = MAX_PIXELS
) -> dict:
    """One record of `open_records(...)` rendered and tokenized, before packing and cutting.

    Returns:
      id, index, origin (of a mixture's record), template, text; input_ids, labels, position_ids,
      segment_ids; image_slots: [{"image", "size", "tiles", "grid", "start", "end"}], the half-open
      range of tokens of each image, whose size (of a video width, height and frames) is None if it
      cannot be read and whose grid (columns, rows) of tiles is None if it is one tile; lengths;
      training: what becomes of the record; ignored_keys; supervised_spans: the [start, end)
      characters of the text that are learnt. Of a record with boxes also boxes: [{"image",
      "pixels", "text"}], the number of its image, the box on it and how it is written.
      If turns are independent, or a pair, also turn_ids, and the text has what each question, or
      answer, adds to the part that they share. Of a pair also rejected.
    Raises:
      LlavaError: there is no such record, or training would refuse its text.
    """
    if not 0 <= index < len(records):
        raise LlavaError(
            f"{records.path} has no record {index}: its records are 0 to {len(records) - 1}"
        )
    try:
        record = checked_record(records, index)
    except RecordError as error:
        if error.kind not in NO_FILE:  # its text can be shown all the same
            raise
        record = records[index]
    f = row_format
    segment_tokenizer = SegmentTokenizer(tokenizer, f.image_token_id, f.use_im_start_end)
    slots, seen, faults = _look_at_images(record, f, max_pixels)
    texts = render_record(f, records, record, segment_tokenizer, seen)
    layouts = f.layouts([one.source for one in seen])
    row = token_row(segment_tokenizer, texts, [len(layout) for layout in layouts])
    for slot, layout, (start, end) in zip(slots, layouts, row.image_spans, strict=True):
        slot |= {"tiles": layout.tiles, "grid": layout.grid, "start": start, "end": end}
    text, offsets = _joined([segment_tokenizer.text(segments) for segments in texts], row)
    shown = {
        "id": record.id,
        "index": index,
        "origin": record.origin,
        "template": f.template.name,
        "text": text,
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
        "position_ids": list(range(len(row))),
        "segment_ids": [1] * len(row),
        "image_slots": slots,
        "lengths": {
            "tokens": len(row),
            "image_tokens": sum(map(len, layouts)),
            "supervised_tokens": int((row.labels != IGNORE_INDEX).sum()),
        },
        "training": faults[0] if faults else _fate(row, layouts, f),
        "ignored_keys": list(record.ignored_keys),
        "supervised_spans": _spans(offsets[row.labels != IGNORE_INDEX]),
    }
    if row.turn_ids is not None:
        shown["turn_ids"] = row.turn_ids.tolist()
        shown["position_ids"] = turn_positions(row.turn_ids).tolist()
    if record.rejected is not None:
        shown["rejected"] = record.rejected
    if record.boxes:
        sizes = [one.source for one in seen]
        shown["boxes"] = [
            {"image": box.image, "pixels": box.pixels(sizes[box.image]), "text": written}
            for box, written in zip(
                record.boxes, box_texts(record.boxes, sizes, f.boxes), strict=True
            )
        ]
    return shown


def draw_record(record: Record, shown: dict) -> Image.Image:
    """The images of a record in a row, with its boxes.

    shown: of the same record, from `show`.

    Raises:
      LlavaError: it has no image, or one that cannot be read.
    """
    pictures = [
        load_image(source, name)
        for source, name in zip(record.images, record.image_names, strict=True)
        if not isinstance(source, Video)
    ]
    if not pictures or len(pictures) < len(record.images):
        raise LlavaError(f"{record.name} has no images alone: there is nothing to draw on")
    drawn = [
        draw_boxes(picture, [box["pixels"] for box in shown.get("boxes", ()) if box["image"] == i],
                   "red")
        for i, picture in enumerate(pictures)
    ]  # fmt: skip
    width, height = sum(p.width for p in drawn), max(p.height for p in drawn)
    canvas, left = Image.new("RGB", (width, height), "white"), 0
    for picture in drawn:
        canvas.paste(picture, (left, 0))
        left += picture.width
    return canvas


def _look_at_images(record: Record, row_format: RowFormat, max_pixels: int):
    """([{"image", "size"}], what is known of each image, what is wrong with them).

    Of one that cannot be read the nominal.
    """
    slots, found, faults = [], [], []
    named = zip(record.images, record.image_names, strict=True)
    for number, (source, name) in enumerate(named):
        seen, size = nominal(record, number, row_format), None
        try:
            seen = sources.look_at(source, row_format.image, name, max_pixels, is_several(record))
            size = seen.source
        except ImageError as error:
            faults.append(f"not used: {error}")
        slots.append({"image": name, "size": size})
        found.append(seen)
    return slots, found, faults


def _fate(row: TokenRow, layouts: list, row_format: RowFormat) -> str:
    """What training does with a record whose images are sound."""
    if sum(layout.tiles for layout in layouts) > row_format.tiles:
        return f"left out: {row_format.crowded}"
    if len(row) <= row_format.max_length:
        return "used whole"
    kept, reason = row_format.cut(row)
    at = f"at max_length={row_format.max_length}"
    return f"left out: {reason} {at}" if kept is None else f"cut {at}"


def _joined(texts: list[str], row: TokenRow) -> tuple[str, np.ndarray]:
    """The text behind a row, and its tokens' offsets in it.

    Of every question but the first only that part which the row holds for itself.
    """
    text, offsets = texts[0], row.offsets.copy()
    for turn, whole in enumerate(texts[1:], start=2):
        here = row.turn_ids == turn
        start = max(int(offsets[here][0, 0]), 0)
        offsets[here] += len(text) - start
        text += whole[start:]
    return text, offsets


def _spans(offsets: np.ndarray) -> list[list[int]]:
    """Ranges of characters, neighbours joined."""
    spans: list[list[int]] = []
    for start, end in offsets.tolist():
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    return spans


def as_text(shown: dict, colour: bool) -> str:
    """What `show` gave, for people: the text with its supervised parts marked, then figures."""
    open_mark, close_mark = (_GREEN, _PLAIN) if colour else ("«", "»")
    text, pieces, position = shown["text"], [], 0
    for start, end in shown["supervised_spans"]:
        pieces += [text[position:start], open_mark, text[start:end], close_mark]
        position = end
    marked = "".join([*pieces, text[position:]])
    if colour:
        marked = marked.replace(IMAGE_TOKEN, f"{_CYAN}{IMAGE_TOKEN}{_PLAIN}")
    marked = marked.replace(BREAK, "")
    lengths = shown["lengths"]
    named = f"record {shown['index']} (id {shown['id']!r})"
    named += f", {shown['origin']}" if shown["origin"] else ""
    lines = [f"{named}, template {shown['template']}", marked]
    for number, slot in enumerate(shown["image_slots"]):
        size = "{}x{} pixels".format(*slot["size"]) if slot["size"] else "size unknown"
        size += ", {} frames".format(*slot["size"][2:]) if len(slot["size"] or ()) > 2 else ""
        tiles = f"{slot['tiles']} tile(s)"
        if slot["grid"]:
            tiles = "a base view and {}x{} tiles".format(*slot["grid"])
        lines.append(
            f"image {number}: {slot['image']}, {size}, {tiles}, "
            f"in tokens {slot['start']} to {slot['end'] - 1}"
        )
    for number, box in enumerate(shown.get("boxes", ())):
        pixels = ", ".join(f"{value:.6g}" for value in box["pixels"])
        lines.append(
            f"box {number}: {pixels} in pixels of image {box['image']}, written {box['text']}"
        )
    lines.append(
        f"{lengths['tokens']} tokens: {lengths['image_tokens']} of images, "
        f"{lengths['supervised_tokens']} supervised (marked {'green' if colour else '«»'})"
    )
    if "rejected" in shown:
        lines.append("a pair: the chosen answer, then the rejected one; each sees the prompt alone")
    elif "turn_ids" in shown:
        lines.append("independent turns: each question sees the images and itself alone")
    if shown["ignored_keys"]:
        lines.append(f"ignored keys: {', '.join(map(brief, shown['ignored_keys']))}")
    return "\n".join([*lines, f"in training: {shown['training']}"])
