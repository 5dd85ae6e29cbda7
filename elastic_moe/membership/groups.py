"""The process groups of one epoch: built together, used until the view changes, aborted together.

They are plain `ProcessGroup` objects, not torch.distributed's global state: an epoch's groups can be thrown away
and built anew at any time, and a user's own `init_process_group` is left alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic_moe.errors import PeerLost
from elastic_moe.membership.view import View


class Group:
    """One process group with a deadline on every call and errors that say what broke off."""

    def __init__(
        self, backend: "dist.ProcessGroupGloo | dist.ProcessGroupNCCL", name: str, epoch: int, timeout_s: float
    ) -> None:
        self._backend = backend
        self._name = name
        self._epoch = epoch
        self._timeout_s = timeout_s
        self.rank = backend.rank()
        self.size = backend.size()

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
        options.reduceOp = dist.ReduceOp.MAX
        self._wait("all_reduce", lambda: self._backend.allreduce([tensor], options))
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.all_reduce_max([0])

    def abort(self) -> None:
        """Break off every call in flight, here and (by the closed sockets) at the peers. From any thread."""
        self._backend.abort()

    def _wait(self, op: str, start: Callable[[], dist.Work]) -> None:
        begin = time.monotonic()
        try:
            start().wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise PeerLost(
                f"{op} on group {self._name} of epoch {self._epoch} broke off on group rank {self.rank} of {self.size} "
                f"after {time.monotonic() - begin:.3f} s (deadline {self._timeout_s} s): {reason}"
            ) from error


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
            timeout_s: deadline of building and of every later call, in seconds.

        Raises:
            PeerLost: a member did not come in time.
        """
        me, size = view.group_rank(rank), len(view.members)
        host, port = view.members[0].store.rsplit(":", 1)
        timeout = timedelta(seconds=timeout_s)

        def gloo(name: str, store: dist.Store) -> Group:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=view.member(rank).host)]
            return Group(
                dist.ProcessGroupGloo(dist.PrefixStore(name, store), me, size, options), name, view.epoch, timeout_s
            )

        def nccl(name: str, store: dist.Store) -> Group:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            backend = dist.ProcessGroupNCCL(dist.PrefixStore(name, store), me, size, options)
            return Group(backend, name, view.epoch, timeout_s)

        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
            prefix = dist.PrefixStore(f"elastic_moe/{view.epoch}", store)
            data = gloo if device.type == "cpu" else nccl
            return cls(view.epoch, view.ranks, gloo("control", prefix), data("data", prefix))
        except RuntimeError as error:
            raise PeerLost(
                f"groups of epoch {view.epoch} (ranks {list(view.ranks)}) were not built within {timeout_s} s"
            ) from error

    def abort(self) -> None:
        """Abort both groups; whoever waits in them gets `PeerLost`. Safe to call twice and from any thread."""
        self.control.abort()
        self.data.abort()
