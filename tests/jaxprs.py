"""Counts of the operations in a jaxpr."""

import math
from collections.abc import Iterator

from jax.extend import core


def equations(closed_jaxpr, primitive: str) -> list:
    """All equations of a primitive, those of inner jaxprs included; one in a loop counts once."""
    return [eqn for eqn, _ in _walk(closed_jaxpr.jaxpr, 1) if eqn.primitive.name == primitive]


def _walk(jaxpr, times: int) -> Iterator[tuple]:
    """(equation, how often it runs); a while loop's body counts once.

    If an operation has a form for each platform, its default form is taken.
    """
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        subs = list(core.jaxprs_in_params(eqn.params))
        if eqn.params.get("branches_platforms"):
            subs = subs[-1:]
        for sub in subs:
            yield from _walk(sub, inner)


def product_flops(closed_jaxpr) -> int:
    """FLOPs of matrix products of two matrices (so: with weights, not of attention scores)."""
    total = 0
    for eqn, times in _walk(closed_jaxpr.jaxpr, 1):
        if eqn.primitive.name != "dot_general":
            continue
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        if not batch:
            inner = math.prod(left[axis] for axis in contracted)
            total += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    return total
