"""One record, looked at before the first batch: its faults, its pictures' sizes, its texts."""

from typing import NamedTuple

from llava_jax.data import sources
from llava_jax.data.attachments import NO_FILE
from llava_jax.data.buckets import Unreachable
from llava_jax.data.media import ImageError
from llava_jax.data.parsing import Record, check_record
from llava_jax.data.rows import RowFormat, is_several, nominal, render_record
from llava_jax.errors import LlavaError, RecordError
from llava_jax.text.templates import Segment
from llava_jax.text.tokenization import SegmentTokenizer

_NOT_READ = (*NO_FILE, "image outside the root", "video outside the root")  # kinds of fault


class Look(NamedTuple):
    """What was seen of one record.

    record: None if it has not the right form. errors: its faults. is_image: whether they are of its
    images or videos. unwritten: why the template cannot write it. texts: as `render_record` gives
    them; None for a record that cannot be used. layouts: (tiles, tokens) of each image, nominal for
    one that is faulty. files: path, size and time of modification of its files. places: where they
    are, see `sources.place_of`.
    """

    record: Record | None
    errors: list[RecordError]
    is_image: bool
    unwritten: RecordError | None
    texts: list[tuple[Segment, ...]] | None
    layouts: list[tuple[int, int]]
    files: bytes
    places: list[str]


def look_at(
    records,
    row_format: RowFormat,
    tokenizer: SegmentTokenizer | None,
    max_pixels: int,
    index: int,
) -> Look:
    """Checks record number `index` and its images, and renders it.

    Raises:
      Unreachable: a bucket does not answer.
    """
    record, errors, is_image, files, places, seen = None, [], True, b"", [], []
    inspect = True
    try:
        record = records[index]
        seen = [nominal(record, number, row_format) for number in range(len(record.images))]
        check_record(record, records.image_root)
        files = b"".join(map(sources.state, record.images, record.image_names))
        places = [place for place in map(sources.place_of, record.images) if place is not None]
    except RecordError as error:
        errors, is_image = [error], error.kind in NO_FILE
        inspect = record is not None and error.kind not in _NOT_READ
    images = zip(record.images, record.image_names, strict=True) if inspect else ()
    for i, (source, name) in enumerate(images):
        try:
            several = is_several(record)
            seen[i] = sources.look_at(source, row_format.image, name, max_pixels, several)
        except Unreachable:
            raise
        except ImageError as error:
            errors.append(RecordError(error.kind, f"{record.name}: {error}"))
        except LlavaError as error:  # the model takes no videos, or they cannot be read here
            errors, is_image = [RecordError("video", f"{record.name}: {error}")], False
            break
    layouts, texts, unwritten = [], None, None
    if is_image:
        try:
            found = row_format.layouts([one.source for one in seen])
            layouts = [(layout.tiles, len(layout)) for layout in found]
            texts = render_record(row_format, records, record, tokenizer, seen)
        except RecordError as error:
            unwritten = error
        except LlavaError as error:  # a missing video, of a model that takes none
            errors, is_image = [RecordError("video", f"{record.name}: {error}")], False
    record = record if is_image else None
    return Look(record, errors, is_image, unwritten, texts, layouts, files, places)
