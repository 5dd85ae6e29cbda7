"""One round on two ranks, threads of this process: what a wrong digest in staging leads to, and what a failure leaves.

An expert's weights are a formula of layer and expert, so that a misplaced or wrong byte shows.
"""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.wires import WireGroup, Wires

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import Round, load_balancer
from elastic_moe.group.view import Member, View
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology
from elastic_moe.transport.staging import GroupStaging
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.store import ExpertStore

WAIT_S = 10.0
LAYERS, EXPERTS, RANKS, SLOTS = 2, 4, 2, 2
VIEW = View(5, tuple(Member(rank, 0, f"i{rank}", 1, "host", "", "") for rank in range(RANKS)))
LOADS = np.array([[10.0, 10.0, 1.0, 1.0], [30.0, 30.0, 1.0, 1.0]])
"""Both busy experts of each layer are on rank 0."""


def weights(layer: int, expert: int) -> torch.Tensor:
    return torch.arange(6.0) + 100 * layer + 10 * expert


class Layer:
    """What a store needs of SlotExperts."""

    def __init__(self, layer: int, experts: list[int], expert_bytes: int) -> None:
        self.layout = SimpleNamespace(num_experts=EXPERTS, num_bytes=expert_bytes)
        self.slots = torch.stack([weights(layer, expert) for expert in experts])

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        return [self.slots[slot]]


class Rank:
    """One rank, from the placement in order."""

    def __init__(self, rank: int, wires: Wires, *, disk_is_right: bool, expert_bytes: int, **settings: Any) -> None:
        self.rank, self.disk_is_right = rank, disk_is_right
        self.disk_reads: list[tuple[int, int]] = []
        self.committed: list[Placement] = []
        self.pauses = 0
        placement = Placement(np.tile(np.arange(EXPERTS), (LAYERS, 1)), EXPERTS, SLOTS, version=1, epoch=VIEW.epoch)
        self.registry = PlacementRegistry(placement, rank, Topology.uniform(RANKS), torch.device("cpu"))
        held = placement.of_rank(rank)
        layers: Any = [Layer(layer, held[layer].tolist(), expert_bytes) for layer in range(LAYERS)]
        self.store = ExpertStore(layers, held)
        self.store.digests = np.array(
            [[digest([weights(layer, expert)]) for expert in range(EXPERTS)] for layer in range(LAYERS)]
        )
        group: Any = WireGroup(wires, rank)
        config = EplbConfig(mode="async", **settings)
        self.round = Round(
            VIEW, rank, group, self.registry, self.store, Reserves(Disk(self.read)), config, GroupStaging(),
            swap=lambda act: act(), pause=self.pause, committed=self.committed.append,
        )  # fmt: skip

    def pause(self) -> None:
        self.pauses += 1

    def read(self, layer: int, expert: int, out: Any) -> int:
        self.disk_reads.append((layer, expert))
        out[0].copy_(weights(layer, expert) if self.disk_is_right else weights(layer, expert) + 1)
        return 24

    def check(self) -> None:
        """Every slot holds what the committed placement says, byte for byte."""
        placement = self.registry.placement
        assert np.array_equal(self.store.held, placement.of_rank(self.rank))
        for layer, slot in np.ndindex(self.store.held.shape):
            assert torch.equal(self.store.tensors(layer, slot)[0], weights(layer, int(self.store.held[layer, slot])))
        self.registry.check_integrity()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """In the main thread, not in that of a rank."""
    load_balancer()


