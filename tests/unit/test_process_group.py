"""A call is believed only when it ended in a live group: backends that finish an aborted one with noise."""

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.group.backends import Backend, make_gloo
from elastic_moe.group.epoch_store import EpochStore, StoreServer
from elastic_moe.group.process_group import SPREAD_BYTES, SPREAD_RANKS, Group
from elastic_moe.group.view import Member, View

NOISE = -989470700326967182
"""What NCCL left in a buffer of counts on two H100."""
TIMEOUT_S = 0.3


class _Call:
    """It ends when the group is aborted, and nothing about it says that it did not end well."""

    def __init__(self, group: "_Noisy") -> None:
        self._group = group

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._group.queues and not self._group.over.wait(timeout.total_seconds() if timeout else 5.0):
            raise RuntimeError("it takes longer than this turn")
        return True

    def is_completed(self) -> bool:
        return self._group.over.is_set()


class _Noisy:
    """A process group of two; with `queues` its calls return before they have run, as on a GPU."""

    def __init__(self, *, queues: bool) -> None:
        self.queues = queues
        self.over = threading.Event()
        self.buffers: list[torch.Tensor] = []

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def begin(self, *buffers: torch.Tensor) -> _Call:
        self.buffers += buffers
        return _Call(self)

    def alltoall_base(self, out: torch.Tensor, _rows: Any, _out: Any, _in: Any) -> _Call:
        return self.begin(out)

    def allreduce(self, tensors: list[torch.Tensor], _options: Any) -> _Call:
        return self.begin(*tensors)

    def send(self, _tensors: Any, _peer: int, _tag: int) -> _Call:
        return self.begin()

    def recv(self, tensors: list[torch.Tensor], _peer: int, _tag: int) -> _Call:
        return self.begin(*tensors)

    def end(self) -> None:
        for buffer in self.buffers:
            buffer.fill_(NOISE)
        self.over.set()


def _group(*, queues: bool) -> tuple[Group, _Noisy]:
    backend: Any = _Noisy(queues=queues)
    made = Backend(backend, lambda noisy: noisy.end(), (lambda: backend.over.is_set) if queues else None)
    store: Any = None
    return Group(made, store, "data", 3, TIMEOUT_S), backend


def _soon(act: Any) -> None:
    threading.Timer(0.05, act).start()


CALLS = {
    "all_to_all": lambda group: group.all_to_all(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
    "all_reduce": lambda group: group.all_reduce_max_array(np.ones(3)),
    "exchange": lambda group: group.exchange([(torch.ones(1), 1, 0)], [(torch.zeros(1), 1, 0)]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_that_an_abort_finished_has_brought_nothing(call):
    group, _ = _group(queues=False)
    _soon(group.abort)
    with pytest.raises(PeerLost, match="has left the group"):
        call(group)


def test_a_queued_call_returns_and_is_believed_only_when_it_has_run_in_a_live_group():
    group, backend = _group(queues=True)
    group.all_to_all(torch.zeros(2), torch.ones(2))
    _soon(backend.over.set)
    group.confirm()
    group.all_to_all(torch.zeros(2), torch.ones(2))
    group.abort()
    with pytest.raises(PeerLost, match="has left the group"):
        group.confirm()


def test_messages_of_a_queue_are_waited_for():
    group, _ = _group(queues=True)
    posted = group.post([], [(torch.zeros(1), 1, 0)])
    _soon(group.abort)
    with pytest.raises(PeerLost, match="has left the group"):
        posted.wait()


def test_a_queued_call_has_a_deadline_too():
    group, _ = _group(queues=True)
    group.all_to_all(torch.zeros(2), torch.ones(2))
    begin = time.monotonic()
    with pytest.raises(PeerLost, match=r"does not end"):
        group.confirm()
    assert TIMEOUT_S <= time.monotonic() - begin < 10 * TIMEOUT_S
    assert not group.waiting


def test_an_exchange_takes_no_counts_from_an_aborted_group():
    group, _ = _group(queues=True)
    _soon(group.abort)
    exchange = CollectiveExchange(group, (0, 1), 2)
    with pytest.raises(PeerLost):
        exchange.dispatch(torch.ones(3, 4), torch.tensor([[0], [1], [2]]))


def test_what_an_exchange_returned_counts_when_it_is_checked():
    group, backend = _group(queues=True)
    exchange = CollectiveExchange(group, (0, 1), 2)
    backend.over.set()
    exchange.check()
    backend.over.clear()
    group.abort()
    with pytest.raises(PeerLost):
        exchange.check()


@contextlib.contextmanager
def _gloo_groups(size: int) -> Iterator[list[Group]]:
    """As many ranks, in threads of this process."""
    server = StoreServer("127.0.0.1")
    view = View(1, tuple(Member(rank, 0, f"i{rank}", 1, "127.0.0.1", "", "") for rank in range(size)))

    def build(rank: int) -> Group:
        store = EpochStore(server.address, 10)
        return Group(
            make_gloo(dist.PrefixStore("x", store), view, rank, timedelta(seconds=10)), store, "control", 1, 10
        )

    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(build, range(size)))
    yield groups
    for group in groups:
        group.abort()


@pytest.mark.parametrize("size", [SPREAD_RANKS, SPREAD_RANKS + 1, 13])
def test_a_maximum_of_many_ranks_takes_a_logarithm_of_hops_and_is_the_same_everywhere(size, monkeypatch):
    messages: list[int] = []
    post = Group.post
    monkeypatch.setattr(Group, "post", lambda group, *parcels: (messages.append(group.rank), post(group, *parcels))[1])
    values = np.random.default_rng(0).integers(-(2**62), 2**62, (3, size, 4))
    with _gloo_groups(size) as groups, ThreadPoolExecutor(size) as pool:
        for round_ in values:
            found = list(pool.map(lambda group, row: group.all_reduce_max(row.tolist()), groups, round_))
            assert found == [round_.max(0).tolist()] * size
        assert Counter(messages) == dict.fromkeys(range(size), 3 * math.ceil(math.log2(size)))
        large = np.arange(SPREAD_BYTES) + np.arange(size)[:, None]
        found = list(pool.map(lambda group, row: group.all_reduce_max_array(row), groups, large))
        assert all(np.array_equal(one, large.max(0)) for one in found)
        assert len(messages) == 3 * size * math.ceil(math.log2(size)), "many bytes go round the ring"


def test_who_waits_for_many_ranks_is_freed_by_an_abort():
    with _gloo_groups(SPREAD_RANKS) as groups, ThreadPoolExecutor(SPREAD_RANKS) as pool:
        waiting = [pool.submit(group.all_reduce_max, [1]) for group in groups[1:]]
        for group in groups:
            _soon(group.abort)
        begin = time.monotonic()
        for ended in waiting:
            with pytest.raises(PeerLost):
                ended.result(5)
        assert time.monotonic() - begin < 2
