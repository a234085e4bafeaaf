"""The tokenizer of a tokenizer.json, without transformers, whose import takes most of a start.

Only for folders where a tokenizer of transformers 4 is its tokenizer.json and nothing more.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models

# Classes of tokenizer_config.json that take every part from tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_NAMING_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")  # if they name the ends of a text
_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
_ENDS = ("bos", "eos")
# Settings that change what the parts of tokenizer.json do.
_CHANGES = (
    "split_special_tokens",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)


def read_tokenizer_file(folder: Path, settings: dict, load: Callable) -> "FileTokenizer | None":
    """The tokenizer of a folder's tokenizer.json; None if transformers may make it another one.

    It does by its class, or by tokens that other files of the folder add.

    Args:
      settings: of tokenizer_config.json.
      load: () -> the tokenizer of transformers.
    """
    path = folder / "tokenizer.json"
    if "added_tokens_decoder" not in settings:  # else transformers does not read it either
        settings = settings | read_settings(folder / "special_tokens_map.json")
    named = {f"{name}_token" for name in _ENDS} <= settings.keys()
    kind = settings.get("tokenizer_class") or ""
    plain = kind in _PLAIN_CLASSES or kind in _NAMING_CLASSES and named
    if not plain or any(map(settings.get, _CHANGES)) or not path.is_file():
        return None
    try:
        core = Tokenizer.from_file(str(path))
    except Exception:  # transformers reports what is wrong with it
        return None
    in_file = {str(index): token for index, token in core.get_added_tokens_decoder().items()}
    known = {token.content for token in in_file.values()}
    if not isinstance(core.model, models.BPE) or not _names(folder, settings) <= known:
        return None
    for index, token in settings.get("added_tokens_decoder", {}).items():
        if index not in in_file or any(getattr(in_file[index], f) != token.get(f) for f in _FLAGS):
            return None
    core.no_truncation()
    core.no_padding()
    return FileTokenizer(folder, core, settings, load)


def read_settings(path: Path) -> dict:
    """A JSON file; {} without one, or for one that is broken, which transformers reports."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _names(folder: Path, settings: dict) -> set[str]:
    """Every token that the settings or added_tokens.json name."""
    found = list(read_settings(folder / "added_tokens.json"))
    for key, value in settings.items():
        if key.endswith("special_tokens"):
            found += value.values() if isinstance(value, dict) else value or ()
        elif key.endswith("_token") and isinstance(value, str | dict):
            found.append(value)
    return {_content(token) for token in found}


def _content(token: str | dict | None) -> str | None:
    """A token's text; it may be written with its flags."""
    return token["content"] if isinstance(token, dict) else token


class FileTokenizer:
    """What the model and its data need of a Hugging Face tokenizer.

    All else of one, such as `apply_chat_template`, is that of the tokenizer of transformers, which
    is loaded when it is first asked for.

    Attributes:
      name_or_path: the folder.
      backend_tokenizer: the tokenizer of the `tokenizers` library.
      bos_token, eos_token: None without one.
      whole: the tokenizer of transformers.
    """

    def __init__(self, folder: Path, core: Tokenizer, settings: dict, load: Callable):
        self.name_or_path = str(folder)
        self.backend_tokenizer = core
        self.bos_token, self.eos_token = (_content(settings.get(f"{n}_token")) for n in _ENDS)
        self._load, self._added = load, []

    @property
    def eos_token_id(self) -> int | None:
        return (
            None if self.eos_token is None else self.backend_tokenizer.token_to_id(self.eos_token)
        )

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def add_tokens(self, tokens: Sequence[str], special_tokens: bool = False) -> int:
        self._added.append((tokens, special_tokens))
        self.__dict__.pop("whole", None)
        core = self.backend_tokenizer
        return (core.add_special_tokens if special_tokens else core.add_tokens)(list(tokens))

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | None | list[str | None]:
        name = self.backend_tokenizer.id_to_token
        return name(ids) if isinstance(ids, int) else [name(int(token)) for token in ids]

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False, **_) -> str:
        ids = [ids] if isinstance(ids, int) else [int(token) for token in ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __call__(self, *args, **options):
        return self.whole(*args, **options)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str):
        if name.startswith("__"):  # asked for by copy and pickle, of an object without attributes
            raise AttributeError(name)
        return getattr(self.whole, name)

    @functools.cached_property
    def whole(self):
        tokenizer = self._load()
        for tokens, special in self._added:
            tokenizer.add_tokens(list(tokens), special_tokens=special)
        return tokenizer
