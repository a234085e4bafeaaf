"""`llava-jax serve --dry_run`: what answering costs on devices that are not attached.

Of the programs that the server warms up, those are compiled that can need most memory: tiles
through the encoder, prompts into the cache, tokens out of it. Nothing of a model is computed or
read.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from llava_jax.dry_run.chips import GIB
from llava_jax.dry_run.compiling import needed_by
from llava_jax.dry_run.report import DOES_NOT_FIT, bytes_on_a_device, share_of_a_card
from llava_jax.dry_run.topology import Topology, topology
from llava_jax.errors import LlavaError
from llava_jax.inference.device import TILES, Device, all_calls
from llava_jax.inference.prefill import (
    PrefillShape,
    cache_bucket,
    count_bucket,
    pack_prompts,
    pool_pages,
)
from llava_jax.models.cache import PAGE
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.precision import compute_precision
from llava_jax.models.presets import PRESETS
from llava_jax.models.quantization import PARTS, cut_groups, quantize_kernels
from llava_jax.parallel.mesh import make_mesh
from llava_jax.parallel.sharding import (
    param_shardings,
    quantized_shardings,
    replicated,
    shards_of_inputs,
)
from llava_jax.serving.serve import check_arguments, check_cache, context_length
from llava_jax.weights.hub import local_folder
from llava_jax.weights.load import picture_options, source_config

BATCHES = (1, 8, 32, 128)  # whose speed is estimated


def run(args: argparse.Namespace) -> int:
    """Prints the dry run of `llava-jax serve`; the last line is all of it as one JSON object.

    Args:
      args: of the command; `dry_run` is the name of the topology.

    Returns:
      The exit status: 0, or DOES_NOT_FIT.
    """
    check_arguments(args)
    where = topology(args.dry_run)
    if args.replicas * args.tensor > len(where.devices):
        raise LlavaError(
            f"{where.name} has {len(where.devices)} devices, but --replicas {args.replicas} and "
            f"--tensor {args.tensor} need {args.replicas * args.tensor}"
        )
    mesh = make_mesh(1, 1, args.tensor, list(where.devices[: args.tensor]))  # of one copy
    config = model_config(args.checkpoint, picture_options(args))
    dtype = "bfloat16" if args.dtype == "auto" and where.chip else args.dtype
    params = abstract_weights(config, mesh, dtype, args.quantize)
    device = Device(config, params, dtype, args.kv_cache, mesh, args.lookup)
    slots = cache_bucket(context_length(args.max_model_len, config))
    share = -(-args.batch_size // args.replicas)  # of a copy
    rows = count_bucket(share)
    few = not args.all_shapes
    calls = all_calls(share, slots, few, args.contrast, args.explain)
    check_cache(args, context_length(args.max_model_len, config))
    pages = pool_pages([], rows, slots, args.cache_tokens)
    figures = {
        "topology": where.name,
        "tensor": args.tensor,
        "dtype": device.dtype,
        "cache_dtype": device.kv_dtype.name,
        "rows": rows,
        "slots": slots,
        "cache_tokens": pages * PAGE,
        "warm_up": len(calls),
        **costs(device, where, mesh, rows, slots, pages, [s for f, s in calls if f == "prefill"]),
    }
    if where.chip:
        figures["decoding"] = decoding_speed(config, params, where, figures, args.lookup)
    print_figures(figures)
    print(json.dumps(figures))
    return 0 if figures["fits"] else DOES_NOT_FIT


def model_config(checkpoint: str, options: dict[str, str | None]) -> LlavaConfig:
    """The config of a checkpoint, or of a preset if no folder has that name.

    options: of `picture_options`, for a folder of another program.
    """
    if checkpoint not in PRESETS or Path(checkpoint).exists():
        return source_config(local_folder(checkpoint), **options)
    if given := [f"--{name}" for name, value in options.items() if value]:
        raise LlavaError(
            f"{checkpoint} is a preset, which says how pictures are read: leave out "
            f"{', '.join(given)}"
        )
    return PRESETS[checkpoint]


def abstract_weights(config: LlavaConfig, mesh: Mesh, dtype: str, quantize: str | None) -> dict:
    """Shapes, dtypes and shardings of a copy's parameters as the engine holds them."""
    boxed = abstract_params(config)
    shardings = param_shardings(mesh, boxed)
    params = nn.meta.unbox(boxed)
    stored = compute_precision(dtype)[0]
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored)
    params = jax.tree.map(cast, params)
    if quantize:
        params = jax.eval_shape(functools.partial(quantize_kernels, form=quantize), params)
        shards = shards_of_inputs(shardings)
        params = jax.eval_shape(functools.partial(cut_groups, shards=shards), params)
    place = lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)
    return jax.tree.map(place, params, quantized_shardings(shardings, params))


