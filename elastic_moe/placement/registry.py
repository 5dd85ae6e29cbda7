"""PlacementRegistry: the committed placement and its device tables, which keep their addresses for ever."""

import torch

from elastic_moe.placement.dispatch import dispatch_tables
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.topology import Topology


class PlacementRegistry:
    """What one rank knows of the committed placement.

    The device tables are written in place: a CUDA graph or a layer that captured them stays valid over every
    commit. Only `commit` changes the state, and only to a newer version.
    """

    def __init__(self, placement: Placement, rank: int, topology: Topology, device: torch.device) -> None:
        self.rank = rank
        self.topology = topology
        self._placement = placement
        shape = (placement.num_layers, placement.num_experts)
        self._choices = torch.empty((*shape, topology.num_ranks), dtype=torch.int64, device=device)
        self._num_choices = torch.empty(shape, dtype=torch.int64, device=device)
        self._write_tables(placement)

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        return self._placement

    def choose_slots(self, layer: int, expert_index: torch.Tensor) -> torch.Tensor:
        """The slot each token's expert is computed in: int64 [T, K] experts -> int64 [T, K] slots. No host sync."""
        tokens = torch.arange(expert_index.shape[0], device=expert_index.device)[:, None]
        turn = tokens % self._num_choices[layer][expert_index]
        return self._choices[layer][expert_index, turn]

    def commit(self, placement: Placement) -> None:
        """Make `placement` the committed one.

        Raises:
            ValueError: it is not newer than the committed one, or of another shape.
        """
        old = self._placement
        if placement.version <= old.version:
            raise ValueError(f"placement version {placement.version} is not newer than {old.version}")
        if (placement.num_layers, placement.num_experts) != (old.num_layers, old.num_experts):
            raise ValueError("a new placement must have the layers and experts of the committed one")
        if placement.num_ranks != self.topology.num_ranks:
            raise ValueError(
                f"placement for {placement.num_ranks} ranks, but the topology has {self.topology.num_ranks}"
            )
        self._write_tables(placement)
        self._placement = placement

    def check_integrity(self) -> None:
        """Check the committed placement, and that the device tables still say what it says. For idle time.

        Raises:
            ValueError: they differ.
        """
        self._placement.check_integrity()
        choices, counts = dispatch_tables(self._placement, self.rank, self.topology)
        same = torch.equal(self._choices.cpu(), torch.from_numpy(choices).long()) and torch.equal(
            self._num_choices.cpu(), torch.from_numpy(counts).long()
        )
        if not same:
            raise ValueError(f"dispatch tables differ from placement version {self._placement.version}")

    def _write_tables(self, placement: Placement) -> None:
        choices, counts = dispatch_tables(placement, self.rank, self.topology)
        self._choices.copy_(torch.from_numpy(choices))
        self._num_choices.copy_(torch.from_numpy(counts))
