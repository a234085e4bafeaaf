"""The search for the remat policy, microbatch size and mesh of the fastest step that fits."""

from collections.abc import Callable, Iterator, Mapping

from llava_jax.errors import LlavaError

# From the policy that recomputes least and keeps most to the opposite.
LADDER = ("none", "linear", "attention", "full")


def candidates(batch_size: int, shards: int) -> Iterator[tuple[str, int]]:
    """(remat policy, microbatches) to try: every policy with every microbatch size that divides."""
    rows = batch_size // shards
    for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
        for policy in LADDER:
            yield policy, accumulation


def fastest_fit(
    batch_size: int,
    mesh: Mapping[str, int],
    try_out: Callable[[str, int, int], dict],
    show: Callable[[dict], None],
) -> dict:
    """Tries settings until no other can be faster.

    Under one policy a larger microbatch is never slower, and a policy that recomputes less is never
    slower than one that recomputes more. So the best policy of a microbatch size is the first one
    that fits, and a smaller size is tried only with policies that no larger one had room for. The
    best setting is then tried with weights sharded over half the chips, and half of those, while
    that is faster and fits.

    Args:
      mesh: sizes of the axes to begin with; a batch is split over `data` and `fsdp`.
      try_out: (policy, microbatches, size of `data`) -> the figures of a dry run.
      show: called with each entry of `tried`.

    Returns:
      `tried`, every setting with the bytes it needs, and `best`, the setting or None.
    """
    tried, best = [], None

    def attempt(policy: str, accumulation: int, data: int) -> dict:
        figures = try_out(policy, accumulation, data)
        entry = {
            "remat_policy": policy,
            "accumulation": accumulation,
            "data": data,
            "needed": figures["bytes"]["needed"],
            "fits": figures["fits"],
            "step_seconds": figures.get("estimate", {}).get("step_seconds_nothing_hidden"),
        }
        show(entry)
        tried.append(entry)
        return entry

    def faster(entry: dict, other: dict) -> bool:
        return (entry["step_seconds"] or 0) < (other["step_seconds"] or 0)

    data, fsdp, open_policies = mesh["data"], mesh["fsdp"], list(LADDER)
    for policy, accumulation in candidates(batch_size, data * fsdp):
        if policy not in open_policies:
            continue
        entry = attempt(policy, accumulation, data)
        if entry["fits"]:
            open_policies = open_policies[: open_policies.index(policy)]
            if best is None or faster(entry, best):
                best = entry
    if not tried:
        raise LlavaError(f"a batch of {batch_size} rows is smaller than its {data * fsdp} shards")
    while best and best["step_seconds"] and fsdp % 2 == 0:
        data, fsdp = 2 * data, fsdp // 2
        entry = attempt(best["remat_policy"], best["accumulation"], data)
        if not entry["fits"] or not faster(entry, best):
            break
        best = entry
    return {"tried": tried, "best": best}
