"""A lost expert that this rank's disk has wrong, from the disk of another member."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from elastic_moe.errors import TransferFailed
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.weights.store import ExpertStore

IN_FLIGHT = 64
"""Experts on their way at once; bounds what is read aside."""
NOBODY = -1


class Unread(NamedTuple):
    """A vacated slot of this rank, and why its expert could not be had here."""

    layer: int
    slot: int
    expert: int
    why: TransferFailed


def read_elsewhere(unread: list[Unread], store: ExpertStore, groups: EpochGroups) -> list[Unread]:
    """Let each other member in turn read what a member could not. Collective: called by all when one of them must.

    What comes is verified by the digests of the group like any copy.

    Args:
        unread: of this rank; often none.
        store: this rank's, whose digests are those of the group.
        groups: of the epoch.

    Returns:
        Those that no member could read.

    Raises:
        PeerLost: a peer died, left, or missed the deadline.
    """
    me, size = groups.control.rank, groups.control.size
    left = {(one.layer, one.expert): one for one in unread}
    for turn in range(1, size):
        wanted = np.full(store.digests.shape, NOBODY, dtype=np.int64)
        for place in left:
            wanted[place] = me
        wanted = groups.control.all_reduce_max_array(wanted)
        places = [(layer, expert) for layer, expert in np.argwhere(wanted != NOBODY).tolist()]
        for begin in range(0, len(places), IN_FLIGHT):
            targets = {place: int(wanted[place]) for place in places[begin : begin + IN_FLIGHT]}
            _fetch(targets, turn, left, store, groups)
    return list(left.values())


def _fetch(
    targets: Mapping[tuple[int, int], int],
    turn: int,
    left: dict[tuple[int, int], Unread],
    store: ExpertStore,
    groups: EpochGroups,
) -> None:
    """The member `turn` places behind each target reads, and sends what is right; what arrives leaves `left`.

    Args:
        targets: position in the group of who wants each (layer, expert).
        turn: 1 to the size of the group less 1.
        left: of this rank.
        store: this rank's.
        groups: of the epoch.
    """
    me, size = groups.control.rank, groups.control.size
    mine = [place for place, target in targets.items() if (target + turn) % size == me]
    read = {place: tensors for place in mine if (tensors := store.read_aside(*place)) is not None}
    found = groups.control.all_reduce_max([int(place in read) for place in targets])
    sends, receives, arriving = [], [], []
    for tag, ((place, target), there) in enumerate(zip(targets.items(), found, strict=True)):
        if place in read:
            sends += [(tensor, target, tag) for tensor in read[place]]
        elif there and target == me and place in left:
            one = left[place]
            arriving.append(one)
            receives += [(t, (me + turn) % size, tag) for t in store.vacate(one.layer, one.slot)]
    groups.data.exchange(sends, receives)
    for one in arriving:
        if store.accept(one.layer, one.slot, one.expert):
            del left[one.layer, one.expert]
