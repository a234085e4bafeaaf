"""The `llava-jax` command: one sub-command a task, each described by --help."""

import argparse
import difflib
import importlib
import os
import re
import sys

from llava_jax.errors import LlavaError, file_fault

# name -> (module with add_arguments(parser) and main(args), one line of help)
COMMANDS = {
    "generate": ("llava_jax.serving.generate", "answer a file of requests"),
    "chat": ("llava_jax.serving.chat", "ask a model about pictures"),
    "explain": ("llava_jax.serving.explain", "show where on a picture a model looked"),
    "serve": ("llava_jax.serving.serve", "serve a model over HTTP, with a chat page"),
    "build": ("llava_jax.data.build", "make a TFDS ArrayRecord data set of LLaVA records"),
    "import": ("llava_jax.data.importers", "make records of published annotations of boxes"),
    "validate": ("llava_jax.training.validate_data", "check every record and image of a data set"),
    "convert": ("llava_jax.weights.convert", "make one checked folder of any LLaVA checkpoint"),
    "export": ("llava_jax.weights.export", "write a trained model for other programs to load"),
    "quantize": ("llava_jax.training.quantize", "round a model to four bits by GPTQ, on records"),
    "show": ("llava_jax.training.show_record", "print one record as the model sees it"),
    "compare": ("llava_jax.evaluation.compare", "test whether two results of eval.py differ"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults, and whose errors name the closest word."""

    def __init__(self, **options):
        super().__init__(formatter_class=_HelpFormatter, **options)

    def unknown(self, word: str) -> None:
        """Exits with the error about a word that is no argument."""
        flag = word.split("=")[0]
        flags = [name for action in self._actions for name in _shown(action)]
        kind = "flag" if flag.startswith("-") else "argument"
        self.error(f"unknown {kind} {flag}{_closest(flag, flags)}")

    def error(self, message: str) -> None:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            word, choices = found[1], re.findall(r"[\w.-]+", found[2])
            name = message[: found.start()].removeprefix("argument ").rstrip(": ")
            known = "" if _closest(word, choices) else f"; known are {', '.join(choices)}"
            message = f"{name} has no choice {word!r}{_closest(word, choices)}{known}"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


class _HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        no_default = action.default is None or action.default is False or action.default == []
        if no_default or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text}; default: %(default)s"


def _shown(action: argparse.Action) -> list[str]:
    return [] if action.help == argparse.SUPPRESS else list(action.option_strings)


def _closest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f": did you mean {close[0]}?" if close else ""


def _pictures(source: str) -> list:
    """The path of a data set, or the pictures of the benchmarks of a config of eval.py."""
    if not source.endswith(".py"):
        return [source]
    from llava_jax.command import read_config
    from llava_jax.evaluation.pictures import benchmark_pictures

    return benchmark_pictures(read_config(source, base_name="configs.eval.base"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="llava-jax",
        description="LLaVA in JAX. Training is `python train.py`, scoring is `python eval.py`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv, current = sys.argv[1:] if argv is None else argv, parser
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv[:1]:  # import only what runs: --help stays quick
            importlib.import_module(module).add_arguments(command)
            current = command
    args, rest = parser.parse_known_args(argv)
    takes_changes = getattr(args, "config", None) is not None
    changes = [text for text in rest if takes_changes and text.startswith("--config.")]
    if unknown := [text for text in rest if text not in changes]:
        current.unknown(unknown[0])
    try:
        if takes_changes:
            from llava_jax.command import read_config

            args.config = read_config(args.config, changes)
        if getattr(args, "against", None):
            args.against = [one for source in args.against for one in _pictures(source)]
        if getattr(args, "dry_run", None):
            from llava_jax.dry_run import answering

            return answering.run(args)
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
