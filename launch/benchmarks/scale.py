"""bench=scale: what the group costs as a function of its members, with members that are sockets and records.

`store_*`: the members of a group leave each other their addresses at the store of one, with values as long as gloo's.
`verdict_ms`: who is left out of a view, when one wire is cut, when one member is out of reach, and when the network is
cut in two halves. `wake_ms`: one member tells all others that it leaves. Not measured but counted: hops of a handshake,
descriptors of a member.
"""

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import zmq

from elastic_moe.group.epoch_store import GetRequest, PutRequest, StoreServer, encode
from elastic_moe.group.process_group import SPREAD_RANKS
from elastic_moe.group.view import Member, View
from elastic_moe.membership.signals import SignalSender, ViewRequest, neighbours
from elastic_moe.membership.verdict import Record, members_without_disputes
from launch.benchmarks.config import BenchConfig

GLOO_VALUE = 154, 8
"""Bytes of what a rank of gloo tells the others: so many, and so many for each rank (torch 2.13)."""
WAIT_S = 600.0
DESCRIPTORS_OF_A_PEER = 3
"""A connection of the control group, one of the data group on a CPU, one for signals; some 100 more are nobody's."""


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each number of ranks."""
    for num_ranks in config.numbers("rank_list"):
        members = [
            Member(rank, rank // 8, f"{rank:032x}", 1, "host", f"tcp://127.0.0.1:{20000 + rank}", "")
            for rank in range(num_ranks)
        ]
        seconds, num_bytes = zip(*(_store(num_ranks) for _ in range(config.repeats)), strict=True)
        yield {
            "ranks": num_ranks,
            "store_s": median(seconds),
            "store_mb": num_bytes[0] / 1e6,
            **{f"verdict_{kind}_ms": _ms(case, config.repeats) for kind, case in _cases(members).items()},
            "wake_ms": _wake(members, config.repeats),
            "neighbours": len(neighbours(View(1, tuple(members)), 0)),
            "handshake_hops": _hops(num_ranks),
            "descriptors": DESCRIPTORS_OF_A_PEER * (num_ranks - 1),
        }


def _hops(num_ranks: int) -> int:
    """Of a maximum: gloo's ring goes twice around, see `Group.all_reduce_max_array`."""
    return math.ceil(math.log2(num_ranks)) if num_ranks >= SPREAD_RANKS else 2 * (num_ranks - 1)


def _ms(act: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:]) * 1e3


def _store(num_ranks: int) -> tuple[float, int]:
    """Seconds until all members have the values of all, over loopback, and the bytes sent to them."""
    server, context = StoreServer("127.0.0.1"), zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * num_ranks)
    sockets = [context.socket(zmq.DEALER) for _ in range(num_ranks)]
    for socket in sockets:
        socket.connect(f"tcp://{server.address}")
    keys, value = [f"gloo/{rank}" for rank in range(num_ranks)], bytes(GLOO_VALUE[0] + GLOO_VALUE[1] * num_ranks)
    begin = time.perf_counter()
    for key, socket in zip(keys, sockets, strict=True):
        socket.send(encode(PutRequest(key, value)))
        socket.send(encode(GetRequest(1, keys, WAIT_S)))
    num_bytes = sum(len(socket.recv()) for socket in sockets)
    seconds = time.perf_counter() - begin
    context.destroy(linger=0)
    return seconds, num_bytes


def _cases(members: list[Member]) -> dict[str, Callable[[], object]]:
    half = len(members) // 2
    names = [member.incarnation for member in members]

    def verdict(unreached: Callable[[int], list[str]]) -> Callable[[], object]:
        records = [Record(member, False, tuple(unreached(member.rank))) for member in members]
        return lambda: members_without_disputes(records)

    return {
        "wire": verdict(lambda rank: [names[1]] if rank == 0 else []),
        "member": verdict(lambda rank: [names[0]] if rank else names[1:]),
        "halves": verdict(lambda rank: names[half:] if rank < half else names[:half]),
    }


def _wake(members: list[Member], repeats: int) -> float:
    """Milliseconds to hand one signal to the sockets of all members, connected before."""
    sender, addresses = SignalSender(), [member.signals for member in members[1:]]
    sender._context = zmq.Context()
    sender._context.set(zmq.MAX_SOCKETS, 2 * len(members))
    sender.connect(addresses)
    found = _ms(lambda: sender.tell(addresses, ViewRequest(1, "digest")), repeats)
    sender.close()
    sender._context.destroy(linger=0)
    return found
