"""The process groups of one epoch: built together, used until the view changes, aborted together.

They are plain `ProcessGroup` objects, not torch.distributed's global state: an epoch's groups can be thrown away
and built anew at any time, and a user's own `init_process_group` is left alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic_moe.background import end_process, start_thread
from elastic_moe.errors import PeerLost
from elastic_moe.membership.connections import Connections, listening_ports
from elastic_moe.membership.view import View

Parcel = tuple[torch.Tensor, int, int]
BUILD_TIMEOUT_S = 3.0
"""How long members of a new view wait for each other; they have all just asked for it."""


TURN_S = 0.05
"""How long a rank may stay in a call after it has left the group, at the most."""
BURY_S = 10.0
_NCCL = getattr(dist, "ProcessGroupNCCL", ())
"""Its works are done when they are queued, and its abort does free who waits."""


class Group:
    """One process group with a deadline on every call and errors that say what broke off."""

    def __init__(self, backend: Any, abort: Callable[[Any], None], name: str, epoch: int, timeout_s: float) -> None:
        """`abort(backend)` breaks off every call in flight, from another thread, and makes later ones fail."""
        self._backend = backend
        self._abort = abort
        self._may_be_left = not isinstance(backend, _NCCL)
        self._name = name
        self._epoch = epoch
        self._timeout_s = timeout_s
        self.rank = backend.rank()
        self.size = backend.size()
        self.waiting = False
        """Whether a call is in flight: the rank waits for its peers, with a deadline."""
        self._lock = threading.Lock()
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
        """Break off the call in flight, here and as soon as they notice at the peers; refuse every later one.

        Safe to call twice and from any thread; takes about a millisecond.
        """
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
        if self.size > 1:
            self._abort(self._backend)
            start_thread("bury", _bury, self._backend, on_error=end_process)

    def _refuse_if_aborted(self) -> None:
        if self._aborted:
            raise RuntimeError("this rank has left the group")

    def _wait(self, op: str, start: "Callable[[], dist.Work | _All]") -> None:
        begin = time.monotonic()
        self.waiting = True
        try:
            self._refuse_if_aborted()
            work = start()
            while not self._is_done(work):
                self._refuse_if_aborted()
            work.wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise PeerLost(
                f"{op} on group {self._name} of epoch {self._epoch} broke off on group rank {self.rank} of {self.size} "
                f"after {time.monotonic() - begin:.3f} s (deadline {self._timeout_s} s): {reason}"
            ) from error
        finally:
            self.waiting = False

    def _is_done(self, work: "dist.Work | _All") -> bool:
        """Whether `work` has ended, or its `wait` can be trusted to end with an abort. Waits a little.

        gloo has been seen not to notice that its sockets are shut until the deadline, so its collectives are waited
        for in turns, and left behind when the group is aborted. (A point-to-point work with a timeout would break off
        the others of its group.)
        """
        if not self._may_be_left or isinstance(work, _All):
            return True
        try:
            work.wait(timedelta(seconds=TURN_S))
        except RuntimeError:
            return work.is_completed()
        return True


def _bury(backend: Any) -> None:
    """Hold the last reference to an aborted group: its end may wait for a call left behind, and nobody else has to."""
    time.sleep(BURY_S)
    del backend


class _All:
    """Several works as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class EpochGroups:
    """`control` (gloo, CPU) carries signals, `data` (gloo or NCCL) carries tokens and weights.

    Made for a view, then built together with its other members; `abort` ends either, at any time.
    """

    control: Group
    data: Group

    def __init__(self, view: View, rank: int, device: torch.device, timeout_s: float) -> None:
        """Nothing is connected yet.

        Args:
            view: the agreed members.
            rank: EP rank of this process.
            device: cpu (gloo) or a CUDA device (NCCL) for the data group.
            timeout_s: deadline of every later call, in seconds; building has `BUILD_TIMEOUT_S`.
        """
        self.epoch = view.epoch
        self.ranks = view.ranks
        self._view = view
        self._rank = rank
        self._device = device
        self._timeout_s = timeout_s
        self._built: Future[tuple[Group, Group]] = Future()

    def build(self) -> "EpochGroups":
        """Connect to all members over the store that the view's first one offers. Collective.

        Connecting cannot be broken off, so it has a thread of its own, left to its end when the build is given up.

        Raises:
            PeerLost: a member did not come in time, or `abort` was called.
        """
        start_thread("groups", self._connect, on_error=self._built.set_exception)
        try:
            self.control, self.data = self._built.result(BUILD_TIMEOUT_S)
        except FutureTimeout:
            self._fail(f"not built within {BUILD_TIMEOUT_S} s")
            self.control, self.data = self._built.result()  # unless they came at this very moment
        return self

    @property
    def waiting(self) -> bool:
        """Whether a call is in flight in either group, or they are being built."""
        if not self._built.done():
            return True
        return self._built.exception() is None and any(group.waiting for group in self._built.result())

    def abort(self) -> None:
        """Give up the build, or abort both groups, see `Group.abort`. Safe to call twice and from any thread."""
        self._fail("left while they were built")
        if self._built.exception() is None:
            for group in self._built.result():
                group.abort()

    def _connect(self) -> None:
        host, port = self._view.members[0].store.rsplit(":", 1)
        limit = timedelta(seconds=BUILD_TIMEOUT_S)
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
            prefix = dist.PrefixStore(f"elastic_moe/{self.epoch}/{self._view.digest}", store)
            data = _gloo if self._device.type == "cpu" else _nccl
            control, data = self._group(_gloo, "control", prefix), self._group(data, "data", prefix)
        except (RuntimeError, OSError) as error:
            self._fail(str(error).splitlines()[0])
            return
        try:
            self._built.set_result((control, data))
        except InvalidStateError:
            control.abort()
            data.abort()

    def _group(self, make: "MakeBackend", name: str, prefix: dist.Store) -> Group:
        backend, abort = make(dist.PrefixStore(name, prefix), self._view, self._rank)
        backend._set_default_timeout(timedelta(seconds=self._timeout_s))
        return Group(backend, abort, name, self.epoch, self._timeout_s)

    def _fail(self, reason: str) -> None:
        with contextlib.suppress(InvalidStateError):  # they are built, or have failed before
            self._built.set_exception(PeerLost(f"groups of epoch {self.epoch} (ranks {list(self.ranks)}): {reason}"))


MakeBackend = Callable[[dist.Store, View, int], tuple[Any, Callable[[Any], None]]]
"""(store, view, EP rank) -> the process group, and how to abort it."""


def _gloo(store: dist.Store, view: View, rank: int) -> tuple[Any, Callable[[Any], None]]:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
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


def _nccl(store: dist.Store, view: View, rank: int) -> tuple[Any, Callable[[Any], None]]:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
    backend = dist.ProcessGroupNCCL(store, view.group_rank(rank), len(view.members), options)
    return backend, lambda group: group.abort()
