"""StepBarrier on gloo ranks: skewed, slow, dead and silent ranks; used again and again; two at once."""

import os
import signal
import threading
import time

import pytest
import torch
from support.ranks import run_ranks

from elastic_moe.control.step_gate import StepGate
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.membership.launch import SeatStart
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.membership.rendezvous import Seat, meet
from elastic_moe.group.step_barrier import MARGIN, StepBarrier


def build(launch, timeout_s=20.0):
    """The store that serves the groups lives in the seat: it is returned to be kept."""
    seat = Seat(SeatStart(launch))
    view = meet(launch, seat, 30)
    groups = EpochGroups(view, launch.rank, torch.device("cpu"), Deadlines.of(launch.world_size, exchange_s=timeout_s)).build()
    return seat, groups, StepBarrier(groups.open("steps", timeout_s))


def agreed_step(barrier, step, limit=1000):
    """Take steps, one after the other, until one is due."""
    while not barrier.due(step):
        step += 1
        assert step < limit
    return step


def skewed(launch, begins):
    _seat, groups, barrier = build(launch)
    steps = []
    for turn in range(3):
        groups.control.barrier()
        step = begins[launch.rank] + 100 * turn
        barrier.begin(step)
        steps.append(agreed_step(barrier, step))
        assert barrier._agreed is None
    return steps


def test_skewed_ranks_agree_on_the_last_ones_step_and_again():
    begins = [3, 17, 5, 4]
    assert run_ranks(skewed, 4, begins) == [[17 + 100 * turn + MARGIN for turn in range(3)]] * 4


def slow(launch):
    """Rank 1 comes late; the others step on meanwhile, as far as they may, and wait only there."""
    _seat, groups, barrier = build(launch)
    if launch.rank == 1:
        groups.control.barrier()
        barrier.begin(1)
        return agreed_step(barrier, 1), 0.0
    barrier.begin(1)
    begin = time.monotonic()
    assert not barrier.due(1)
    assert not barrier.due(1 + MARGIN - 1)
    free_s = time.monotonic() - begin
    assert not barrier._agreed.done()
    groups.control.barrier()
    return agreed_step(barrier, 1 + MARGIN), free_s


def test_a_slow_rank_is_waited_for_only_when_it_must_be():
    ends = run_ranks(slow, 3)
    assert [step for step, _ in ends] == [1 + MARGIN] * 3
    assert all(free_s < 1.0 for _, free_s in ends)


def dead(launch):
    _seat, groups, barrier = build(launch)
    groups.control.barrier()
    if launch.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier.begin(5)
    with pytest.raises(PeerLost, match="group steps of epoch"):
        agreed_step(barrier, 5)
    return True


def test_a_dead_rank_is_told_of():
    assert run_ranks(dead, 3, ends={2: -signal.SIGKILL})[:2] == [True, True]


def silent(launch):
    """Nobody hears of a rank that never begins, but the deadline of the group ends the wait."""
    _seat, groups, barrier = build(launch, timeout_s=1.0)
    groups.control.barrier()
    if launch.rank == 0:
        time.sleep(3.0)  # neither dead nor there
        return True
    barrier.begin(1)
    with pytest.raises(PeerLost):
        agreed_step(barrier, 1)
    return True


def test_a_silent_rank_meets_the_deadline():
    assert run_ranks(silent, 2) == [True, True]


def test_two_at_once_are_refused():
    assert run_ranks(twice, 2) == [True, True]


def twice(launch):
    _seat, groups, barrier = build(launch)
    barrier.begin(1)
    with pytest.raises(RuntimeError, match="agreed on already"):
        barrier.begin(1)
    step = agreed_step(barrier, 1)
    barrier.begin(step + 1)
    with pytest.raises(RuntimeError, match="step 6 was agreed on, but step 7 has come"):
        barrier.due(step + MARGIN + 2)
    groups.control.barrier()
    return True


def gated(launch):
    """A gate in front of two step loops that run at different speeds: the action runs before the same step."""
    _seat, groups, barrier = build(launch)
    gate, ran, stop = StepGate(lambda: None), [], threading.Event()
    gate.open(barrier)
    step = 0

    def work():
        for _ in range(5):
            gate.run(lambda: ran.append(step))
        groups.control.barrier()
        stop.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not stop.wait(0.001 * (1 + launch.rank)):
        step += 1
        gate.enter(step)
    thread.join()
    return ran


def test_a_gate_runs_its_action_before_the_same_step_on_all():
    first, *others = run_ranks(gated, 3)
    assert len(first) == 5
    assert first == sorted(set(first))
    assert all(other == first for other in others)
