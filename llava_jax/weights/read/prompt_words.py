"""The words in which a folder's model is asked, and the tokens that end its answers.

The words are a Jinja chat template or one of our conversation templates. A chat template is looked
for where transformers does: that of the processor first, then that of the tokenizer. A folder
without one leaves a guess, which whoever loads the model must report: the wrong words give worse
answers and no error.

The original code never reads chat templates. From LLaVA-NeXT on, a folder in its form has that of
its language model all the same, with which no picture was ever seen in training.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_jax.data.boxes import CONVENTIONS
from llava_jax.errors import LlavaError
from llava_jax.text.chat_template import template_of
from llava_jax.text.templates import TEMPLATES, get_template
from llava_jax.weights.families import DecoderFamily
from llava_jax.weights.read.fields import read_json

# What only the conversations of one kind hold -> their template.
_MARKS = {
    "<seed:bos>": "seed_oss",
    "<|start_header_id|>": "llama_3",
    "<|im_start|>": "chatml",
    "<|assistant|>": "phi_3",
    "<<SYS>>": "llama_2",
    "[INST]": "mistral_instruct",
}
# Parts of a model's name, as llava/eval/run_llava.py of the original LLaVA chooses by them.
_NAMES = {
    "v1.6-34b": "chatml_direct",
    "llama-2": "llama_2",
    "llama2": "llama_2",
    "llama-3": "llama_3",
    "mistral": "mistral_instruct",
    "vicuna": "v1",
    "llava-v1": "v1",
}
BOX_KEY = "box_convention"  # of config.json
_TOKENIZER_FILES = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class PromptWords:
    """How a model is asked.

    Attributes:
      template: name of a conversation template of ours.
      chat_template: Jinja text to be followed in place of `template`, of which then only the ends
        of answers are used; None to follow `template`.
      source: where these words come from, for messages.
      guessed: whether nothing in the folder says them.
      stop_token_ids: ends of an answer that the folder's `generation_config.json` or `config.json`
        names, besides those of the template and the tokenizer.
      box_convention: how it writes boxes (`data.boxes`), if not as LLaVA-1.5.
    """

    template: str
    chat_template: str | None = None
    source: str = ""
    guessed: bool = False
    stop_token_ids: tuple[int, ...] = ()
    box_convention: str = "llava"

    @property
    def box_keys(self) -> dict[str, str]:
        """What a `config.json` says of the box convention: nothing of LLaVA's own."""
        usual = self.box_convention == PromptWords.box_convention
        return {} if usual else {BOX_KEY: self.box_convention}

    @property
    def warning(self) -> str | None:
        """One sentence about a guess, or None."""
        if not self.guessed:
            return None
        return f"{self.source}; name another with --template (template= in Python)"


def prompt_words(
    folders: Iterable[Path],
    config: Mapping,
    family: DecoderFamily,
    template: str | None = None,
    marked: bool = False,
    tiled: bool = False,
    original: bool = False,
) -> PromptWords:
    """The words of a model.

    Args:
      folders: where they are looked for, in this order: an adapter's folder, then its base's.
      config: the model's `config.json`.
      template: the words wanted: one of our templates, or a named one of the folder's.
      marked: the model marks pictures with <im_start> and <im_end>, as only LLaVA v0 did.
      tiled: it is LLaVA-NeXT or later.
      original: the folder has the form of the original code.
    Raises:
      LlavaError: an unknown template; a file that cannot be read; several chat templates, none of
        them the default.
    """
    folders = tuple(folders)
    stops, boxes = stop_token_ids(folders, config), _box_convention(config)
    found = next((named for named in map(chat_templates, folders) if named), {})
    texts_alone = {name for name, (_, jinja) in found.items() if not _knows_pictures(jinja)}
    if tiled and original and template not in texts_alone:
        found = {name: held for name, held in found.items() if name not in texts_alone}
    if template and template not in found:
        if template not in TEMPLATES:
            known = ", ".join(sorted({*TEMPLATES, *found}))
            raise LlavaError(f"unknown template {template!r}: choose one of {known}")
        return PromptWords(template, None, "the template asked for", False, stops, boxes)
    if found:
        path, jinja = _chosen(found, template)
        ours = template_of(jinja)
        name = ours or _marked_with([jinja]) or family.template
        return PromptWords(name, None if ours else jinja, str(path), False, stops, boxes)
    name, why = _guess(folders, config, family, marked, tiled)
    what = "the chat template is for texts alone" if texts_alone else "no chat template"
    source = f"{what} in {folders[0]}: using {name}, {why}"
    return PromptWords(name, None, source, True, stops, boxes)


