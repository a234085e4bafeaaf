"""What the commands that ask a model have in common: its arguments, and how it is loaded."""

import argparse
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.errors import LlavaError
from llava_jax.inference.model import DTYPES, Llava
from llava_jax.parallel.mesh import make_mesh
from llava_jax.weights.hub import local_folder


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands that ask a model have in common."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run of train.py, a Hugging Face folder, or a name on the hub",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--weights", choices=["int8"], help="eight bits a weight")
    parser.add_argument("--kv_cache", choices=["int8"], help="eight bits a key or value")
    parser.add_argument(
        "--data", type=int, default=1, metavar="N", help="copies of the model that share the work"
    )
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices that share one copy's weights"
    )
    parser.add_argument("--allow_urls", action="store_true", help="images from http(s) addresses")


def load_from_arguments(args: argparse.Namespace) -> Llava:
    """The model of `add_model_arguments`; what is compiled for it is kept for the next time."""
    checkpoint = local_folder(args.checkpoint)
    if not checkpoint.is_dir():
        raise LlavaError(f"no checkpoint folder at {args.checkpoint}")
    keep_compilations()
    mesh = None
    if (args.data, args.tensor) != (1, 1):
        count = max(args.data * args.tensor, 1)
        mesh = make_mesh(args.data, 1, args.tensor, jax.devices()[:count])
    return Llava.from_pretrained(
        checkpoint,
        dtype=args.dtype,
        quantize=args.weights,
        kv_cache=args.kv_cache,
        allow_urls=args.allow_urls,
        mesh=mesh,
    )


def mesh_of_all(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh of all devices, as `make_mesh` makes it; None where there is one, which needs none."""
    mesh = make_mesh(data, fsdp, tensor)
    return mesh if mesh.size > 1 else None


def keep_compilations() -> None:
    """Turns JAX's persistent compilation cache on, below ~/.cache, unless it is set up already.

    All is kept that is compiled, also what takes less than JAX's second: there is much of it.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "llava_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
