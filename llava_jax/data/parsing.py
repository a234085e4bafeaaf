"""One LLaVA record: from a decoded JSON object to a checked `Record`.

A record is one conversation about no, one or several images (the format of LLaVA,
https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md):

    {"id": "7", "image": "cats/7.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}]}

`image` is a path below the image root, a `data:image/...;base64,...` address, or a list of them.
`video` is the path of a video file or of a folder of frames below the same root, or a list of them,
each with one `<image>`, or `<video>`, in the text. A text-only record has neither. `boxes` are of
its images; see `data.record_boxes`. `system`, or a first turn from "system", replaces the
template's system prompt. Ids may repeat, as they do in LLaVA's own data: a record's index is what
identifies it, and stands in for a missing id. Records with two answers are in `data.pairs`.
"""

from dataclasses import dataclass

from llava_jax.data import attachments
from llava_jax.data.attachments import IMAGE_KEYS, VIDEO_KEYS
from llava_jax.data.forms import Talk, read_talk, renamed, sound_text, talk_form, with_marks
from llava_jax.data.pairs import is_pair, pair_form, unpaired
from llava_jax.data.record_boxes import BOX_KEYS, RecordBox, has_boxes, parse_boxes
from llava_jax.data.stored import Stored
from llava_jax.data.video import Video
from llava_jax.errors import RecordError, brief, closest
from llava_jax.text.conversation import IMAGE_TOKEN, ROLES, VIDEO_TOKEN, Turn

SYSTEM_KEYS = ("system", "system_prompt")
UNSUPPORTED_KEYS = tuple(key.replace("image", "audio") for key in IMAGE_KEYS)
# Where a record comes from and what it is about: of no use in training.
PLAIN_KEYS = tuple(
    "id uid image_id image_ids question_id model source data_source source_dataset dataset "
    "dataset_name split type task task_type category metadata meta width height license".split()
)
_PAIRS = "; pairs of answers are read only with config.loss=dpo"
_READ_KEYS = frozenset((*PLAIN_KEYS, *SYSTEM_KEYS, *UNSUPPORTED_KEYS, *IMAGE_KEYS, *VIDEO_KEYS))


@dataclass(frozen=True)
class Record:
    """One conversation and its images and videos.

    images: in the order of their `<image>`, for each image its path on disk (str) or its encoded
    bytes, for each video a Video.
    image_names: what messages call each of them, such as its path in the source file.
    system: the system prompt, if the record brings its own.
    ignored_keys: keys that hold something which nothing reads.
    boxes: what each `<box>` in the turns stands for.
    origin: "number 3 of ocr.json", where the record is one of a mixture.
    rejected: of a pair, the answer that is worse than the last one of `turns`.
    form: words for the form of conversation that it was read from.
    """

    index: int
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes | Video, ...] = ()
    image_names: tuple[str, ...] = ()
    system: str | None = None
    ignored_keys: tuple[str, ...] = ()
    boxes: tuple[RecordBox, ...] = ()
    origin: str = ""
    rejected: str | None = None
    form: str = ""

    @property
    def name(self) -> str:
        """What error messages call this record."""
        origin = f", {self.origin}" if self.origin else ""
        return f"record {self.index} (id {brief(self.id)}{origin})"


def ignored_keys(item: dict, talk: Talk) -> list[str]:
    """The keys of a decoded record that hold something which nothing reads.

    `conversations.weight` stands for a key `weight` of a turn.
    """
    keys = attachments.field(item, IMAGE_KEYS)[1] + attachments.field(item, VIDEO_KEYS)[1]
    read = _READ_KEYS | {*talk.keys} | ({*BOX_KEYS} if has_boxes(item) else set())
    spare = [key for key in item if key not in read]
    keys += [key for key in spare if item[key] not in (None, "", [], {})]
    return keys + [*talk.ignored]


