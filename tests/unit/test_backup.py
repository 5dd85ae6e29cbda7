"""The backup of experts in host memory: who keeps what, the segment, and the daemon's rounds."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backup import ALL, flip, held, make_segment, memfd, path_of, write
from support.sources import EXPERTS, LAYERS, WANTS, make_store, tensors_of

from elastic_moe.backup import daemon as daemon_module
from elastic_moe.backup import segment as segment_module
from elastic_moe.backup.daemon import Filler, Shelf
from elastic_moe.backup.mooncake import remote_memory
from elastic_moe.backup.remote import MooncakeMemory
from elastic_moe.backup.segment import ALIGN, Segment, Writer
from elastic_moe.backup.shares import keepers, share
from elastic_moe.backup.source import NodeMemory
from elastic_moe.backup.start import BackupStart
from elastic_moe.config import BackupConfig
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Backup, Member, View, backups_of
from elastic_moe.pulse import Pulse
from elastic_moe.weights.digest import digest
from elastic_moe.weights.holders import Holder
from elastic_moe.weights.server import NOTHING, Gift, WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Missed, Origin, Until
from elastic_moe.weights.store import ExpertStore


@pytest.fixture
def file() -> Iterator[int]:
    file = memfd()
    yield file
    os.close(file)


@given(st.integers(1, 6), st.integers(1, 61), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_expert_is_kept_by_as_many_nodes_as_it_shall(layers, experts, num_nodes, copies):
    nodes = list(range(3, 3 + num_nodes))
    shares = [share(node, layers, experts, nodes, copies) for node in nodes]
    kept = Counter(place for one in shares for place in one)
    assert set(kept.values()) == {min(copies, num_nodes)}
    assert len(kept) == layers * experts


def test_a_node_that_goes_moves_its_own_part_only():
    nodes = [0, 1, 2, 3]
    before = {node: share(node, 10, 100, nodes, 2) for node in nodes}
    assert all(400 < len(one) < 600 for one in before.values())
    for node in nodes[:3]:
        after = share(node, 10, 100, nodes[:3], 2)
        assert before[node] <= after
        assert after - before[node] <= before[3]
    assert keepers(0, 0, nodes, 2) == keepers(0, 0, reversed(nodes), 2)


def test_what_is_written_is_found_by_another_mapping(file):
    writer = make_segment(file, ALL[:3])
    other = Segment(os.open(path_of(file), os.O_RDWR))
    assert held(other) == ALL[:3]
    layer, expert = ALL[2]
    record = other.find(layer, expert)
    assert record is not None
    data = other.bytes_of(record)
    for part, tensor in zip(other.parts(layer), tensors_of(layer, expert), strict=True):
        found = torch.frombuffer(bytearray(data[part.begin : part.begin + part.size]), dtype=tensor.dtype)
        assert part.begin % ALIGN == 0
        assert torch.equal(found.view(tensor.shape), tensor)
    assert other.find(*ALL[3]) is other.find(99, 0) is other.find(0, -1) is None
    write(writer, *ALL[3], commit=False)
    assert other.find(*ALL[3]) is None, "it is being written"
    writer.commit(*ALL[3], digest=7)
    found = other.find(*ALL[3])
    assert found is not None
    assert found.digest == 7
    writer.drop(*ALL[0])
    assert held(other) == ALL[1:4]


def test_it_grows_by_arenas_and_uses_again_what_was_dropped(file, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segment_module, "ARENA_BYTES", 1)
    writer = make_segment(file, ())
    other = Segment(file)
    per_arena = writer.shape.arena_bytes // 128
    assert per_arena > 8, "several lie in one"
    sizes = [1000] * 10 + [4000] * 3
    for number, size in enumerate(sizes[:8]):
        writer.begin(*ALL[number], size)[:] = bytes([number]) * size
        writer.commit(*ALL[number], number)
    assert writer.num_arenas > 1
    for number, size in enumerate(sizes[:8]):
        record = other.find(*ALL[number])
        assert record is not None
        assert bytes(other.bytes_of(record)) == bytes([number]) * size
    before = writer.num_arenas
    for _ in range(20):
        writer.drop(*ALL[3])
        writer.begin(*ALL[3], 1000)
        writer.commit(*ALL[3], 0)
    assert writer.num_arenas == before


def test_what_a_dead_daemon_was_writing_is_not_there_and_its_place_is_free(file):
    writer = make_segment(file, ALL[:2])
    write(writer, *ALL[2], commit=False)
    again = Writer(file)
    assert held(again) == ALL[:2]
    write(again, *ALL[3])
    assert again._records[ALL[3]]["offset"] == writer._records[ALL[2]]["offset"]
    with pytest.raises(ValueError, match="no backup"):
        Segment(memfd())


class Engines:
    """Two members with all experts between them, and a daemon's filler."""

    def __init__(self, file: int, **config: Any) -> None:
        self.stores = [make_store([0, 1]), make_store([2, 3])]
        self.servers = [WeightServer("127.0.0.1") for _ in self.stores]
        for server, store in zip(self.servers, self.stores, strict=True):
            server.start(EngineShelf(store, form="form"))
        members = [
            Member(rank, rank, "x", 1, "h", "", "", weights=server.address) for rank, server in enumerate(self.servers)
        ]
        self.view = View(1, tuple(members))
        self.start = BackupStart(BackupConfig(**{"copies": 2, "gb_per_s": 100.0} | config), Backup(0, "", ""))
        self.shelf = Shelf()
        self.filler = Filler(self.start, file, self.shelf)

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture
def engines(file: int) -> Iterator[Engines]:
    engines = Engines(file)
    yield engines
    engines.close()


