"""The load balancer of one rank: when a round is due, and the thread that runs it beside the step loop."""

import itertools
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from elastic_moe.background import OnError, start_thread
from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import Round
from elastic_moe.control.report import Outcome, RebalanceReport
from elastic_moe.control.step_gate import StepGate
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.process_group import Group
from elastic_moe.group.step_barrier import StepBarrier
from elastic_moe.group.view import View
from elastic_moe.placement.loads import LoadCounter, LoadWindow
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.transport.staging import Staging
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.store import ExpertStore

AFTER_CHANGE_S = 2.0
"""From a loss or a join to the round that it asks for: streams catch up first."""
STEP_WAIT_S = 0.05
"""How long a transfer that has used up the budget of a step waits for the next one; a group that sleeps takes none."""


class Rebalancer:
    """Counts loads always; balances in the background of each epoch unless `eplb.mode` is off."""

    def __init__(
        self,
        config: EplbConfig,
        rank: int,
        registry: PlacementRegistry,
        counter: LoadCounter,
        steps: Callable[[], int],
        staging: Staging,
        deadlines: Deadlines,
        *,
        wake: Callable[[], None],
        committed: Callable[[Placement], None],
        on_error: OnError,
    ) -> None:
        """
        Args:
            config: the `eplb` section.
            rank: EP rank of this process.
            registry: the committed placement.
            counter: what the layers count.
            steps: how many steps this rank has taken in all.
            staging: how experts come to where they are swapped in.
            deadlines: of waits for other ranks.
            wake: makes a step loop that sleeps look at `wants_steps` and `reports`; from any thread.
            committed: called in the step loop with every placement that a round commits.
            on_error: told if a thread dies of a bug.
        """
        self.config = config
        self.rank = rank
        self.registry = registry
        self._counter = counter
        self._steps = steps
        self.staging = staging
        self.grace_s = deadlines.rebalance_grace_s
        self.wake = wake
        self._committed = committed
        self.on_error = on_error
        placement = registry.placement
        self._window = LoadWindow(placement.num_layers, placement.num_experts, config.half_life_steps)
        self._window_lock = threading.Lock()
        self._changed = threading.Condition()
        """There is a request, or an epoch is over."""
        self._ops: list[str] = []
        self._session: _Session | None = None
        self._thread: threading.Thread | None = None
        """Of the newest session."""
        self.reports: queue.SimpleQueue[RebalanceReport] = queue.SimpleQueue()
        """Of the rounds that have ended; for the step loop."""

    def begin_epoch(
        self, view: View, groups: EpochGroups, store: ExpertStore, reserves: Reserves, *, changed: bool
    ) -> None:
        """Balance in this epoch from now on; `changed`: the members are others than before, so a round is due soon."""
        self.end_epoch()
        if self.config.mode != "off" and reserves:
            session = self._session = _Session(self, view, groups, store, reserves, changed=changed)
            self._thread = start_thread("rebalance", session.run, self._thread, on_error=self.on_error)

    def end_epoch(self) -> None:
        """What is under way is dropped; what was committed stays."""
        if self._session is not None:
            self._session.gate.close()
            with self._changed:
                self._changed.notify_all()
        self._session = None

    def request(self, op: str = "") -> None:
        """Ask for a round now, whatever the threshold; its report will name `op`. From any thread.

        The other ranks come to it when they are asked too, or at their next interval.

        Raises:
            ValueError: the balancer is off.
        """
        if self.config.mode == "off":
            raise ValueError("eplb.mode=off: start with eplb.mode=async (or sync) to rebalance")
        self.add_ops([op])

    def enter_step(self, step: int) -> None:
        """Before every step, in the step loop; the first of an epoch is 1.

        Raises:
            PeerLost: a peer was lost in the background.
        """
        session = self._session
        if session is not None:
            if session.error is not None:
                raise PeerLost(str(session.error))
            session.gate.enter(step)

    @property
    def wants_steps(self) -> bool:
        """Whether the step loop should step although there is no work: a swap, or an error, waits for it."""
        session = self._session
        return session is not None and (session.gate.is_wanted or session.error is not None)

    def local_loads(self) -> np.ndarray:
        """float64 [L, E]: the window of this rank, until now. From any thread."""
        with self._window_lock:
            self._window.add(self._counter.read(), self._steps())
            return self._window.loads.copy()

    def take_ops(self) -> list[str]:
        """The requests that wait; they are the caller's to answer."""
        with self._changed:
            ops, self._ops = self._ops, []
        return ops

    def add_ops(self, ops: list[str]) -> None:
        """Requests that the next round answers: new ones, or those of a round that broke off."""
        with self._changed:
            self._ops += ops
            self._changed.notify_all()

    def wait_for_request(self, gate: StepGate, timeout_s: float) -> None:
        """Wait until there is a request or `gate` is closed, `timeout_s` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._ops or gate.is_closed, timeout_s)

    def tell(self, report: RebalanceReport) -> None:
        """A round has ended."""
        self.reports.put(report)
        self.wake()

    def commit(self, placement: Placement) -> None:
        """In the step loop: a chunk was swapped in."""
        self._committed(placement)


class _Session:
    """The thread of one epoch. It ends with the epoch's groups; a lost peer is kept for the step loop."""

    def __init__(
        self,
        owner: Rebalancer,
        view: View,
        groups: EpochGroups,
        store: ExpertStore,
        reserves: Reserves,
        *,
        changed: bool,
    ) -> None:
        self.gate = StepGate(owner.wake)
        self.error: PeerLost | None = None
        self._owner = owner
        self._view = view
        self._groups = groups
        self._store = store
        self._reserves = reserves
        self._changed = changed
        self._last_said: np.ndarray | None = None

    def run(self, before: threading.Thread | None) -> None:
        """Until the epoch is over. `before` is the thread of an earlier one: what it has under way ends first."""
        if before is not None:
            before.join()
        try:
            self._serve()
        except PeerLost as error:
            self.error = error.with_traceback(None)  # its frames would hold the epoch's groups
            self._owner.wake()

    def _serve(self) -> None:
        owner, config = self._owner, self._owner.config
        owner.staging.enter(self._view)
        deadline_s = owner.grace_s + config.interval_s
        group = self._groups.open("balance", deadline_s)
        self.gate.open(StepBarrier(self._groups.open("steps", deadline_s)))
        for number in itertools.count(1):
            changed = self._changed and number == 1
            owner.wait_for_request(self.gate, AFTER_CHANGE_S if changed else config.interval_s)
            if self.gate.is_closed:  # what is asked now is the next epoch's
                return
            ops = owner.take_ops()
            try:
                owner.tell(self._round(group, number, ops, changed=changed))
            except BaseException:
                owner.add_ops(ops)
                raise

    def _round(self, group: Group, number: int, ops: list[str], *, changed: bool) -> RebalanceReport:
        """One round of all ranks. Its report comes on every rank."""
        owner = self._owner
        asynchronous = owner.config.mode == "async"
        said = np.append(np.rint(owner.local_loads()).astype(np.int64), len(ops))
        summed = group.all_reduce_sum_array(said)
        asked = bool(summed[-1]) or changed
        idle = self._last_said is not None and np.array_equal(summed, self._last_said)
        self._last_said = summed
        if idle and not asked:  # a group that sleeps goes on sleeping, in sync too
            reason = "no tokens since the last round"
            version = owner.registry.placement.version
            return RebalanceReport(self._view.epoch, number, version, (), Outcome.KEPT, reason, ended_at=time.time())
        loads = summed[:-1].reshape(owner.registry.placement.num_layers, -1).astype(np.float64)
        this = Round(
            self._view,
            owner.rank,
            group,
            owner.registry,
            self._store,
            self._reserves,
            owner.config,
            owner.staging,
            swap=self.gate.run if asynchronous else lambda act: act(),
            pause=(lambda: self.gate.wait_for_step(STEP_WAIT_S)) if asynchronous else lambda: None,
            committed=owner.commit,
        )
        if asynchronous:
            return this.run(number, loads, ops, asked=asked)
        reports: list[RebalanceReport] = []
        self.gate.run(lambda: reports.append(this.run(number, loads, ops, asked=asked)))
        return reports[0]
