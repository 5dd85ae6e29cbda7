"""What every source of weights has to do, as one table: each case runs for each source. And the chain over them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.backup import ALL, flip, make_segment, memfd, path_of
from support.sources import (
    EXPERTS,
    LAYERS,
    NUM_BYTES,
    SLOTS,
    WANTS,
    Fallback,
    Faulty,
    Ran,
    make_store,
    run,
    tensors_of,
    write,
)
from support.wires import WireGroup, Wires

from elastic_moe.backup.daemon import Shelf as BackupShelf
from elastic_moe.backup.mooncake import RemoteMemory
from elastic_moe.backup.remote import MooncakeMemory
from elastic_moe.backup.segment import Segment, Writer
from elastic_moe.backup.source import NodeMemory
from elastic_moe.control.vote import Vote
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import DigestMismatch, PeerLost, TransferFailed
from elastic_moe.group.view import Member, View
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import plan_transfers
from elastic_moe.pulse import Pulse
from elastic_moe.transport.staging import GroupStaging, Transfer
from elastic_moe.weights import disk as disk_module
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk, OtherDisks
from elastic_moe.weights.holders import Holder, Holders
from elastic_moe.weights.memory import InMemory
from elastic_moe.weights.reserves import FoundHolders
from elastic_moe.weights.server import NOTHING, Gift, WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Account, Came, Missed, Origin, Until, Want, fill
from elastic_moe.weights.staged import Replicas, Staged


def from_memory(fault: str, until: Until | None) -> Ran:
    by_layer = [[tensors_of(layer, expert) for expert in range(EXPERTS)] for layer in range(LAYERS)]
    whole = [[torch.stack(parts) for parts in zip(*experts, strict=True)] for experts in by_layer]
    if fault == "corrupt":
        whole[0][0][3, 2] += 1
    return run([InMemory(whole)], store := make_store(), store, until)


def from_disk(fault: str, until: Until | None) -> Ran:
    return run([Disk(Faulty(fault))], store := make_store(), store, until)


def from_disk_at_once(fault: str, until: Until | None) -> Ran:
    return run([Disk(Faulty(fault), 3)], store := make_store(), store, until)


def from_holders(fault: str, until: Until | None) -> Ran:
    """Of one member, and of an address where nobody answers."""
    server, held = WeightServer("127.0.0.1"), make_store([2, 3])

    class Shelf(EngineShelf):
        asked = 0

        def expert(self, layer: int, expert: int) -> Gift:
            self.asked += 1
            second = (layer, expert) == WANTS[1][:2]
            if fault == "some" and second:
                return NOTHING
            if fault == "dies" and self.asked > 1:
                time.sleep(2)
            gift = super().expert(layer, expert)
            if fault == "corrupt" and second:
                first = bytes([gift.frames[0][0] ^ 1, *gift.frames[0][1:]])
                return gift._replace(frames=[memoryview(first), *gift.frames[1:]])
            if fault == "wrong size" and second:
                return gift._replace(frames=[gift.frames[0][:16], gift.frames[1]])
            return gift

    starter = threading.Timer(0.1 if fault == "late" else 0.0, server.start, [Shelf(held)])
    starter.start()
    addresses = [Holder(server.address, Origin.NODE), Holder("tcp://127.0.0.1:9", Origin.NODE)]
    holders = Holders(addresses, replace(Deadlines(), weights_s=0.3))
    try:
        return run([holders], store := make_store(), store, until)
    finally:
        starter.join()
        holders.close()
        server.close()


def _backup(fault: str, file: int) -> Writer:
    """In the memory of this process or another."""
    writer = make_segment(file, [p for p in ALL if fault != "some" or p != WANTS[1][:2]])
    if fault == "corrupt":
        flip(writer, *WANTS[1][:2])
    return writer


def from_own_backup(fault: str, until: Until | None) -> Ran:
    file = memfd()
    _backup(fault, file)
    return run([NodeMemory(lambda: path_of(file), "form")], store := make_store(), store, until)


@contextlib.contextmanager
def _daemon(fault: str, remote: RemoteMemory | None) -> Iterator[list[Holder]]:
    """That of another node."""
    shelf, server = BackupShelf(remote), WeightServer("127.0.0.1")
    file = memfd()
    _backup(fault, file)
    shelf.segment = Segment(file)
    if remote:
        shelf.segment.on_arena = remote.register
        shelf.segment.map_all()
    starter = threading.Timer(0.1 if fault == "late" else 0.0, server.start, [shelf])
    starter.start()
    yield [Holder(server.address, Origin.REMOTE_DRAM)]
    starter.join()
    server.close()


def from_another_backup(fault: str, until: Until | None) -> Ran:
    with _daemon(fault, None) as daemons:
        found = FoundHolders(Origin.REMOTE_DRAM, lambda: daemons, Deadlines(), "form", Pulse(), greet_s=0.5)
        return run([found], store := make_store(), store, until)


def from_another_backup_by_mooncake(fault: str, until: Until | None) -> Ran:
    with _daemon(fault, RemoteMemory("127.0.0.1", "tcp", "")) as daemons:
        mine = RemoteMemory("127.0.0.1", "tcp", "")
        found = MooncakeMemory(lambda: daemons, lambda: mine, Deadlines(), "form", Pulse())
        return run([found], store := make_store(), store, until)


def together(
    fault: str, others: Callable[[Any], object], last: Callable[[Any], Any], parcel: int, size: int = 2
) -> Any:
    """All ranks of a group, each in a thread; the fault comes upon the parcel `parcel`, the second expert's first.

    Returns what the last one does.
    """
    wires = Wires(size)
    wires.spoilt = {parcel} if fault == "corrupt" else set()
    wires.counted = 0
    wires.dies_at = parcel if fault == "dies" else None

    def late(rank: int) -> object:
        time.sleep(0.1 if fault == "late" else 0.0)
        return others(WireGroup(wires, rank))

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(late, rank) for rank in range(size - 1)]
        try:
            return pool.submit(last, WireGroup(wires, size - 1)).result()
        finally:
            for other in running:
                other.exception()


def from_other_disks(fault: str, until: Until | None) -> Ran:
    def other(group: Any) -> None:
        store = make_store()
        groups: Any = SimpleNamespace(control=group, data=group)
        sources = [OtherDisks(Disk(Faulty(fault if fault in ("some", "wrong size") else "")), store, groups)]
        fill([], store, sources, Account(), any_lacks=Vote(group, Account()))

    def this(group: Any) -> Ran:
        def broken(*_: Any) -> int:
            raise OSError("no such disk")

        disk, store = Disk(broken), make_store()
        groups: Any = SimpleNamespace(control=group, data=group)
        return run([OtherDisks(disk, store, groups)], store, store, until, any_lacks=Vote(group, Account()))

    return together(fault, other, this, parcel=2)


@pytest.mark.parametrize(("experts_at_once", "exchanges"), [(1, 4), (2, 2), (64, 1)])
def test_what_is_read_for_others_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch, experts_at_once, exchanges):
    """One expert at least, however large."""
    monkeypatch.setattr(disk_module, "BYTES_IN_FLIGHT", NUM_BYTES * experts_at_once - (experts_at_once == 1))
    num_exchanges = []
    right = WireGroup.exchange

    def counted(self: WireGroup, sends: Any, receives: Any) -> None:
        num_exchanges.append(self.rank)
        right(self, sends, receives)

    monkeypatch.setattr(WireGroup, "exchange", counted)
    assert from_other_disks("", None).account.num_bytes == {Origin.OTHER_DISK: len(WANTS) * NUM_BYTES}
    assert num_exchanges.count(1) == exchanges


def from_replicas(fault: str, until: Until | None) -> Ran:
    """Rank 0 holds what rank 1 is to hold."""
    plan = plan_transfers(
        np.tile(np.array([2, 3, 0, 1], dtype=np.int32), (LAYERS, 1)),
        Placement(np.tile(np.array([0, 1, 2, 3]), (LAYERS, 1)), EXPERTS, SLOTS),
        [0, 1],
        Topology.uniform(2),
    )
    view = View(1, (Member(0, 0, "a", 1, "host", "", ""), Member(1, 0, "b", 1, "host", "", "")))

    def of(rank: int, held: list[int]) -> Callable[[Any], Ran]:
        def act(group: Any) -> Ran:
            store = make_store(held)
            staged = Staged(store)
            transfer = Transfer(plan, view, rank, group, store.tensors, in_flight=4, between=lambda: None)
            sources = [Replicas(GroupStaging(), transfer, staged)]
            if rank == 0:
                mine = [Want(layer, expert, expert) for layer in range(LAYERS) for expert in range(SLOTS)]
                fill(mine, staged, sources, Account())
            return run(sources, staged, store, until) if rank else Ran(store, Account(), Fallback(), 0.0)

        return act

    return together(fault, lambda group: of(0, [2, 3])(group), of(1, [0, 1]), parcel=2)  # type: ignore[arg-type,return-value]


SOURCES: dict[str, tuple[Callable[[str, Until | None], Ran], Origin, set[str]]] = {
    "memory": (from_memory, Origin.MEMORY, {"some", "dies", "wrong size", "late", "deadline"}),
    "disk": (from_disk, Origin.DISK, set()),
    "disk, three at once": (from_disk_at_once, Origin.DISK, {"dies"}),
    "other disks": (from_other_disks, Origin.OTHER_DISK, {"deadline"}),
    "holders": (from_holders, Origin.NODE, set()),
    "own backup": (from_own_backup, Origin.DRAM, {"wrong size", "late", "dies"}),
    "another backup": (from_another_backup, Origin.REMOTE_DRAM, {"wrong size", "dies"}),
    "another backup by mooncake": (from_another_backup_by_mooncake, Origin.REMOTE_DRAM, {"wrong size", "dies"}),
    "replicas": (from_replicas, Origin.NODE, {"some", "wrong size", "deadline"}),
}
"""How to run each; where its bytes have been; what cannot befall it: a plan names what is held, one layout holds for a
group, and what all ranks do together has the group's deadline; of three at once any is the first. A backup has one
form, and is there or not: see `test_backup.py`."""

READ_AGAIN = ("holders", "another backup")
"""Bytes of others that change while they are read may be right the next time."""
FAULTS = ["", "some", "corrupt", "wrong size", "late", "dies", "deadline"]
CASES = [(name, fault) for name, (_, _, never) in SOURCES.items() for fault in FAULTS if fault not in never]


@pytest.mark.parametrize(("name", "fault"), CASES, ids=[f"{name}: {fault or 'all come'}" for name, fault in CASES])
def test_source(name: str, fault: str):
    act, origin, _ = SOURCES[name]
    if name.endswith("mooncake"):
        pytest.importorskip("mooncake.engine", exc_type=ImportError, reason="elastic_moe[mooncake] is not installed")
    if fault == "dies" and name in ("other disks", "replicas"):
        with pytest.raises(PeerLost):
            act(fault, None)
        return
    if fault == "deadline":
        with pytest.raises(TransferFailed, match=r"no source has it right: none was asked, or in time \(and"):
            act("", Until(time.monotonic()))
        return
    ran = act(fault, None)
    for layer, expert, slot in WANTS:
        assert ran.store.held[layer, slot] == expert
        for found, right in zip(ran.store.tensors(layer, slot), tensors_of(layer, expert), strict=True):
            assert torch.equal(found, right)
    lacking = {"": [], "late": [], "dies": WANTS[1:]}.get(fault, [WANTS[1]])
    assert ran.fallback.asked_for == lacking
    assert ran.account.rejected == int(fault == "corrupt") * (2 if name in READ_AGAIN else 1)
    assert sum(ran.account.num_bytes.values()) == len(WANTS) * NUM_BYTES
    if origin is not Origin.OTHER_DISK:
        assert ran.account.num_bytes[origin] == (len(WANTS) - len(lacking)) * NUM_BYTES
    assert ran.seconds < 3


def test_sources_are_asked_nearest_first_and_only_for_what_lacks():
    asked: list[str] = []

    class Told(Disk):
        def __init__(self, origin: Origin, gives: int) -> None:
            super().__init__(write)
            self.nearest, self.gives = origin, gives

        def fetch(self, wants, landing, until):
            asked.append(f"{self.nearest} {len(wants)}")
            for want in wants[: self.gives]:
                self.read(want.layer, want.expert, landing.open(want))
                yield [Came(want, self.nearest)]

    account = Account()
    sources = [Told(Origin.DISK, 1), Told(Origin.OTHER_DISK, 9), Told(Origin.MEMORY, 0), Told(Origin.REMOTE, 3)]
    fill(WANTS, make_store(), sources, account)
    assert asked == ["memory 4", "remote 4", "disk 1"]
    assert account.num_bytes == {Origin.REMOTE: 3 * NUM_BYTES, Origin.DISK: NUM_BYTES}
    assert str(account) == "0.0 MB from remote, 0.0 MB from disk"


def test_when_no_source_has_it_the_error_names_the_expert_and_each_reason():
    def refuse(*_: Any) -> int:
        raise OSError("no such file")

    store = make_store()
    with pytest.raises(TransferFailed) as raised:
        fill(WANTS[:1], store, [Disk(refuse)], Account())
    assert str(raised.value) == "layer 0 expert 2: no source has it right: disk: no such file"
    assert not isinstance(raised.value, DigestMismatch)
    with pytest.raises(DigestMismatch, match=r"expert 3: .*: disk: the bytes have another digest than the group's"):
        fill(WANTS[1:2], store, [Disk(Faulty("corrupt"))], Account())
    with pytest.raises(TransferFailed, match="none was asked, or in time"):
        fill(WANTS, store, [], Account())
    assert (store.held == EMPTY).all(), "a slot that was overwritten in vain holds nothing"


def test_bytes_that_nobody_knows_become_the_truth_unless_their_source_says_otherwise():
    store = make_store(knows_digests=False)
    fill(WANTS[:1], store, [Disk(write)], Account())
    assert store.digests[0, 2] == digest(tensors_of(0, 2))
    came = Came(WANTS[1], Origin.NODE, digest(tensors_of(0, 3)))
    assert store.accept([came]) == [False], "these bytes are others than their source says"
    assert store.held[0, 1] == EMPTY


def test_a_cancelled_fill_ends_between_two_experts():
    reads = Faulty("")
    with pytest.raises(PeerLost, match="the epoch was left"):
        fill(WANTS, make_store(), [Disk(reads)], Account(), until=Until(is_cancelled=lambda: reads.reads == 2))
    assert reads.reads == 2


def test_the_other_ranks_are_asked_only_when_one_of_them_must():
    asked: list[bool] = []

    def nobody(lacking: bool) -> bool:
        asked.append(lacking)
        return False

    store = make_store()
    groups: Any = SimpleNamespace()  # a call of it would raise
    fill(WANTS, store, [Disk(write), OtherDisks(Disk(write), store, groups)], Account(), any_lacks=nobody)
    assert asked == [False]
    with pytest.raises(TransferFailed, match="another rank"):
        fill([], store, [], Account(), any_lacks=lambda lacking: True)


def test_what_a_source_tells_of_twice_counts_once():
    class Stubborn(Disk):
        """Comes wrong first, then right."""

        def fetch(self, wants, landing, until):
            for want in wants:
                for tensor in landing.open(want):
                    tensor.zero_()
                yield [Came(want, Origin.DISK)]
                self.read(*want[:2], landing.open(want))
                yield [Came(want, Origin.DISK)]

    store, account = make_store(), Account()
    fill(WANTS, store, [Stubborn(write)], account)
    assert (account.rejected, account.num_bytes[Origin.DISK]) == (4, 4 * NUM_BYTES)
    assert not list(store.wants(np.array([[2, 3], [2, 3]])))
    ((told,),) = Holders([], Deadlines()).fetch(WANTS[:1], store, Until())
    assert isinstance(told, Missed)
