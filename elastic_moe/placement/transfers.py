"""Transfer plan: where each newly filled slot of a placement gets its expert from."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.repair import only_alive
from elastic_moe.placement.topology import Topology

OUTSIDE = -1
"""The source of a move whose expert no live slot holds: host DRAM or disk."""


class Distance(IntEnum):
    """How far an expert travels, nearest first."""

    OWN = 0
    NODE = 1
    REMOTE = 2
    OUTSIDE = 3


@dataclass(frozen=True, slots=True)
class Move:
    """Expert `expert` of layer `layer` goes into slot `target`, from slot `source` or from OUTSIDE (-1)."""

    layer: int
    expert: int
    target: int
    source: int


@dataclass(frozen=True)
class TransferPlan:
    """The moves that turn what is held into a placement, by rising layer, then target: every rank has this order.

    Contract: **within a layer all sources are read before any target is published.** A source may be a target of
    the same layer (a rebalance swaps experts); what it gives is what it held before the plan. So bytes
    land in staging, and slots are written only when every read of their layer is done. Layers are independent:
    one may be published before the next is read. The plan of a `repair` never reads a slot that it overwrites.
    """

    moves: tuple[Move, ...]
    slots_per_rank: int
    topology: Topology

    def rank_of(self, slot: int) -> int:
        """The EP rank that owns `slot`; OUTSIDE (-1) for OUTSIDE."""
        return slot // self.slots_per_rank

    def distance(self, move: Move) -> Distance:
        """How far `move` goes."""
        return _distance(self.rank_of(move.source), self.rank_of(move.target), self.topology)

    def sends_of(self, rank: int) -> tuple[Move, ...]:
        """Moves from a slot of `rank` to another rank."""
        return tuple(m for m in self.moves if self.rank_of(m.source) == rank != self.rank_of(m.target))

    def receives_of(self, rank: int) -> tuple[Move, ...]:
        """Moves into a slot of `rank` from another rank."""
        apart = (rank, OUTSIDE)
        return tuple(m for m in self.moves if self.rank_of(m.target) == rank and self.rank_of(m.source) not in apart)

    def local_of(self, rank: int) -> tuple[Move, ...]:
        """Moves from one slot of `rank` to another of its own."""
        return tuple(m for m in self.moves if self.rank_of(m.target) == rank == self.rank_of(m.source))

    @property
    def missing(self) -> tuple[Move, ...]:
        """Moves whose expert no live slot holds."""
        return tuple(m for m in self.moves if m.source == OUTSIDE)

    def num_moves(self) -> dict[Distance, int]:
        """How many moves go how far; every distance has an entry."""
        counts = Counter(map(self.distance, self.moves))
        return {distance: counts[distance] for distance in Distance}


def plan_transfers(held: np.ndarray, new: Placement, alive: Collection[int], topology: Topology) -> TransferPlan:
    """One move for every slot of a live rank whose expert in `new` is not what it holds.

    A source is a live slot that holds the expert now: on the target's own rank if there is one, else on its node,
    else on another. Among equally near slots it is the one whose rank has been given fewest sends so far, then
    the lowest. Without any live holder it is OUTSIDE. Slots that `new` leaves empty need no move.

    Args:
        held: int [L, P], what every seat holds; -1 is empty. Entries of dead ranks are ignored.
        new: the placement to reach; its slots on dead ranks are ignored.
        alive: EP ranks of the live members.
        topology: the node of each of the R seats.

    Raises:
        ValueError: shapes or ranks do not fit.
    """
    if held.shape != new.slots.shape or new.num_ranks != topology.num_ranks:
        raise ValueError(
            f"held {held.shape}, the new placement {new.slots.shape} and a topology of {topology.num_ranks} ranks "
            f"x {new.slots_per_rank} slots do not fit"
        )
    slots = only_alive(held, new.slots_per_rank, alive)
    goal = only_alive(new.slots, new.slots_per_rank, alive)
    layers, targets = np.nonzero((goal != EMPTY) & (goal != slots))
    experts = goal[layers, targets]
    holders = _holders(slots, layers, experts, new.num_experts)
    num_sends: Counter[int] = Counter()
    moves = []
    for layer, target, expert in zip(layers.tolist(), targets.tolist(), experts.tolist(), strict=True):
        rank = target // new.slots_per_rank
        owned = [(slot // new.slots_per_rank, slot) for slot in holders.get((layer, expert), ())]
        choices = [(_distance(owner, rank, topology), num_sends[owner], owner, slot) for owner, slot in owned]
        distance, _, owner, source = min(choices, default=(Distance.OUTSIDE, 0, OUTSIDE, OUTSIDE))
        num_sends[owner] += distance > Distance.OWN
        moves.append(Move(layer, expert, target, source))
    return TransferPlan(tuple(moves), new.slots_per_rank, topology)


def _distance(source_rank: int, target_rank: int, topology: Topology) -> Distance:
    if source_rank == OUTSIDE:
        return Distance.OUTSIDE
    if source_rank == target_rank:
        return Distance.OWN
    return Distance.NODE if topology.nodes[source_rank] == topology.nodes[target_rank] else Distance.REMOTE


def _holders(
    slots: np.ndarray, layers: np.ndarray, experts: np.ndarray, num_experts: int
) -> dict[tuple[int, int], list[int]]:
    """The slots of `slots` [L, P] that hold each of the (layer, expert) pairs, rising; only of pairs that have any."""
    wanted = np.zeros((slots.shape[0], num_experts + 1), dtype=bool)  # the last column is that of the empty slot
    wanted[layers, experts] = True
    found: dict[tuple[int, int], list[int]] = {}
    rows, columns = np.nonzero(np.take_along_axis(wanted, slots % (num_experts + 1), axis=1))
    for layer, slot, expert in zip(rows.tolist(), columns.tolist(), slots[rows, columns].tolist(), strict=True):
        found.setdefault((layer, expert), []).append(slot)
    return found
