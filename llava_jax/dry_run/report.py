"""What a dry run tells: bytes on a chip, what crosses between chips, FLOPs and seconds a step."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llava_jax.dry_run.collectives import BETWEEN_SLICES, Collective
from llava_jax.dry_run.compiling import Compiled, Stage
from llava_jax.dry_run.estimate import (
    CAPTIONS,
    CONVERSATIONS,
    assumed_counts,
    estimate,
    executed_flops,
    memory_traffic,
)
from llava_jax.dry_run.topology import GIB
from llava_jax.text.templates import get_template
from llava_jax.training.flops import attention_flops, step_flops


def bytes_on_a_device(tree) -> int:
    """Bytes of the largest shard of every leaf, summed."""
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
    return sum(sizes)


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def report(stage: Stage, compiled: Compiled, fill: float | None = None) -> dict:
    """Everything that a dry run tells, as plain values: bytes on a chip, FLOPs and seconds a step.

    Args:
      fill: share of real tokens in the rows, where the data was there to be measured.
    """
    config, where, state = stage.config, stage.where, stage.state
    model, trainable = stage.model.config, set(stage.state.params)
    rows, length = config.batch_size, config.data.max_length
    is_captions = get_template(config.model.template).image_only_question
    contents = CAPTIONS if is_captions else CONVERSATIONS
    contents = dataclasses.replace(contents, fill=fill) if fill else contents
    counts = assumed_counts(model, contents, rows, length, config.data.images_per_row)
    told = {
        "topology": where.name,
        "mesh": dict(stage.mesh.shape),
        "parameters": {
            "trainable": parameter_count(state.params),
            "frozen": parameter_count(stage.frozen),
        },
        "rows": rows,
        "microbatches": config.accumulation,
        "attention": stage.model.attention,
        "remat_policy": config.model.remat_policy,
        "compile_seconds": compiled.seconds,
        "bytes": {
            "trainable_weights": bytes_on_a_device(state.params),
            "frozen_weights": bytes_on_a_device(stage.frozen),
            "optimizer": bytes_on_a_device(state.opt_state),
            "batch": bytes_on_a_device(stage.batch),
            **(compiled.memory or {}),
            "needed": compiled.needed,
            "hbm": where.chip.hbm if where.chip else None,
        },
        "fits": compiled.memory is not None
        and (where.chip is None or compiled.needed <= where.chip.hbm),
        "assumed": dataclasses.asdict(contents),
        "tokens": counts["tokens"],
        "model_flops": step_flops(model, trainable, counts),
    }
    if compiled.memory is None:
        return told
    between = sum(c.received for c in compiled.collectives if c.kind == BETWEEN_SLICES)
    within = [c for c in compiled.collectives if c.kind != BETWEEN_SLICES]
    sent = sum(c.received for c in within)
    told |= {
        "collectives": by_kind(compiled.collectives),
        "collective_bytes": sent,
        "between_slices_bytes": between,
        "waiting_bytes": sum(c.received for c in within if not c.hidden),
        "fsdp": {"least": least_fsdp_bytes(stage), "measured": sent},
    }
    if where.chip:
        told["estimate"] = estimate_of(stage, compiled.kernel_cycles, within, told)
    return told


def by_kind(collectives: list[Collective]) -> dict[str, dict]:
    """Kind -> how many run in a step and the bytes that enter a device by them."""
    kinds: dict[str, dict] = {}
    for c in collectives:
        kind = kinds.setdefault(c.kind, {"runs": 0, "bytes": 0.0, "largest": list(c.shape)})
        kind["runs"] += c.runs
        kind["bytes"] += c.received
    return kinds


def least_fsdp_bytes(stage: Stage) -> float:
    """The least bytes that sharding the weights can cost a device in a step.

    Trained weights are gathered for the forward and the backward pass in the compute
    dtype and their gradients scattered in float32; frozen ones are gathered for each pass they
    take part in. Once a microbatch.
    """
    shards = stage.mesh.shape["fsdp"]
    tensor, share = stage.mesh.shape["tensor"], (shards - 1) / shards
    width = jnp.dtype(stage.model.dtype).itemsize
    trained = parameter_count(stage.state.params)
    frozen = {name: parameter_count(tree) for name, tree in stage.frozen.items()}
    # The gradient flows back through a frozen decoder, not through a frozen encoder.
    passes = {name: 1 if name == "vision" else 2 for name in frozen}
    least = trained * (2 * width + 4) + sum(frozen[n] * passes[n] * width for n in frozen)
    return stage.config.accumulation * least * share / tensor


def link_seconds(stage: Stage, collectives: list[Collective]) -> float:
    """What these take at the least one after the other, each over the links that its chips have."""
    devices = stage.mesh.devices.flat
    return sum(c.received / stage.where.bandwidth(devices[i] for i in c.group) for c in collectives)


def estimate_of(stage: Stage, kernel_cycles: int, within: list[Collective], told: dict) -> dict:
    """The roofline of a step of this stage, and its kernels beside it.

    Args:
      within: its collectives within a slice.
    """
    config, model, trainable = stage.config, stage.model.config, set(stage.state.params)
    rows, length, remat = config.batch_size, config.data.max_length, config.model.remat_policy
    executed = executed_flops(model, trainable, rows, length, config.data.images_per_row, remat)
    decoder = {**stage.frozen, **stage.state.params}["decoder"]
    plan = {
        "trainable": told["bytes"]["trainable_weights"],
        "optimizer": told["bytes"]["optimizer"],
        "decoder": parameter_count(decoder),
        "passes": (3 if "decoder" in trainable else 2) + (remat in ("attention", "full")),
        "accumulation": config.accumulation,
        "tokens": rows * length / stage.batch_shards,
    }
    traffic = memory_traffic(model, plan)
    kernels = kernel_cycles / stage.where.chip.clock
    if stage.model.attention == "splash":  # of which the compiler says nothing
        passes = 3 + (remat == "full")
        scores = passes * attention_flops(model, rows * length * (length + 1) / 2)
        kernels += scores / len(stage.where.devices) / stage.where.chip.peak
    return estimate(
        stage.where,
        executed,
        told["model_flops"],
        traffic,
        links=link_seconds(stage, within),
        between=told["between_slices_bytes"],
        waiting=link_seconds(stage, [c for c in within if not c.hidden]),
        kernels=kernels,
    )


def print_report(told: dict) -> None:
    """The report as lines to read."""
    gib = lambda size: f"{size / GIB:.2f}"
    sizes, counts = told["bytes"], told["parameters"]
    print(
        f"{told['topology']} as {told['mesh']}; parameters: {counts['trainable'] / 1e6:,.1f}M "
        f"trained, {counts['frozen'] / 1e6:,.1f}M frozen\n"
        f"{told['rows']} rows in {told['microbatches']} microbatches; attention: "
        f"{told['attention']}; remat: {told['remat_policy']}; compiled in "
        f"{told['compile_seconds']:.0f} s"
    )
    kinds = {k: v for k, v in sizes.items() if k not in ("needed", "hbm")}
    print("GiB a chip: " + ", ".join(f"{k.replace('_', ' ')} {gib(v)}" for k, v in kinds.items()))
    room = f" of {gib(sizes['hbm'])}" if sizes["hbm"] else ""
    print(f"at the peak {gib(sizes['needed'])}{room}: {'fits' if told['fits'] else 'DOES NOT FIT'}")
    print(f"model FLOPs a step: {told['model_flops']:.3g}, with {told['assumed']} assumed")
    for kind, sent in told.get("collectives", {}).items():
        print(f"{kind}: {sent['runs']} a step, {sent['bytes'] / 1e9:.2f} GB into each chip")
    if "fsdp" in told:
        fsdp = told["fsdp"]
        print(
            f"within a slice: {fsdp['measured'] / 1e9:.2f} GB into each chip a step; sharded "
            f"weights cost at least {fsdp['least'] / 1e9:.2f} GB"
        )
    if "estimate" in told:
        e = told["estimate"]
        terms = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in e["seconds"].items())
        best, worst = e["step_seconds"], e["step_seconds_nothing_hidden"]
        print(
            f"roofline: {terms}; a step takes {best:.3f} s (MFU {e['mfu']:.0%}, bound by "
            f"{e['bound_by']}) if the rest hides behind it, {worst:.3f} s "
            f"(MFU {e['mfu_nothing_hidden']:.0%}) if nothing does\n"
            f"as compiled: kernels {e['kernel_seconds']:.3f} s by the compiler's own figures "
            f"(attention at the peak), {e['waiting_seconds']:.3f} s in which they wait for "
            f"{told['waiting_bytes'] / 1e9:.2f} GB: MFU {e['mfu_as_compiled']:.0%}"
        )
