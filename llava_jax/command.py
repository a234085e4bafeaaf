"""The frame around train.py and eval.py: absl flags and an ml_collections config, no tracebacks."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from llava_jax.errors import LlavaError, file_fault


def run(main: Callable[[], None], required: tuple[str, ...] = ("config",)) -> None:
    """Parses the command line and calls `main`; a wrong input is one sentence and exit code 1.

    Args:
      required: names of flags that must be given.
    """

    def told(arguments: list[str]) -> None:
        if len(arguments) > 1:
            sys.exit(f"error: unexpected argument {arguments[1]!r}: flags begin with --")
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except LlavaError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            sys.exit(f"error: {file_fault(error)}")

    flags.mark_flags_as_required(required)
    app.run(told, flags_parser=parse_flags)


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's flag parsing, with the exceptions of a config turned into one sentence."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config", "-config"):
            value = value or "".join(arguments[i + 1 : i + 2])
            if not Path(value.split(":")[0]).is_file():
                sys.exit(f"error: no config file {value}")
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError) as error:
        # What ml_collections raises for `--config.key` with a key that the config has not.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = str(error.args[0]).strip("\"'").replace("'\n", ". ")
        sys.exit(f"error: unknown config key: {text}")