def parse_record(
    item,
    index: int,
    image_root: str | None,
    columns: dict[str, str] | None = None,
    pairs: bool = False,
) -> Record:
    """One decoded JSON object -> Record, its image paths joined to `image_root`.

    columns: our names of keys -> those of the object; see `forms.check_columns`.
    pairs: a record with a rejected answer is a pair; otherwise the keys of pairs mean nothing.

    Raises RecordError unless the object has a form of this module or of `data.forms`.
    """
    where = f"record {index}"
    if not isinstance(item, dict):
        raise RecordError("not an object", f"{where}: expected a JSON object, found {brief(item)}")
    form = (pair_form if pairs else talk_form)(item, columns or {})
    item = renamed(item, columns or {})
    record_id = str(index if item.get("id") is None else item["id"])
    where = f"{where} (id {brief(record_id)})"
    for key in UNSUPPORTED_KEYS:
        if item.get(key):
            raise RecordError(
                f"{key} field",
                f"{where} has {key!r} {brief(item[key])}: only images and videos are supported; "
                "leave the record out",
            )
    rejected, unread = None, ()
    if pairs:
        item, rejected, unread = unpaired(item, columns or {}, where)
    if rejected is not None and has_boxes(item):
        raise RecordError(
            "bad pair", f"{where} has boxes and 'rejected': write the boxes of a pair as text"
        )
    try:
        talk = read_talk(item, {} if rejected else columns or {}, where)
    except RecordError as error:
        if pairs or error.kind != "no conversations" or not is_pair(item):
            raise
        reason = f"{where} has two answers and no 'conversations'{_PAIRS}"
        raise RecordError(error.kind, reason) from None
    turns = talk.turns
    given = {kind: attachments.sources(item, kind, where) for kind in ("image", "video")}
    if talk.parts is not None:
        found = attachments.of_parts(talk.parts, given, image_root, where)
    else:
        images, videos = (
            [attachments.read(kind, source, image_root, where) for source in given[kind]]
            for kind in given
        )
        if not talk.is_marked:
            turns = with_marks(turns, len(images) + len(videos))
        found = images
        if videos:
            turns, found = attachments.placed(turns, images, videos, where)
    return Record(
        index,
        record_id,
        turns,
        tuple(source for source, _ in found),
        tuple(name for _, name in found),
        _parse_system(item, talk.system, where),
        (*unread, *ignored_keys(item, talk)),
        parse_boxes(item, turns, len(found), where),
        rejected=rejected,
        form=form or "",
    )


def _parse_system(item: dict, first_turn: str | None, where: str) -> str | None:
    """The record's own system prompt, from one of SYSTEM_KEYS or its first turn; None if empty."""
    texts = {"conversations": first_turn} if first_turn else {}
    for key in SYSTEM_KEYS:
        if item.get(key):
            texts[key] = sound_text(item[key], key, where)
    if len(set(texts.values())) > 1:
        raise RecordError(
            "several system prompts",
            f"{where} has different system prompts in {' and '.join(map(repr, texts))}: keep one",
        )
    return next(iter(texts.values()), None)


def check_record(record: Record, image_root: str | None = None) -> None:
    """Raises RecordError unless the record can be trained on; reads no pixel.

    Checks the order of the turns (human first, then alternating, gpt last: unlike the original,
    which drops a leading gpt turn in silence), the number of `<image>`, and that each image is a
    file inside `image_root` after links are resolved.
    """
    where = record.name
    if IMAGE_TOKEN in (record.system or ""):
        raise RecordError(
            "<image> in a system prompt", f"{where}: the system prompt may not hold <image>"
        )
    for position, turn in enumerate(record.turns):
        expected = ROLES[position % 2]
        if turn.role != expected:
            raise RecordError(
                "turns do not alternate",
                f"{where}, turn {position}: expected {expected!r}, found {turn.role!r}; "
                "turns must alternate, human first",
            )
        if turn.role == "gpt" and IMAGE_TOKEN in turn.text:
            raise RecordError(
                "<image> in an answer", f"{where}, turn {position}: an answer may not hold <image>"
            )
    if not record.turns:
        raise RecordError("no conversations", f"{where} has no conversations")
    if len(record.turns) % 2:
        hint = _PAIRS if {"rejected", "pair"} & {*record.ignored_keys} else ""
        raise RecordError(
            "last turn unanswered", f"{where} ends with a human turn; add its answer{hint}"
        )
    if record.rejected is not None:
        _check_rejected(record, where)
    places = sum(turn.images for turn in record.turns)
    if places != len(record.images):
        raise RecordError(
            "<image> count",
            f"{where} has {places} <image> in its text but {len(record.images)} "
            f"{'image(s) and video(s)' if _videos(record) else 'image(s)'}{_unread(record)}",
        )
    for source, name in zip(record.images, record.image_names, strict=True):
        path = source.source if isinstance(source, Video) else source
        kind = "image" if path is source else "video"
        if isinstance(path, str):
            attachments.check_file(path, name, image_root, where, kind)
        elif isinstance(path, Stored):
            path.check(kind, where)


def _check_rejected(record: Record, where: str) -> None:
    if IMAGE_TOKEN in record.rejected or _videos(record) and VIDEO_TOKEN in record.rejected:
        raise RecordError(
            "<image> in an answer", f"{where}: the rejected answer may not hold a picture's place"
        )
    if record.rejected == record.turns[-1].text:
        raise RecordError(
            "bad pair", f"{where}: both answers are the same, so neither is better; leave it out"
        )


def _videos(record: Record) -> bool:
    return any(isinstance(source, Video) for source in record.images)


def _unread(record: Record) -> str:
    keys = record.ignored_keys
    if not keys:
        return ""
    return f"; nothing reads its keys {brief(', '.join(keys))}{closest(keys, IMAGE_KEYS)}"
