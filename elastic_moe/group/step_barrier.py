"""StepBarrier: ranks that never wait for each other agree on the step at which all of them do something.

Each rank says the number of the first step it has not begun; the agreed step is the largest of these, plus a margin.
"""

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import torch

from elastic_moe.background import start_thread
from elastic_moe.errors import PeerLost
from elastic_moe.group.process_group import Group

MARGIN = 2
"""Steps from the last rank's message to the agreed step. A rank may be a step ahead of another, and while messages
travel it runs one more; with two steps it has heard all of them before it could have to act, so it never waits. A
smaller margin would be as right, only slower: a rank that has not heard enough waits, see `due`."""


class StepBarrier:
    """Asynchronous max of step counters over isend/irecv. `begin` and `due` may be called from different threads."""

    def __init__(self, group: Group) -> None:
        """`group` is a CPU group (gloo) whose point-to-point messages belong to this barrier alone."""
        self._group = group
        self._lock = threading.Lock()
        self._uses = 0
        self._begun_at = -1
        self._agreed: Future[int] | None = None

    def begin(self, step: int) -> None:
        """Tell the others that this rank has not begun `step`. Does not wait. Every rank calls it, in any order.

        Raises:
            RuntimeError: the last agreement has not been reached, or not been used up by `due`.
            PeerLost: the group was left.
        """
        with self._lock:
            if self._agreed is not None:
                raise RuntimeError(f"a step is being agreed on already (begun at step {self._begun_at})")
            self._agreed, self._begun_at = Future(), step
            self._uses += 1
            tag, agreed = self._uses, self._agreed
        peers = [peer for peer in range(self._group.size) if peer != self._group.rank]
        mine = torch.tensor([step])
        theirs = [torch.empty_like(mine) for _ in peers]
        sent = self._group.post(
            [(mine, peer, tag) for peer in peers],
            [(their, peer, tag) for their, peer in zip(theirs, peers, strict=True)],
        )

        def listen() -> None:
            try:
                sent.wait()
                agreed.set_result(max([step, *map(int, theirs)]) + MARGIN)
            except PeerLost as error:
                agreed.set_exception(error.with_traceback(None))

        start_thread("step barrier", listen, on_error=agreed.set_exception)

    def due(self, step: int) -> bool:
        """Whether `step`, which this rank is about to begin, is the agreed one; if so the barrier can be begun again.

        Call it before every step. It waits only when `step` may be the agreed one and not all peers have been heard:
        any rank's own step plus the margin is a lower bound, so nobody runs the agreed step without knowing of it.

        Raises:
            PeerLost: a peer died, left, or missed the deadline of the group.
            RuntimeError: the agreed step is over: `due` was not called before it.
        """
        agreed = self._agreed
        if agreed is None or step < self._begun_at + MARGIN:
            return False
        try:
            at = agreed.result(self._group.timeout_s)
        except FutureTimeout as error:
            raise PeerLost(
                f"step barrier begun at {self._begun_at}: no answer within {self._group.timeout_s} s"
            ) from error
        if at < step:
            raise RuntimeError(f"step {at} was agreed on, but step {step} has come")
        if at > step:
            return False
        with self._lock:
            self._agreed = None
        return True
