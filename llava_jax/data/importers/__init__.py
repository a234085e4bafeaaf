"""Published annotations of boxes as LLaVA records: `llava-jax import NAME ROOT --out FILE.json`.

An importer reads the files of a data set from the folder they were unpacked to, and gives records
with `boxes` (`data.record_boxes`), whose image paths start at that folder.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_jax.data.importers import coco, flickr30k, grit, refer, visual_genome
from llava_jax.data.importers.annotations import Cuts
from llava_jax.errors import LlavaError
from llava_jax.files import write_records

# name -> (records of (root, split, cuts), its splits, the files below the root)
IMPORTERS: dict[str, tuple[Callable[[Path, str, Cuts], list[dict]], Sequence[str], str]] = {
    **{name: (refer.of(name), splits, f"{name}/{file}, {name}/instances.json, train2014/")
       for name, (file, splits) in refer.REFERENCES.items()},
    "visual_genome": (visual_genome.records, ("train",),
                      "region_descriptions.json, image_data.json, VG_100K/, VG_100K_2/"),
    "coco": (coco.records, ("train2017", "val2017", "train2014", "val2014"),
             "annotations/instances_SPLIT.json, SPLIT/"),
    "flickr30k": (flickr30k.records, ("train", "val", "test"),
                  "SPLIT.txt, Sentences/, Annotations/, flickr30k-images/"),
    "grit": (grit.records, ("train",), "*.jsonl or *.json, a picture KEY.jpg for each"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llava-jax import`."""
    layouts = "; ".join(f"{name}: {files}" for name, (_, _, files) in IMPORTERS.items())
    parser.add_argument("name", choices=list(IMPORTERS), help="the data set")
    parser.add_argument("root", help=f"the folder of its published files ({layouts})")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .json file to write")
    parser.add_argument("--split", help="of the data set; default: its first")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")


def main(args) -> int:
    """Runs `llava-jax import`; returns the exit code."""
    read, splits, _ = IMPORTERS[args.name]
    split = args.split or splits[0]
    if split not in splits:
        raise LlavaError(f"{args.name} has no split {split!r}: choose one of {', '.join(splits)}")
    if args.limit is not None and args.limit < 1:
        raise LlavaError(f"--limit must be at least 1, not {args.limit}")
    if Path(args.out).suffix != ".jsonl" and Path(args.out).suffix != ".json":
        raise LlavaError(f"--out {args.out} must end with .json or .jsonl")
    cuts = Cuts()
    records = read(Path(args.root), split, cuts)[: args.limit]
    if not records:
        raise LlavaError(f"{args.root} has no record of the split {split!r} with a box")
    write_records(Path(args.out), records)
    boxes = sum(len(record["boxes"]) for record in records)
    cut = cuts.text() if args.limit is None else ""  # they are counted of all records
    print(f"{args.out}: {len(records):,} records with {boxes:,} boxes{cut}")
    print(f"check it: llava-jax validate {args.out} --image_root {args.root}")
    return 0
