"""Recoveries of several ranks in one process: a thread each, a wire for a network, the next views as a test says."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.sources import EXPERTS, LAYERS, NUM_BYTES, Faulty, make_store, tensors_of
from support.wires import WireGroup, Wires

from elastic_moe.control import recovery as recovery_module
from elastic_moe.control.recovery import Recovery
from elastic_moe.control.report import Report
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import NotEnoughMembers, NotEnoughSlots, PeerLost, TransferFailed
from elastic_moe.group.view import Member, View
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology
from elastic_moe.pulse import Pulse
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.store import ExpertStore

HELD = ((0, 1), (2, 3), (0, 2))
"""By rank, in every layer: when rank 1 is lost, expert 3 is, and one of two copies of 0 must make room."""


def member(rank: int, life: int = 0) -> Member:
    return Member(rank, 0, f"{rank}/{life}", 1, "host", "", "")


def view(epoch: int, *members: Member) -> View:
    return View(epoch, members)


@dataclass
class Rank:
    """One member: what it holds, what its disk does, which views it is given (or errors)."""

    rank: int
    held: Sequence[int]
    views: list[View | PeerLost]
    life: int = 0
    disk: Any = None
    newcomer: bool = False
    version: int = 3
    grow_slots: bool = False
    min_members: int = 1
    store: ExpertStore = field(init=False)
    left: list[int] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = make_store(self.held, knows_digests=False)

    def run(self, old: View) -> tuple[Placement, Report]:
        views = iter(self.views)

        def next_view(_view: View, _join: Any, _deadline: float) -> View:
            if isinstance(given := next(views), PeerLost):
                raise given
            return given

        membership: Any = SimpleNamespace(
            next_view=next_view, report=self.reported.extend, entered=lambda view: self.entered.append(view.epoch)
        )
        epoch: Any = SimpleNamespace(
            enter=lambda *_: None,
            leave=lambda view: self.left.append(view.epoch),
            is_left=False,
            others=None,
            request_join=lambda _view: None,
        )
        disk = Reserves(Disk(self.disk or Faulty("")))
        me, topology = member(self.rank, self.life), Topology.uniform(3, 3)
        recovery = Recovery(
            me, membership, epoch, topology, self.store, disk, torch.device("cpu"),
            deadlines=Deadlines(), pulse=Pulse(), slots_per_rank=2, grow_slots=self.grow_slots,
            min_members=self.min_members,
        )  # fmt: skip
        return recovery.run(old, self.version, "a test", newcomer=self.newcomer)

    def has_right_bytes(self) -> bool:
        """Whether every slot holds what it says."""
        return all(
            torch.equal(a, b)
            for layer, slot in np.argwhere(self.store.held != EMPTY).tolist()
            for a, b in zip(
                self.store.tensors(layer, slot), tensors_of(layer, int(self.store.held[layer, slot])), strict=True
            )
        )


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[int, Wires]:
    """The wires of each epoch, made by the first that comes."""
    wires: dict[int, Wires] = {}

    class Groups:
        unreached = ()

        def __init__(self, view: View, rank: int, *_: Any) -> None:
            shared = wires.setdefault(view.epoch, Wires(len(view.members)))
            self.control = self.data = WireGroup(shared, view.group_rank(rank))

        def build(self) -> "Groups":
            return self

    monkeypatch.setattr(recovery_module, "EpochGroups", Groups)
    return wires


def recover(ranks: Sequence[Rank], old: View) -> list[Any]:
    """What `run` returns or raises, by rank."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        running = [pool.submit(rank.run, old) for rank in ranks]
        return [one.exception() or one.result() for one in running]


ALL = view(4, member(0), member(1), member(2))
REST = view(5, member(0), member(2))


