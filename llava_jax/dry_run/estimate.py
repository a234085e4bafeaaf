"""How long a step would take at best: a roofline of compute, memory and links.

Each term is a lower bound set by the hardware. The estimate is a range: the largest term alone, as
if all others were hidden behind it, up to the sum of all, as if none were. A third figure describes
the program as compiled: the time that the compiler expects of its kernels, which never reach the
roofline (or the roofline, on GPUs, where it says nothing), plus the time they wait for data.
"""

import dataclasses

from llava_jax.dry_run.topology import Topology
from llava_jax.models.llava import LlavaConfig
from llava_jax.training.flops import (
    attention_flops,
    decoder_flops_per_token,
    image_flops,
    step_flops,
)

# The share of the forward pass, where gradients are taken, that each remat policy computes twice.
RECOMPUTED = {"none": 0.0, "linear": 0.0, "attention": 1.0, "full": 1.0}


@dataclasses.dataclass(frozen=True)
class Contents:
    """The assumed contents of rows, for data that is not on this machine.

    Attributes:
      fill: share of real tokens in a row.
      text: tokens of a conversation besides its picture.
      supervised: share of the text that is learnt.
      pictured: share of conversations with a picture.
      sizes: (width, height) of pictures, each as frequent as the others.
    """

    fill: float
    text: int
    supervised: float
    pictured: float
    sizes: tuple[tuple[int, int], ...] = ((640, 427),)


# Captions of LCS-558K; the 665K mix: 94% have a picture, and about 900 tokens with it.
CAPTIONS = Contents(fill=0.95, text=32, supervised=0.9, pictured=1.0)
CONVERSATIONS = Contents(fill=0.88, text=340, supervised=0.4, pictured=0.94)
# A question about a picture with two descriptions of it, of 110 tokens each: a guess.
PAIRS = Contents(fill=0.85, text=290, supervised=0.75, pictured=1.0)
# Where tiles and tokens depend on the size: two of COCO, Visual Genome, OCR-VQA, ChartQA, DocVQA,
# InfographicVQA, a small one. Rows of several such pictures are fuller (tests/data/test_plan.py).
SIZES = ((640, 427), (427, 640), (500, 375), (325, 500))
SIZES += ((850, 600), (1700, 2200), (800, 2500), (448, 336))


def contents_of(config: LlavaConfig, captions: bool, pairs: bool = False) -> Contents:
    """What rows are assumed to hold."""
    if captions:
        return CAPTIONS
    contents = PAIRS if pairs else CONVERSATIONS
    by_size = config.image.by_size
    return dataclasses.replace(contents, fill=0.95, sizes=SIZES) if by_size else contents


def assumed_counts(
    config: LlavaConfig, contents: Contents, rows: int, length: int, tiles: int
) -> dict[str, float]:
    """The contents of a step's batch, as `step_flops` takes them.

    Args:
      length, tiles: tokens and tiles that a row has room for.
    """
    pictures = [config.layouts([size])[0] for size in contents.sizes]
    mean = lambda values: sum(values) / len(pictures)
    tiles_each = contents.pictured * mean(picture.tiles for picture in pictures)
    conversation = contents.text + contents.pictured * mean(map(len, pictures))
    in_a_row = min(length * contents.fill / conversation, tiles / tiles_each)
    conversations = rows * in_a_row
    tokens = conversations * conversation
    return {
        "tokens": tokens,
        "images": conversations * tiles_each,
        "attention_pairs": tokens * (conversation + 1) / 2,
        "supervised_tokens": conversations * contents.text * contents.supervised,
    }


def executed_flops(
    config: LlavaConfig,
    trainable: set[str],
    rows: int,
    length: int,
    images: int,
    remat: str,
    reference: bool = False,
    encodes: bool = True,
) -> float:
    """FLOPs that the devices execute, with padding, empty image slots and recomputation.

    Attention counts the blocks up to the diagonal; the loss is counted as in `step_flops`.
    """
    everything = {
        "tokens": rows * length,
        "images": rows * images,
        "attention_pairs": rows * length * (length + 1) / 2,
        "supervised_tokens": 0,
    }
    once = rows * length * decoder_flops_per_token(config)
    once += attention_flops(config, everything["attention_pairs"])
    if "vision" in trainable:
        once += rows * images * image_flops(config)[0]
    step = step_flops(config, trainable, everything, reference, encodes)
    return step + RECOMPUTED[remat] * once


def memory_traffic(config: LlavaConfig, plan: dict) -> float:
    """Bytes that a chip reads and writes in a step: weights, optimizer and layers' activations.

    Args:
      plan: `trainable` and `optimizer`, bytes on this chip; `decoder`, parameters of the whole
        decoder; `passes` over it a microbatch; `accumulation`; `tokens` on this chip.
    """
    d = config.decoder
    # Read and written once: masters and moments. Gradients: written, read.
    update = 2 * (plan["trainable"] + plan["optimizer"]) + 2 * plan["trainable"]
    # Each pass writes the gathered bfloat16 weights and reads them.
    weights = plan["accumulation"] * plan["passes"] * 2 * 2.0 * plan["decoder"]
    width = d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
    linear_layers = 4 * d.hidden_size + width + 3 * (d.hidden_size + d.intermediate_size)
    activations = plan["tokens"] * plan["passes"] * d.num_layers * 2.0 * linear_layers
    return update + weights + activations


def estimate(
    where: Topology,
    executed: float,
    model: float,
    traffic: float,
    links: float,
    between: float = 0.0,
    waiting: float = 0.0,
    kernels: float | None = 0.0,
) -> dict:
    """Seconds of each term on a chip and of the whole step, and the resulting MFU.

    Args:
      executed, model: FLOPs of a step over all chips.
      traffic, between: bytes of a step on one chip, through memory and through the network
        between slices.
      links: seconds of traffic over the links of a slice.
      waiting: the part of `links` that is not overlapped with compute.
      kernels: seconds that the compiler expects its kernels to take; None: it says nothing, and
        they are counted at the roofline.
    """
    chip, chips = where.chip, len(where.devices)
    terms = {
        "compute": executed / chips / chip.peak,
        "memory": traffic / chip.hbm_bandwidth,
        "collectives": links,
    }
    if where.slices > 1:
        terms["between slices"] = between / chip.network
    # Only the sum of a step's gradients crosses between slices, after everything else.
    waits = waiting + terms.get("between slices", 0.0)
    best, worst = max(terms.values()), sum(terms.values())
    if kernels is None:
        kernels = max(terms["compute"], terms["memory"])
    share = lambda seconds: model / chips / chip.peak / seconds
    return {
        "seconds": terms,
        "bound_by": max(terms, key=terms.get),
        "step_seconds": best,
        "step_seconds_nothing_hidden": worst,
        "mfu": share(best),
        "mfu_nothing_hidden": share(worst),
        "kernel_seconds": kernels,
        "waiting_seconds": waits,
        "mfu_as_compiled": share(max(kernels + waits, best)),
    }
