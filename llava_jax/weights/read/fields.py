"""Reading a Hugging Face JSON file: its keys, their defaults, and errors that name both.

Omitted keys take the defaults of transformers' config class for that `model_type`, because
`save_pretrained` of the 4.x line left out whatever equalled a default inside LLaVA's sub-configs.
"""

import json
import sys
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.formats.packed import read_packing

MAX_LAYERS = 1000


def read_json(path: Path) -> dict:
    """The object in a JSON file, or a LlavaError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LlavaError(f"{path} is missing: give the folder of a checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LlavaError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LlavaError(f"{path} must hold a JSON object")
    return content


def convert_command(folder: Path, *options: str) -> str:
    """The command that makes a whole LLaVA of a folder and what it lacks."""
    return f"`llava-jax convert --checkpoint {folder} {' '.join(options)} --out DIR`"


def is_positive(value: object) -> bool:
    """True for a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


class Fields:
    """Lookups in a config with transformers' defaults and errors that name the source."""

    def __init__(self, values: dict, defaults: dict, source: str):
        self.values, self.defaults, self.source = values, defaults, source
        self._check_plain()

    def __getitem__(self, key: str):
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str, most: int = 2**31 - 1) -> int:
        value = self[key]
        if type(value) is not int or not 0 < value <= most:
            raise LlavaError(
                f"{self.source} has {key}={value!r}: it must be an integer from 1 to {most}"
            )
        return value

    def number(self, key: str) -> float:
        value = self[key]
        if not is_positive(value):
            raise LlavaError(f"{self.source} has {key}={value!r}: it must be a number above 0")
        return float(value)

    def _check_plain(self) -> None:
        """Refuses settings that change the numbers and that our models do not have."""
        if self["quantization_config"]:
            read_packing(self["quantization_config"], self.source)
        rope = self["rope_parameters"] or self["rope_scaling"] or {}
        inside = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
        if (inside or self["partial_rotary_factor"] or 1) != 1:
            factor = inside or self["partial_rotary_factor"]
            raise LlavaError(
                f"{self.source} has partial_rotary_factor={factor}: only rotation of the whole "
                "head is supported"
            )

    def refuse(self, key: str, reason: str):
        raise LlavaError(f"{self.source} has {key}={self[key]!r}: {reason}")
