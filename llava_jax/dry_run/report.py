"""The figures of a dry run: bytes on a chip, traffic between chips, FLOPs and seconds a step."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llava_jax.dry_run.chips import GIB
from llava_jax.dry_run.collectives import BETWEEN_SLICES, Collective
from llava_jax.dry_run.compiling import Compiled
from llava_jax.dry_run.estimate import (
    assumed_counts,
    contents_of,
    estimate,
    executed_flops,
    memory_traffic,
)
from llava_jax.dry_run.topology import Topology
from llava_jax.models.quantization import stored_bytes
from llava_jax.text.templates import get_template
from llava_jax.training.flops import attention_flops, decoder_passes, step_flops
from llava_jax.training.stage import Stage
from llava_jax.training.step import REFERENCE

DOES_NOT_FIT = 3  # exit status
LARGEST_SHARE = 0.95  # of a card's memory; CUDA and NCCL need the rest
BY_THE_COMPILER = "by the compiler's own figures (attention at the peak)"
AT_THE_ROOFLINE = "at the roofline, as this compiler gives no figures"


def bytes_on_a_device(tree) -> int:
    """Bytes of the largest shard of every leaf, summed."""
    sizes = (
        stored_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )
    return sum(sizes)


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def report(stage: Stage, where: Topology, compiled: Compiled, fill: float | None = None) -> dict:
    """All figures of a dry run as plain values, ready for JSON.

    Args:
      where: what the devices of the stage are.
      fill: share of real tokens in the rows, if the data could be measured.
    """
    config, state, model = stage.config, stage.state, stage.model.config
    frozen = stage.of_steps(stage.frozen)
    rows, length = config.batch_size, stage.row_format.length
    is_captions = get_template(config.model.template).image_only_question
    contents = contents_of(model, is_captions, stage.compares)
    contents = dataclasses.replace(contents, fill=fill) if fill else contents
    counts = assumed_counts(model, contents, rows, length, stage.row_format.tiles)
    figures = {
        "topology": where.name,
        "mesh": dict(stage.mesh.shape),
        "parameters": {
            "trainable": parameter_count(state.params),
            "frozen": parameter_count(frozen),
        },
        "rows": rows,
        "microbatches": stage.microbatches,
        "attention": stage.model.attention,
        "attention_refused": stage.refused,
        "remat_policy": config.model.remat_policy,
        "compile_seconds": compiled.seconds,
        "bytes": {
            "trainable_weights": bytes_on_a_device(state.params),
            "frozen_weights": bytes_on_a_device(frozen),
            "optimizer": bytes_on_a_device(state.opt_state),
            "batch": bytes_on_a_device(stage.batch_spec()),
            **(compiled.memory or {}),
            "needed": compiled.needed,
            "usable": where.usable,
            "hbm": where.chip.hbm if where.chip else None,
        },
        "fits": compiled.memory is not None
        and (where.chip is None or compiled.needed <= where.usable),
        "assumed": dataclasses.asdict(contents),
        "tokens": counts["tokens"],
        "model_flops": step_flops(
            model, stage.trainable, counts, stage.compares, not stage.from_features
        ),
    }
    if compiled.memory is None:
        return figures
    between = sum(c.received for c in compiled.collectives if c.kind == BETWEEN_SLICES)
    within = [c for c in compiled.collectives if c.kind != BETWEEN_SLICES]
    sent = sum(c.received for c in within)
    figures |= {
        "collectives": by_kind(compiled.collectives),
        "collective_bytes": sent,
        "between_slices_bytes": between,
        "waiting_bytes": sum(c.received for c in within if not c.hidden),
        "fsdp": {"least": least_fsdp_bytes(stage), "measured": sent},
    }
    if where.chip:
        figures["estimate"] = estimate_of(stage, where, compiled.kernel_cycles, within, figures)
    return figures


def by_kind(collectives: list[Collective]) -> dict[str, dict]:
    """Kind -> number of collectives in a step, and the bytes that enter a device by them."""
    kinds: dict[str, dict] = {}
    for c in collectives:
        kind = kinds.setdefault(c.kind, {"runs": 0, "bytes": 0.0, "largest": list(c.shape)})
        kind["runs"] += c.runs
        kind["bytes"] += c.received
    return kinds


def least_fsdp_bytes(stage: Stage) -> float:
    """The least bytes that sharding the weights can cost a device in a step.

    In every microbatch, trained weights are gathered for the forward and the backward pass in the
    compute dtype, and their gradients are scattered in float32; frozen weights are gathered for
    each pass that uses them.
    """
    shards = stage.mesh.shape["fsdp"]
    tensor, share = stage.mesh.shape["tensor"], (shards - 1) / shards
    width = jnp.dtype(stage.model.dtype).itemsize
    trained, held = parameter_count(stage.state.params), stage.of_steps(stage.frozen)
    frozen = {name: parameter_count(tree) for name, tree in held.items()}
    # The gradient flows back through a frozen decoder, not through a frozen encoder or a reference.
    passes = {name: 1 if name in ("vision", REFERENCE) else 2 for name in frozen}
    least = trained * (2 * width + 4) + sum(frozen[n] * passes[n] * width for n in frozen)
    return stage.microbatches * least * share / tensor


def link_seconds(stage: Stage, where: Topology, collectives: list[Collective]) -> float:
    """The least time of collectives one after the other, each over the links between its chips."""
    devices = stage.mesh.devices.flat
    return sum(c.received / where.bandwidth(devices[i] for i in c.group) for c in collectives)


def estimate_of(
    stage: Stage, where: Topology, kernel_cycles: int, within: list[Collective], figures: dict
) -> dict:
    """The roofline of a step, and the compiler's own figures for its kernels.

    Args:
      within: the collectives within a slice.
      figures: those of `report` so far.
    """
    config, model, trainable = stage.config, stage.model.config, stage.trainable
    rows, length, remat = config.batch_size, stage.row_format.length, config.model.remat_policy
    executed = executed_flops(
        model,
        trainable,
        rows,
        length,
        stage.row_format.tiles,
        remat,
        stage.compares,
        not stage.from_features,
    )
    decoder = {**stage.frozen, **stage.state.params}["decoder"]
    plan = {
        "trainable": figures["bytes"]["trainable_weights"],
        "optimizer": figures["bytes"]["optimizer"],
        "decoder": parameter_count(decoder),
        "passes": decoder_passes(trainable, stage.compares) + (remat in ("attention", "full")),
        "accumulation": stage.microbatches,
        "tokens": rows * length / stage.batch_shards,
    }
    traffic = memory_traffic(model, plan)
    kernels = kernel_cycles / where.chip.clock if kernel_cycles else None
    if kernels and stage.model.attention == "splash":  # the compiler has no figure for it
        passes = 3 + (remat == "full")
        scores = passes * attention_flops(model, rows * length * (length + 1) / 2)
        kernels += scores / len(where.devices) / where.chip.peak
    return estimate(
        where,
        executed,
        figures["model_flops"],
        traffic,
        links=link_seconds(stage, where, within),
        between=figures["between_slices_bytes"],
        waiting=link_seconds(stage, where, [c for c in within if not c.hidden]),
        kernels=kernels,
    ) | {"kernels_by": BY_THE_COMPILER if kernel_cycles else AT_THE_ROOFLINE}


def share_of_a_card(sizes: dict[str, int]) -> str:
    """What part of a GPU's memory JAX takes, and the part to give it if a step needs more."""
    needed, usable, hbm = (sizes[name] for name in ("needed", "usable", "hbm"))
    if usable == hbm:
        return ""
    text = f" (JAX takes {usable / hbm:.0%} of the card's {hbm / GIB:.2f}"
    least = math.ceil(100 * needed / hbm) / 100
    if needed > usable and least <= LARGEST_SHARE:
        text += f"; with export XLA_CLIENT_MEM_FRACTION={least:.2f} the step fits"
    return text + ")"


