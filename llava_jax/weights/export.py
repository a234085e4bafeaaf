"""`llava-jax export`: a trained model as a folder that other programs load."""

import argparse
import collections
import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_jax.errors import LlavaError
from llava_jax.models.llava import IMAGE_TOKEN_ID, LlavaConfig
from llava_jax.text.templates import get_template
from llava_jax.weights.families import Families, families_of
from llava_jax.weights.formats.safetensors_files import TensorToWrite, write_checkpoint_files
from llava_jax.weights.llava_classes import class_of
from llava_jax.weights.load import open_run
from llava_jax.weights.name_tables import NEWLINE
from llava_jax.weights.read.llava_folder import LlavaFolder, components, is_llava_folder, open_llava
from llava_jax.weights.read.prompt_words import PromptWords, run_words
from llava_jax.weights.run_directory import checkpoint_of
from llava_jax.weights.tensors import PARAMETER_DTYPES
from llava_jax.weights.write import huggingface as hf_form
from llava_jax.weights.write import original as original_form
from llava_jax.weights.write.peft import write_adapter
from llava_jax.weights.write.save import (
    array_params,
    refuse_existing,
    stored_tensors,
    whole_folder,
)

HF_ROOTS = {
    "vision": "vision_tower.",
    "projector": "multi_modal_projector.",
    "decoder": "language_model.",
    NEWLINE: "",
}
ORIGINAL_ROOTS = {
    "vision": "model.vision_tower.vision_tower.",
    "projector": "model.mm_projector.",
    "decoder": "",
    NEWLINE: "model.",
}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # the tensors with a row a token


@dataclasses.dataclass(frozen=True)
class FolderToWrite:
    """A checkpoint folder before anything of it is on disk.

    Attributes:
      config: what must be read back.
      write_side_files: writes everything but the weights and their checksums into a folder.
      loaded_by: programs that load it.
    """

    config: LlavaConfig
    tensors: list[TensorToWrite]
    write_side_files: Callable[[Path], None]
    loaded_by: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser, "a run of train.py, one of its checkpoints/STEP, or a LLaVA")
    parser.add_argument(
        "--format",
        required=True,
        choices=(*FORMATS, "peft"),
        help="Hugging Face's, the original LLaVA's (both with LoRA merged), or LoRA alone for PEFT",
    )
    add_output_arguments(parser)


def add_checkpoint_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """--checkpoint DIR; the older positional form is read by `checkpoint_of_arguments` too."""
    parser.add_argument("--checkpoint", metavar="DIR", help=f"{text} (required)")
    parser.add_argument("positional", nargs="?", help=argparse.SUPPRESS)


def checkpoint_of_arguments(args: argparse.Namespace) -> str:
    given = [path for path in (args.checkpoint, args.positional) if path]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise LlavaError(f"name one model with --checkpoint DIR, not {found}")
    return given[0]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the words in which the model is asked; default: those that its folder or run names",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=PARAMETER_DTYPES, help="of the weights; default: as they are"
    )


