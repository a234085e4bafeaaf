"""Imports of large packages, of which their users here need little, or which few users need."""

import contextlib
import os
import sys
from collections.abc import Iterator

from llava_jax.errors import LlavaError


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Imports within the block find that a module is not installed, unless it is imported already.

    For packages that import PyTorch if they can, which takes seconds, and use it for nothing that
    they do here.
    """
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


_alone = False


def tokenizers_alone() -> None:
    """Has `transformers` import it without PyTorch, for a program that needs only its tokenizers.

    For programs only, never for a library: models of transformers do not work in such a process.
    """
    global _alone
    _alone = True


def transformers():
    """The package of this name, which takes seconds to import."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    with hidden("torch") if _alone else contextlib.nullcontext():
        import transformers
    return transformers


def ray():
    """The package of this name with its part for data; LlavaError if it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise LlavaError(f"{error.name} is not installed: pip install 'llava_jax[ray]'") from None
    return ray
