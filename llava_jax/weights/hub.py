"""Names of the Hugging Face hub -> local folders."""

import re
from pathlib import Path

from llava_jax.errors import LlavaError

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_PICKLES = ("*.bin",)


def local_folder(name: str | Path, allow_pickle: bool = False) -> Path:
    """The folder of a path, or of a name on the hub such as "llava-hf/llava-1.5-7b-hf".

    Files of the hub come from its cache, else from the network. A name is taken for a path if it
    exists here or its parent folder does.

    Raises:
      LlavaError: it is not here, and the hub did not give it.
    """
    path = Path(name)
    is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    if not is_name or path.exists() or path.parent.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_FILES, *(_PICKLES if allow_pickle else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LlavaError(
            f"{name} is no folder here, and the Hugging Face hub did not give it: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
