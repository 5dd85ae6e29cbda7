"""The process groups of torch under ours, gloo and NCCL: how they are made, and how a call in flight is broken off."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from elastic_moe.group.connections import Connections, listening_ports
from elastic_moe.group.epoch_store import RankValues
from elastic_moe.group.view import View


class Backend(NamedTuple):
    """A process group of torch, and what differs between its kinds."""

    group: Any
    abort: Callable[[Any], None]
    """`abort(group)` breaks off every call in flight, from another thread, and makes later ones fail."""
    record: Callable[[], Callable[[], bool]] | None = None
    """Of a group whose calls are queued for a device and return before they have run: marks this moment in the queue
    of the calling thread; what it returns tells whether all before it has run."""


MakeBackend = Callable[[dist.Store, View, int, timedelta], Backend]
"""(store, view, EP rank, limit of the build) -> the process group."""

_MAKING = threading.Lock()
"""A gloo device is known by the port that is new in this process; two must not be made at once."""


def make_gloo(store: dist.Store, view: View, rank: int, limit: timedelta) -> Backend:
    """Over TCP, for tensors in host memory. Its members publish their ports, so that an abort can shut the sockets."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = limit
    with _MAKING:
        before = set(listening_ports())
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=view.member(rank).host)]
        ports = set(listening_ports()) - before
    store.set(f"ports/{rank}", ",".join(map(str, ports)))
    values = RankValues(store, len(view.members))
    backend = dist.ProcessGroupGloo(values, view.group_rank(rank), len(view.members), options)
    said = store.multi_get([f"ports/{member.rank}" for member in view.members])
    listeners = {
        (member.host, int(port))
        for member, text in zip(view.members, said, strict=True)
        for port in text.decode().split(",")
        if port
    }
    connections = Connections(listeners)

    def abort(_group: Any, _held: RankValues = values) -> None:
        connections.shut()

    return Backend(backend, abort)


def make_nccl(store: dist.Store, view: View, rank: int, limit: timedelta) -> Backend:
    """For tensors on a GPU. torch's watchdog shall not end the process when a peer is lost: `Group` sees to that."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    backend = dist.ProcessGroupNCCL(store, view.group_rank(rank), len(view.members), options)
    return Backend(backend, lambda group: group.abort(), _mark)


def _mark() -> Callable[[], bool]:
    event = torch.cuda.Event()
    event.record()
    return event.query
