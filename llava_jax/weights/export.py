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
from llava_jax.files import write_json
from llava_jax.models.llava import IMAGE_TOKEN_ID, LlavaConfig
from llava_jax.text.chat_template import chat_template
from llava_jax.text.conversation import IMAGE_TOKEN
from llava_jax.text.processor_prompt import check_image_token
from llava_jax.text.templates import get_template
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.weights.checksums import CHECKSUMS_FILE
from llava_jax.weights.families import Families, families_of
from llava_jax.weights.formats.safetensors_files import TensorToWrite, write_checkpoint_files
from llava_jax.weights.lazy import PARAMETER_DTYPES
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.llava_folder import LlavaFolder, components, is_llava_folder, open_llava
from llava_jax.weights.run_directory import checkpoint_of, open_run
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
}
ORIGINAL_ROOTS = {
    "vision": "model.vision_tower.vision_tower.",
    "projector": "model.mm_projector.",
    "decoder": "",
}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # the tensors with a row a token


@dataclasses.dataclass(frozen=True)
class FolderToWrite:
    """A checkpoint folder before anything of it is on disk.

    Attributes:
      config: what must be read back.
      write_side_files: writes all but the weights and their checksums into a folder.
    """

    config: LlavaConfig
    tensors: list[TensorToWrite]
    write_side_files: Callable[[Path], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run directory, step of one, or LLaVA folder"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=(*FORMATS, "peft"),
        help="Hugging Face's, the original LLaVA's (both with LoRA merged), or LoRA alone for PEFT",
    )
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=PARAMETER_DTYPES, help="of the weights; default: as they are"
    )


def main(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    if args.format == "peft":
        write_adapter(args.checkpoint, Path(args.out), args.dtype)
        return 0
    checkpoint = open_checkpoint(args.checkpoint)
    write_folder(FORMATS[args.format](checkpoint, args.dtype), Path(args.out))
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
    families = families_of(run.config)
    return LlavaFolder(step_folder, run.config, families, params, {}, run.template, tokenizer)


def write_folder(folder: FolderToWrite, out: Path) -> None:
    """Writes a folder whole or not at all, its weights one tensor at a time.

    Raises:
      LlavaError: `out` exists, another process writes it, the disk is or would be full, or the
        result would be read back as another model.
    """
    refuse_existing(out)
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
    print(f"{out}: {total / 1e9:.2f} GB of weights, with checksums", file=sys.stderr)


def check_space(out: Path, needed: int) -> None:
    """Raises LlavaError when the disk of `out` has too little room."""
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LlavaError(
            f"{out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: choose "
            "another disk, or --dtype bfloat16"
        )


def hugging_face(checkpoint: LlavaFolder, dtype: str | None) -> FolderToWrite:
    """The folder that transformers' LlavaForConditionalGeneration loads.

    A folder in this form keeps its config, processor and tokenizer; only the names of tensors
    become those of the llava-hf checkpoints. For any other, the tokenizer gets a token for
    `<image>`, and the embedding table and the head get rows for it if they have none to spare.
    """
    if hf_form.is_hf_folder(checkpoint.folder):
        return _same_form(checkpoint, dtype)
    hf_form.check_expressible(checkpoint.config)
    tokenizer, template = _tokenizer(checkpoint), get_template(checkpoint.template)
    if checkpoint.chat_template is None:
        hf_form.warn_of_other_tokens(tokenizer, template, _tell)
    config = hf_form.with_image_token(checkpoint.config, tokenizer.image_id)
    parts = _component_tensors(checkpoint, dtype, families_of(config))
    parts["decoder"] = [_grown(t, config.decoder.vocab_size) for t in parts["decoder"]]
    tensors = _with_roots(parts, HF_ROOTS)
    has_head = any(t.name.startswith("vision_tower.vision_model.head.") for t in tensors)
    write = partial(
        hf_form.write_side_files,
        config=config,
        tokenizer=tokenizer,
        template=template,
        dtype=_main_dtype(tensors),
        vision_use_head=has_head,
    )
    return FolderToWrite(config, tensors, write)


def _same_form(checkpoint: LlavaFolder, dtype: str | None) -> FolderToWrite:
    values = read_json(checkpoint.folder / "config.json")
    families = checkpoint.families
    if checkpoint.tokenizer_dir is not None:  # copied, so that nothing else would notice
        rows = checkpoint.config.decoder.vocab_size
        tokenizer = load_tokenizer(checkpoint.tokenizer_dir, rows)
        if IMAGE_TOKEN in tokenizer.get_vocab():
            check_image_token(tokenizer, checkpoint.config.image_token_id)
    tensors = _with_roots(_component_tensors(checkpoint, dtype, families), HF_ROOTS)
    write = partial(_copy_side_files, checkpoint.folder, values, _main_dtype(tensors))
    return FolderToWrite(checkpoint.config, tensors, write)


def original(checkpoint: LlavaFolder, dtype: str | None) -> FolderToWrite:
    """The folder that the original LLaVA code loads, vision encoder included."""
    original_form.check_expressible(checkpoint.config)
    config = dataclasses.replace(checkpoint.config, image_token_id=IMAGE_TOKEN_ID)
    parts = _component_tensors(checkpoint, dtype, families_of(config), original=True)
    tensors = _with_roots(parts, ORIGINAL_ROOTS)
    write = partial(
        original_form.write_side_files,
        config=config,
        tokenizer=_tokenizer(checkpoint),
        dtype=_main_dtype(tensors),
    )
    return FolderToWrite(config, tensors, write)


FORMATS = {"hf": hugging_face, "llava": original}


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _tokenizer(checkpoint: LlavaFolder) -> hf_form.HFTokenizer:
    if checkpoint.tokenizer_dir is None:
        raise LlavaError(
            f"{checkpoint.folder} has no tokenizer: put its tokenizer.json, or tokenizer.model, "
            "and tokenizer_config.json there"
        )
    return hf_form.prepare_tokenizer(
        checkpoint.tokenizer_dir,
        checkpoint.chat_template or chat_template(get_template(checkpoint.template)),
        checkpoint.config.decoder.vocab_size,
        checkpoint.added_tokens,
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
        dataclasses.replace(tensor, name=roots[part] + tensor.name)
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
    """A tensor of the vocabulary [V, D] with `rows` rows: new ones are the mean of the others.

    So the score of a token that was never trained is the mean of all scores, and never the best.
    """
    old, *width = tensor.shape
    if tensor.name not in VOCABULARY or old == rows:
        return tensor

    def values() -> np.ndarray:
        table = np.asarray(tensor.values(), tensor.dtype)
        mean = table.mean(axis=0, dtype=np.float32).astype(tensor.dtype)
        return np.concatenate([table, np.broadcast_to(mean, (rows - old, *width))])

    return dataclasses.replace(tensor, shape=(rows, *width), values=values)


def _copy_side_files(source: Path, values: dict, dtype: str, folder: Path) -> None:
    """Everything beside the weights, config.json told of their dtype."""
    for path in source.iterdir():
        of_weights = path.name == CHECKSUMS_FILE or path.name.endswith(".index.json")
        if path.suffix in (".json", ".jinja", ".model", ".txt") and not of_weights:
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", values | hf_form.dtype_keys(dtype))
