"""Whether a round moves anything, and where to: `decide`, pure, on placements small enough to check by eye."""

import msgspec
import numpy as np
import pytest

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import Decision, arrivals, decide
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology

TWO_RANKS = Topology.uniform(2)
UNEVEN = np.array([[10.0, 10.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
"""Of the first layer rank 0 has 20 of 22 tokens, when experts lie in order: max/mean 1.818; the second is even."""


def in_order(version=3):
    return Placement(np.tile(np.arange(4), (2, 1)), 4, 2, version=version)


def decided(loads, *, asked=False, current=None, expert_bytes=1000, **settings) -> Decision:
    current = current or in_order()
    return decide(
        np.array(loads), current, [0, 1], TWO_RANKS, EplbConfig(**settings), expert_bytes, asked=asked, epoch=7
    )


def slots_of(decision):
    return np.frombuffer(decision.slots, dtype=np.int32).reshape(2, 4)


@pytest.mark.parametrize("asked", [False, True])
def test_without_tokens_nothing_moves(asked):
    decision = decided(np.zeros((2, 4)), asked=asked)
    assert decision == Decision("no tokens were counted yet")


def test_over_the_threshold_it_moves():
    decision = decided(UNEVEN, threshold=1.05)
    assert decision.max_mean == pytest.approx((20 / 11 + 1) / 2)
    assert decision.max_mean_after == pytest.approx(1.0)
    assert decision.balancedness == [0.55, 1.0]
    slots = slots_of(decision)
    assert slots[1].tolist() == [0, 1, 2, 3], "an even layer stays"
    assert sorted(slots[0]) == [0, 1, 2, 3]
    assert [len({0, 1} & set(rank)) for rank in slots[0].reshape(2, 2).tolist()] == [1, 1], "the busy ones are apart"
    assert (slots[0] != np.arange(4)).sum() == 2, "two experts change places"
    assert not decision.failed
    assert decision == decided(UNEVEN, threshold=1.05), "the same for the same arguments"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=Decision) == decision


def test_what_is_expected_afterwards_need_not_be_perfect_and_experts_may_have_no_tokens():
    decision = decided([[9.0, 3.0, 0.0, 0.0]] * 2)
    assert decision.max_mean == pytest.approx(2.0)
    assert decision.max_mean_after == pytest.approx(1.5)


def test_within_the_threshold_it_stays_unless_asked():
    kept = decided(UNEVEN, threshold=1.5)
    assert (kept.slots, kept.max_mean_after) == (b"", kept.max_mean)
    assert kept.reason == "max/mean 1.409 is within eplb.threshold=1.5"
    assert slots_of(decided(UNEVEN, threshold=1.5, asked=True)).shape == (2, 4)


def test_what_does_not_pay_stays_unless_asked():
    slow = {"link_gb_per_s": 1e-6, "interval_s": 1.0, "expert_bytes": 10_000}
    kept = decided(UNEVEN, **slow)
    assert kept.slots == b""
    assert kept.reason.startswith("max/mean 1.409 -> 1.000 does not pay: ")
    assert slots_of(decided(UNEVEN, asked=True, **slow)).shape == (2, 4)


def test_asked_where_nothing_is_better_it_stays():
    decision = decided(np.ones((2, 4)), asked=True)
    assert (decision.slots, decision.reason) == (b"", "no better placement than the present one, max/mean 1.000")


def test_arrivals_are_what_a_rank_did_not_hold():
    old = Placement(np.array([[0, 1, 2, 3]]), 4, 2)
    assert arrivals(old, old) == [0, 0]
    assert arrivals(old, Placement(np.array([[1, 0, 3, 2]]), 4, 2)) == [0, 0], "its own, in other slots"
    assert arrivals(old, Placement(np.array([[0, 2, 1, 3]]), 4, 2)) == [1, 1]
    three = Placement(np.array([[0, 1, EMPTY, 2, 3, EMPTY]]), 4, 3)
    assert arrivals(three, Placement(np.array([[0, 1, 2, 2, 3, 2]]), 4, 3)) == [1, 0], "copies on one rank are one"