def run_words(
    tokenizer_dir: Path,
    trained_with: str,
    template: str | None = None,
    box_convention: str = "llava",
) -> PromptWords:
    """The words of a run of train.py: those of its training, unless `template` names others.

    Its tokenizer folder keeps the `generation_config.json` and `config.json` of its start.
    """
    path = tokenizer_dir / "config.json"
    stops = stop_token_ids([tokenizer_dir], read_json(path) if path.is_file() else {})
    source = "the template asked for" if template else "the run's model.json"
    name = get_template(template or trained_with).name
    return PromptWords(name, None, source, False, stops, box_convention)


def _box_convention(config: Mapping) -> str:
    """How the model of a `config.json` writes boxes; only llava-jax writes that down."""
    found = config.get(BOX_KEY, PromptWords.box_convention)
    if found not in tuple(CONVENTIONS):  # it may be unhashable
        raise LlavaError(
            f"config.json has {BOX_KEY}={found!r}: it must be one of {', '.join(CONVENTIONS)}"
        )
    return found


def stop_token_ids(folders: Iterable[Path], config: Mapping) -> tuple[int, ...]:
    """The ends of an answer: of the first `generation_config.json` that names some, else those of
    `config.json`."""
    for folder in folders:
        path = folder / "generation_config.json"
        found = _ids(read_json(path), str(path)) if path.is_file() else ()
        if found:
            return found
    inner = config.get("text_config")  # the language model's come first in transformers too
    inner = _ids(inner, "config.json (text_config)") if isinstance(inner, dict) else ()
    return inner or _ids(config, "config.json")


def chat_templates(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, Jinja text) of the chat templates of a folder, the usual one as "default".

    In the order of transformers: what its processor reads, else what its tokenizer reads.
    """
    for name in ("processor_config.json", "chat_template.json"):
        found = _in_json(folder / name)
        if found:
            return found
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    found = {name: (path, _text(path)) for name, path in files.items() if path.is_file()}
    return found or _in_json(folder / "tokenizer_config.json")


def _in_json(path: Path) -> dict[str, tuple[Path, str]]:
    """The `chat_template` of a JSON file: a text, a list of named ones, or an object of them."""
    value = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    value = {"default": value} if isinstance(value, str) else value or {}
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise LlavaError(f"{path} has a chat_template that is neither a text nor named texts")
    return {name: (path, text) for name, text in value.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlavaError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _chosen(found: dict[str, tuple[Path, str]], wanted: str | None) -> tuple[Path, str]:
    name = wanted or (next(iter(found)) if len(found) == 1 else "default")
    if name not in found:
        path, _ = next(iter(found.values()))
        raise LlavaError(
            f"{path} has the chat templates {', '.join(found)} and none called default: choose one "
            "with --template (template= in Python)"
        )
    return found[name]


def _knows_pictures(jinja: str) -> bool:
    """Whether a chat template was written for pictures, by us or by others."""
    return template_of(jinja) is not None or "image" in jinja


def _guess(
    folders: tuple[Path, ...], config: Mapping, family: DecoderFamily, marked: bool, tiled: bool
) -> tuple[str, str]:
    """(template, the reason for it) for a model whose folder has no chat template."""
    if marked:
        return "v0", "since pictures are marked with <im_start>"
    named = config.get("version")
    if isinstance(named, str) and named in TEMPLATES:
        return named, "the version that config.json names"
    texts = [_text(p) for f in folders for p in map(f.joinpath, _TOKENIZER_FILES) if p.is_file()]
    mark = next((m for m in _MARKS if any(f'"{m}"' in text for text in texts)), None)
    if mark:
        # LLaVA-NeXT on Yi, whose class is Llama's, writes no line breaks between turns.
        yi = tiled and mark == "<|im_start|>" and family.model_type == "llama"
        return "chatml_direct" if yi else _MARKS[mark], f"since its tokenizer has {mark}"
    text_config = config.get("text_config")
    inner = text_config.get("_name_or_path") if isinstance(text_config, dict) else None
    for name in (config.get("_name_or_path"), inner, *(folder.name for folder in folders)):
        part = next((part for part in _NAMES if part in str(name or "").lower()), None)
        if part:
            return _NAMES[part], f"since it is called {name}"
    return family.template, f"as most LLaVAs on a {family.model_type} language model"


def _marked_with(texts: Iterable[str]) -> str | None:
    """The template whose mark stands in one of the texts, or None."""
    texts = list(texts)
    return next((t for m, t in _MARKS.items() if any(m in text for text in texts)), None)


def _ids(values: Mapping, source: str) -> tuple[int, ...]:
    """`eos_token_id`, one id or several; ids below 0 stand for none."""
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise LlavaError(f"{source} has eos_token_id={value!r}: it must be a token id or a list")
    return tuple(i for i in ids if i >= 0)
