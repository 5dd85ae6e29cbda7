"""The balancer of a rank that is alone: when rounds come, whom they wake, and what is left when the epoch is over."""

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.control.rebalancer import Rebalancer
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.placement.loads import LoadCounter
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology
from elastic_moe.transport.staging import GroupStaging
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.reserves import Reserves

WAIT_S = 20.0
VIEW = View(1, (Member(0, 0, "i", 1, "host", "", ""),))


class Alone:
    """`membership.groups.Group` of one rank."""

    size, rank, timeout_s = 1, 0, WAIT_S

    def all_reduce_sum_array(self, values):
        return np.array(values)

    def broadcast(self, message):
        return message

    def post(self, sends, receives):
        assert not sends
        assert not receives
        return SimpleNamespace(wait=lambda: None)


class Harness:
    """A balancer, and the step loop around it."""

    def __init__(self, mode, interval_s):
        load_balancer()
        placement = Placement(np.array([[0, 1]]), 2, 2)
        cpu = torch.device("cpu")
        self.counter = LoadCounter(1, 2, cpu)
        registry = PlacementRegistry(placement, 0, Topology.uniform(1), cpu)
        self.errors = []
        self.balancer = Rebalancer(
            EplbConfig(mode=mode, interval_s=interval_s), 0, registry, self.counter, lambda: 0, GroupStaging(),
            Deadlines(),
            wake=lambda: None, committed=lambda _: None, on_error=self.errors.append,
        )  # fmt: skip
        self.begin_epoch()

    def begin_epoch(self):
        groups: Any = SimpleNamespace(open=lambda name, timeout_s: Alone())
        store: Any = SimpleNamespace(expert_bytes=8)
        self.balancer.begin_epoch(VIEW, groups, store, Reserves(Disk(lambda *_: 0)), changed=False)
        self._step = 0

    def report(self, *, steps):
        """The next report; with `steps` the loop steps until it has come."""
        deadline = time.monotonic() + WAIT_S
        while steps and self.balancer.reports.empty():
            self._step += 1
            self.balancer.enter_step(self._step)
            assert time.monotonic() < deadline
            assert not self.errors
        return self.balancer.reports.get(timeout=WAIT_S)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_who_sleeps_is_not_woken_by_rounds_without_new_tokens(mode):
    harness = Harness(mode, interval_s=0.01)
    assert harness.report(steps=True).reason == "no tokens were counted yet"
    for _ in range(3):
        assert harness.report(steps=False).reason == "no tokens since the last round"
        assert not harness.balancer.wants_steps
    harness.counter.count(0, torch.tensor([[0], [1]]))
    while (report := harness.report(steps=True)).reason == "no tokens since the last round":
        pass
    assert (report.outcome, report.max_mean_before) == ("kept", 1.0)
    harness.balancer.end_epoch()


def test_a_request_is_answered_before_the_interval_is_over():
    harness = Harness("async", interval_s=1000.0)
    harness.balancer.request("first")
    assert harness.report(steps=True).ops == ("first",)
    harness.balancer.request("second")
    report = harness.report(steps=True)
    assert (report.ops, report.number, report.outcome) == (("second",), 2, "kept")
    assert report.reason != "no tokens since the last round", "who asks gets an answer of his own"
    harness.balancer.end_epoch()


def test_what_is_asked_when_the_epoch_is_over_waits_for_the_next():
    others = set(threading.enumerate())
    harness = Harness("async", interval_s=1000.0)
    (thread,) = set(threading.enumerate()) - others
    harness.balancer.end_epoch()
    harness.balancer.request("late")
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert harness.balancer.take_ops() == ["late"]


def test_an_epoch_begins_when_what_the_last_one_had_under_way_is_over():
    harness = Harness("async", interval_s=1000.0)
    entered, go_on = threading.Event(), threading.Event()

    class Slow(GroupStaging):
        def enter(self, view):
            entered.set()
            assert go_on.wait(WAIT_S)

    harness.balancer.end_epoch()
    harness.balancer.staging = Slow()
    harness.begin_epoch()
    assert entered.wait(WAIT_S)
    harness.balancer.staging = again = Mock()
    harness.begin_epoch()
    time.sleep(0.05)
    assert not again.enter.called
    go_on.set()
    harness.balancer.request("op")
    assert harness.report(steps=True).ops == ("op",)
    assert again.enter.called
    harness.balancer.end_epoch()


def test_off_refuses():
    with pytest.raises(ValueError, match=r"eplb\.mode=off: start with eplb\.mode=async"):
        Harness("off", interval_s=1000.0).balancer.request("op")
