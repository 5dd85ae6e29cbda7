"""How the ranks of one launch find each other: every member writes its record into torchrun's store.

And whether they were started alike: ranks that differ in what they hold or how they talk would serve wrong tokens.
"""

import hashlib
import logging
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta

import msgspec
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_store import StoreServer
from elastic_moe.group.probe import refused
from elastic_moe.group.view import Member, View, backups_of
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.signals import Signals
from elastic_moe.secret import VARIABLE

log = logging.getLogger(__name__)

AGAIN_S = 0.1
"""torchrun's store outlives the processes of a launch that it starts again: a record of a dead one is looked at again
after this long, until the one that follows has written its own. How often torchrun has started ranks is of no use: each
node counts for itself."""


class Seat:
    """This process as it enters the group: its `member` record, and what it offers to the others."""

    def __init__(
        self, start: SeatStart, *, address: str = "", weights: str = "", alike: Mapping[str, str] | None = None
    ) -> None:
        """`address` and `weights` are endpoints for front ends and for newcomers, if it serves them; `alike` is what
        all members must have the same, by the key that a user knows it by."""
        self.alike = dict(alike or {})
        launch, host = start.launch, host_of(start.launch)
        self.wire = launch.wire
        self.signals = Signals(host, start.signals_port, self.wire)
        self.store = StoreServer(host, self.wire)
        self.member = Member(
            rank=launch.rank,
            node=launch.node,
            incarnation=start.incarnation or secrets.token_hex(8),
            pid=os.getpid(),
            host=host,
            signals=self.signals.address,
            store=self.store.address,
            address=address,
            weights=weights,
            lighthouse=start.lighthouse,
            backup=start.backup,
            settings=hashlib.sha256(msgspec.json.encode(sorted(self.alike.items()))).hexdigest()[:12],
        )


def meet(launch: Launch, seat: Seat, timeout_s: float) -> View:
    """Publish this process, wait for all ranks of the launch, return the first view (epoch 1).

    Raises:
        PeerLost: a rank did not come within `timeout_s` seconds; the message names the missing ones.
        ValueError: they were not started alike, on all ranks, or with other secrets; says in what they differ.
    """
    me = seat.member
    if launch.world_size == 1:
        return _first_view([me])
    if launch.rank == 0 and not launch.wire.secret:
        log.warning("without a secret whoever reaches the ports of this launch is obeyed: see elastic.secret_file")
    host, _, port = launch.store.rpartition(":")
    keys = [f"elastic_moe/{launch.run}/member/{rank}" for rank in range(launch.world_size)]
    serve = launch.rank == 0 and not launch.store_is_up
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(host, int(port), is_master=serve, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise PeerLost(f"no store answered at {launch.store} within {timeout_s} s") from error
    store.set(keys[me.rank], launch.wire.seal(msgspec.json.encode((me, seat.alike)).decode(), keys[me.rank]))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            store.wait(keys, timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise PeerLost(f"ranks {missing} did not come to {launch.store} within {timeout_s} s") from error
        said = [_read(store.get(key).decode(errors="replace"), key, launch) for key in keys]
        died = refused(member.signals for member, _ in said)
        if not died:
            break
        if time.monotonic() > deadline:
            ranks = [member.rank for member, _ in said if member.signals in died]
            raise PeerLost(f"ranks {ranks} of {launch.store} have died and did not come again within {timeout_s} s")
        time.sleep(AGAIN_S)
    refuse_differences(said)
    return _first_view([member for member, _ in said])


def _read(sealed: str, key: str, launch: Launch) -> tuple[Member, dict[str, str]]:
    try:
        return msgspec.json.decode(launch.wire.unseal(sealed, key), type=tuple[Member, dict[str, str]])
    except ValueError as error:
        raise ValueError(
            f"rank {key.rpartition('/')[2]} does not have the secret of rank {launch.rank}: give all nodes the same "
            f"elastic.secret_file, or {VARIABLE}"
        ) from error


def refuse_differences(said: Sequence[tuple[Member, Mapping[str, str]]]) -> None:
    """Whether all members were started alike.

    Raises:
        ValueError: they were not; names the first key that differs, and who has what.
    """
    for key in sorted({key for _, alike in said for key in alike}):
        who: dict[str, list[Member]] = defaultdict(list)
        for member, alike in said:
            who[alike.get(key, "none")].append(member)
        if len(who) > 1:
            told = "; ".join(
                f"{value} on node {members[0].node} (ranks {', '.join(str(m.rank) for m in members)})"
                for value, members in who.items()
            )
            raise ValueError(f"{key} differs between the ranks: {told}. It must be the same on all nodes")


def refuse_a_stranger(seat: Seat, view: View) -> None:
    """Whether a process that comes back is as those are that it comes back to.

    Raises:
        ValueError: it is not.
    """
    if any(member.settings != seat.member.settings for member in view.members):
        raise ValueError(
            f"rank {seat.member.rank} comes back with another checkpoint, model or setting than the group has: "
            f"{', '.join(seat.alike)} must be as they were"
        )


def _first_view(members: list[Member]) -> View:
    return View(1, tuple(members), tuple(m.lighthouse for m in members if m.lighthouse), backups_of(members))
