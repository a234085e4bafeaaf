"""RefCOCO, RefCOCO+ and RefCOCOg, from the files of https://github.com/lichengunc/refer."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llava_jax.data.importers.annotations import Cuts, about_regions, plain
from llava_jax.data.published import MissingFile, each, plain_pickle, read_json

# name -> (the file of references, its splits)
REFERENCES = {
    "refcoco": ("refs(unc).p", ("train", "val", "testA", "testB")),
    "refcoco+": ("refs(unc).p", ("train", "val", "testA", "testB")),
    "refcocog": ("refs(umd).p", ("train", "val", "test")),
}
SOURCE = "https://github.com/lichengunc/refer"


class Reference(NamedTuple):
    """A sentence and the object that it describes.

    image: below the root. box: left, top, width, height in pixels.
    """

    key: str
    sentence: str
    image: str
    size: tuple[int, int]
    box: tuple[float, float, float, float]


def references(root: Path, name: str, split: str) -> list[Reference]:
    """All references of a split, in the order of the file.

    Raises:
      MissingFile, LlavaError: a file is missing or not as published.
    """
    objects, sentences = (root / name / file for file in ("instances.json", REFERENCES[name][0]))
    for path in (objects, sentences):
        if not path.exists():
            raise MissingFile(f"{path} is missing: it is published at {SOURCE}; put it there")
    instances = read_json(objects)
    boxes = dict(each(instances["annotations"], objects, lambda a: (a["id"], a["bbox"])))
    images = dict(each(instances["images"], objects, lambda i: (i["id"], i)))

    def make(ref) -> list[Reference]:
        image, (x, y, width, height) = images[ref["image_id"]], boxes[ref["ann_id"]]
        return [
            Reference(
                f"{ref['ref_id']}/{sentence['sent_id']}",
                sentence["sent"],
                f"train2014/{image['file_name']}",
                (image["width"], image["height"]),
                (x, y, width, height),
            )
            for sentence in ref["sentences"]
            if ref["split"] == split
        ]

    return [one for found in each(plain_pickle(sentences), sentences, make) for one in found]


def of(name: str) -> Callable[[Path, str, Cuts], list[dict]]:
    """The importer of one of the sets: conversations about all references of a picture."""

    def records(root: Path, split: str, cuts: Cuts) -> list[dict]:
        by_image = defaultdict(list)
        for one in references(root, name, split):
            if box := cuts.inside(one.box, *one.size):
                by_image[one.image].append((plain(one.sentence), box))
        return [
            record
            for image, regions in by_image.items()
            for record in about_regions(f"{name}-{Path(image).stem}", image, regions)
        ]

    return records
