"""The process groups of one epoch: built together, used until the view changes, aborted together.

They are plain `ProcessGroup` objects, not torch.distributed's global state: an epoch's groups can be thrown away
and built anew at any time, and a user's own `init_process_group` is left alone.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.membership.view import View

Parcel = tuple[torch.Tensor, int, int]
BUILD_TIMEOUT_S = 3.0
"""How long members of a new view wait for each other; they have all just asked for it."""

ABORT_AGAIN_S = 0.005


class Group:
    """One process group with a deadline on every call and errors that say what broke off."""

    def __init__(self, backend: Any, name: str, epoch: int, timeout_s: float) -> None:
        self._backend = backend
        self._name = name
        self._epoch = epoch
        self._timeout_s = timeout_s
        self.rank = backend.rank()
        self.size = backend.size()
        self.waiting = False
        """Whether a call is in flight: the rank waits for its peers, with a deadline."""
        self._aborted = False

    def all_to_all(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        out_splits: list[int] | None = None,
        in_splits: list[int] | None = None,
    ) -> None:
        """Exchange the rows of `rows` with all peers into `out`; splits are rows per group rank (None: equal).

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        if self.size == 1:
            out.copy_(rows)
            return
        self._wait("all_to_all", lambda: self._backend.alltoall_base(out, rows, out_splits or [], in_splits or []))

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """The largest value at each position over all ranks; the lists have the same length everywhere.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # pyright: ignore[reportAttributeAccessIssue]
        self._wait("all_reduce", lambda: self._backend.allreduce([tensor], options))
        return tensor.tolist()

    def all_reduce_max_array(self, values: np.ndarray) -> np.ndarray:
        """The largest value at each place of an int64 array of the same shape everywhere.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        return np.array(self.all_reduce_max(values.ravel().tolist()), dtype=np.int64).reshape(values.shape)

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Send and receive tensors point to point, all at once: (tensor, group rank, tag), contiguous tensors.

        Parcels of one pair and tag arrive in the order they were given.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        if sends or receives:
            self._wait(
                "exchange",
                lambda: _All(
                    [self._backend.send([tensor], peer, tag) for tensor, peer, tag in sends]
                    + [self._backend.recv([tensor], peer, tag) for tensor, peer, tag in receives]
                ),
            )

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.all_reduce_max([0])

    def abort(self) -> None:
        """Refuse every later call, and break off the one in flight where the backend can. From any thread.

        NCCL's abort does. gloo's (torch 2.13), though repeated, was seen to free nobody who waits: there the caller
        comes out when a peer that it waits for dies, or at the deadline.
        """
        if self._aborted:
            return
        self._aborted = True
        if self.waiting:
            threading.Thread(target=self._abort_until_free, name="abort", daemon=True).start()

    def _abort_until_free(self) -> None:
        while self.waiting:
            self._backend.abort()
            time.sleep(ABORT_AGAIN_S)

    def _refuse_if_aborted(self) -> None:
        if self._aborted:
            raise RuntimeError("this rank has left the group")

    def _wait(self, op: str, start: "Callable[[], dist.Work | _All]") -> None:
        begin = time.monotonic()
        self.waiting = True
        try:
            self._refuse_if_aborted()
            start().wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise PeerLost(
                f"{op} on group {self._name} of epoch {self._epoch} broke off on group rank {self.rank} of {self.size} "
                f"after {time.monotonic() - begin:.3f} s (deadline {self._timeout_s} s): {reason}"
            ) from error
        finally:
            self.waiting = False


class _All:
    """Several works as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


@dataclass(frozen=True)
class EpochGroups:
    """`control` (gloo, CPU) carries signals, `data` (gloo or NCCL) carries tokens and weights."""

    epoch: int
    ranks: tuple[int, ...]
    control: Group
    data: Group

    @classmethod
    def build(cls, view: View, rank: int, device: torch.device, timeout_s: float) -> "EpochGroups":
        """Build this epoch's groups over the store that the view's first member offers. Collective.

        Args:
            view: the agreed members.
            rank: EP rank of this process.
            device: cpu (gloo) or a CUDA device (NCCL) for the data group.
            timeout_s: deadline of every later call, in seconds; building has `BUILD_TIMEOUT_S`.

        Raises:
            PeerLost: a member did not come in time.
        """
        host, port = view.members[0].store.rsplit(":", 1)
        limit = timedelta(seconds=BUILD_TIMEOUT_S)
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
            prefix = dist.PrefixStore(f"elastic_moe/{view.epoch}/{view.digest}", store)
            control = _gloo(dist.PrefixStore("control", prefix), view, rank)
            data = _gloo if device.type == "cpu" else _nccl
            backends = {"control": control, "data": data(dist.PrefixStore("data", prefix), view, rank)}
        except RuntimeError as error:
            raise PeerLost(
                f"groups of epoch {view.epoch} (ranks {list(view.ranks)}) were not built within {BUILD_TIMEOUT_S} s"
            ) from error
        groups = {}
        for name, backend in backends.items():
            backend._set_default_timeout(timedelta(seconds=timeout_s))
            groups[name] = Group(backend, name, view.epoch, timeout_s)
        return cls(view.epoch, view.ranks, **groups)

    @property
    def waiting(self) -> bool:
        """Whether a call is in flight in either group."""
        return self.control.waiting or self.data.waiting

    def abort(self) -> None:
        """Abort both groups, see `Group.abort`. Safe to call twice and from any thread."""
        self.control.abort()
        self.data.abort()


def _gloo(store: dist.Store, view: View, rank: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=view.member(rank).host)]
    return dist.ProcessGroupGloo(store, view.group_rank(rank), len(view.members), options)


def _nccl(store: dist.Store, view: View, rank: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, view.group_rank(rank), len(view.members), options)
