"""StepGate in one process, over a barrier that agrees at once: who waits, who hears of an error, who is freed."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from elastic_moe.control.step_gate import StepGate
from elastic_moe.errors import PeerLost

WAIT_S = 10.0
AHEAD = 2


class AgreesAtOnce:
    """A StepBarrier of one rank."""

    def __init__(self):
        self.at = None

    def begin(self, step):
        assert self.at is None, "begun twice"
        self.at = step + AHEAD

    def due(self, step):
        if self.at != step:
            return False
        self.at = None
        return True


class Background:
    """`work()` in a thread of its own; `asked` is set when the gate wakes the step loop."""

    def __init__(self):
        self.asked = threading.Event()
        self.gate = StepGate(self.asked.set)
        barrier: Any = AgreesAtOnce()
        self.gate.open(barrier)

    def start(self, work):
        result = Future()

        def run():
            try:
                result.set_result(work())
            except Exception as error:  # noqa: BLE001 - the test looks at it
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return result

    def run(self, action):
        """`gate.run(action)` in the background; returns when it waits for its step."""
        result = self.start(lambda: self.gate.run(action))
        assert self.asked.wait(WAIT_S)
        self.asked.clear()
        return result


def test_the_action_runs_in_the_step_loop_before_the_agreed_step():
    background, ran = Background(), []
    gate = background.gate
    gate.enter(1)
    for begin in (2, 12):
        done = background.run(lambda: ran.append(threading.current_thread()))
        assert gate.is_wanted
        for step in range(begin, begin + AHEAD):
            gate.enter(step)
            assert not done.done()
        assert not ran
        gate.enter(begin + AHEAD)
        assert ran == [threading.main_thread()]
        done.result(WAIT_S)
        assert not gate.is_wanted
        for step in range(begin + AHEAD + 1, 12):
            gate.enter(step)
        ran.clear()


def test_the_error_of_an_action_reaches_both_sides_and_those_who_come_later():
    background = Background()
    gate, bug = background.gate, RuntimeError("a bug")

    def action():
        raise bug

    done = background.run(action)
    for step in range(1, 1 + AHEAD):
        gate.enter(step)
    with pytest.raises(RuntimeError) as raised:
        gate.enter(1 + AHEAD)
    assert raised.value is bug
    assert done.exception(WAIT_S) is bug
    for late in (lambda: gate.run(lambda: None), lambda: gate.wait_for_step(WAIT_S)):
        with pytest.raises(RuntimeError) as raised:
            late()
        assert raised.value is bug


def test_close_frees_whoever_waits():
    background, ran = Background(), []
    done = background.run(lambda: ran.append(1))
    assert not background.gate.is_closed
    background.gate.close()
    assert background.gate.is_closed
    background.gate.close(RuntimeError("the first call counts"))
    assert isinstance(done.exception(WAIT_S), PeerLost)
    with pytest.raises(PeerLost, match="the epoch is over"):
        background.gate.run(lambda: ran.append(2))
    assert not ran


def test_each_that_hears_of_a_loss_gets_an_error_of_its_own():
    """One error raised twice would hold the frames of both, and the epoch's groups with them."""
    gate, lost = Background().gate, PeerLost("rank 1 is lost")
    gate.close(lost)
    heard = []
    for _ in range(2):
        with pytest.raises(PeerLost, match="rank 1 is lost") as raised:
            gate.wait_for_step(WAIT_S)
        heard.append(raised.value)
    assert len({id(error) for error in (lost, *heard)}) == 3


def test_an_error_of_the_barrier_leaves_the_action_undone():
    class Broken(AgreesAtOnce):
        def due(self, step):
            raise PeerLost("rank 1 is gone")

    background, ran = Background(), []
    barrier: Any = Broken()
    background.gate.open(barrier)
    done = background.run(lambda: ran.append(1))
    with pytest.raises(PeerLost, match="rank 1 is gone"):
        background.gate.enter(1)
    assert not ran
    background.gate.close()  # as the step loop does, which leaves the epoch
    assert isinstance(done.exception(WAIT_S), PeerLost)


def test_run_before_open_is_a_bug():
    with pytest.raises(RuntimeError, match="not open"):
        StepGate(lambda: None).run(lambda: None)


def test_wait_for_step_ends_with_the_next_step_the_time_or_the_epoch():
    background = Background()
    gate = background.gate
    gate.wait_for_step(0.01)  # no step comes: the time ends it
    waits = background.start(lambda: gate.wait_for_step(1000 * WAIT_S))
    for step in range(1, 1_000_000):
        gate.enter(step)
        if waits.done():
            break
    waits.result(WAIT_S)
    waits = background.start(lambda: gate.wait_for_step(1000 * WAIT_S))
    gate.close()
    assert isinstance(waits.exception(WAIT_S), PeerLost)
