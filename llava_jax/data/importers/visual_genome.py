"""Visual Genome's region descriptions (https://homes.cs.washington.edu/~ranjay/visualgenome)."""

from pathlib import Path

from llava_jax.data.importers.annotations import Cuts, about_regions, plain
from llava_jax.data.published import each, read_json


def records(root: Path, split: str, cuts: Cuts) -> list[dict]:
    """Conversations of ten regions each; the set has no splits of its own."""
    sizes_file, regions_file = root / "image_data.json", root / "region_descriptions.json"

    def image(item) -> tuple[int, tuple[str, int, int]]:
        folder, name = item["url"].split("/")[-2:]
        return item["image_id"], (f"{folder}/{name}", item["width"], item["height"])

    images = dict(each(read_json(sizes_file), sizes_file, image))

    def make(item) -> list[dict]:
        regions, number = [], item["id"]
        path, width, height = images[number]
        for region in item["regions"]:
            box = [region[key] for key in ("x", "y", "width", "height")]
            if kept := cuts.inside(box, width, height):
                regions.append((plain(region["phrase"]), kept))
        return about_regions(f"vg-{number}", path, regions)

    made = each(read_json(regions_file), regions_file, make)
    return [record for found in made for record in found]
