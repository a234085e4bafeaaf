"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what a sentence describes."""

from pathlib import Path

from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.evaluation.benchmark import Benchmark, Question, ask, graded
from llava_jax.evaluation.files import Folder, questions_of
from llava_jax.inference.boxes import Box, draw_boxes, parse_boxes, to_pixels

# name -> the file of references, the splits it has
REFERENCES = {
    "refcoco": ("refs(unc).p", ("val", "testA", "testB")),
    "refcoco+": ("refs(unc).p", ("val", "testA", "testB")),
    "refcocog": ("refs(umd).p", ("val", "test")),
}
LEAST_OVERLAP = 0.5


def load(root: Path, name: str, split: str) -> Benchmark:
    """One split of one of the three sets; a box is right from an IoU of 0.5.

    The question is that of LLaVA-1.5's training data, the answer a box on the padded square.
    """
    if name not in REFERENCES or split not in REFERENCES[name][1]:
        known = "; ".join(f"{name}: {', '.join(s)}" for name, (_, s) in REFERENCES.items())
        raise LlavaError(f"unknown set and split {name!r}, {split!r}: choose of {known}")
    folder = Folder(root, "https://github.com/lichengunc/refer")
    file = f"{name}/{REFERENCES[name][0]}"
    instances = folder.json(f"{name}/instances.json")
    boxes = {item["id"]: item["bbox"] for item in instances["annotations"]}
    images = {item["id"]: item for item in instances["images"]}

    def make(pair) -> Question:
        ref, sentence = pair
        image = images[ref["image_id"]]
        x, y, width, height = boxes[ref["ann_id"]]
        return ask(
            f"{ref['ref_id']}/{sentence['sent_id']}",
            "Please provide the bounding box coordinate of the region this sentence describes: "
            f"{sentence['sent']}.",
            str(root / "train2014" / image["file_name"]),
            reference=f"x {x:.0f} to {x + width:.0f}, y {y:.0f} to {y + height:.0f} pixels",
            label=((x, y, x + width, y + height), (image["width"], image["height"])),
        )

    refs = folder.plain_pickle(file)
    pairs = [(ref, s) for ref in refs if ref["split"] == split for s in ref["sentences"]]
    questions = questions_of(pairs, root / file, make)
    source = f"{folder.source} (pictures: https://cocodataset.org, train2014)"
    return Benchmark(f"{name}/{split}", source, questions, draw=draw, **graded(grade))


def grade(question: Question, text: str) -> float:
    """1 if the first box in the answer overlaps the right one enough."""
    box, size = question.label
    answers = parse_boxes(text)
    return float(bool(answers) and iou(to_pixels(answers[0], size), box) >= LEAST_OVERLAP)


def iou(a: Box, b: Box) -> float:
    """Intersection over union; a box whose corners are swapped has no area."""
    overlap = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - overlap
    return overlap / union if union else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def draw(image: Image.Image, question: Question, text: str) -> Image.Image:
    """The right box in green, the answer's in red."""
    box, size = question.label
    image = draw_boxes(image, [box], "lime")
    return draw_boxes(image, [to_pixels(b, size) for b in parse_boxes(text)[:1]], "red")
