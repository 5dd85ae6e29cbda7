"""CollectiveExchange on 2 to 4 gloo ranks: routes by formula, zero tokens, seats with holes, silent and dead peers."""

import os
import signal
import threading
import time

import pytest
import torch
from support.ranks import run_ranks

from elastic_moe.errors import PeerLost
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.membership.launch import SeatStart
from elastic_moe.group.groups import EpochGroups
from elastic_moe.membership.launch import Launch
from elastic_moe.membership.rendezvous import Seat, meet
from elastic_moe.group.view import Member, View

HIDDEN = 5


def build(launch, timeout_s=20.0):
    seat = Seat(SeatStart(launch))
    view = meet(launch, seat.member, 30)
    return seat, view, EpochGroups(view, launch.rank, torch.device("cpu"), timeout_s).build()


def routes(rank, num_tokens, num_slots, top_k, ranks):
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn((num_tokens, HIDDEN), generator=generator)
    valid = torch.tensor([r * num_slots + s for r in ranks for s in range(num_slots)])
    return hidden, valid[torch.randint(len(valid), (num_tokens, top_k), generator=generator)]


def round_trip(launch, num_tokens, slots_per_rank, top_k):
    seat, view, groups = build(launch)
    exchange = CollectiveExchange(groups.data, view.ranks, slots_per_rank)
    for turn in range(3):
        hidden, slots = routes(launch.rank + 10 * turn, num_tokens[launch.rank], slots_per_rank, top_k, view.ranks)
        sent = exchange.dispatch(hidden, slots)
        assert sent.offsets.dtype == torch.int32
        assert int(sent.offsets[-1]) == sent.rows.shape[0]
        slot = torch.searchsorted(sent.offsets, torch.arange(len(sent.rows)), right=True) + launch.rank * slots_per_rank
        answer = torch.cat([sent.rows, slot[:, None].float()], dim=1)
        back = exchange.combine(answer, sent.ticket)
        assert back.shape == (num_tokens[launch.rank], top_k, HIDDEN + 1)
        assert torch.equal(back[..., :HIDDEN], hidden[:, None].expand(-1, top_k, -1))
        assert torch.equal(back[..., HIDDEN].long(), slots)
    groups.control.barrier()
    return True


@pytest.mark.parametrize(
    ("num_tokens", "slots_per_rank", "top_k"),
    [([4, 4], 3, 2), ([0, 7], 2, 1), ([5, 0, 3], 1, 3), ([0, 0, 0, 0], 2, 2), ([100, 1, 0, 17], 4, 8)],
)
def test_every_token_reaches_its_slot_and_comes_back(num_tokens, slots_per_rank, top_k):
    assert all(run_ranks(round_trip, len(num_tokens), num_tokens, slots_per_rank, top_k))


def with_a_hole(launch):
    """Seats 0, 2 and 5 of six: group ranks 0, 1, 2."""
    seat = Seat(SeatStart(launch))
    view = meet(launch, seat.member, 30)
    members = tuple(
        type(m)(rank, m.node, m.incarnation, m.pid, m.host, m.signals, m.store)
        for m, rank in zip(view.members, (0, 2, 5), strict=True)
    )
    view, rank = View(2, members), (0, 2, 5)[launch.rank]
    groups = EpochGroups(view, rank, torch.device("cpu"), 20).build()
    exchange = CollectiveExchange(groups.data, view.ranks, 2)
    hidden, slots = routes(rank, 6, 2, 2, view.ranks)
    sent = exchange.dispatch(hidden, slots)
    back = exchange.combine(sent.rows + rank, sent.ticket)
    owners = (slots // 2)[..., None].float()
    torch.testing.assert_close(back, hidden[:, None] + owners, rtol=0, atol=0)
    groups.control.barrier()
    return True


def test_seats_may_have_holes():
    assert all(run_ranks(with_a_hole, 3))


def lose_peer(launch, victim, how, timeout_s):
    seat, view, groups = build(launch, timeout_s)
    exchange = CollectiveExchange(groups.data, view.ranks, 2)
    hidden, slots = routes(launch.rank, 4, 2, 2, view.ranks)
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
    both = meet(Launch(launch.rank, 2, launch.rank, 2, 0, launch.store), seat.member, 10)
    groups = EpochGroups(View(2, (*both.members, absent)), launch.rank, torch.device("cpu"), 60.0)
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
        meet(launch, seat.member, 1.0)
    return True


def test_a_rank_that_does_not_come_is_named():
    assert run_ranks(come_alone, 2)[0]