def print_report(figures: dict) -> None:
    """The figures as lines to read."""
    gib = lambda size: f"{size / GIB:.2f}"
    sizes, counts = figures["bytes"], figures["parameters"]
    refused = figures["attention_refused"]
    attention = figures["attention"] + (f" (not {refused})" if refused else "")
    print(
        f"{figures['topology']} as {figures['mesh']}; parameters: "
        f"{counts['trainable'] / 1e6:,.1f}M trained, {counts['frozen'] / 1e6:,.1f}M frozen\n"
        f"{figures['rows']} rows in {figures['microbatches']} microbatches; attention: "
        f"{attention}; remat: {figures['remat_policy']}; compiled in "
        f"{figures['compile_seconds']:.0f} s"
    )
    kinds = {k: v for k, v in sizes.items() if k not in ("needed", "usable", "hbm")}
    print("GiB a chip: " + ", ".join(f"{k.replace('_', ' ')} {gib(v)}" for k, v in kinds.items()))
    room = f" of {gib(sizes['usable'])}" if sizes["hbm"] else ""
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    print(f"at the peak {gib(sizes['needed'])}{room}: {verdict}{share_of_a_card(sizes)}")
    print(f"model FLOPs a step: {figures['model_flops']:.3g}, with {figures['assumed']} assumed")
    for kind, sent in figures.get("collectives", {}).items():
        print(f"{kind}: {sent['runs']} a step, {sent['bytes'] / 1e9:.2f} GB into each chip")
    if "fsdp" in figures:
        fsdp = figures["fsdp"]
        print(
            f"within a slice: {fsdp['measured'] / 1e9:.2f} GB into each chip a step; sharded "
            f"weights cost at least {fsdp['least'] / 1e9:.2f} GB"
        )
    if "estimate" in figures:
        e = figures["estimate"]
        terms = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in e["seconds"].items())
        best, worst = e["step_seconds"], e["step_seconds_nothing_hidden"]
        print(
            f"roofline: {terms}; a step takes {best:.3f} s (MFU {e['mfu']:.0%}, bound by "
            f"{e['bound_by']}) if the rest hides behind it, {worst:.3f} s "
            f"(MFU {e['mfu_nothing_hidden']:.0%}) if nothing does\n"
            f"as compiled: kernels {e['kernel_seconds']:.3f} s {e['kernels_by']}, "
            f"{e['waiting_seconds']:.3f} s in which they wait for "
            f"{figures['waiting_bytes'] / 1e9:.2f} GB: MFU {e['mfu_as_compiled']:.0%}"
        )
