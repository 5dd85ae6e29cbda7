"""Which bytes are right, when the copies of a group differ at its start: never the larger number, never the first.

Each node's disk has one vote on each thing that differs, and the digests of an earlier start have one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from elastic_moe.group.process_group import Group
from elastic_moe.weights.store import UNKNOWN

STALE = 0.5
"""When more than this part of what an earlier start has found differs, the weights were changed on purpose."""


class Undecided(ValueError):
    """Copies differ, and no majority says which is right."""


class Truth(NamedTuple):
    """What a group has agreed on."""

    digests: np.ndarray
    """int64 [N]: of each thing, UNKNOWN where nobody has any."""
    wrong: dict[int, tuple[int, ...]]
    """Thing -> group ranks whose disk has other bytes, of those things about which somebody differed."""


def agree(
    group: Group,
    held: np.ndarray,
    witness: Callable[[int], int],
    nodes: Sequence[int],
    earlier: np.ndarray,
    name: Callable[[int], str],
) -> Truth:
    """Agree on the digests of N things. Collective.

    Args:
        group: all ranks.
        held: int64 [N], of what this rank holds; UNKNOWN for the rest.
        witness: the digest of a thing as this rank's disk has it now, UNKNOWN if it cannot be read.
        nodes: of each rank of the group; the ranks of a node share a disk.
        earlier: int64 [N], of an earlier start; UNKNOWN where there is none. The same on all ranks of a node.
        name: of a thing, for people.

    Raises:
        Undecided: on all ranks; says what differs where.
        PeerLost: a peer died, left, or missed the deadline.
    """
    absent = np.iinfo(np.int64).min
    known = np.stack([held, np.where(held == UNKNOWN, absent, -held), earlier])
    largest, negated, earlier = group.all_reduce_max_array(known)
    compared = (earlier != UNKNOWN) & (largest != UNKNOWN)
    if (earlier != largest)[compared].sum() > STALE * compared.sum():
        earlier = np.full_like(earlier, UNKNOWN)
    differs = (largest != UNKNOWN) & ((largest != -negated) | ((earlier != UNKNOWN) & (earlier != largest)))
    things = np.flatnonzero(differs).tolist()
    digests, wrong = largest.copy(), {}
    if not things:
        return Truth(digests, wrong)
    said = np.full((len(things), group.size), UNKNOWN, dtype=np.int64)
    said[:, group.rank] = [witness(thing) for thing in things]
    said = group.all_reduce_max_array(said)
    speakers = {node: nodes.index(node) for node in sorted(set(nodes))}
    for thing, row in zip(things, said.tolist(), strict=True):
        votes = Counter(row[rank] for rank in speakers.values() if row[rank] != UNKNOWN)
        votes.update(d for d in (int(earlier[thing]),) if d != UNKNOWN)
        best = votes.most_common(2)
        if not best or (len(best) > 1 and best[0][1] == best[1][1]):
            found = ", ".join(f"node {node} {row[rank]:016x}" for node, rank in speakers.items())
            before = f", an earlier start {int(earlier[thing]):016x}" if earlier[thing] != UNKNOWN else ""
            raise Undecided(
                f"the copies of {name(thing)} differ, and no majority says which is right ({found}{before}): copy the "
                "right files to all nodes, or remove elastic_moe_digests.json if they were changed on purpose"
            )
        digests[thing] = best[0][0]
        wrong[thing] = tuple(rank for rank, one in enumerate(row) if one != digests[thing])
    return Truth(digests, wrong)
