"""`llava-jax show`: one record as the model sees it."""

import json
import sys

from llava_jax.data.records import checked_record, open_records
from llava_jax.errors import LlavaError, RecordError
from llava_jax.models.images import IMAGE_TOKEN_ID
from llava_jax.text.conversation import IMAGE_TOKEN
from llava_jax.text.templates import TEMPLATES, get_template, render
from llava_jax.text.tokenization import (
    IGNORE_INDEX,
    SegmentTokenizer,
    TokenRow,
)
from llava_jax.text.tokenizer import load_tokenizer

_GREEN, _CYAN, _PLAIN = "\033[32m", "\033[36m", "\033[0m"


def add_arguments(parser) -> None:
    """The arguments of `llava-jax show`."""
    parser.add_argument("data", help="LLaVA JSON or JSONL file, or a data set folder")
    parser.add_argument("--index", type=int, required=True, help="which record, from 0")
    parser.add_argument(
        "--template", default="v1", choices=sorted(TEMPLATES), metavar="NAME",
        help=f"conversation template: {', '.join(sorted(TEMPLATES))} (default: v1)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--image_root", help="folder that image paths start from")
    parser.add_argument("--split", help="split of a data set (default: train)")
    parser.add_argument("--image_tokens", type=int, default=576, help="tokens an image takes")
    parser.add_argument("--image_token_id", type=int, default=IMAGE_TOKEN_ID, help="placeholder id")
    parser.add_argument("--json", action="store_true", help="print ids, labels and slots as JSON")


def main(args) -> int:
    """Runs `llava-jax show`; returns the exit code."""
    shown = show(
        open_records(args.data, args.image_root, args.split),
        args.index,
        args.template,
        load_tokenizer(args.tokenizer),
        args.image_tokens,
        args.image_token_id,
    )
    spans = shown.pop("supervised_spans")
    if args.json:
        print(json.dumps(shown, ensure_ascii=False))
    else:
        print(_as_text(shown, spans, colour=sys.stdout.isatty()))
    return 0


def show(
    records,
    index: int,
    template: str,
    tokenizer,
    image_tokens: int = 576,
    image_token_id: int = IMAGE_TOKEN_ID,
) -> dict:
    """One record of `open_records(...)` rendered and tokenized, before packing and cutting.

    Gives id, index, template, text, input_ids, labels, position_ids, segment_ids, image_slots
    ([{"image", "start", "end"}], half-open), lengths, and supervised_spans, the [start, end)
    characters of the text that are learnt. Image files need not exist. Raises LlavaError.
    """
    if not 0 <= index < len(records):
        raise LlavaError(
            f"{records.path} has no record {index}: its records are 0 to {len(records) - 1}"
        )
    try:
        record = checked_record(records, index)
    except RecordError as error:
        if error.kind != "missing image":  # its text can be shown all the same
            raise
        record = records[index]
    segment_tokenizer = SegmentTokenizer(tokenizer, image_token_id)
    segments = render(get_template(template).with_system(record.system), record.turns)
    row = segment_tokenizer(segments, [image_tokens] * len(record.images))
    supervised = int((row.labels != IGNORE_INDEX).sum())
    return {
        "id": record.id,
        "index": index,
        "template": template,
        "text": segment_tokenizer.text(segments),
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
        "position_ids": list(range(len(row))),
        "segment_ids": [1] * len(row),
        "image_slots": [
            {"image": name, "start": start, "end": end}
            for name, (start, end) in zip(record.image_names, row.image_spans, strict=True)
        ],
        "lengths": {
            "tokens": len(row),
            "image_tokens": sum(end - start for start, end in row.image_spans),
            "supervised_tokens": supervised,
        },
        "supervised_spans": _supervised_spans(row),
    }


def _supervised_spans(row: TokenRow) -> list[list[int]]:
    """Character ranges of the supervised tokens, neighbours joined."""
    spans: list[list[int]] = []
    for start, end in row.offsets[row.labels != IGNORE_INDEX].tolist():
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    return spans


def _as_text(shown: dict, spans: list[list[int]], colour: bool) -> str:
    open_mark, close_mark = (_GREEN, _PLAIN) if colour else ("«", "»")
    text, pieces, position = shown["text"], [], 0
    for start, end in spans:
        pieces += [text[position:start], open_mark, text[start:end], close_mark]
        position = end
    marked = "".join([*pieces, text[position:]])
    if colour:
        marked = marked.replace(IMAGE_TOKEN, f"{_CYAN}{IMAGE_TOKEN}{_PLAIN}")
    lengths = shown["lengths"]
    lines = [f"record {shown['index']} (id {shown['id']!r}), template {shown['template']}", marked]
    lines += [
        f"image {number}: {slot['image']} in tokens {slot['start']} to {slot['end'] - 1}"
        for number, slot in enumerate(shown["image_slots"])
    ]
    lines.append(
        f"{lengths['tokens']} tokens: {lengths['image_tokens']} of images, "
        f"{lengths['supervised_tokens']} supervised (marked {'green' if colour else '«»'})"
    )
    return "\n".join(lines)
