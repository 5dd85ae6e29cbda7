"""PlacementRegistry: the committed placement and its device tables, which keep their addresses for ever."""

from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.placement.dispatch import dispatch_tables
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology


@dataclass(frozen=True)
class Tables:
    """Dispatch tables of some layers: what `PlacementRegistry.prepare` has made."""

    base_version: int
    """Of the placement that was committed when they were made."""
    layers: np.ndarray
    choices: torch.Tensor
    num_choices: torch.Tensor


class PlacementRegistry:
    """What one rank knows of the committed placement.

    The device tables are written in place: a CUDA graph or a layer that captured them stays valid over every
    commit. Only `commit` changes the state, and only to a newer version.
    """

    def __init__(self, placement: Placement, rank: int, topology: Topology, device: torch.device) -> None:
        self.rank = rank
        self.topology = topology
        self._placement = placement
        # The row behind the last expert says what "none" becomes, and is where an index of -1 looks.
        shape = (placement.num_layers, placement.num_experts + 1)
        self._choices = torch.full((*shape, topology.num_ranks), EMPTY, dtype=torch.int64, device=device)
        self._num_choices = torch.ones(shape, dtype=torch.int64, device=device)
        choices, counts = dispatch_tables(placement, rank, topology)
        self._choices[:, :-1].copy_(torch.from_numpy(choices))
        self._num_choices[:, :-1].copy_(torch.from_numpy(counts))

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        return self._placement

    def choose_slots(self, layer: int, expert_index: torch.Tensor) -> torch.Tensor:
        """The slot each token's expert is computed in: int64 [T, K] experts -> int64 [T, K] slots, -1 to -1. No host
        sync; experts are -1..E-1."""
        tokens = torch.arange(expert_index.shape[0], device=expert_index.device)[:, None]
        turn = tokens % self._num_choices[layer][expert_index]
        return self._choices[layer][expert_index, turn]

    def prepare(self, placement: Placement) -> "Tables":
        """The tables of the layers in which `placement` differs from the committed one, for a quick `commit`. From any
        thread."""
        old, new = self._placement.slots, placement.slots
        layers = np.arange(len(new)) if old.shape != new.shape else np.flatnonzero((old != new).any(axis=1))
        if not layers.size:
            nothing = torch.empty(0, dtype=torch.int32)
            return Tables(self._placement.version, layers, nothing, nothing)
        part = Placement(new[layers], placement.num_experts, placement.slots_per_rank)
        choices, counts = dispatch_tables(part, self.rank, self.topology)
        return Tables(self._placement.version, layers, torch.from_numpy(choices), torch.from_numpy(counts))

    def commit(self, placement: Placement, tables: "Tables | None" = None) -> None:
        """Make `placement` the committed one; `tables` are those prepared for it, if they were.

        Raises:
            ValueError: it is not newer than the committed one, or of another shape, or the tables are of another.
        """
        old = self._placement
        tables = tables or self.prepare(placement)
        if tables.base_version != old.version:
            raise ValueError(f"tables prepared over version {tables.base_version}, but {old.version} is committed")
        if placement.version <= old.version:
            raise ValueError(f"placement version {placement.version} is not newer than {old.version}")
        if (placement.num_layers, placement.num_experts) != (old.num_layers, old.num_experts):
            raise ValueError("a new placement must have the layers and experts of the committed one")
        if placement.num_ranks != self.topology.num_ranks:
            raise ValueError(
                f"placement for {placement.num_ranks} ranks, but the topology has {self.topology.num_ranks}"
            )
        for row, layer in enumerate(tables.layers.tolist()):
            self._choices[layer, :-1].copy_(tables.choices[row])
            self._num_choices[layer, :-1].copy_(tables.num_choices[row])
        self._placement = placement

    def check_integrity(self) -> None:
        """Check the committed placement, and that the device tables still say what it says. For idle time.

        Raises:
            ValueError: they differ.
        """
        self._placement.check_integrity()
        choices, counts = dispatch_tables(self._placement, self.rank, self.topology)
        wanted = np.pad(choices, ((0, 0), (0, 1), (0, 0)), constant_values=EMPTY)
        num_wanted = np.pad(counts, ((0, 0), (0, 1)), constant_values=1)
        same = np.array_equal(self._choices.cpu(), wanted) and np.array_equal(self._num_choices.cpu(), num_wanted)
        if not same:
            raise ValueError(f"dispatch tables differ from placement version {self._placement.version}")