def test_what_only_the_lost_rank_held_comes_from_disk(network):
    zero, two = Rank(0, HELD[0], [REST]), Rank(2, HELD[2], [REST], version=7)
    (placement, report), (other, _) = recover([zero, two], ALL)
    assert placement.hash == other.hash
    assert (placement.version, placement.epoch) == (8, 5), "one more than the newest that any member knows"
    for layer in range(LAYERS):
        assert set(placement.of_rank(0)[layer]) | set(placement.of_rank(2)[layer]) == set(range(EXPERTS))
    assert np.array_equal(zero.store.held, placement.of_rank(0))
    assert zero.has_right_bytes()
    assert two.has_right_bytes()
    assert (report.lost, report.joined, report.ranks, report.attempts) == ((1,), (), (0, 2), 1)
    assert report.bytes_by_source == {"disk": LAYERS * NUM_BYTES}
    assert report.bytes_lower_bound == LAYERS * NUM_BYTES
    assert report.rejected == 0
    assert list(report.phase_s) == ["view", "groups", "repair", "commit"]


def test_a_disk_that_fails_is_replaced_by_another(network):
    def broken(*_: Any) -> int:
        raise OSError("no such disk")

    zero, two = Rank(0, HELD[0], [REST], disk=broken), Rank(2, HELD[2], [REST])
    (_, report), _ = recover([zero, two], ALL)
    assert zero.has_right_bytes()
    assert two.has_right_bytes()
    assert sum(report.bytes_by_source.values()) == LAYERS * NUM_BYTES


def test_when_no_disk_has_it_all_hear_so_and_nothing_lies(network):
    def broken(*_: Any) -> int:
        raise OSError("no such disk")

    ranks = [Rank(0, HELD[0], [REST], disk=broken), Rank(2, HELD[2], [REST], disk=broken)]
    assert all(isinstance(raised, TransferFailed) for raised in recover(ranks, ALL))
    assert all(rank.has_right_bytes() for rank in ranks)


def test_a_broken_attempt_begins_again_at_the_view(network):
    zero = Rank(0, HELD[0], [PeerLost("nobody answered"), REST])
    (_, report), _ = recover([zero, Rank(2, HELD[2], [REST])], ALL)
    assert report.attempts == 2
    assert zero.left == [4], "the view that it came from"


def test_what_was_lost_in_two_losses_in_a_row_is_told_as_one(network):
    first, second = view(5, member(0), member(1)), view(6, member(0))
    network[5] = Wires(2)
    network[5].barrier.abort()  # rank 1 dies in the recovery from the loss of rank 2
    zero = Rank(0, HELD[0], [first, second], grow_slots=True)
    ((placement, report),) = recover([zero], ALL)
    assert (report.lost, report.attempts, report.ranks) == ((1, 2), 2, (0,))
    assert zero.left == [5]
    assert placement.slots_per_rank == zero.store.num_slots == EXPERTS
    assert zero.has_right_bytes()


def test_whom_a_build_could_not_reach_is_reported_before_the_next_view_is_asked_for(network, monkeypatch):
    made = recovery_module.EpochGroups

    class Broken(made):  # pyright: ignore[reportGeneralTypeIssues]
        def build(self):
            if self.control.size == 3:
                self.unreached = ("2/0",)
                raise PeerLost("ranks [2] cannot be reached from here")
            return self

    monkeypatch.setattr(recovery_module, "EpochGroups", Broken)
    smaller = view(5, member(0), member(1))
    ranks = [Rank(r, HELD[r], [ALL, smaller]) for r in (0, 1)]
    for placement, report in recover(ranks, ALL):
        assert (report.attempts, report.ranks, placement.epoch) == (2, (0, 1), 5)
    assert [rank.reported for rank in ranks] == [["2/0"]] * 2
    assert [rank.entered for rank in ranks] == [[5]] * 2, "what was reported holds until a view is entered"


def test_too_few_slots_are_told_to_all_if_none_may_be_added(network):
    (raised,) = recover([Rank(0, HELD[0], [view(5, member(0))])], ALL)
    assert isinstance(raised, NotEnoughSlots)


