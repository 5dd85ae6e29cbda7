"""StepGate: work in the background has something done in the step loop, by all ranks before the same step."""

import threading
from collections.abc import Callable

from elastic_moe.errors import PeerLost
from elastic_moe.group.step_barrier import StepBarrier


class StepGate:
    """The background thread calls `run`, the step loop calls `enter` before every step. Lives for one epoch."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` makes a step loop that sleeps take steps, until `is_wanted` is False again."""
        self._wake = wake
        self._barrier: StepBarrier | None = None
        self._changed = threading.Condition()
        self._next_step = 1
        self._action: Callable[[], None] | None = None
        self._error: Exception | None = None

    def open(self, barrier: StepBarrier) -> None:
        """From now on `run` may be called; its steps are agreed on by `barrier`."""
        self._barrier = barrier

    @property
    def is_wanted(self) -> bool:
        """Whether an action waits for its step."""
        return self._action is not None

    @property
    def is_closed(self) -> bool:
        """Whether the epoch is over."""
        return self._error is not None

    def run(self, action: Callable[[], None]) -> None:
        """Have `action()` run in the step loop, before a step that all ranks agree on; wait until it has. Collective.

        Raises:
            PeerLost: the epoch is over; or what `action` raised.
        """
        barrier = self._barrier
        if barrier is None:
            raise RuntimeError("the gate is not open yet")
        with self._changed:
            self._raise_error()
            self._action = action
            barrier.begin(self._next_step)
        self._wake()
        with self._changed:
            self._changed.wait_for(lambda: self._action is None or self._error is not None)
            self._raise_error()

    def enter(self, step: int) -> None:
        """Before step number `step`, which is the last one plus 1; the first of an epoch is 1.

        Raises:
            PeerLost: a peer died, left, or missed the deadline while a step was agreed on; or what the action raised.
        """
        with self._changed:
            self._next_step = step + 1
            action, barrier = self._action, self._barrier
            self._changed.notify_all()
        if action is None or barrier is None or not barrier.due(step):
            return
        try:
            action()
        except Exception as error:
            self.close(error)
            raise
        with self._changed:
            self._action = None
            self._changed.notify_all()

    def wait_for_step(self, timeout_s: float) -> None:
        """Wait until the next step begins, `timeout_s` seconds at most: a step loop that sleeps takes none.

        Raises:
            PeerLost: the epoch is over.
        """
        with self._changed:
            begun = self._next_step
            self._changed.wait_for(lambda: self._next_step != begun or self._error is not None, timeout_s)
            self._raise_error()

    def close(self, error: Exception | None = None) -> None:
        """The epoch is over: whoever waits gets PeerLost, or `error`. From any thread; the first call counts."""
        with self._changed:
            self._error = self._error or error or PeerLost("the epoch is over")
            self._changed.notify_all()

    def _raise_error(self) -> None:
        error = self._error
        if isinstance(error, PeerLost):
            raise PeerLost(str(error))  # a new one: the frames of whoever raises it would hold the epoch's groups
        if error is not None:
            raise error
