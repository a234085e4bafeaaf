"""`llava-jax validate`: every check of training over a whole data set, before any training.

The exit code is 1 if training would stop at a fault, or a picture of `--against` is in the training
data. What training would leave out or cut is only noted, and so are pictures that the recipe's
training and held-out data share.
"""

import os
from pathlib import Path
from typing import NamedTuple

from llava_jax.data.duplicates import leak_lines, leaks
from llava_jax.data.fingerprints import picture_set
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.records import about, add_columns_argument, holds_images, open_records
from llava_jax.data.report_page import Shared, write_report_page
from llava_jax.data.rows import RowFormat
from llava_jax.data.validate import validate
from llava_jax.errors import LlavaError
from llava_jax.models.images import IMAGE_TOKEN_ID, ImageSpec
from llava_jax.text.templates import TEMPLATES, get_template
from llava_jax.text.tokenizer import load_tokenizer

# What a recipe decides; for a command line without one the values of LLaVA-1.5 and configs/base.py.
DEFAULTS = {
    "template": "v1",
    "tokenizer": None,
    "max_length": 2048,
    "image_tokens": 576,
    "images_per_row": 4,
    "image_token_id": IMAGE_TOKEN_ID,
}


class DataSet(NamedTuple):
    """Records and how training reads them.

    training: see `validate`. image_root: where the paths of other data sets may start from, too.
    """

    records: object
    row_format: RowFormat
    tokenizer: object
    training: dict
    image_root: str | None


def add_data_arguments(parser) -> None:
    """The arguments that say which data set is meant and how training reads it."""
    parser.add_argument(
        "data", nargs="?",
        help="file, pattern, mixture or folder of a data set (default: what the recipe names)",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE",
        help="recipe, such as configs/NAME.py; --config.key=value changes a value",
    )  # fmt: skip
    parser.add_argument("--image_root", help="folder that image paths start from")
    parser.add_argument("--split", help="split of a data set (default: train)")
    add_columns_argument(parser)
    without = parser.add_argument_group("without a recipe")
    without.add_argument(
        "--template", choices=sorted(TEMPLATES), metavar="NAME",
        help=f"conversation template: {', '.join(sorted(TEMPLATES))} (default: v1)",
    )  # fmt: skip
    without.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder; measures lengths")
    for name, text in (
        ("max_length", "tokens a row holds"),
        ("image_tokens", "tokens an image takes"),
        ("images_per_row", "images a row holds"),
    ):
        help_text = f"{text} (default: {DEFAULTS[name]})"
        without.add_argument(f"--{name}", type=int, metavar="N", help=help_text)


def data_sets(args) -> list[DataSet]:
    """The data set that the arguments name, or both data sets of their recipe.

    args.config: the recipe (ConfigDict), or None.
    """
    given = [n for n in DEFAULTS if getattr(args, n, None) is not None]
    if args.config is None:
        if args.data is None:
            raise LlavaError("name a data file, or a recipe with --config=configs/NAME.py")
        values = DEFAULTS | {name: getattr(args, name) for name in given}
        row_format = RowFormat(
            get_template(values["template"]),
            ImageSpec(),
            values["image_tokens"],
            values["max_length"],
            values["images_per_row"],
            image_token_id=values["image_token_id"],
        )
        tokenizer = values["tokenizer"] and load_tokenizer(values["tokenizer"])
        columns = dict(args.columns)
        records = open_records(args.data, args.image_root, args.split, columns=columns)
        return [DataSet(records, row_format, tokenizer, {}, args.image_root)]
    if given:
        raise LlavaError(f"the recipe decides {given[0]}: leave out --{given[0]}")
    return _data_sets_of_recipe(args)


def _data_sets_of_recipe(args) -> list[DataSet]:
    import jax

    from llava_jax.training import recipe
    from llava_jax.training.stage import Stage

    # The devices of a run do not matter to its data: one of this machine will do.
    config = args.config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh, config.model.attention = {"data": 1, "fsdp": 1, "tensor": 1}, "auto"
        if args.data is not None:
            config.data.train, config.data.train_split = args.data, args.split
            config.data.validation = ""
        config.data.image_root = args.image_root or config.data.image_root
        config.data.columns = dict(args.columns) or config.data.columns
    stage = Stage.of(config, jax.devices()[:1])
    tokenizer = load_tokenizer(
        recipe.tokenizer_folder(config), stage.model.config.decoder.vocab_size
    )
    sets = []
    for held_out in [False, True] if config.data.validation else [False]:
        training = stage.data_arguments(held_out) | {"workers": 0, "cache_dir": None}
        if not held_out:
            training["accept"] = lambda data: stage.check_reach(data, print)
        records, root = stage.records(held_out), config.data.image_root or None
        sets.append(DataSet(records, stage.row_format, tokenizer, training, root))
    return sets


def add_arguments(parser) -> None:
    """The arguments of `llava-jax validate`."""
    add_data_arguments(parser)
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, metavar="N",
        help=f"pixels an image may have (default: {MAX_PIXELS:,})",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N",
        help="decoding threads (default: one for each CPU core)",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SOURCE",
        help="data sets, or benchmarks as configs/eval/NAME.py, whose pictures must not be in the "
        "training data",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="FILE", help="also write a web page, with pictures, there"
    )


def main(args) -> int:
    """Runs `llava-jax validate` and prints its report.

    args.against: paths of data sets, and sequences of records with `path`.

    Returns 1 if there is any fault, or a leak from what `--against` names.
    """
    page = args.report and Path(args.report)
    if page and not page.absolute().parent.is_dir():
        raise LlavaError(f"no folder {page.parent} to write {page.name} into")
    sets = data_sets(args)
    against = [_opened(source, sets[0].image_root) for source in args.against]
    reports, compares = [], bool(page or against or len(sets) > 1)
    for data_set in sets:
        if reports:
            print()
        report = validate(
            *data_set[:3],
            max_pixels=args.max_pixels,
            threads=args.workers,
            fingerprints=compares,
            **data_set.training,
        )
        reports.append(report)
        print(f"{data_set.records.path}: {report.text()}")
        for line in about(data_set.records):
            print(f"  {line}")
    ours, others = reports[0].pictures, [report.pictures for report in reports[1:]]
    others += [picture_set(records, args.max_pixels, args.workers) for records in against]
    shared = [Shared(ours, other, leaks(ours.fingerprints, other.fingerprints)) for other in others]
    for one in shared:
        print("", *leak_lines(one.leaks, one.ours, one.theirs), sep="\n")
    if page:
        write_report_page(page, reports, shared)
        print(f"\nreport: {page}")
    leaked = any(one.leaks for one in shared[len(reports) - 1 :])
    return 1 if leaked or any(report.faults for report in reports) else 0


def _opened(source, image_root: str | None):
    """The records of a path of `--against`; anything else as it is."""
    if not isinstance(source, str):
        return source
    return open_records(source, None if holds_images(source) else image_root, pairs=True)