def no_memory(rank: Rank, *, is_known: bool) -> None:
    """More slots than it has are refused: by what is free, or only when they are taken."""
    store: Any = rank.store
    store.room = lambda: store.num_slots if is_known else 99
    for layer in store.layers:
        right = layer.resize

        def resize(num_slots: int, right: Any = right) -> None:
            if num_slots > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            right(num_slots)

        layer.resize = resize


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("poor", [(0,), (0, 2)], ids=["one", "all"])
def test_slots_that_one_has_no_memory_for_are_added_nowhere(network, poor: tuple[int, ...], is_known: bool):
    """Experts 1 and 3 are on nobody who is left; with 5 experts on two ranks it takes 3 slots."""
    ranks = [Rank(r, HELD[r], [REST], grow_slots=True) for r in (0, 2)]
    for rank in ranks:
        rank.store.num_experts = 5
        rank.store.digests = np.pad(rank.store.digests, ((0, 0), (0, 1)), constant_values=-1)
        if rank.rank in poor:
            no_memory(rank, is_known=is_known)
    for raised in recover(ranks, ALL):
        assert isinstance(raised, NotEnoughSlots)
        assert "2 ranks need 3 slots each for 5 experts and have 2; one of them has memory for 2" in str(raised)
    for rank in ranks:
        assert rank.store.num_slots == 2
        assert rank.store.held.tolist() == [list(HELD[rank.rank])] * LAYERS
        assert rank.has_right_bytes()


def test_slots_that_were_added_are_given_back_when_a_rank_has_come_back(network):
    alone, back = view(5, member(0)), view(6, member(0), member(1, life=1))
    zero = Rank(0, HELD[0], [alone], grow_slots=True)
    ((placement, _),) = recover([zero], ALL)
    assert placement.slots_per_rank == EXPERTS
    one = Rank(1, HELD[1], [back], life=1, newcomer=True, grow_slots=True)
    zero.views = [back]
    (placement, report), (other, _) = recover([zero, one], alone)
    assert placement.hash == other.hash
    assert placement.slots_per_rank == zero.store.num_slots == one.store.num_slots == 2
    assert report.bytes_by_source == {}
    assert zero.has_right_bytes()
    assert one.has_right_bytes()


def test_fewer_members_than_wanted_do_not_serve_and_keep_what_they_hold(network):
    ranks = [Rank(r, HELD[r], [REST], min_members=3) for r in (0, 2)]
    for raised in recover(ranks, ALL):
        assert isinstance(raised, NotEnoughMembers)
        assert "ranks [0, 2] are left, elastic.min_members=3" in str(raised)
    assert [rank.store.held.tolist() for rank in ranks] == [[list(HELD[r])] * LAYERS for r in (0, 2)]


def test_a_newcomer_brings_experts_but_has_no_say_in_what_is_right(network):
    """Its copy of expert 2 is spoilt: it is given up and read again, though it is the larger digest or not."""
    back = view(6, member(0), member(1, life=1), member(2))
    for change in (1, -1):
        network.clear()
        zero, two = Rank(0, (0, 1), [back]), Rank(2, (3, 2), [back])
        one = Rank(1, HELD[1], [back], life=1, newcomer=True)
        one.store.tensors(0, 0)[0][1] += change
        (_, report), (_, newcomers), _ = recover([zero, one, two], REST)
        assert (report.joined, report.lost) == ((1,), ())
        assert (report.rejected, newcomers.rejected) == (0, 1), "of each rank its own"
        assert all(rank.has_right_bytes() for rank in (zero, one, two))
        assert two.store.held.tolist() == [[3, 2]] * LAYERS


def test_a_group_of_newcomers_alone_agrees_too(network):
    """All have died and come back: there is nobody who knows better."""
    fresh = view(9, member(0, 1), member(1, 1))
    ranks = [Rank(r, HELD[r], [fresh], life=1, newcomer=True) for r in (0, 1)]
    (placement, report), _ = recover(ranks, ALL)
    assert report.bytes_by_source == {}
    assert placement.of_rank(1).tolist() == [list(HELD[1])] * LAYERS
