"""The `llava-jax` command: one sub-command a task, each described by --help."""

import argparse
import importlib
import os
import sys

from llava_jax.errors import LlavaError, file_fault

# name -> (module with add_arguments(parser) and main(args), one line of help)
COMMANDS = {
    "generate": ("llava_jax.serving.generate", "answer a file of requests"),
    "chat": ("llava_jax.serving.chat", "ask a model about pictures"),
    "serve": ("llava_jax.serving.serve", "serve a model over HTTP, with a chat page"),
    "build": ("llava_jax.data.build", "make a TFDS ArrayRecord data set of LLaVA records"),
    "validate": ("llava_jax.training.validate_data", "check every record and image of a data set"),
    "convert": ("llava_jax.weights.convert", "make one checked folder of any LLaVA checkpoint"),
    "export": ("llava_jax.weights.export", "write a trained model for other programs to load"),
    "show": ("llava_jax.training.show_record", "print one record as the model sees it"),
    "compare": ("llava_jax.evaluation.compare", "test whether two results of eval.py differ"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llava-jax",
        description="LLaVA in JAX. Training is `python train.py`, scoring is `python eval.py`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv[:1]:  # import only what runs: --help stays quick
            importlib.import_module(module).add_arguments(command)
    args, rest = parser.parse_known_args(argv)
    takes_changes = getattr(args, "config", None) is not None
    changes = [text for text in rest if takes_changes and text.startswith("--config.")]
    if unknown := [text for text in rest if text not in changes]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if takes_changes:
            from llava_jax.command import read_config

            args.config = read_config(args.config, changes)
        return importlib.import_module(COMMANDS[args.command][0]).main(args)
    except LlavaError as error:
        print(f"llava-jax {args.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"llava-jax {args.command}: {file_fault(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
