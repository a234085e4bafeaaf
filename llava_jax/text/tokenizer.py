"""A tokenizer from a local folder, with the token ids that its model was trained on.

LLaVA models and the language models below them were trained with transformers 4. Version 5 builds
some tokenizers anew from their class and changed defaults on the way, so the same folder gives
other ids. The ids here follow version 4.57, whichever version is installed:

| in the folder | transformers 4 | transformers 5 |
|---|---|---|
| class of Llama, `add_bos_token` not set | BOS first | BOS only if tokenizer.json writes it |
| the same from tokenizer.model, `legacy` not set | a space at each start | at the first only |
| the same from tokenizer.json | read as it is | with the pre-tokenizer of the class |

"Each start" is the start of a text and what follows a special token in it.
A folder that version 5 wrote is read as version 5 reads it.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

from llava_jax import imports
from llava_jax.errors import LlavaError
from llava_jax.text.tokenization import fast_core
from llava_jax.text.tokenizer_file import read_settings, read_tokenizer_file

# Classes that put BOS first unless tokenizer_config.json says otherwise.
_BOS_CLASSES = ("Llama", "CodeLlama", "Gemma", "Cohere")
_SENTENCEPIECE_CLASSES = ("Llama", "CodeLlama")
# The class that model types of config.json stand for if tokenizer_config.json names none.
_CLASS_OF_MODEL = dict.fromkeys(
    ("llama", "mistral", "mixtral", "llava", "llava_llama", "llava_mistral"), "Llama"
) | {"gemma": "Gemma", "gemma2": "Gemma", "gemma3_text": "Gemma", "cohere": "Cohere"}


def load_tokenizer(
    path: str | os.PathLike, vocab_size: int | None = None, added_tokens: Sequence[str] = ()
):
    """A Hugging Face tokenizer from a local folder.

    Args:
      vocab_size: rows of the model's embedding table, to check that every token has one.
      added_tokens: special tokens to add first, in this order.
    Raises:
      LlavaError: the folder holds no tokenizer, or one with ids past the table.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise LlavaError(f"no tokenizer folder at {path}")
    load = functools.partial(_load_with_transformers, folder)
    settings = read_settings(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer_file(folder, settings, load)
    if tokenizer is None:
        tokenizer = load()
    else:
        _restore_file(tokenizer.backend_tokenizer, settings)
    tokenizer.add_tokens(list(added_tokens), special_tokens=True)
    if vocab_size is not None:
        past = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
        if past:
            raise LlavaError(
                f"the tokenizer in {path} does not fit the model: its token {past[max(past)]!r} is "
                f"{max(past)}, and the embedding table has {vocab_size} rows"
            )
    return tokenizer


def _load_with_transformers(folder: Path):
    """The same without more tokens, as transformers and `_restore` make it."""
    transformers = imports.transformers()
    name = str(folder)
    load = functools.partial(
        transformers.AutoTokenizer.from_pretrained, name, local_files_only=True
    )
    try:
        with _only_errors(transformers.utils.logging):
            try:
                tokenizer = load()
            except AttributeError:  # a config.json of the original LLaVA with scaled positions
                tokenizer = load(config=transformers.PretrainedConfig())
    except Exception as error:  # transformers raises many kinds here
        first_line = str(error).strip().split("\n")[0]
        raise LlavaError(f"cannot load a tokenizer from {folder}: {first_line}") from None
    fast_core(tokenizer)
    changes = _restore(tokenizer, folder)
    if changes:
        _report(f"{folder}: tokenized like transformers 4, not 5: {', '.join(changes)}")
    return tokenizer


@contextlib.contextmanager
def _only_errors(logging):
    """Keeps transformers from warning of the config.json of an original LLaVA."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@functools.cache
def _report(message: str) -> None:
    """Prints a message once."""
    print(message, file=sys.stderr)


def _restore(tokenizer, folder: Path) -> list[str]:
    """Gives the tokenizer the behaviour of transformers 4; returns what that changed, in words."""
    settings, kind = _settings(folder)
    written_by_5 = _written_by_5(settings)
    # The class of version 4 converts tokenizer.model again if the prefix space is set.
    converts = kind in _SENTENCEPIECE_CLASSES and settings.get("add_prefix_space") is not None
    model = folder / "tokenizer.model"
    core, changes = tokenizer.backend_tokenizer, []
    before = _state(core)
    if (folder / "tokenizer.json").exists() and not (converts and model.exists()):
        _take_file(core, Tokenizer.from_file(str(folder / "tokenizer.json")))
        _restore_file(core, settings)
    else:
        _merge_by_score(core, model)
        if kind in _SENTENCEPIECE_CLASSES and not written_by_5 and model.exists():
            legacy = settings.get("legacy") in (None, True) or kind == "CodeLlama"
            _take_spaces(core, legacy, settings.get("add_prefix_space") is not False)
    if _state(core) != before:
        changes.append("spaces at the start of a text and after special tokens")
    if kind in _BOS_CLASSES and not written_by_5:
        before = core.encode("a").ids
        bos = tokenizer.bos_token if settings.get("add_bos_token", True) else None
        eos = tokenizer.eos_token if settings.get("add_eos_token", False) else None
        _take_ends(core, bos, eos)
        if core.encode("a").ids != before:
            changes.append(f"{bos} before a text" if bos else "no BOS before a text")
    return changes


def _restore_file(core: Tokenizer, settings: dict) -> None:
    """What transformers 4 changes of a tokenizer.json by tokenizer_config.json."""
    if isinstance(core.pre_tokenizer, pre_tokenizers.ByteLevel) and not _written_by_5(settings):
        core.pre_tokenizer.add_prefix_space = bool(settings.get("add_prefix_space"))


def _written_by_5(settings: dict) -> bool:
    return "backend" in settings


def _settings(folder: Path) -> tuple[dict, str]:
    """tokenizer_config.json, and the class it names without its ending, such as "Llama"."""
    names = ("tokenizer_config.json", "config.json")
    settings, config = (read_settings(folder / name) for name in names)
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not name:
        return settings, _CLASS_OF_MODEL.get(config.get("model_type"), "")
    return settings, name.removesuffix("Fast").removesuffix("Tokenizer")


def _state(core: Tokenizer) -> list:
    """What decides how a text is cut, without the vocabulary and the tokens at its ends."""
    state = json.loads(core.to_str())
    return [state["normalizer"], state["pre_tokenizer"]]


def _take_file(core: Tokenizer, file: Tokenizer) -> None:
    """Sets every part of `core` as tokenizer.json has it; the tokens added to it stay."""
    core.model, core.post_processor = file.model, file.post_processor
    core.normalizer, core.pre_tokenizer = file.normalizer, file.pre_tokenizer
    core.decoder = file.decoder


def _take_spaces(core: Tokenizer, legacy: bool, prefix: bool) -> None:
    """How a SentencePiece model of the Llama class writes spaces.

    legacy: a text that follows a special token begins with a space too.
    """
    replace = normalizers.Replace(" ", "▁")
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    if legacy:
        start = [normalizers.Prepend("▁")] if prefix else []
        core.normalizer, core.pre_tokenizer = normalizers.Sequence([*start, replace]), None
    else:
        scheme = "first" if prefix else "never"
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)


def _take_ends(core: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `core` put these tokens around each text."""
    ends = [token for token in (bos, eos) if token is not None]
    text = f"{f'{bos} ' if bos else ''}$A{f' {eos}' if eos else ''}"
    core.post_processor = processors.TemplateProcessing(
        single=text, special_tokens=[(token, core.token_to_id(token)) for token in ends]
    )


def _merge_by_score(core: Tokenizer, model: Path) -> None:
    """Puts the merges of a SentencePiece model in the order of its scores.

    transformers 5 makes them of `tokenizer.model` in the order of ids. Llama's runs of spaces have
    the lowest of both: SentencePiece joins spaces last of all.
    """
    if not model.is_file():
        return
    state = json.loads(core.to_str())
    if state["model"]["type"] != "BPE":
        return
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(model))
    except RuntimeError:  # another kind of model under the same name
        return
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
    key = lambda pair: (scores.get("".join(pair), 0), *map(len, pair))
    state["model"]["merges"].sort(key=key, reverse=True)
    core.model = Tokenizer.from_str(json.dumps(state)).model