def test_a_round_reads_the_share_and_the_next_one_what_has_changed(engines: Engines):
    engines.filler.fill(engines.view)
    segment = engines.shelf.segment
    assert segment is not None
    assert held(segment) == ALL
    assert {(layer, e): d for layer, e, d in segment.held()} == {p: digest(tensors_of(*p)) for p in ALL}
    generations = segment._records["generation"].copy()
    engines.filler.fill(engines.view)
    assert (segment._records["generation"] == generations).all(), "nothing is read twice"
    store = engines.stores[1]
    store.tensors(0, 1)[0][2] += 1  # expert 3 of layer 0 is trained
    store.digests[0, 3] = digest(store.tensors(0, 1))
    engines.filler.fill(engines.view)
    record = segment.find(0, 3)
    assert record is not None
    assert record.digest == store.digests[0, 3]
    assert (segment._records["generation"] != generations).sum() == 1


def test_what_another_node_keeps_is_dropped_and_what_it_kept_is_read(engines: Engines):
    engines.filler._config = replace(engines.filler._config, copies=1)
    alone = View(2, engines.view.members[:1])
    engines.filler.fill(engines.view)
    segment = engines.shelf.segment
    assert segment is not None
    mine = sorted(share(0, LAYERS, EXPERTS, [0, 1], 1))
    assert 0 < len(mine) < len(ALL)
    assert held(segment) == mine
    engines.filler.fill(alone)
    assert set(held(segment)) == {p for p in ALL if p in mine or p[1] in (0, 1)}, "the other member is lost"
    engines.filler.fill(engines.view)
    assert held(segment) == mine


def test_wrong_bytes_are_not_kept(engines: Engines, caplog: pytest.LogCaptureFixture):
    engines.stores[0].tensors(1, 0)[0][1] += 1  # its memory goes bad
    engines.filler.fill(engines.view)
    assert engines.shelf.segment is not None
    assert held(engines.shelf.segment) == [place for place in ALL if place != (1, 0)]
    assert "layer 1 expert 0" in caplog.text


def test_a_share_too_large_is_refused_in_one_line_before_memory_is_taken(file: int, caplog: pytest.LogCaptureFixture):
    engines = Engines(file, memory_limit_gb=1e-7)
    for _ in range(3):
        engines.filler.fill(engines.view)
    assert os.fstat(file).st_size == 0
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "backup: backup.memory_limit_gb=1e-07: 8 experts of node 0's share take 0.00 GB, and there is room for "
        "0.00 GB: nothing is backed up here; give more, or fewer backup.copies"
    ]
    assert engines.shelf.holding().experts == []
    engines.close()


def test_a_new_daemon_finds_what_was_kept_and_verifies_it(engines: Engines, file: int):
    engines.filler.fill(engines.view)
    flip(Writer(file), 1, 2)
    shelf = Shelf()
    Filler(engines.start, file, shelf)._find_again()
    assert shelf.segment is not None
    assert held(shelf.segment) == [place for place in ALL if place != (1, 2)]
    Filler(engines.start, memfd(), Shelf())._find_again()


