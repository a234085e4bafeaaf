"""The search for settings that fit finds the fastest, and tries no hopeless one."""

import pytest

from llava_jax.dry_run.fit import LADDER, fastest_fit

MEMORY = dict(zip(LADDER, (80, 40, 12, 10), strict=True))  # of a whole batch's activations
MESH = {"data": 1, "fsdp": 8, "tensor": 1}
SECONDS = dict(zip(LADDER, (3.0, 3.0, 3.5, 4.0), strict=True))


def dry_run(room: int, tried: list, copies: float = 0.1):
    """`copies`: seconds that a step takes longer for each size of `data` more than 1."""

    def try_out(policy: str, accumulation: int, data: int) -> dict:
        tried.append((policy, accumulation, data))
        needed = MEMORY[policy] / accumulation + data - 1
        seconds = SECONDS[policy] + 0.05 * accumulation + copies * (data - 1)
        fits = needed <= room
        figures = {"bytes": {"needed": needed}, "fits": fits}
        return figures | ({"estimate": {"step_seconds_nothing_hidden": seconds}} if fits else {})

    return try_out


@pytest.mark.parametrize(
    ("room", "best"),
    [
        (100, ("none", 1)),
        (45, ("linear", 1)),
        (20, ("linear", 2)),  # half a batch keeps what a whole one must compute again
        (5, ("attention", 4)),
        (1, None),
    ],
)
def test_the_fastest_that_fits(room, best):
    tried = []
    found = fastest_fit(32, MESH, dry_run(room, tried), lambda _: None)
    chosen = found["best"]
    assert (chosen and (chosen["remat_policy"], chosen["accumulation"])) == best
    assert [(e["remat_policy"], e["accumulation"], e["data"]) for e in found["tried"]] == tried


def test_what_cannot_be_faster_is_not_tried():
    tried = []
    fastest_fit(32, MESH, dry_run(45, tried), lambda _: None)
    assert tried == [("none", 1, 1), ("linear", 1, 1), ("none", 2, 1), ("linear", 1, 2)]


@pytest.mark.parametrize(("room", "data"), [(100, 8), (42, 2), (40, 1)])
def test_copies_of_the_weights_while_they_are_faster_and_fit(room, data):
    found = fastest_fit(32, MESH, dry_run(room, [], copies=-0.1), lambda _: None)
    assert found["best"]["data"] == data and found["best"]["fits"]
