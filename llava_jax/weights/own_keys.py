"""What a folder's form cannot say of a model's pictures, under a key of ours in `config.json`.

    "llava_jax": {"tiling": {"rounded": false}, "video": {"newline": "grid"}}

Other programs do not look at it. A folder that says everything in its own keys has none.
"""

import dataclasses
from collections.abc import Mapping

from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec

OWN_KEY = "llava_jax"


def own_keys(form: ImageSpec, wanted: ImageSpec) -> dict:
    """What to add to a `config.json` that is read as `form`, so that it is read as `wanted`."""
    changes = _changes(dataclasses.asdict(form), dataclasses.asdict(wanted))
    return {OWN_KEY: changes} if changes else {}


def with_own_keys(form: ImageSpec, values: Mapping, source: str) -> ImageSpec:
    """How pictures are prepared by a `config.json` whose other keys mean `form`."""
    changes = values.get(OWN_KEY)
    if not changes:
        return form
    try:
        return ImageSpec.from_values(_changed(dataclasses.asdict(form), changes))
    except (LlavaError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise LlavaError(
            f"{source} has {OWN_KEY}={changes!r}, which llava-jax did not write: {error}"
        ) from None


def in_words(changes: Mapping, path: str = "") -> str:
    """The changes in one line: `tiling.rounded=False, video.newline='grid'`."""
    return ", ".join(
        in_words(value, f"{path}{key}.") if isinstance(value, dict) else f"{path}{key}={value!r}"
        for key, value in changes.items()
    )


def _changes(old: dict, new: dict) -> dict:
    found = {}
    for key, value in new.items():
        if value == old.get(key):
            continue
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        found[key] = _changes(old[key], value) if both else value
    return found


def _changed(old: dict, changes: dict) -> dict:
    new = dict(old)
    for key, value in changes.items():
        if key not in old:
            raise ValueError(f"there is no {key}")
        both = isinstance(value, dict) and isinstance(old[key], dict)
        new[key] = _changed(old[key], value) if both else value
    return new
