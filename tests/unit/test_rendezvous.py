"""Ranks meet at torchrun's store, which may still hold the records of those who were here before."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.group.view import Member
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.rendezvous import Seat, meet


@pytest.fixture
def store() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def launch(store: Any, rank: int, **fields: Any) -> Launch:
    return Launch(rank, 2, rank, 2, store=f"127.0.0.1:{store.port}", **fields)


def dead(rank: int) -> Member:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"tcp://127.0.0.1:{gone.getsockname()[1]}"
    return Member(rank, 0, "dead", 1, "127.0.0.1", address, "")


def test_the_record_of_one_who_has_died_is_not_met(store):
    """As when torchrun has started the ranks of each node another number of times."""
    for rank in range(2):
        store.set(f"elastic_moe/job/member/{rank}", msgspec.json.encode((dead(rank), {})).decode())
    seats = [Seat(SeatStart(launch(store, rank, run="job"))) for rank in range(2)]

    def come(rank: int, after_s: float) -> Any:
        time.sleep(after_s)
        return meet(launch(store, rank, run="job"), seats[rank], 10.0)

    with ThreadPoolExecutor(2) as pool:
        views = [one.result() for one in [pool.submit(come, 0, 0.0), pool.submit(come, 1, 0.5)]]
    assert views[0] == views[1]
    assert [member.incarnation for member in views[0].members] == [seat.member.incarnation for seat in seats]


def test_one_who_does_not_come_again_is_named(store):
    store.set("elastic_moe//member/1", msgspec.json.encode((dead(1), {})).decode())
    seat = Seat(SeatStart(launch(store, 0)))
    with pytest.raises(PeerLost, match=r"ranks \[1\] of 127.* have died and did not come again within 0.5 s"):
        meet(launch(store, 0), seat, 0.5)


def test_ranks_that_were_not_started_alike_are_refused_on_all(store):
    seats = [Seat(SeatStart(launch(store, rank)), alike={"eplb.mode": str(rank)}) for rank in range(2)]
    raised: list[str] = []

    def come(rank: int) -> None:
        with pytest.raises(ValueError, match=r"eplb\.mode differs between the ranks") as refused:
            meet(launch(store, rank), seats[rank], 10.0)
        raised.append(str(refused.value))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(raised)) == 1
    assert len(raised) == 2