def main(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    path = checkpoint_of_arguments(args)
    if args.format == "peft":
        write_adapter(path, Path(args.out), args.dtype)
        return 0
    write_folder(FORMATS[args.format](open_checkpoint(path), args.dtype, args.template), args.out)
    return 0


def open_checkpoint(path: str | Path) -> LlavaFolder:
    """A LLaVA folder; or a run or one of its steps: what it trained is read, LoRA merged."""
    path = Path(path)
    if is_llava_folder(path):
        return open_llava(path)
    step_folder = checkpoint_of(path)
    run, tree = open_run(step_folder)
    params = {
        f"{part}/{name}": parameter
        for part, branch in tree.items()
        for name, parameter in array_params(branch).items()
    }
    tokenizer = step_folder.parent.parent / "tokenizer"
    return LlavaFolder(
        folder=step_folder,
        config=run.config,
        families=families_of(run.config),
        params=params,
        idle={},
        words=partial(run_words, tokenizer, run.template, box_convention=run.box_convention),
        tokenizer_dir=tokenizer,
    )


def write_folder(folder: FolderToWrite, out: str | Path) -> None:
    """Writes a folder whole or not at all, its weights one tensor at a time.

    Raises:
      LlavaError: `out` exists, another process writes it, the disk is or would be full, or the
        result would be read back as another model.
    """
    refuse_existing(out)
    out = Path(out)
    total = sum(tensor.bytes for tensor in folder.tensors)
    check_space(out, total)
    digests = {}
    with whole_folder(out, digests) as partial_folder:
        folder.write_side_files(partial_folder)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {out.name}") as progress:
            digests |= write_checkpoint_files(partial_folder, folder.tensors, progress.update)
        found = open_llava(partial_folder).config
        if found != folder.config:
            raise LlavaError(f"{out} would be read back as {found} and not {folder.config}")
    *most, last = folder.loaded_by
    programs = f"{', '.join(most)} and {last}" if most else f"{last} alone"
    _tell(f"{out}: {total / 1e9:.2f} GB of weights, with checksums; loads in {programs}")


def check_space(out: Path, needed: int) -> None:
    """Raises LlavaError if the disk of `out` has too little room."""
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LlavaError(
            f"{out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: choose "
            "another disk, or --dtype bfloat16"
        )


def hugging_face(
    checkpoint: LlavaFolder, dtype: str | None, template: str | None = None
) -> FolderToWrite:
    """The folder that one of transformers' LLaVA classes loads.

    A folder in this form keeps its config and tokenizer and gets what its processor lacks; only the
    names of tensors become those of the llava-hf checkpoints. For any other, the tokenizer gets a
    token for `<image>`, and the embedding table and the head get rows for it if they have none to
    spare.
    """
    _check_form("hf", checkpoint.config)
    words = _words(checkpoint, template)
    if hf_form.is_copied(checkpoint):
        parts = _component_tensors(checkpoint, dtype, checkpoint.families)
        tensors = _with_roots(parts, HF_ROOTS)
        dtype = _main_dtype(tensors)
        write = hf_form.copied_side_files(checkpoint, words, bool(template), dtype, _tell)
        return FolderToWrite(checkpoint.config, tensors, write, _loaded_by(checkpoint))
    tokenizer = _tokenizer(checkpoint, words)
    if words.chat_template is None:
        hf_form.warn_of_other_tokens(tokenizer, get_template(words.template), _tell)
    config = hf_form.with_placeholders(checkpoint.config, tokenizer.image_id, tokenizer.video_id)
    parts = _component_tensors(checkpoint, dtype, families_of(config))
    parts["decoder"] = [_grown(t, config.decoder.vocab_size) for t in parts["decoder"]]
    tensors = _with_roots(parts, HF_ROOTS)
    has_head = any(t.name.startswith("vision_tower.vision_model.head.") for t in tensors)
    write = partial(
        hf_form.write_side_files,
        config=config,
        tokenizer=tokenizer,
        words=words,
        dtype=_main_dtype(tensors),
        vision_use_head=has_head,
        log=_tell,
    )
    return FolderToWrite(config, tensors, write, _loaded_by(checkpoint))


def _loaded_by(checkpoint: LlavaFolder) -> tuple[str, ...]:
    """Programs that load a folder in Hugging Face form; see docs/use/weights.md for what was run.

    Only transformers joins the features of several layers. With tiles no other program was run.
    """
    one_layer = isinstance(checkpoint.config.feature_layer, int)
    plain = one_layer and checkpoint.config.image.tiling is None
    return checkpoint.families.vision.loaded_by if plain else ("transformers",)


def original(
    checkpoint: LlavaFolder, dtype: str | None, template: str | None = None
) -> FolderToWrite:
    """The folder that the original LLaVA code loads, vision encoder included."""
    _check_form("llava", checkpoint.config)
    words = _words(checkpoint, template)
    config = dataclasses.replace(
        checkpoint.config, image_token_id=IMAGE_TOKEN_ID, video_token_id=None
    )
    parts = _component_tensors(checkpoint, dtype, families_of(config), original=True)
    tensors = _with_roots(parts, ORIGINAL_ROOTS)
    write = partial(
        original_form.write_side_files,
        config=config,
        tokenizer=_tokenizer(checkpoint, words),
        words=words,
        dtype=_main_dtype(tensors),
        log=_tell,
    )
    return FolderToWrite(config, tensors, write, ("the original LLaVA code",))


FORMATS = {"hf": hugging_face, "llava": original}
_FAULTS = {"hf": hf_form.fault, "llava": original_form.fault}


def writable(form: str, config: LlavaConfig) -> bool:
    """Whether a form can express a model."""
    return _FAULTS[form](config) is None


def _check_form(form: str, config: LlavaConfig) -> None:
    """Raises LlavaError, with the form that can, if one cannot express a model."""
    fault = _FAULTS[form](config)
    if fault is None:
        return
    other = next((f"use --format {f}" for f in FORMATS if writable(f, config)), "")
    raise LlavaError(
        f"this model cannot be written in the form {form}: {fault}; "
        f"{other or 'use the run directory itself'}"
    )


def _words(checkpoint: LlavaFolder, template: str | None) -> PromptWords:
    """How the model is asked; what was assumed and guessed is reported."""
    for note in checkpoint.notes:
        _tell(note)
    words = checkpoint.words(template)
    if words.warning:
        _tell(words.warning)
    return words


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _tokenizer(checkpoint: LlavaFolder, words: PromptWords) -> hf_form.HFTokenizer:
    return hf_form.prepare_tokenizer(
        checkpoint.needed_tokenizer(),
        hf_form.jinja_of(words, checkpoint.config),
        checkpoint.config.decoder.vocab_size,
        checkpoint.added_tokens,
        checkpoint.config.image_token_id,
        class_of(checkpoint.config.image),
        checkpoint.config.video_token_id,
    )


def _component_tensors(
    checkpoint: LlavaFolder, dtype: str | None, families: Families, original: bool = False
) -> dict[str, list[TensorToWrite]]:
    """Component -> its tensors, by the names that a folder of it alone would have."""
    parts = {}
    for part, (table, config, _) in components(checkpoint.config, families, original).items():
        own = {
            path.removeprefix(f"{part}/"): parameter
            for path, parameter in checkpoint.params.items()
            if path.startswith(f"{part}/")
        }
        idle = checkpoint.idle if part == "vision" else {}
        parts[part] = stored_tensors(table, config, own, dtype, idle)
    return parts


def _with_roots(
    parts: Mapping[str, list[TensorToWrite]], roots: Mapping[str, str]
) -> list[TensorToWrite]:
    return [
        dataclasses.replace(tensor, name=roots.get(tensor.name, roots[part]) + tensor.name)
        for part, tensors in parts.items()
        for tensor in tensors
    ]


def _main_dtype(tensors: list[TensorToWrite]) -> str:
    """The dtype of most bytes, as config.json names it."""
    names = {dtype: name for name, dtype in PARAMETER_DTYPES.items()}
    counts = collections.Counter()
    for tensor in tensors:
        counts[names[np.dtype(tensor.dtype)]] += tensor.bytes
    return counts.most_common(1)[0][0]


def _grown(tensor: TensorToWrite, rows: int) -> TensorToWrite:
    """A tensor of the vocabulary [V, D] with `rows` rows: new ones are the mean of the old ones.

    The score of a token that was never trained is then the mean of all scores, never the best.
    """
    old, *width = tensor.shape
    if tensor.name not in VOCABULARY or old == rows:
        return tensor

    def values() -> np.ndarray:
        table = np.asarray(tensor.values(), tensor.dtype)
        mean = table.mean(axis=0, dtype=np.float32).astype(tensor.dtype)
        return np.concatenate([table, np.broadcast_to(mean, (rows - old, *width))])

    return dataclasses.replace(tensor, shape=(rows, *width), values=values)
