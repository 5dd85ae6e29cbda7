"""The process groups of one epoch: built together, used until the view changes, aborted together."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic_moe.background import start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.backends import MakeBackend, make_gloo, make_nccl
from elastic_moe.group.epoch_store import EpochStore
from elastic_moe.group.probe import PROBE_S, unreachable
from elastic_moe.group.process_group import TURN_S, Group
from elastic_moe.group.view import Member, View
from elastic_moe.wire import PLAIN, Wire

PROBE_AFTER_S = 1.0
"""Members that are not connected after this time, and again, are looked for: one that cannot be reached need not be
waited for."""


class EpochGroups:
    """`control` (gloo, CPU) carries signals, `data` (gloo or NCCL) carries tokens and weights.

    Made for a view, then built together with its other members; `abort` ends all, at any time. Work in the background
    opens CPU groups of its own.
    """

    control: Group
    data: Group

    def __init__(self, view: View, rank: int, device: torch.device, deadlines: Deadlines, wire: Wire = PLAIN) -> None:
        """Nothing is connected yet.

        Args:
            view: the agreed members.
            rank: EP rank of this process.
            device: cpu (gloo) or a CUDA device (NCCL) for the data group.
            deadlines: `build_s` is that of building, `exchange_s` that of every later call.
            wire: the launch's, for the store.
        """
        self.epoch = view.epoch
        self.ranks = view.ranks
        self._view = view
        self._offered = view.members[0].store
        self._rank = rank
        self._device = device
        self._deadlines = deadlines
        self._wire = wire
        self._built: Future[tuple[Group, Group]] = Future()
        self._lock = threading.Lock()
        self._opened: list[Group] = []
        self._when_aborted: list[Callable[[], None]] = []
        self._left = False
        self._turns = 0
        self.unreached: tuple[str, ...] = ()
        """Incarnations that could not be reached when the build was given up."""

    def build(self) -> "EpochGroups":
        """Connect to all members over the store that the view's first one offers. Collective.

        Connecting cannot be broken off, so it has a thread of its own, left to its end when the build is given up.

        Raises:
            PeerLost: a member did not come in time, or `abort` was called.
        """
        start_thread("groups", self._connect, on_error=self._built.set_exception)
        probe_at = time.monotonic() + PROBE_AFTER_S
        deadline = time.monotonic() + self._deadlines.build_s
        while True:
            self._turns += 1
            try:
                self.control, self.data = self._built.result(TURN_S)
            except FutureTimeout:
                if time.monotonic() < min(probe_at, deadline):
                    continue
                probe_at = time.monotonic() + PROBE_AFTER_S
                silent = self._silent_members()
                self.unreached = tuple(member.incarnation for member in silent)
                if silent:
                    self._fail(f"ranks {[member.rank for member in silent]} cannot be reached from here")
                elif time.monotonic() > deadline:
                    self._fail(f"not built within {self._deadlines.build_s:g} s")
            else:
                return self

    def _silent_members(self) -> list[Member]:
        """Those with an address, for signals or of a group that they offer, from which nothing comes back."""
        own = self._view.member(self._rank)
        offered = {member.signals: member for member in self._view.members if member is not own}
        offered |= {f"tcp://{host}:{port}": member for host, port, member in self._listeners() if member is not own}
        silent = unreachable(offered)
        return sorted({offered[address] for address in silent}, key=lambda member: member.rank)

    def _listeners(self) -> list[tuple[str, int, Member]]:
        """Where the members that have come so far listen for the control group."""
        found: list[tuple[str, int, Member]] = []
        with contextlib.suppress(dist.DistStoreError):
            store = EpochStore(self._offered, PROBE_S, self._wire)
            prefix = f"elastic_moe/{self.epoch}/{self._view.digest}/control"
            for member in self._view.members:
                key = f"{prefix}/ports/{member.rank}"
                if store.check([key]):
                    found += [(member.host, int(port), member) for port in store.get(key).decode().split(",") if port]
        return found

    def waiting(self, thread: int) -> bool:
        """Whether the thread with this ident waits for messages of the members."""
        return any(group.waiting == thread for group in self._groups())

    @property
    def turns(self) -> int:
        """Rises while a thread waits for the members in a collective, or for the groups to be built."""
        return self._turns + sum(group.turns for group in self._groups())

    def _groups(self) -> list[Group]:
        built = self._built.done() and self._built.exception() is None
        return [*self._opened, *(self._built.result() if built else ())]

    def open(self, name: str, timeout_s: float) -> Group:
        """One more gloo group of all members, on the CPU, with a deadline of its own. Collective; waits for all.

        Raises:
            PeerLost: a member did not come within `timeout_s`, or `abort` was called.
        """
        try:
            group = self._group(make_gloo, name, EpochStore(self._offered, timeout_s, self._wire), timeout_s, timeout_s)
        except (RuntimeError, OSError) as error:
            raise PeerLost(f"group {name} of epoch {self.epoch}: {str(error).splitlines()[0]}") from error
        with self._lock:
            self._opened.append(group)
            left = self._left
        if left:
            group.abort()
            raise PeerLost(f"group {name} of epoch {self.epoch}: left while it was opened")
        return group

    def abort(self) -> None:
        """Give up the build, or abort all groups, see `Group.abort`. Safe to call twice and from any thread."""
        self._fail("left while they were built")
        with self._lock:
            self._left = True
            groups, acts = list(self._opened), list(self._when_aborted)
        for act in acts:
            act()
        if self._built.exception() is None:
            groups += self._built.result()
        for group in groups:
            group.abort()

    def when_aborted(self, act: Callable[[], None]) -> None:
        """Have `act` called, in any thread, when the groups are aborted; now, if they have been."""
        with self._lock:
            self._when_aborted.append(act)
            left = self._left
        if left:
            act()

    def _connect(self) -> None:
        try:
            build_s, exchange_s = self._deadlines.build_s, self._deadlines.exchange_s
            store = EpochStore(self._offered, build_s, self._wire)
            data = make_gloo if self._device.type == "cpu" else make_nccl
            control = self._group(make_gloo, "control", store, build_s, exchange_s)
            data = self._group(data, "data", store, build_s, exchange_s)
        except (RuntimeError, OSError) as error:
            self._fail(str(error).splitlines()[0])
            return
        try:
            self._built.set_result((control, data))
        except InvalidStateError:
            control.abort()
            data.abort()

    def _group(self, make: MakeBackend, name: str, store: EpochStore, build_s: float, timeout_s: float) -> Group:
        own = dist.PrefixStore(f"elastic_moe/{self.epoch}/{self._view.digest}/{name}", store)
        made = make(own, self._view, self._rank, timedelta(seconds=build_s))
        made.group._set_default_timeout(timedelta(seconds=timeout_s))
        return Group(made, store, name, self.epoch, timeout_s)

    def _fail(self, reason: str) -> None:
        with contextlib.suppress(InvalidStateError):  # they are built, or have failed before
            self._built.set_exception(PeerLost(f"groups of epoch {self.epoch} (ranks {list(self.ranks)}): {reason}"))
