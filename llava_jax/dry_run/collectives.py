"""The traffic between devices of a compiled program, read from its text."""

import dataclasses
import math
import re

import numpy as np

from llava_jax.dry_run.program import fused_computations, instructions, read_program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"
DTYPE_BYTES = {"pred": 1, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Who takes part, in one of three ways: numbers from 0 laid out as an array, its axes moved, cut
# into groups; a mesh of such numbers and the axes that a group spans; lists of members.
_NUMBERS = r"\[(?P<{0}>[\d,]+)\](?:T\((?P<{0}_order>[\d,]+)\))?"
_GROUPS = re.compile(
    rf"replica_groups=(?:\[\d+,(?P<size>\d+)\]<={_NUMBERS.format('tiles')}"
    rf"|mesh\[(?P<axes>.*?)\](?:, device_ids=\({_NUMBERS.format('ids')}\))? \{{(?P<spanned>.*?)\}}"
    r"|\{\{(?P<members>[\d,]*)\})"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OF_HOSTS = "xla_megascale_runtime"
_WAITS = '"is_sync":true'  # a pair of start and done with nothing between them, on GPUs


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of KINDS, or BETWEEN_SLICES.
      shape: of the whole array: the result of a gather, what goes into a reduction; per device.
        Between slices: what a device receives.
      size: its bytes.
      group: numbers of the devices of its first group, counted as the mesh lists them.
      runs: times a step.
      hidden: devices work while it is under way.
      scope: the name the compiler kept of the code it comes from.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    group: tuple[int, ...]
    runs: int
    hidden: bool
    scope: str

    @property
    def received(self) -> float:
        """Bytes that enter each device in a step, by the bandwidth-optimal ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        whole = self.kind in ("collective-permute", BETWEEN_SLICES)
        share = 1 if whole else 1 - 1 / len(self.group)
        return passes * share * self.size * self.runs


def read_collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`), largest first.

    A loop whose number of turns depends on data counts once. The TPU compiler splits a collective
    over fusions that it hides behind products; the parts, of which some have lost their name,
    count as one. A reduce-scatter it writes as a fusion `all-reduce-scatter`: an all-reduce, a
    slice of it kept. What crosses slices it makes a transfer of the hosts. The GPU compiler writes
    every collective as a pair of start and done, and marks those that wait.

    Args:
      devices: of the program, for collectives that name no groups.
    """
    computations, runs = read_program(text)
    fused = fused_computations(computations)
    found, seen, everyone = [], {}, tuple(range(devices))
    for name, lines in computations.items():
        for result, opcode, rest in instructions(lines):
            if not runs[name]:
                continue
            if opcode == "recv" and _OF_HOSTS in rest:
                dtype, shape = _arrays(result)[0]
                size = math.prod(shape) * DTYPE_BYTES[dtype]
                found.append(
                    Collective(BETWEEN_SLICES, dtype, shape, size, everyone, runs[name], False, "")
                )
            if opcode.removesuffix("-start") not in KINDS:
                continue
            if _is_part(seen, result, opcode, rest):
                continue
            several = _collectives(opcode, result, rest, runs[name], devices)
            if name.startswith("all-reduce-scatter"):
                several = (dataclasses.replace(c, kind="reduce-scatter") for c in several)
            elif name in fused:
                several = (dataclasses.replace(c, hidden=True) for c in several)
            found += several
    return sorted(found, key=lambda c: -c.received)


def _is_part(seen: dict, result: str, opcode: str, rest: str) -> bool:
    """Whether this is another piece of a collective already in `seen` (which is updated).

    The channel alone does not decide: all collectives of `shard_map` have the same one.
    """
    channel, groups, name = (p.search(rest) for p in (_CHANNEL, _GROUPS, _OP_NAME))
    if channel is None:
        return False
    arrays = tuple(_ARRAY.findall(result))  # parts may be in different memories
    names = seen.setdefault((opcode, channel[1], groups and groups[0], arrays), set())
    name = name and name[1]
    part = bool(names) and (name is None or bool(names & {name, None}))
    names.add(name)
    return part


def _collectives(opcode: str, result: str, rest: str, runs: int, devices: int):
    """The collectives of one instruction: one for each array that it was combined from."""
    kind, arrays = opcode.removesuffix("-start"), _arrays(result)
    hidden = opcode != kind and _WAITS not in rest
    if opcode != kind and kind != "all-reduce":  # the result lists the operands first
        operands = rest.split(")")[0].count("%")
        arrays = arrays[operands : 2 * operands]
    group = _first_group(rest, devices)
    scope = _OP_NAME.search(rest)
    for dtype, shape in arrays:
        if kind == "reduce-scatter":
            dimension = int(re.search(r"dimensions=\{(\d+)\}", rest)[1])
            shape = (*shape[:dimension], shape[dimension] * len(group), *shape[dimension + 1 :])
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        name = scope[1] if scope else ""
        yield Collective(kind, dtype, shape, size, group, runs, hidden, name)


def _arrays(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array of a result."""
    return [(dtype, _integers(sizes)) for dtype, sizes in _ARRAY.findall(result)]


def _first_group(rest: str, devices: int) -> tuple[int, ...]:
    found = _GROUPS.search(rest)
    if not found or found["members"] == "":
        return tuple(range(devices))
    if found["members"]:
        return _integers(found["members"])
    if found["size"]:
        group = _numbers(found["tiles"], found["tiles_order"]).ravel()[: int(found["size"])]
    else:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found["axes"])}
        spanned = re.findall(r"'([^']+)'", found["spanned"])
        ids = _numbers(found["ids"] or str(math.prod(sizes.values())), found["ids_order"])
        first = tuple(slice(None) if name in spanned else 0 for name in sizes)
        group = ids.reshape(*sizes.values())[first].ravel()
    return tuple(group.tolist())


def _numbers(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... as an array of `shape`, its axes in another `order`."""
    shape = _integers(shape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_integers(order)) if order else numbers


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
