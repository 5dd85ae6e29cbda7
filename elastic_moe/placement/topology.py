"""Where the seats are: which node holds which EP rank. The fault domains of a placement."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """`nodes[r]` is the node of EP rank `r`; seats without a process keep their entry, so ranks stay stable."""

    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.nodes or min(self.nodes) < 0:
            raise ValueError(f"a topology needs one node number >= 0 for every rank, got {self.nodes}")

    @classmethod
    def uniform(cls, num_ranks: int, ranks_per_node: int | None = None) -> "Topology":
        """`num_ranks` ranks in order, `ranks_per_node` on each node (all on one node by default)."""
        per_node = ranks_per_node or num_ranks
        return cls(tuple(r // per_node for r in range(num_ranks)))

    @classmethod
    def of_members(cls, members: Sequence[tuple[int, int]]) -> "Topology":
        """From (rank, node) pairs; an absent seat in between counts as a node of its own."""
        nodes = dict(members)
        spare = max(nodes.values()) + 1
        return cls(tuple(nodes.get(r, spare + r) for r in range(max(nodes) + 1)))

    @property
    def num_ranks(self) -> int:
        """R: seats, occupied or not."""
        return len(self.nodes)
