"""`llava-jax convert`: a LLaVA checkpoint of any form made into one folder, tensor by tensor."""

import argparse
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.export import add_output_arguments, hugging_face, original, write_folder
from llava_jax.weights.hub import local_folder
from llava_jax.weights.read.llava_folder import LlavaFolder, open_llava
from llava_jax.weights.write import huggingface as hf_form
from llava_jax.weights.write.save import refuse_existing

FOLDERS = {  # options of open_llava
    "base": "the model that an adapter or a projector was trained on",
    "delta_base": "the LLaMA that delta weights were taken from",
    "vision_tower": "the vision encoder, where SOURCE only names it or is a language model alone",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder, or name on the Hugging Face hub")
    for name, text in FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=text)
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read .bin and .pth files: tensors only, no code of theirs runs",
    )
    add_output_arguments(parser)


def main(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    folders = {name: getattr(args, name) for name in FOLDERS}
    source = local_folder(args.source, args.allow_pickle)
    checkpoint = open_llava(source, **folders, allow_pickle=args.allow_pickle)
    convert(checkpoint, Path(args.out), args.dtype)
    return 0


def convert(checkpoint: LlavaFolder, out: Path, dtype: str | None = None) -> None:
    """Writes a checkpoint in Hugging Face form; in the original one if only that can say it.

    Raises:
      LlavaError: as `export.write_folder`.
    """
    try:
        hf_form.check_expressible(checkpoint.config)
        form = hugging_face
    except LlavaError:
        form = original
    write_folder(form(checkpoint, dtype), out)
