"""Pictures that are the same, or nearly, within a data set and in two of them.

Three kinds, the strongest counts: the same bytes, the same pixels (of another file format, or with
other metadata), near-duplicates (compressed anew, or of another size). For the last, perceptual
hashes propose pairs and thumbnails decide. Cut, mirrored, rotated or recoloured copies are not
found.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llava_jax.data.fingerprints import PIXELS, Fingerprints, PictureSet

KINDS = ("same bytes", "same pixels", "near-duplicate")
BITS = 6  # in which the hashes of near-duplicates may differ
# Differences of two thumbnails, of 255, in the mean and anywhere. JPEG at quality 20 and a third of
# the size stay below, but for drawings of saturated colours. Of the 12.5 million pairs of Easy-VQA,
# whose flat shapes are all that differs, a handful is below, too.
MEAN, ANYWHERE = 3.0, 32
_AT_ONCE = 4096  # pairs of thumbnails compared
_SHOWN = 3


class Group(NamedTuple):
    """Pictures of one data set that are the same.

    kind: the weakest that holds one to another. rows: their rows in the fingerprints, ascending.
    """

    kind: str
    rows: np.ndarray


class Leak(NamedTuple):
    """A picture of another data set that is in ours.

    kind: the strongest that holds. ours: rows in our fingerprints. theirs: its row in the others.
    """

    kind: str
    ours: np.ndarray
    theirs: int


def near_hashes(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of uint64 [N] that differ in at most BITS bits, as parts of (int64, int64).

    Not all are compared with all. Of the eight bytes of two hashes that differ in six bits at most
    two at least are equal; so for each two of the bytes, hashes are sorted by them, and compared
    with those that have the same. A pair may come more than once.

        3f 80 1c 07 55 e2 90 11
        3f 81 1c 07 55 e2 92 11     equal in bytes 0 2 3 4 5 7
    """
    parts = hashes.view(np.uint8).reshape(-1, 8).astype(np.uint16)
    for i, j in itertools.combinations(range(8), 8 - BITS):
        key = parts[:, i] << 8 | parts[:, j]
        order = np.argsort(key, kind="stable")
        key, sorted_hashes = key[order], hashes[order]
        at, distance = np.arange(len(key)), 1
        while len(at := at[at + distance < len(key)]):
            at = at[key[at + distance] == key[at]]
            different = np.bitwise_count(sorted_hashes[at] ^ sorted_hashes[at + distance])
            close = at[different <= BITS]
            if len(close):
                yield order[close], order[close + distance]
            distance += 1


def groups(fingerprints: Fingerprints) -> list[Group]:
    """The groups of pictures that are the same, the largest first."""
    looks = _Looks(fingerprints)
    parents = np.arange(looks.count)
    for a, b in looks.near():
        a, b = _roots(parents, a), _roots(parents, b)
        for pair in np.stack([a, b], 1)[a != b].tolist():
            one, other = sorted(_root(parents, node) for node in pair)
            parents[other] = one
    of_picture = _roots(parents, np.arange(looks.count))[looks.of_picture]
    found = []
    for rows in _together(of_picture):
        kind = KINDS[2]
        if len(np.unique(looks.of_picture[rows])) == 1:
            kind = KINDS[len(np.unique(looks.bytes[rows])) > 1]
        found.append(Group(kind, rows))
    return sorted(found, key=lambda group: (-len(group.rows), group.rows[0]))


def leaks(ours: Fingerprints, theirs: Fingerprints) -> list[Leak]:
    """The pictures of another data set that are in ours, in its order."""
    count = len(ours)
    looks = _Looks(ours, theirs)
    mine = np.zeros(looks.count, bool)
    mine[looks.of_picture[:count]] = True
    other = np.zeros(looks.count, bool)
    other[looks.of_picture[count:]] = True
    near: dict[int, list[int]] = {}
    crosses = lambda a, b: mine[a] & other[b] | other[a] & mine[b]
    for pairs in looks.near(crosses):
        for a, b in np.unique(np.stack(pairs, 1), axis=0).tolist():
            near.setdefault(a, []).append(b)
            near.setdefault(b, []).append(a)
    order = np.argsort(looks.of_picture[:count], kind="stable")
    sorted_looks = looks.of_picture[:count][order]
    found = []
    for row, look in enumerate(looks.of_picture[count:].tolist()):
        if not mine[look] and look not in near:
            continue
        same = sorted({look, *near.get(look, ())})
        edges = [np.searchsorted(sorted_looks, same, side) for side in ("left", "right")]
        rows = [order[start:end] for start, end in zip(*edges, strict=True)]
        rows = np.sort(np.concatenate(rows))
        if not len(rows):
            continue
        kind = KINDS[2]
        if mine[look]:
            kind = KINDS[looks.bytes[count + row] not in looks.bytes[rows]]
        found.append(Leak(kind, rows, row))
    return found


