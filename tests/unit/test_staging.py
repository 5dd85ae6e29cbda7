"""MappedStaging on three ranks, threads of this process, over memory that all can write: what fits is pushed, the rest
takes the group; slots are only read."""

import queue
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.group.view import Member, View
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import plan_transfers
from elastic_moe.transport.staging import ALIGNED, GroupStaging, MappedStaging, Staging, Transfer

RANKS, SLOTS, EXPERTS, WAIT_S = 3, 2, 6, 10.0
VIEW = View(1, tuple(Member(rank, 0, f"i{rank}", 1, "host", "", "") for rank in range(RANKS)))
OLD = np.array([[0, 1, 2, 3, 4, 5]], dtype=np.int32)
NEW = Placement(np.array([[4, 5, 0, 1, 3, 2]]), EXPERTS, SLOTS)
"""Every rank gets both of another rank's."""


def expert(number: int) -> list[torch.Tensor]:
    """Two tensors of different types and odd sizes."""
    return [torch.arange(7.0) + 10 * number, torch.full((3, 2), number, dtype=torch.bfloat16)]


class Group:
    """What staging needs of a group."""

    on_cpu = True

    def __init__(self, rank: int, barrier: threading.Barrier, lanes: dict[Any, Any], sent: list[int]) -> None:
        self.rank, self._barrier, self._lanes, self._sent = rank, barrier, lanes, sent

    def barrier(self) -> None:
        self._barrier.wait()

    def exchange(self, sends: Any, receives: Any) -> None:
        for tensor, peer, tag in sends:
            self._sent.append(peer)
            self._lanes[self.rank, peer, tag].put(tensor.clone())
        for tensor, peer, tag in receives:
            tensor.copy_(self._lanes[peer, self.rank, tag].get(timeout=WAIT_S))


class Peers:
    """PeerStaging over one process's memory."""

    def __init__(self, rank: int, buffers: list[torch.Tensor]) -> None:
        self._buffers = buffers
        self.buffer = buffers[rank]

    def push(self, rank: int, offset: int, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            data = tensor.contiguous().view(-1).view(torch.uint8)
            self._buffers[rank][offset : offset + len(data)].copy_(data)
            offset += len(data)

    def synchronize(self) -> None:
        """Pushes are done when they return."""


def bring(staging_of: Any, in_flight: int = 1, *, overflows: bool = False) -> list[int]:
    """Run the plan on all ranks, twice, and check what came. Returns the ranks that parcels of the group went to."""
    plan = plan_transfers(OLD, NEW, range(RANKS), Topology.uniform(RANKS))
    barrier, sent = threading.Barrier(RANKS, timeout=WAIT_S), []
    lanes: dict[Any, Any] = defaultdict(queue.SimpleQueue)

    def rank_of(rank: int) -> None:
        slots = [expert(int(number)) for number in OLD[0, rank * SLOTS : (rank + 1) * SLOTS]]
        staging: Staging = staging_of(rank)
        pauses = []
        group: Any = Group(rank, barrier, lanes, sent)
        transfer = Transfer(
            plan, VIEW, rank, group, lambda _layer, slot: slots[slot], in_flight, lambda: pauses.append(rank)
        )
        for _ in range(2):
            staged = staging.bring(transfer)
            assert sorted(move.target for move in staged) == [rank * SLOTS, rank * SLOTS + 1]
            for move, tensors in staged.items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, expert(move.expert), strict=True))
            barrier.wait()  # as the vote does
        assert [t.tolist() for one in slots for t in one] == [
            t.tolist() for number in OLD[0, rank * SLOTS : (rank + 1) * SLOTS] for t in expert(int(number))
        ]
        assert bool(pauses) == (in_flight == 1 and not overflows)

    with ThreadPoolExecutor(RANKS) as pool:
        for done in [pool.submit(rank_of, rank) for rank in range(RANKS)]:
            done.result(6 * WAIT_S)
    return sent


def test_all_is_pushed_where_it_fits():
    buffers = [torch.zeros(4 * 2 * ALIGNED, dtype=torch.uint8) for _ in range(RANKS)]
    assert bring(lambda rank: MappedStaging(Peers(rank, buffers))) == []  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_takes_the_group():
    buffers = [torch.zeros(2 * ALIGNED, dtype=torch.uint8) for _ in range(RANKS)]  # one expert of two
    sent = bring(lambda rank: MappedStaging(Peers(rank, buffers)), overflows=True)  # pyright: ignore[reportArgumentType]
    assert sorted(sent) == sorted([0, 1, 2] * 2 * 2)  # one expert a rank, of two tensors, twice


@pytest.mark.parametrize("in_flight", [1, 8])
def test_over_the_group_alone(in_flight):
    assert len(bring(lambda _rank: GroupStaging(), in_flight)) == RANKS * SLOTS * 2 * 2