def costs(
    device: Device,
    where: Topology,
    mesh: Mesh,
    rows: int,
    slots: int,
    pages: int,
    shapes: list[PrefillShape],
) -> dict[str, object]:
    """Bytes of a device by kind, and of each program; tokens for which the cache has room.

    Args:
      rows, slots: of the batch, and the most tokens of each.
      pages: of the cache.
      shapes: of all prefills.
    """
    config, everywhere = device.config, replicated(mesh)
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    state = device.abstract_state(rows, pages, slots)
    store = device.abstract_store(everywhere)
    side = config.image.size
    tiles = put((TILES[-1], side, side, 3), jnp.uint8), put((TILES[-1],), jnp.int32)
    running, fewest = put((rows,), bool), put((), jnp.int32)
    tables = put((rows, slots // PAGE), jnp.int32)
    lowered = {
        f"encode {TILES[-1]} tiles": device.lower("encode", store, *tiles),
        f"a token of {rows} rows": device.lower("decode", state, running, fewest, tables),
    }
    for shape in largest_prefills(shapes):
        prompts = pack_prompts([], shape, rows, config.image.taps)
        prompts = jax.tree.map(lambda leaf: put(leaf.shape, leaf.dtype), prompts)
        name = f"read {shape.tokens:,} tokens in {shape.chunks} chunks"
        lowered[name] = device.lower("prefill", state, store, prompts)
    programs = {name: program_costs(program) for name, program in lowered.items()}
    sizes = {
        "weights": bytes_on_a_device(device.params),
        "cache": bytes_on_a_device(state.cache),
        "features": bytes_on_a_device(store),
    }
    held = sizes["weights"] + sizes["features"]
    temporary = max(program["temporary"] for program in programs.values())
    sizes["needed"] = max(
        # An argument that a program does not take is in memory all the same.
        max(sum(sizes.values()) + program["temporary"], program["peak"])
        for program in programs.values()
    )
    sizes |= {"usable": where.usable, "hbm": where.chip and where.chip.hbm}
    figures = {"bytes": sizes, "programs": programs}
    if where.usable is None:
        return figures | {"fits": True}
    spare = (where.usable - held - temporary) / (sizes["cache"] / (pages * PAGE))
    figures["room"] = {
        "rows": _power(spare / slots),
        "slots": _power(spare / rows),
        "cache_tokens": max(int(spare) // PAGE * PAGE, 0),
    }
    return figures | {"fits": sizes["needed"] <= where.usable}


def largest_prefills(shapes: list[PrefillShape]) -> list[PrefillShape]:
    """The shapes that no other reaches in all that memory grows with.

    That is tokens, cache slots that are looked at (a window for each chunk) and attention scores.
    More tokens in fewer chunks can need less: 32 rows of 2,048 slots read 4,096 tokens in 85 chunks
    of 64, which look at 85 windows, and 2,048 in 170 of 16, which look at 170.
    """

    def sizes(shape: PrefillShape) -> tuple[int, int, int]:
        copies = shape.chunks * shape.window
        return shape.tokens, copies, copies * shape.chunk

    def reaches(other: PrefillShape, shape: PrefillShape) -> bool:
        return all(a >= b for a, b in zip(sizes(other), sizes(shape), strict=True))

    largest: list[PrefillShape] = []
    for shape in sorted(shapes, key=sizes, reverse=True):
        if not any(reaches(other, shape) for other in largest):
            largest.append(shape)
    return largest


def _power(number: float) -> int:
    """The largest power of two up to a number; 0 below 1."""
    return 1 << (int(number).bit_length() - 1) if number >= 1 else 0


def program_costs(lowered: jax.stages.Lowered) -> dict[str, float]:
    """Bytes on top of the arguments, and at the peak; seconds to compile."""
    began = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_by(str(error)) or np.inf
        return {"temporary": 0, "peak": needed, "seconds": time.perf_counter() - began}
    memory = program.memory_analysis()
    return {
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def decoding_speed(
    config: LlavaConfig, params: dict, where: Topology, figures: dict, lookup: int = 0
) -> dict:
    """The least bytes that a token of every row moves on a device, and the most tokens/s.

    Every weight of the language model is read, and every key and value of full rows; of the table
    of embeddings only if it is the output's too. With so many guesses a row (`lookup`) a pass moves
    the same, and multiplies more: its most tokens/s if none of them comes true, and if all do.
    """
    decoder = dict(params["decoder"])
    if not config.decoder.tie_word_embeddings:
        decoder.pop("embed_tokens")
    weights = bytes_on_a_device(decoder)
    weighed = [leaf for path, leaf in flatten_dict(decoder).items() if path[-1] not in PARTS]
    count = sum(leaf.size for leaf in weighed) / figures["tensor"]
    row = figures["bytes"]["cache"] / figures["cache_tokens"] * figures["slots"]
    least = lambda rows: weights + rows * row
    passes = lambda rows, tokens: (
        1 / max(least(rows) / where.chip.hbm_bandwidth, 2 * count * rows * tokens / where.chip.peak)
    )
    speed = {}
    for rows in sorted({*BATCHES, figures["rows"]}):
        speed[rows] = {"bytes": least(rows), "tokens_per_second": rows * passes(rows, 1)}
        if lookup:
            none = rows * passes(rows, 1 + lookup)
            speed[rows]["guessing"] = {"none": none, "all": (1 + lookup) * none}
    return speed


def print_figures(figures: dict) -> None:
    """The figures as lines to read."""
    gib = lambda size: f"{size / GIB:.2f}"
    sizes, rows, slots = figures["bytes"], figures["rows"], figures["slots"]
    print(
        f"{figures['topology']}, {figures['tensor']} devices a copy; {figures['dtype']}, cache "
        f"{figures['cache_dtype']} of {figures['cache_tokens']:,} tokens; {rows} rows of at most "
        f"{slots:,}; {figures['warm_up']} programs a copy to compile at the start"
    )
    kinds = ("weights", "cache", "features")
    print("GiB a device: " + ", ".join(f"{kind} {gib(sizes[kind])}" for kind in kinds))
    for name, program in figures["programs"].items():
        print(
            f"{name}: {gib(program['temporary'])} GiB on top; compiled in "
            f"{program['seconds']:.0f} s"
        )
    room = f" of {gib(sizes['usable'])}" if sizes["hbm"] else ""
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    print(f"at the peak {gib(sizes['needed'])}{room}: {verdict}{share_of_a_card(sizes)}")
    if "room" in figures:
        most = figures["room"]
        print(
            f"room for {most['rows']} rows of {slots:,} tokens, or {rows} rows of "
            f"{most['slots']:,}: --cache_tokens {most['cache_tokens']} at most"
        )
    for batch, speed in figures.get("decoding", {}).items():
        guessing = ""
        if "guessing" in speed:
            none, every = speed["guessing"].values()
            guessing = f"; guessing {none:,.0f} if no guess comes true, {every:,.0f} if all do"
        print(
            f"{batch} full rows: at least {speed['bytes'] / 1e9:.1f} GB for a token of each, at "
            f"most {speed['tokens_per_second']:,.0f} tokens/s a copy{guessing}"
        )
