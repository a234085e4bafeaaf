"""What the commands that ask a model have in common: its arguments, and how it is loaded."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax import imports
from llava_jax.errors import LlavaError, closest
from llava_jax.inference.lookup import check_lookup
from llava_jax.inference.model import Llava
from llava_jax.inference.paging import check_cache_tokens
from llava_jax.models.precision import DTYPES
from llava_jax.models.quantization import FORMS
from llava_jax.parallel.mesh import make_mesh
from llava_jax.weights.hub import local_folder
from llava_jax.weights.load import add_picture_arguments, picture_options

_SMALLER = (
    "a copy cannot span hosts, so keep fewer bits with quantize, or take a host with more memory"
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and say how it computes."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run of train.py, a folder of a LLaVA, or a name on the Hugging Face hub",
    )
    add("--template", metavar="NAME", help="conversation template; default: the checkpoint's own")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of computation; auto is the fastest on this machine, mixed is float32 with bfloat16 "
        "products",
    )
    add(
        "--quantize",
        choices=FORMS,
        help="eight or four bits for each weight of the language model; default: off",
    )
    add("--kv_cache", choices=["int8"], help="eight bits for each key and value; default: off")
    add("--lookup", type=int, default=0, metavar="K",
        help="guess K tokens at a time where answers repeat prompts, to answer quicker; default: "
        "off")  # fmt: skip
    add("--cache_tokens", type=int, metavar="N",
        help="tokens of prompts and answers that a copy keeps in memory at a time; if they become "
        "more, answers wait; default: room for all rows at their longest")  # fmt: skip
    add("--replicas", type=int, default=1, metavar="N", help="copies of the model, to share work")
    add("--tensor", type=int, default=1, metavar="N", help="devices that share a copy's weights")
    add("--allow_urls", action="store_true", help="download pictures at http(s) addresses")
    add_picture_arguments(parser)
    # Earlier names.
    add("--weights", dest="quantize", choices=FORMS, help=argparse.SUPPRESS,
        default=argparse.SUPPRESS)  # fmt: skip
    add("--data", dest="replicas", type=int, help=argparse.SUPPRESS,
        default=argparse.SUPPRESS)  # fmt: skip


class _Keywords(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise LlavaError(message)


def from_keywords(
    add_arguments: Callable[[argparse.ArgumentParser], None], values: Mapping
) -> argparse.Namespace:
    """The arguments of a command from names and values of its flags, as its line would give them.

    Raises:
      LlavaError: a name that is no flag, or a value that the flag does not take.
    """
    parser, words = _Keywords(add_help=False), []
    add_arguments(parser)
    flags = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in flags:
            raise LlavaError(f"there is no argument {name!r}{closest([name], flags)}")
        if value is None:
            continue
        flag, takes = f"--{name}", flags[name].nargs
        if takes == 0:
            if str(value).lower() not in ("true", "false"):
                raise LlavaError(f"{name} must be true or false, not {value!r:.80}")
            words += [flag] * (str(value).lower() == "true")
        elif takes is not None:
            words += [flag, *map(str, value)]
        else:  # a list stands for a flag that is given several times
            several = value if isinstance(value, list | tuple) else [value]
            words += [f"{flag}={one}" for one in several]
    return parser.parse_args(words)


def load_from_arguments(args: argparse.Namespace) -> Llava:
    """The model of `add_model_arguments`; its compiled functions are kept for the next time."""
    check_lookup(args.lookup)
    check_cache_tokens(args.cache_tokens)
    checkpoint = local_folder(args.checkpoint)
    if not checkpoint.is_dir():
        raise LlavaError(f"no checkpoint folder at {args.checkpoint}")
    keep_compilations()
    imports.tokenizers_alone()
    mesh = mesh_here(args.replicas, 1, args.tensor, max(args.replicas * args.tensor, 1))
    with needs_room():
        return Llava.from_pretrained(
            checkpoint,
            dtype=args.dtype,
            template=args.template,
            quantize=args.quantize,
            kv_cache=args.kv_cache,
            lookup=args.lookup,
            cache_tokens=args.cache_tokens,
            allow_urls=args.allow_urls,
            mesh=mesh,
            **picture_options(args),
        )


def mesh_here(
    data: int = -1, fsdp: int = 1, tensor: int = 1, count: int | None = None
) -> Mesh | None:
    """A mesh of this host's devices, see `make_mesh`; None for a single device, which needs none.

    Args:
      count: use the first so many; None: all.

    Raises:
      LlavaError: they are too few, for a copy of the model or for all copies.
    """
    devices = jax.local_devices()
    if (copy := fsdp * tensor) > len(devices):
        raise LlavaError(
            f"a copy of the model over {copy} devices does not fit this host, which has "
            f"{len(devices)}: {_SMALLER}"
        )
    mesh = make_mesh(data, fsdp, tensor, devices[:count])
    return mesh if mesh.size > 1 else None


@contextlib.contextmanager
def needs_room() -> Iterator[None]:
    """Loads a model in its block; LlavaError if the memory of the devices is too small for it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        devices = jax.local_devices()
        raise LlavaError(
            f"the model does not fit the memory of its devices (this host has {len(devices)} x "
            f"{devices[0].device_kind}): spread a copy over more of them with tensor; {_SMALLER}"
        ) from None


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache, below ~/.cache, unless it is set up already.

    Functions that compile in less than JAX's threshold of a second are kept too: there are many.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "llava_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