def run_round(*, spoilt=(), disk_is_right=True, loads=LOADS, expert_bytes=24, layers_per_chunk=LAYERS, **settings):
    """Both ranks, and their reports."""
    wires = Wires(RANKS)
    wires.spoilt = set(spoilt)
    settings |= {"disk_is_right": disk_is_right, "expert_bytes": expert_bytes, "layers_per_chunk": layers_per_chunk}
    ranks = [Rank(rank, wires, **settings) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        rounds = [pool.submit(rank.round.run, 4, loads, (f"op{rank.rank}",), asked=False) for rank in ranks]
        reports = [one.result(6 * WAIT_S) for one in rounds]
    for rank in ranks:
        rank.check()
    return ranks, reports


def test_a_round_moves_the_experts_and_tells_of_it():
    ranks, reports = run_round()
    for rank, report in zip(ranks, reports, strict=True):
        assert (report.epoch, report.number, report.outcome, report.ops) == (5, 4, "moved", (f"op{rank.rank}",))
        assert report.max_mean_after == pytest.approx(1.0)
        assert report.max_mean_before > 1.8
        assert report.version == rank.registry.placement.version == 2
        assert report.bytes_by_source == {"node": 4 * 24}
        assert (report.num_moves, report.bytes_lower_bound) == (4, 4 * 24)
        assert not rank.disk_reads
        assert [placement.version for placement in rank.committed] == [2]
    assert ranks[0].registry.placement.hash == ranks[1].registry.placement.hash
    for layer in range(LAYERS):
        assert [len({0, 1} & set(rank.store.held[layer].tolist())) for rank in ranks] == [1, 1]


def test_chunks_are_committed_one_after_the_other():
    ranks, reports = run_round(layers_per_chunk=1)
    assert [report.num_chunks for report in reports] == [2, 2]
    assert [[placement.version for placement in rank.committed] for rank in ranks] == [[2, 3], [2, 3]]
    assert [report.version for report in reports] == [3, 3]


@pytest.mark.parametrize(
    ("staging_mb", "mb_per_step", "num_chunks", "pauses"),
    [(2, 2.0, 1, 0), (2, 1.0, 1, 1), (1, 2.0, 2, 0), (1, 0.001, 2, 0)],
)
def test_budgets_in_megabytes_are_kept(staging_mb: int, mb_per_step: float, num_chunks: int, pauses: int):
    """Experts of one megabyte, of which each rank gets two: so many wait at once, so many travel during a step."""
    ranks, reports = run_round(expert_bytes=1_000_000, staging_mb=staging_mb, mb_per_step=mb_per_step)
    assert {report.num_chunks for report in reports} == {num_chunks}
    assert {rank.pauses for rank in ranks} == {pauses}
    assert {report.bytes_lower_bound for report in reports} == {4_000_000}


def test_what_came_with_a_wrong_digest_is_read_from_disk():
    ranks, reports = run_round(spoilt=[1])
    assert [report.outcome for report in reports] == ["moved", "moved"]
    assert [report.bytes_by_source for report in reports] == [{"node": 3 * 24, "disk": 24}] * 2
    assert sum(len(rank.disk_reads) for rank in ranks) == 1


def test_when_the_disk_is_wrong_too_both_ranks_keep_what_they_had():
    ranks, reports = run_round(spoilt=[1], disk_is_right=False)
    assert sum(len(rank.disk_reads) for rank in ranks) == 1
    assert [report.outcome for report in reports] == ["failed", "failed"]
    (reader,) = [rank.rank for rank in ranks if rank.disk_reads]
    assert "disk: the bytes have another digest than the group's" in reports[reader].reason
    assert reports[1 - reader].reason == "another rank can have an expert from no source"
    for rank, report in zip(ranks, reports, strict=True):
        assert (rank.registry.placement.version, report.version) == (1, 1)
        assert rank.store.held.tolist() == [[2 * rank.rank, 2 * rank.rank + 1]] * LAYERS
        assert not rank.committed
        assert (report.num_moves, report.bytes_by_source) == (0, {})


def test_a_failure_in_a_later_chunk_leaves_the_placement_between():
    ranks, reports = run_round(spoilt=[2], disk_is_right=False, layers_per_chunk=1)
    assert [(report.outcome, report.version, report.num_chunks) for report in reports] == [("failed", 2, 1)] * 2
    for rank in ranks:
        assert rank.store.held[1].tolist() == [2 * rank.rank, 2 * rank.rank + 1], "the second layer is as before"
        assert [placement.version for placement in rank.committed] == [2]


def test_a_planner_that_fails_changes_nothing(monkeypatch):
    def broken(*_args, **_settings):
        raise ZeroDivisionError("of the planner")

    monkeypatch.setattr("elastic_moe.placement.balance.balance", broken)
    ranks, reports = run_round()
    assert [report.outcome for report in reports] == ["failed", "failed"]
    assert {report.reason for report in reports} == {"the balancer failed: of the planner"}
    assert not any(rank.committed for rank in ranks)


def test_even_loads_move_nothing():
    _, reports = run_round(loads=np.ones((LAYERS, EXPERTS)))
    assert {(report.outcome, report.num_chunks, report.version) for report in reports} == {("kept", 0, 1)}
