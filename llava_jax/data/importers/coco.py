"""COCO's instances (https://cocodataset.org): all boxes of one kind of thing in a picture."""

from collections import defaultdict
from pathlib import Path

from llava_jax.data.importers.annotations import Cuts, record
from llava_jax.data.published import each, read_json
from llava_jax.data.record_boxes import BOX_TOKEN

QUESTION = "Please provide the bounding box coordinates of every {}."


def records(root: Path, split: str, cuts: Cuts) -> list[dict]:
    """A conversation about each picture, a question about each of its categories.

    Annotations of crowds, whose box is that of many, leave their category of that picture out.
    """
    path = root / "annotations" / f"instances_{split}.json"
    instances = read_json(path)
    names = dict(each(instances["categories"], path, lambda c: (c["id"], c["name"])))
    images = dict(each(instances["images"], path, lambda i: (i["id"], i)))
    found, crowds = defaultdict(lambda: defaultdict(list)), set()

    def take(item) -> None:
        image, name = images[item["image_id"]], names[item["category_id"]]
        if item.get("iscrowd"):
            crowds.add((image["id"], name))
        elif box := cuts.inside(item["bbox"], image["width"], image["height"]):
            found[image["id"]][name].append(box)

    each(instances["annotations"], path, take)
    made = []
    for number, image in images.items():
        groups = {n: b for n, b in found[number].items() if (number, n) not in crowds}
        turns = [(QUESTION.format(n), " ".join([BOX_TOKEN] * len(b))) for n, b in groups.items()]
        boxes = [box for group in groups.values() for box in group]
        if turns:
            made.append(record(f"coco-{number}", f"{split}/{image['file_name']}", turns, boxes))
    return made
