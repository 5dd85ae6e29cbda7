"""The process groups of torch under ours, gloo and NCCL: how they are made, and how a call in flight is broken off."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic_moe.group.connections import Connections, listening_ports
from elastic_moe.group.view import View

MakeBackend = Callable[[dist.Store, View, int, timedelta], tuple[Any, Callable[[Any], None]]]
"""(store, view, EP rank, limit of the build) -> the process group, and how to abort it."""

_MAKING = threading.Lock()
"""A gloo device is known by the port that is new in this process; two must not be made at once."""


def make_gloo(store: dist.Store, view: View, rank: int, limit: timedelta) -> tuple[Any, Callable[[Any], None]]:
    """Over TCP, for tensors in host memory. Its members publish their ports, so that an abort can shut the sockets."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = limit
    with _MAKING:
        before = set(listening_ports())
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=view.member(rank).host)]
        ports = set(listening_ports()) - before
    store.set(f"ports/{rank}", ",".join(map(str, ports)))
    backend = dist.ProcessGroupGloo(store, view.group_rank(rank), len(view.members), options)
    said = store.multi_get([f"ports/{member.rank}" for member in view.members])
    listeners = {
        (member.host, int(port))
        for member, text in zip(view.members, said, strict=True)
        for port in text.decode().split(",")
        if port
    }
    connections = Connections(listeners)
    return backend, lambda _group: connections.shut()


def make_nccl(store: dist.Store, view: View, rank: int, limit: timedelta) -> tuple[Any, Callable[[Any], None]]:
    """For tensors on a GPU."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    backend = dist.ProcessGroupNCCL(store, view.group_rank(rank), len(view.members), options)
    return backend, lambda group: group.abort()
