"""Placement: which logical expert each slot of every layer holds. A frozen value with its derived maps.

Shapes: L MoE layers, E logical experts, R ranks (seats), S slots per rank, P = R * S. Rank r owns slots
[r * S, (r + 1) * S). -1 is the only "empty".
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.topology import Topology

EMPTY = -1


@dataclass(frozen=True, eq=False)
class Placement:
    """`slots` is int32 [L, P], read-only; its entry is the logical expert in that slot, or -1.

    Two layers, four experts, three ranks of two slots each. Expert 0 has two copies in layer 0 and three in layer 1;
    slot 5 of layer 0 is empty:

        rank    |   0   |   1   |   2   |
        slot    |  0  1 |  2  3 |  4  5 |
        layer 0 |  0  1 |  2  3 |  0 -1 |
        layer 1 |  0  1 |  2  0 |  3  0 |

    >>> placement = Placement(np.array([[0, 1, 2, 3, 0, -1], [0, 1, 2, 0, 3, 0]]), num_experts=4, slots_per_rank=2)
    >>> placement.num_layers, placement.num_ranks, placement.has_replicas
    (2, 3, True)
    >>> placement.copies.tolist()  # of experts 0, 1, 2, 3, layer by layer
    [[2, 1, 1, 1], [3, 1, 1, 1]]
    >>> placement.of_rank(2).tolist()  # what its slots 4 and 5 hold
    [[0, -1], [3, 0]]
    >>> placement.slots_of(layer=1, expert=0).tolist()  # of ranks 0, 1 and 2: slot // 2
    [0, 3, 5]
    >>> placement.uncovered(alive=[0, 2])  # without rank 1: the only copies of expert 2, and of 3 in layer 0
    [(0, 2), (0, 3), (1, 2)]

    Raises:
        ValueError: shapes or expert numbers do not fit.
        NotEnoughSlots: some logical expert has no slot at all.
    """

    slots: np.ndarray
    num_experts: int
    slots_per_rank: int
    version: int = 0
    epoch: int = 0
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        slots = np.array(self.slots, dtype=np.int32)
        slots.setflags(write=False)
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "hash", self._digest())
        self.check_integrity()

    def _digest(self) -> str:
        header = np.array([*self.slots.shape, self.num_experts, self.slots_per_rank], dtype=np.int64)
        return hashlib.sha256(header.tobytes() + self.slots.tobytes()).hexdigest()[:16]

    def check_integrity(self) -> None:
        """Check shape, range, coverage and hash again. Raises as the constructor does."""
        slots = self.slots
        if slots.ndim != 2 or slots.shape[1] % self.slots_per_rank:
            raise ValueError(f"placement of shape {slots.shape} is not [L, R * {self.slots_per_rank}]")
        if slots.size and (slots.min() < EMPTY or slots.max() >= self.num_experts):
            raise ValueError(f"placement holds expert numbers outside -1..{self.num_experts - 1}")
        if self.hash != self._digest():
            raise ValueError(f"placement version {self.version} does not match its hash {self.hash}")
        missing = self.uncovered(range(self.num_ranks))
        if missing:
            layer, expert = missing[0]
            raise NotEnoughSlots(
                f"{len(missing)} of {self.num_layers * self.num_experts} experts have no slot "
                f"(first: layer {layer} expert {expert}; {slots.shape[1]} slots for {self.num_experts} experts)"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return self.slots.shape[0]

    @property
    def num_ranks(self) -> int:
        """R: seats, occupied or not."""
        return self.slots.shape[1] // self.slots_per_rank

    @cached_property
    def copies(self) -> np.ndarray:
        """int64 [L, E]: how many slots hold each logical expert."""
        return count_experts(self.slots, self.num_experts)

    @property
    def has_replicas(self) -> bool:
        """Whether any logical expert of any layer is in more than one slot."""
        return bool((self.copies > 1).any())

    def of_rank(self, rank: int) -> np.ndarray:
        """int32 [L, S]: the experts in the slots of one rank."""
        return self.slots[:, rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def slots_of(self, layer: int, expert: int) -> np.ndarray:
        """int64 [copies]: the slots that hold `expert`, rising (the inverse map)."""
        return np.flatnonzero(self.slots[layer] == expert)

    def uncovered(self, alive: Collection[int]) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no slot of the `alive` ranks holds."""
        live = np.isin(np.arange(self.num_ranks), list(alive)).repeat(self.slots_per_rank)
        counts = count_experts(np.where(live, self.slots, EMPTY), self.num_experts)
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(counts == 0)]


def count_experts(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 [L, E]: occurrences of each expert in each row of `slots` [L, P]; -1 is not counted."""
    rows = np.arange(slots.shape[0])[:, None]
    flat = (slots + 1 + rows * (num_experts + 1)).ravel()
    counts = np.bincount(flat, minlength=slots.shape[0] * (num_experts + 1))
    return counts.reshape(slots.shape[0], num_experts + 1)[:, 1:]


def fewest_slots(num_experts: int, num_ranks: int) -> int:
    """The least S with which `num_ranks` ranks hold every one of `num_experts` experts."""
    return -(-num_experts // num_ranks)


def initial_placement(
    num_layers: int, num_experts: int, topology: Topology, slots_per_rank: int, *, replicate: bool = True
) -> Placement:
    """A placement that knows no loads: experts in order over the ranks, spare slots filled with replicas.

    Experts are dealt in contiguous, equally long runs (lengths differ by one at most). Each spare slot gets the
    expert with the fewest copies among those not on this rank, preferring one that is not on this node either. A
    slot stays -1 only when its rank already holds every expert, or when `replicate` is False.

    Raises:
        NotEnoughSlots: R * slots_per_rank < num_experts; the message says how many are short.
    """
    num_ranks = topology.num_ranks
    if num_ranks * slots_per_rank < num_experts:
        raise NotEnoughSlots(
            f"{num_ranks} ranks x {slots_per_rank} slots hold {num_ranks * slots_per_rank} of {num_experts} experts: "
            f"{fewest_slots(num_experts, num_ranks)} slots per rank or more are needed"
        )
    grid = np.full((num_ranks, slots_per_rank), EMPTY, dtype=np.int32)
    on_rank = np.zeros((num_ranks, num_experts), dtype=bool)
    for rank, run in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
        grid[rank, : len(run)] = run
        on_rank[rank, run] = True
    nodes = np.array(topology.nodes)
    for slot in range(slots_per_rank if replicate else 0):
        for rank in np.flatnonzero(grid[:, slot] == EMPTY):
            copies = on_rank.sum(axis=0)
            on_node = on_rank[nodes == nodes[rank]].any(axis=0)
            after = (np.arange(num_experts) - int(grid[rank].max()) - 1) % num_experts
            order = np.lexsort((after, on_node, copies))
            free = order[~on_rank[rank, order]]
            if free.size:
                grid[rank, slot] = free[0]
                on_rank[rank, free[0]] = True
    return Placement(np.tile(grid.reshape(1, -1), (num_layers, 1)), num_experts, slots_per_rank)
