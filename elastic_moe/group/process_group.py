"""One process group with a deadline on every call and errors that say what broke off.

It wraps a plain `ProcessGroup` object, not torch.distributed's global state: it can be thrown away and built anew at
any time, and a user's own `init_process_group` is left alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic_moe.background import end_process, start_thread
from elastic_moe.errors import PeerLost
from elastic_moe.group.backends import Backend
from elastic_moe.group.epoch_store import EpochStore

Parcel = tuple[torch.Tensor, int, int]
"""(tensor, group rank of the peer, tag)."""
TURN_S = 0.05
"""How long a rank may stay in a call after it has left the group, at the most."""
SPREAD_RANKS, SPREAD_BYTES, SPREAD_TAG = 8, 4096, 2**30
"""From so many ranks on, and up to so many bytes, a maximum is spread by messages, with this tag: below, and with more
ranks than cores, gloo's ring is as fast (docs/scaling.md)."""
BURY_S = 10.0
"""How long an aborted group is held: longer than `TURN_S`, so that no call is left in it when it is destroyed."""


class Group:
    """One process group with a deadline on every call and errors that say what broke off.

    No value that a call brought may be believed before it is known that the call ended in a live group: what an abort
    breaks off may look finished, and leaves anything in its buffers. A call of gloo that returns has ended so. Of NCCL
    it is only queued: whoever looks at its values from the host calls `confirm` first.
    """

    def __init__(self, made: Backend, store: EpochStore, name: str, epoch: int, timeout_s: float) -> None:
        """`store` is that of the backend, to be held as long as it."""
        backend = made.group
        self._backend = backend
        self._store = store
        self._abort = made.abort
        self._record = made.record
        self.on_cpu = made.record is None
        """Whether it takes tensors in host memory (gloo), and not those of a GPU (NCCL)."""
        self._name = name
        self._epoch = epoch
        self.timeout_s = timeout_s
        """Deadline of every call, in seconds."""
        self.rank = backend.rank()
        self.size = backend.size()
        self.waiting = 0
        """Ident of the thread that waits for messages, in one call with a deadline; 0: none does."""
        self.turns = 0
        """Rises while a thread waits in a collective: it looks again and again whether it may go on."""
        self._lock = threading.Lock()
        self._aborted = False

    def all_to_all(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        out_splits: list[int] | None = None,
        in_splits: list[int] | None = None,
    ) -> None:
        """Exchange the rows of `rows` with all peers into `out`; splits are rows per group rank (None: equal). On a GPU
        it is queued only, see `confirm`.

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
        return self.all_reduce_max_array(np.array(values, dtype=np.int64)).tolist()

    def all_reduce_max_array(self, values: np.ndarray) -> np.ndarray:
        """The largest value at each place of an int64 array of the same shape everywhere; a new array.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        values = np.asarray(values, dtype=np.int64)
        if self.on_cpu and self.size >= SPREAD_RANKS and values.nbytes <= SPREAD_BYTES:
            return self._spread_max(values)
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def all_reduce_sum_array(self, values: np.ndarray) -> np.ndarray:
        """The sum at each place of an int64 array of the same shape everywhere; a new array.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def broadcast(self, message: bytes | None) -> bytes:
        """The message of the one rank that gives one, on every rank.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        (size,) = self.all_reduce_max([len(message or b"")])
        padded = (message or b"").ljust(size + -size % 8, b"\0")
        summed = self.all_reduce_sum_array(np.frombuffer(padded if message else bytes(len(padded)), dtype=np.int64))
        return summed.tobytes()[:size]

    def _all_reduce(self, values: np.ndarray, op: Any) -> np.ndarray:
        reduced = np.array(values, dtype=np.int64)
        if self.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = op
            self._wait("all_reduce", lambda: self._backend.allreduce([torch.from_numpy(reduced)], options))
        return reduced

    def _spread_max(self, values: np.ndarray) -> np.ndarray:
        """In log2 R hops, where gloo's ring takes 2 (R - 1): round by round each rank tells what it knows to the one 1,
        2, 4, ... places on. A maximum may be told twice, so R need not be a power of two."""
        known, places = values.copy(), 1
        while places < self.size:
            heard = np.empty_like(known)
            self.exchange(
                [(torch.from_numpy(known), (self.rank + places) % self.size, SPREAD_TAG)],
                [(torch.from_numpy(heard), (self.rank - places) % self.size, SPREAD_TAG)],
            )
            known, places = np.maximum(known, heard), 2 * places
        return known

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Send and receive tensors point to point, all at once: (tensor, group rank, tag), contiguous tensors.

        Parcels of one pair and tag arrive in the order they were given.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.post(sends, receives).wait()

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "Posted":
        """Begin what `exchange` does, and do not wait: isend and irecv.

        Raises:
            PeerLost: this rank has left the group, or a connection is known to be broken.
        """
        with self._told_as_lost("post", time.monotonic()):
            self._refuse_if_aborted()
            works = [self._backend.send([tensor], peer, tag) for tensor, peer, tag in sends]
            works += [self._backend.recv([tensor], peer, tag) for tensor, peer, tag in receives]
        return Posted(self, works)

    def confirm(self) -> None:
        """Wait for the calls that this thread has queued on its GPU stream, and know that they ended in a live group.

        Raises:
            PeerLost: they did not, or missed the deadline: what they brought is garbage.
        """
        if self._record is None or self.size == 1:
            return
        begin = time.monotonic()
        with self._told_as_lost("a queued call", begin):
            is_over = self._record()
            while not is_over():
                self.turns += 1
                self._refuse_if_aborted()
                if time.monotonic() - begin > self.timeout_s:
                    raise RuntimeError("it does not end")
                time.sleep(0)
            self._refuse_if_aborted()  # an abort says so before it breaks anything off

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.all_reduce_max([0])

    @contextlib.contextmanager
    def patient(self, timeout_s: float) -> Iterator[None]:
        """Calls in here have this deadline, in seconds."""
        usual, self.timeout_s = self.timeout_s, timeout_s
        self._backend._set_default_timeout(timedelta(seconds=timeout_s))
        try:
            yield
        finally:
            self.timeout_s = usual
            self._backend._set_default_timeout(timedelta(seconds=usual))

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
            start_thread("bury", _bury, self._backend, self._store, on_error=end_process)

    def _refuse_if_aborted(self) -> None:
        if self._aborted:
            raise RuntimeError("this rank has left the group")

    def _wait(self, op: str, start: Callable[[], dist.Work]) -> None:
        with self._told_as_lost(op, time.monotonic()):
            self._refuse_if_aborted()
            work = start()
            while not self._is_done(work):
                self.turns += 1
                self._refuse_if_aborted()
            work.wait()
            self._refuse_if_aborted()

    @contextlib.contextmanager
    def _told_as_lost(self, op: str, begin: float) -> Iterator[None]:
        """The backend's errors become PeerLost."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerLost):
                raise
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise PeerLost(
                f"{op} on group {self._name} of epoch {self._epoch} broke off on group rank {self.rank} of {self.size} "
                f"after {time.monotonic() - begin:.3f} s (deadline {self.timeout_s} s): {reason}"
            ) from error

    def _is_done(self, work: dist.Work) -> bool:
        """Whether `work` is over, or its `wait` can be trusted to end with an abort. Waits a little.

        gloo has been seen not to notice that its sockets are shut until the deadline, so its collectives are waited
        for in turns, and given up when the group is aborted. (A point-to-point work with a timeout would break off
        the others of its group.)
        """
        if not self.on_cpu:
            return True
        try:
            work.wait(timedelta(seconds=TURN_S))
        except RuntimeError:
            return work.is_completed()
        return True


class Posted:
    """Messages on their way, of `Group.post`."""

    def __init__(self, group: Group, works: list[dist.Work]) -> None:
        self._group = group
        self._works = works

    def wait(self) -> None:
        """Wait until all have gone out and come in.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        group = self._group
        group.waiting = threading.get_ident()
        try:
            with group._told_as_lost("exchange", time.monotonic()):
                for work in self._works:
                    work.wait()
                group._refuse_if_aborted()
            group.confirm()
        finally:
            group.waiting = 0


def _bury(backend: Any, store: EpochStore) -> None:
    """Hold the last reference to an aborted group: destroying it may wait for a call given up; nobody else has to."""
    time.sleep(BURY_S)
    del backend, store