def group_lines(found: list[Group], fingerprints: Fingerprints, records) -> list[str]:
    """The groups within a data set as text: counts of each kind, and the largest."""
    copies = sum(len(group.rows) - 1 for group in found)
    none = "" if found else ", none is like another"
    lines = [f"{len(fingerprints):,} pictures, {len(fingerprints) - copies:,} different{none}"]
    for kind in KINDS:
        ours = [group for group in found if group.kind == kind]
        if ours:
            count = sum(len(group.rows) for group in ours)
            lines.append(f"{count:>10,}  pictures in {len(ours):,} groups: {kind}")
        for group in ours[:_SHOWN]:
            users = fingerprints.users(group.rows)
            lines.append(f"{'':12}{len(group.rows)} pictures: {names(records, users)}")
    return lines


def leak_lines(found: list[Leak], ours: PictureSet, theirs: PictureSet) -> list[str]:
    """The pictures of `theirs` that are in `ours` as text: counts of each kind, and the first."""
    many = f"{len(found):,}" if found else "none"
    of_all = f"of {len(theirs.fingerprints):,} pictures"
    lines = [f"{theirs.records.path}: {many} {of_all} are in {ours.records.path}"]
    for kind in KINDS:
        of_kind = [leak for leak in found if leak.kind == kind]
        if of_kind:
            lines.append(f"{len(of_kind):>10,}  {kind}")
        for leak in of_kind[:_SHOWN]:
            there = names(theirs.records, theirs.fingerprints.users(np.array([leak.theirs])))
            here = names(ours.records, ours.fingerprints.users(leak.ours))
            lines.append(f"{'':12}{there} there = {here} here")
    if theirs.unreadable:
        lines.append(f"{len(theirs.unreadable):>10,}  records there could not be read")
        lines += [f"{'':12}{message}" for message in theirs.unreadable[:_SHOWN]]
    return lines


def names(records, numbers: list[int]) -> str:
    """The first records by number and id, and how many more there are."""
    shown = ", ".join(records[number].name for number in numbers[:_SHOWN])
    more = f" and {len(numbers) - _SHOWN:,} more" if len(numbers) > _SHOWN else ""
    return shown + more


class _Looks:
    """The distinct looks of pictures: those of the same pixels have one.

    count: how many. of_picture: int64 [N], the look of each picture. bytes: uint64 [N].
    """

    def __init__(self, *sets: Fingerprints):
        hashes = np.concatenate([one.hashes for one in sets])
        self.bytes, self._sets = hashes[:, 0], sets
        _, self._first, self.of_picture = np.unique(
            hashes[:, 1], return_index=True, return_inverse=True
        )
        self.count, self._perceptual = len(self._first), hashes[self._first, 2]

    def near(self, wanted=lambda a, b: np.ones(len(a), bool)):
        """Pairs of looks that are near-duplicates, as parts of (int64, int64)."""
        for a, b in near_hashes(self._perceptual):
            keep = wanted(a, b)
            a, b = a[keep], b[keep]
            for start in range(0, len(a), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                difference = np.abs(self._thumbnail(a[part]) - self._thumbnail(b[part]))
                alike = (difference.mean(1) <= MEAN) & (difference.max(1) <= ANYWHERE)
                if alike.any():
                    yield a[part][alike], b[part][alike]

    def _thumbnail(self, looks: np.ndarray) -> np.ndarray:
        """int16 [pairs, PIXELS]."""
        rows, found, start = self._first[looks], np.empty((len(looks), PIXELS), np.int16), 0
        for one in self._sets:
            here = (rows >= start) & (rows < start + len(one))
            found[here] = one.thumbnails(rows[here] - start)
            start += len(one)
        return found


def _root(parents: np.ndarray, node: int) -> int:
    while parents[node] != node:
        node = parents[node]
    return int(node)


def _roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node; ways to it become one step."""
    found = parents[nodes]
    while (found != (higher := parents[found])).any():
        found = higher
    parents[nodes] = found
    return found


def _together(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each label that occurs more than once."""
    order = np.argsort(labels, kind="stable")
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    return [part for part in np.split(order, ends) if len(part) > 1]
