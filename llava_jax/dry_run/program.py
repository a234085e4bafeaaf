"""A compiled program's text: its computations, how often each runs, the cycles of its kernels.

A layer scanned L times stands in the text once, inside a loop; everything is counted as often as
the loops around it run.
"""

import collections
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)|branch_computations=\{(.*?)\}"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
UNKNOWN = 2**63 - 1
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read_program(text: str) -> tuple[dict[str, list[str]], collections.Counter]:
    """The lines of each computation of `compiled.as_text()`, and how often a run runs it."""
    computations, entry = _computations(text)
    return computations, _run_counts(computations, entry)


def kernel_cycles(text: str) -> int:
    """Cycles of a core that the TPU compiler expects its own kernels to take in a run.

    It writes them down for products and what is fused with them, not for kernels of Pallas, nor
    for what crosses between devices. 0 for other compilers' programs, and if it does not know a
    kernel's, as for TPU7x, where it writes the largest integer instead.
    """
    computations, runs = read_program(text)
    found = [
        (runs[name], int(cycles))
        for name, lines in computations.items()
        for line in lines
        for cycles in _CYCLES.findall(line)
    ]
    if any(cycles == UNKNOWN for _, cycles in found):
        return 0
    return sum(times * cycles for times, cycles in found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def instructions(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """(result, opcode, operands and attributes) of each."""
    for line in lines:
        if match := _INSTRUCTION.match(line):
            yield match[1], match[2], match[3]


def fused_computations(computations: dict[str, list[str]]) -> set[str]:
    """Names of those that are one kernel each."""
    return {
        name
        for lines in computations.values()
        for _, opcode, rest in instructions(lines)
        if opcode == "fusion"
        for name in re.findall(r"calls=%?([\w.\-]+)", rest)
    }


def _run_counts(computations: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often each computation runs in one run of the program."""
    runs = collections.Counter()
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        runs[name] += times
        for _, opcode, rest in instructions(computations.get(name, [])):
            if opcode.endswith(("-done", "-update")):  # names what its start has run
                continue
            turns = _trip_count(computations, rest) if opcode == "while" else 1
            for called, branches in _CALLED.findall(rest):
                for callee in filter(None, [called, *re.findall(r"[\w.\-]+", branches)]):
                    pending.append((callee, times * turns))
    return runs


def _trip_count(computations: dict[str, list[str]], rest: str) -> int:
    """How often a loop turns; 1 if that depends on data.

    Written down by the compiler for GPUs; with others the constant that the loop's condition
    compares its counter with.
    """
    if known := _TURNS.search(rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
    limits = [int(n) for line in computations[condition] for n in _CONSTANT.findall(line)]
    return limits[0] if len(limits) == 1 else 1
