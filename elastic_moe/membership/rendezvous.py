"""How the ranks of one launch find each other: every member writes its record into torchrun's store."""

import logging
import os
import uuid
from datetime import timedelta

import msgspec
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_store import StoreServer
from elastic_moe.group.view import Member, View
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.signals import Signals
from elastic_moe.secret import VARIABLE
from elastic_moe.wire import Forged

log = logging.getLogger(__name__)


class Seat:
    """This process as it enters the group: its `member` record, and what it offers to the others."""

    def __init__(self, start: SeatStart, *, address: str = "", weights: str = "") -> None:
        """`address` and `weights` are endpoints for front ends and for newcomers, if it serves them."""
        launch, host = start.launch, host_of(start.launch)
        self.wire = launch.wire
        self.signals = Signals(host, start.signals_port, self.wire)
        self.store = StoreServer(host, self.wire)
        self.member = Member(
            rank=launch.rank,
            node=launch.node,
            incarnation=uuid.uuid4().hex[:12],
            pid=os.getpid(),
            host=host,
            signals=self.signals.address,
            store=self.store.address,
            address=address,
            weights=weights,
            lighthouse=start.lighthouse,
        )


def meet(launch: Launch, me: Member, timeout_s: float) -> View:
    """Publish `me`, wait for all ranks of the launch, return the first view (epoch 1).

    Raises:
        PeerLost: a rank did not come within `timeout_s` seconds; the message names the missing ones.
        ValueError: a record in the store was not made with the secret of this launch.
    """
    if launch.world_size == 1:
        return _first_view([me])
    if launch.rank == 0 and not launch.wire.secret:
        log.warning("without a secret whoever reaches the ports of this launch is obeyed: see elastic.secret_file")
    host, _, port = launch.store.rpartition(":")
    keys = [f"elastic_moe/{launch.attempt}/member/{rank}" for rank in range(launch.world_size)]
    serve = launch.rank == 0 and not launch.store_is_up
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(host, int(port), is_master=serve, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise PeerLost(f"no store answered at {launch.store} within {timeout_s} s") from error
    store.set(keys[me.rank], launch.wire.seal(msgspec.json.encode(me).decode(), keys[me.rank]))
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise PeerLost(f"ranks {missing} did not come to {launch.store} within {timeout_s} s") from error
    return _first_view([_read(store.get(key).decode(errors="replace"), key, launch) for key in keys])


def _read(sealed: str, key: str, launch: Launch) -> Member:
    try:
        return msgspec.json.decode(launch.wire.unseal(sealed, key), type=Member)
    except (Forged, msgspec.MsgspecError) as error:
        raise ValueError(
            f"rank {key.rpartition('/')[2]} does not have the secret of rank {launch.rank}: give all nodes the same "
            f"elastic.secret_file, or {VARIABLE}"
        ) from error


def _first_view(members: list[Member]) -> View:
    return View(1, tuple(members), tuple(m.lighthouse for m in members if m.lighthouse))
