"""The command lines of train.py and eval.py: absl flags and an ml_collections config.

A wrong input is one sentence and exit code 1, never a traceback. That includes what ml_collections
takes without a word: a flag that replaces a whole section, text in place of a number, names joined
by commas. Keys and kinds of values are those of a base config, a module with

    get_config()  -> ConfigDict of all keys with their defaults
    FREE           names of sections whose keys are up to the recipe
"""

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from llava_jax.errors import LlavaError, file_fault

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def run(
    main: Callable[[], None],
    required: Collection[str] = ("config",),
    base: ModuleType | None = None,
) -> None:
    """Parses the command line and calls `main`; a wrong input is one sentence and exit code 1.

    Args:
      required: flags that must be given.
      base: of the config; None: its keys are not checked.
    """

    def checked(arguments: list[str]) -> None:
        if len(arguments) > 1:
            fail(f"unexpected argument {arguments[1]!r}: flags begin with --")
        for name in required:
            if flags.FLAGS[name].value is None:
                what = f"=VALUE, {flags.FLAGS[name].help}"
                fail(f"give --{name}{f'={_recipes(base)}' if name == 'config' else what}")
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except LlavaError as error:
            fail(str(error))
        except OSError as error:
            fail(file_fault(error))

    app.run(checked, flags_parser=lambda arguments: parse_flags(arguments, base))


def fail(message: str) -> None:
    """Ends the program with a message and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def _recipes(base: ModuleType | None) -> str:
    """configs/NAME.py, and the names that there are."""
    if base is None:
        return "FILE.py"
    folder = Path(os.path.relpath(Path(base.__file__).parent))
    names = sorted(path.stem for path in folder.glob("*.py"))
    known = ", ".join(name for name in names if name not in ("base", "__init__"))
    return f"{folder}/NAME.py, with NAME one of {known}; or a file of your own"


def read_config(
    file: str, changes: Collection[str] = (), base_name: str = "configs.base"
) -> ConfigDict:
    """A config for commands other than train.py and eval.py, checked as these check it.

    Args:
      changes: flags of the form --config.key=value.
      base_name: the module of its base, by default of recipes.
    """
    project = Path(__file__).parent.parent
    sys.path += [str(path) for path in (Path.cwd(), project) if str(path) not in sys.path]
    try:
        base = importlib.import_module(base_name)
    except ImportError:
        path = f"{base_name.replace('.', '/')}.py"
        raise LlavaError(f"no {path} in {Path.cwd()}: change to the project") from None
    arguments, values = ["llava-jax", f"--config={file}", *changes], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    parse_flags(arguments, base, values)
    config = values["config"].value
    check_config(config, base)
    return config


def parse_flags(
    arguments: list[str],
    base: ModuleType | None = None,
    values: flags.FlagValues = flags.FLAGS,
) -> list[str]:
    """absl's flag parsing, with the exceptions of a config turned into one sentence.

    A key whose default is None takes `None`, also where it is a number or a text otherwise.
    """
    kept, unset = [], []
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        name = name.lstrip("-") if argument.startswith("-") else ""
        if name == "config":
            file = value or "".join(arguments[i + 1 : i + 2])
            if not Path(file.split(":")[0]).is_file():
                fail(f"no config file {file}")
        if base is not None and name.startswith("config."):
            path = name.removeprefix("config.").split(".")
            try:
                default = _default(base, path)
            except LlavaError as error:
                fail(str(error))
            if value == "None" and default is None:
                unset.append(path)
                continue
        kept.append(argument)
    try:
        rest = values(kept)
    except flags.Error as error:
        fail(str(error))
    except (AttributeError, KeyError) as error:
        # What ml_collections raises for `--config.key` with a key that the config does not have.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        key = str(error.args[0]).strip("\"'").replace("'\n", ". ")
        free = [f"--config.{section}" for section in base.FREE] if base else []
        for argument in kept:
            section, _, name = argument.partition("=")[0].rpartition(".")
            if section in free and name == key:
                whole = "\"{'NAME': VALUE, 'NAME': VALUE}\""
                fail(
                    f"the recipe's {section[2:]} has no {key}: give it whole, as {section}={whole}"
                )
        fail(f"unknown config key: {key}")
    for *parents, key in unset:
        place = values["config"].value
        for parent in parents:
            place = place[parent]
        place[key] = None
    return rest


def _default(base: ModuleType, path: list[str]):
    """The default value of a key; ... for one in a section of free keys."""
    place = base.get_config()
    for depth, name in enumerate(path):
        if ".".join(path[:depth]) in base.FREE:
            return ...
        if not isinstance(place, ConfigDict) or name not in place:
            raise LlavaError(_unknown(".".join(path), base))
        place = place[name]
    return place


def _unknown(key: str, base: ModuleType) -> str:
    known = list(_flat(base.get_config()))
    same_name = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, known, 1)
    return f"unknown config key: {key}" + (f", did you mean {close[0]}?" if close else "")


def _flat(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """All keys, those of sections too, such as `data` and `data.train`."""
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _flat(config[key], f"{prefix}{key}.")


def check_config(config: ConfigDict, base: ModuleType) -> None:
    """Compares the keys of a config, and the kinds of its values, with those of its base.

    Raises:
      LlavaError: a key that the base does not have, one that is missing, or a value of another
        kind.
    """
    _check_section(config, base.get_config(), "", base)


def _check_section(config: ConfigDict, default: ConfigDict, path: str, base: ModuleType) -> None:
    name = path.removesuffix(".")
    if name in base.FREE:
        like = next(iter(default.values()), None)  # all values are of one kind
        for key, value in config.items():
            _check_value(value, like, f"config.{path}{key}")
        return
    if unknown := [key for key in config if key not in default]:
        raise LlavaError(_unknown(path + unknown[0], base))
    if missing := [key for key in default if key not in config]:
        example = next((f"{key}={config[key]}" for key in config), f"{missing[0]}=VALUE")
        raise LlavaError(
            f"config.{name} has no {', '.join(missing)}: it was replaced as a whole; give single "
            f"values, as in --config.{path}{example}"
        )
    for key in default:
        if isinstance(default[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise LlavaError(f"config.{path}{key} is {config[key]!r}: it is a section of keys")
            _check_section(config[key], default[key], f"{path}{key}.", base)
        elif default[key] is None:
            like = None if config[key] is None else default.get_type(key)()
            _check_value(config[key], like, f"config.{path}{key}")
        else:
            _check_value(config[key], default[key], f"config.{path}{key}")


def _check_value(value: object, like: object, key: str) -> None:
    """Raises LlavaError if a value is of another kind than `like`; None is like everything."""
    if like is None:
        return
    if isinstance(like, tuple):
        _check_names(value, key)
        return
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(like, bool):
        found = f"the text {value!r}" if isinstance(value, str) else repr(value)
        raise LlavaError(f"{key} is {found}: give {_KINDS[type(like)]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise LlavaError(f"{key} is {value}: give a finite number")


def _check_names(value: object, key: str) -> None:
    is_name = lambda name: isinstance(name, str) and name != ""
    if not isinstance(value, tuple) or not all(map(is_name, value)):
        raise LlavaError(f"{key} is {value!r}: give names, as in --{key}=\"('a', 'b')\"")
    for name in value:
        if "," in name:
            several = tuple(part.strip() for part in name.split(","))
            raise LlavaError(
                f'{key} holds the one name {name!r}: give several as --{key}="{several}"'
            )
