"""What was measured of a chunk of records, and the file in which it is kept between runs."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.data.chunks import Census
from llava_jax.errors import RecordError
from llava_jax.files import whole_file

VERSION = 5  # raise it when the meaning of a kept value changes


class Part(NamedTuple):
    """What is known of the n records of a chunk.

    lengths, full: int32 [n], tokens after and before cutting at max_length. tiles: int32 [n].
    refused: reason -> places in the chunk of the records that cannot be used. cut: how many lost
    their end at max_length. faults: of records that are left out for their pictures, by place.
    census: of the records, as if of one data set.
    sized: whether lengths depend on the sizes of pictures. places: where the files of pictures are.
    seen: the state of these files, and what was asked of them, when all were found good; else "".
    """

    lengths: np.ndarray
    full: np.ndarray
    tiles: np.ndarray
    refused: dict[str, list[int]]
    cut: int
    faults: dict[int, RecordError]
    census: Census
    sized: bool
    places: list[str]
    seen: str


def read_part(path: Path) -> Part | None:
    """A part as it was kept; None if the file is absent or broken."""
    try:
        with np.load(path) as data:
            about = json.loads(data["about"].tobytes())
            arrays = data["lengths"], data["full"], data["tiles"]
        forms = Counter({(0, form): count for form, count in about.pop("forms").items()})
        census = Census(forms, Counter(about.pop("ignored")))
        return Part(*arrays, faults={}, census=census, **about)
    except Exception:
        return None


def keep_part(path: Path, part: Part) -> None:
    """Writes a part, without its faults: those are looked for again."""
    about = {
        "refused": part.refused,
        "cut": part.cut,
        "forms": {form: count for (_, form), count in part.census.forms.items()},
        "ignored": part.census.ignored,
        "sized": part.sized,
        "places": part.places,
        "seen": part.seen,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(file, lengths=part.lengths, full=part.full, tiles=part.tiles, about=text)
