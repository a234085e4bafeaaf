"""Which remat policy and microbatch size make a step fastest and still fit."""

from collections.abc import Callable, Iterator

from llava_jax.errors import LlavaError

# From the one that computes least and keeps most.
LADDER = ("none", "linear", "attention", "full")


def candidates(batch_size: int, shards: int) -> Iterator[tuple[str, int]]:
    """(remat policy, microbatches) to try: every policy with every microbatch size that divides."""
    rows = batch_size // shards
    for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
        for policy in LADDER:
            yield policy, accumulation


def fastest_fit(
    batch_size: int, shards: int, try_out: Callable[[str, int], dict], tell: Callable
) -> dict:
    """Tries settings until no other can be faster.

    A larger microbatch is never slower under one policy, and neither is a policy that recomputes
    less; so of every microbatch size the first policy that fits is its best, and a size counts
    only while it opens a policy that no larger one had room for.

    Args:
      shards: devices that a batch is split over.
      try_out: (policy, microbatches) -> the report of a dry run.

    Returns:
      `tried`, every setting with the bytes it needs, and `best`, the setting or None.
    """
    tried, best = [], None
    open_policies = list(LADDER)
    for policy, accumulation in candidates(batch_size, shards):
        if policy not in open_policies:
            continue
        told = try_out(policy, accumulation)
        seconds = told.get("estimate", {}).get("step_seconds_nothing_hidden")
        entry = {
            "remat_policy": policy,
            "accumulation": accumulation,
            "needed": told["bytes"]["needed"],
            "fits": told["fits"],
            "step_seconds": seconds,
        }
        tell(entry)
        tried.append(entry)
        if told["fits"]:
            open_policies = open_policies[: open_policies.index(policy)]
            if best is None or (seconds or 0) < (best["step_seconds"] or 0):
                best = entry
    if not tried:
        raise LlavaError(f"a batch of {batch_size} rows is smaller than its {shards} shards")
    return {"tried": tried, "best": best}
