"""`llava-jax show`: one record as the model reads it in training."""

import json
import sys

from llava_jax.data.show import as_text, draw_record, show
from llava_jax.errors import LlavaError
from llava_jax.training.validate_data import DEFAULTS, add_data_arguments, data_sets


def add_arguments(parser) -> None:
    """The arguments of `llava-jax show`."""
    add_data_arguments(parser)
    parser.add_argument("--index", type=int, required=True, help="which record, from 0")
    parser.add_argument(
        "--image_token_id", type=int, metavar="ID",
        help=f"token id of the placeholder, without a recipe (default: "
        f"{DEFAULTS['image_token_id']})",
    )  # fmt: skip
    parser.add_argument(
        "--picture", metavar="FILE", help="write the record's images there, its boxes drawn"
    )
    parser.add_argument("--json", action="store_true", help="print ids, labels and slots as JSON")


def main(args) -> int:
    """Runs `llava-jax show`; returns the exit code."""
    records, row_format, tokenizer, *_ = data_sets(args)[0]
    if tokenizer is None:
        raise LlavaError("give --tokenizer DIR, or a recipe with --config=configs/NAME.py")
    shown = show(records, args.index, row_format, tokenizer)
    if args.picture:
        picture = draw_record(records[args.index], shown)
        try:
            picture.save(args.picture)
        except (OSError, ValueError) as error:  # the latter: an unknown suffix
            raise LlavaError(f"cannot write {args.picture!r}: {error}") from None
    if args.json:
        shown.pop("supervised_spans")
        print(json.dumps(shown, ensure_ascii=False))
    else:
        print(as_text(shown, colour=sys.stdout.isatty()))
    return 0