def test_a_change_of_the_group_ends_a_round(engines: Engines):
    """So that nobody who has died is asked on."""
    engines.filler._config = replace(engines.filler._config, gb_per_s=1e-9)
    engines.filler.set_view(engines.view)
    begin = time.monotonic()
    engines.filler.fill(engines.view)
    assert time.monotonic() - begin < 5
    assert engines.shelf.segment is not None
    assert len(held(engines.shelf.segment)) == 1


def test_a_member_that_is_silent_costs_a_wait_and_no_more(engines: Engines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(daemon_module, "ANSWER_S", 0.3)
    monkeypatch.setattr(daemon_module, "GREETING_S", 0.1)
    engines.servers[0].close()
    time.sleep(0.6)  # its thread looks twice a second
    engines.filler.fill(engines.view)
    assert engines.shelf.segment is not None
    assert {expert for _, expert in held(engines.shelf.segment)} == {2, 3}


def test_the_shelf_gives_what_the_segment_has(file: int):
    shelf = Shelf()
    assert shelf.holding().experts == []
    assert shelf.expert(0, 0) == NOTHING
    shelf.segment = make_segment(file, ALL[:2])
    gift = shelf.expert(*ALL[1])
    assert gift.header.digest == digest(tensors_of(*ALL[1]))
    assert b"".join(gift.frames) == b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors_of(*ALL[1]))
    assert shelf.expert(*ALL[2]) == shelf.expert(9, 9) == shelf.dense("x") == NOTHING
    assert isinstance(gift, Gift)


def test_memory_that_cannot_be_opened_or_has_another_form_is_missed(file: int):
    store: ExpertStore = make_store()

    def told(find: Any, form: str = "form") -> list[Any]:
        return [one for some in NodeMemory(find, form).fetch(WANTS[:1], store, Until()) for one in some]

    assert told(lambda: "") == []
    (missed,) = told(lambda: "/proc/1/fd/no")
    assert isinstance(missed, Missed)
    assert "cannot be opened" in missed.why
    (missed,) = told(lambda: path_of(file))  # empty yet
    assert "this is no backup" in missed.why
    make_segment(file)
    (missed,) = told(lambda: path_of(file), form="another")
    assert "another form" in missed.why


def test_backups_outlive_the_members_that_announce_them():
    here, there, moved = Backup(0, "a", "x"), Backup(1, "b", "y"), Backup(0, "c", "z")
    members = [SimpleNamespace(backup=here), SimpleNamespace(backup=None), SimpleNamespace(backup=there)]
    known = backups_of(members)  # type: ignore[arg-type]
    assert known == (here, there)
    assert backups_of([members[1]], known) == known  # type: ignore[arg-type]
    assert backups_of([SimpleNamespace(backup=moved)], known) == (moved, there)  # type: ignore[arg-type]


def test_a_session_of_mooncake_that_fails_is_left_at_once():
    class Remote:
        session, reads = "x", 0

        def register(self, address: int, size: int) -> None:
            pass

        def read(self, session: str, reads: Any, within_s: float) -> bool:
            self.reads += 1
            return False

    store, remote, server, shelf = make_store(), Remote(), WeightServer("127.0.0.1"), Shelf(Remote())  # type: ignore[arg-type]
    shelf.segment = make_segment(memfd())
    server.start(shelf)
    find = lambda: [Holder(server.address, Origin.REMOTE_DRAM)]  # noqa: E731
    source = MooncakeMemory(find, lambda: remote, Deadlines(), "form", Pulse())  # type: ignore[arg-type,return-value]
    wants = WANTS * 5
    told = [one for some in source.fetch(wants, store, Until()) for one in some]
    assert len(told) == len(wants)
    assert all(isinstance(one, Missed) and "cannot be read" in one.why for one in told)
    assert remote.reads == 1
    server.close()
    assert list(MooncakeMemory(find, lambda: None, Deadlines(), "form", Pulse()).fetch(wants, store, Until())) == []


def test_without_the_library_it_is_said_once_and_zmq_serves(caplog: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    assert remote_memory(BackupConfig(transport="zmq"), "127.0.0.1") is None
    assert not caplog.records
    assert remote_memory(BackupConfig(transport="mooncake"), "127.0.0.1") is None
    assert "Backups go from node to node over ZMQ" in caplog.text
    assert "apt-get install libibverbs1 librdmacm1 libnuma1" in caplog.text
