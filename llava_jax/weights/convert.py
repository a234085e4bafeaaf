"""`llava-jax convert`: a LLaVA of any form made into one folder, tensor by tensor."""

import argparse
from pathlib import Path

from llava_jax.weights.export import (
    add_checkpoint_argument,
    add_output_arguments,
    checkpoint_of_arguments,
    hugging_face,
    original,
    writable,
    write_folder,
)
from llava_jax.weights.hub import local_folder
from llava_jax.weights.load import add_picture_arguments, picture_options
from llava_jax.weights.read.llava_folder import LlavaFolder, open_llava
from llava_jax.weights.write.save import refuse_existing

FOLDERS = {  # options of open_llava
    "base": "the model that an adapter or a projector was trained on",
    "delta_base": "the LLaMA that delta weights were taken from",
    "vision_tower": "the vision encoder, if the checkpoint only names it or is a language model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser, "a folder, or a name on the Hugging Face hub")
    for name, text in FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=text)
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read .bin and .pth files: their tensors only, no code in them runs",
    )
    add_picture_arguments(parser)
    add_output_arguments(parser)


def main(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    folders = {name: getattr(args, name) for name in FOLDERS}
    source = local_folder(checkpoint_of_arguments(args), args.allow_pickle)
    options = folders | picture_options(args)
    checkpoint = open_llava(source, **options, allow_pickle=args.allow_pickle)
    convert(checkpoint, Path(args.out), args.dtype, args.template)
    return 0


def convert(
    checkpoint: LlavaFolder, out: Path, dtype: str | None = None, template: str | None = None
) -> None:
    """Writes a checkpoint in Hugging Face form, or in the original one if only that can say it.

    Args:
      template: the words in which the model is asked, in place of the folder's own.
    Raises:
      LlavaError: as `export.write_folder`.
    """
    only_original = not writable("hf", checkpoint.config) and writable("llava", checkpoint.config)
    form = original if only_original else hugging_face
    write_folder(form(checkpoint, dtype, template), out)
