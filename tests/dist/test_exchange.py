"""CollectiveExchange on 1 to 4 gloo ranks: the table of cases, its gradients, silent and dead peers."""

import contextlib
import os
import signal
import threading
import time

import pytest
import msgspec
import torch
from support.exchange_cases import SETUPS, Setup, check_gradients, conform, expected_scale_gradients
from support.ranks import run_ranks

from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.rendezvous import Seat, meet

HIDDEN = 5


def build(launch, timeout_s=20.0, ranks=()):
    """`ranks` are the seats, where they are others than 0, 1, ..."""
    seat = Seat(SeatStart(launch))
    view = meet(launch, seat, 30)
    if ranks:
        members = zip(view.members, ranks, strict=True)
        view = View(view.epoch, tuple(msgspec.structs.replace(member, rank=rank) for member, rank in members))
    deadlines = Deadlines.of(launch.world_size, exchange_s=timeout_s)
    groups = EpochGroups(view, view.ranks[launch.rank], torch.device("cpu"), deadlines).build()
    return seat, view, groups


@contextlib.contextmanager
def open_collective(launch, setup):
    _seat, view, groups = build(launch, ranks=setup.ranks)
    yield CollectiveExchange(groups.data, view.ranks, setup.slots_per_rank), torch.device("cpu")
    groups.control.barrier()


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_collective(setup):
    assert all(run_ranks(conform, len(setup.ranks), open_collective, setup))


def gradients(launch, setup):
    with open_collective(launch, setup) as (exchange, _):
        return check_gradients(exchange, setup, setup.ranks[launch.rank])


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.dtype == torch.float32], ids=str)
def test_gradients_equal_those_of_one_process(setup):
    of_ranks = run_ranks(gradients, len(setup.ranks), setup)
    for parts, wanted in zip(zip(*of_ranks, strict=True), expected_scale_gradients(setup), strict=True):
        assert torch.equal(torch.stack(parts).sum(0), wanted)


def refuse_strays(launch):
    """Of seats 0 and 2 with 2 slots each; both ranks are wrong, so nobody waits for the other's rows."""
    with open_collective(launch, Setup((0, 2), slots_per_rank=2)) as (exchange, _):
        for stray in (2, 3, 6, 99, -2):
            match = rf"slots \[{stray}\] are none of ranks \[0, 2\] with 2 slots each"
            with pytest.raises(ValueError, match=match):
                exchange.dispatch(torch.zeros((3, HIDDEN)), torch.tensor([[0, 5], [stray, stray], [-1, 1]]))
    return True


def test_a_slot_of_no_member_is_refused():
    assert all(run_ranks(refuse_strays, 2))


def lose_peer(launch, victim, how, timeout_s):
    seat, view, groups = build(launch, timeout_s)
    exchange = CollectiveExchange(groups.data, view.ranks, 2)
    hidden, slots = torch.ones((4, HIDDEN)), torch.arange(8).view(4, 2) % 6
    exchange.dispatch(hidden, slots)
    groups.control.barrier()
    if launch.rank == victim:
        os.kill(os.getpid(), how)
    begin = time.monotonic()
    with pytest.raises(PeerLost, match=r"all_to_all on group data of epoch 1 broke off on group rank \d of 3"):
        exchange.dispatch(hidden, slots)
    return time.monotonic() - begin


def test_a_killed_peer_is_noticed_at_once():
    seconds = run_ranks(lose_peer, 3, 1, signal.SIGKILL, 20.0, ends={1: -signal.SIGKILL})
    assert max(seconds[0], seconds[2]) < 5


def test_a_silent_peer_is_noticed_at_the_deadline():
    seconds = run_ranks(lose_peer, 3, 2, signal.SIGSTOP, 2.0, ends={2: -signal.SIGKILL}, deadline_s=15)
    assert 1.5 < max(seconds[0], seconds[1]) < 8


def refuse_after_abort(launch):
    _seat, _, groups = build(launch, 60.0)  # a seat that is let go ends its store, and a slower rank's build
    groups.control.barrier()
    groups.abort()
    with pytest.raises(PeerLost, match="has left the group"):
        groups.control.barrier()
    return True


def test_an_aborted_group_refuses_calls():
    assert all(run_ranks(refuse_after_abort, 2))


def wait_until_aborted(launch, call):
    """Rank 2 does not take part; each other waits for it in `call`, and a second thread of its own breaks that off."""
    _seat, _, groups = build(launch, 60.0)  # a seat that is let go ends its store, and a slower rank's build
    groups.data.barrier()
    if launch.rank == 2:
        time.sleep(4)
        return None
    threading.Timer(0.3, groups.abort).start()
    begin = time.monotonic()
    with pytest.raises(PeerLost):
        call(groups.data)
    return time.monotonic() - begin


def wait_in_all_to_all(group):
    group.all_to_all(torch.empty(3, 2**20), torch.ones(3, 2**20))


def wait_in_all_reduce(group):
    group.all_reduce_max([1])


def wait_in_exchange(group):
    group.exchange([], [(torch.empty(8), 2, 0)])


@pytest.mark.parametrize("call", [wait_in_all_to_all, wait_in_all_reduce, wait_in_exchange])
def test_abort_frees_who_waits_for_a_silent_peer(call):
    seconds = run_ranks(wait_until_aborted, 3, call)
    assert all(0.2 < seconds[rank] < 3 for rank in (0, 1))


def build_without_one(launch):
    if launch.rank == 2:
        return None
    seat = Seat(SeatStart(launch))
    absent = Member(2, 0, "absent", 0, "127.0.0.1", "", "127.0.0.1:1")
    both = meet(Launch(launch.rank, 2, launch.rank, 2, 0, launch.store), seat, 10)
    groups = EpochGroups(View(2, (*both.members, absent)), launch.rank, torch.device("cpu"), Deadlines())
    threading.Timer(0.3, groups.abort).start()
    begin = time.monotonic()
    with pytest.raises(PeerLost, match="left while they were built"):
        groups.build()
    return time.monotonic() - begin


def test_abort_frees_who_builds_with_an_absent_peer():
    assert max(run_ranks(build_without_one, 3)[:2]) < 2


def come_alone(launch):
    if launch.rank == 1:
        return None
    seat = Seat(SeatStart(launch))
    with pytest.raises(PeerLost, match=r"ranks \[1\] did not come"):
        meet(launch, seat, 1.0)
    return True


def test_a_rank_that_does_not_come_is_named():
    assert run_ranks(come_alone, 2)[0]
