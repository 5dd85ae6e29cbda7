"""Chunks of a change of placement: coverage in between, budgets, and the goal at the end."""

from collections import Counter

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_moe.placement.chunks import chunks, closed_sets
from elastic_moe.placement.placement import EMPTY, Placement, count_experts


@st.composite
def changes(draw):
    """(current [L, P], goal) that cover E experts in R x S slots of L layers."""
    num_ranks, slots_per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    num_slots = num_ranks * slots_per_rank
    num_experts, num_layers = draw(st.integers(1, num_slots)), draw(st.integers(1, 3))

    def layer():
        spare = draw(
            st.lists(
                st.integers(EMPTY, num_experts - 1), min_size=num_slots - num_experts, max_size=num_slots - num_experts
            )
        )
        return draw(st.permutations([*range(num_experts), *spare]))

    current, goal = (np.array([layer() for _ in range(num_layers)], dtype=np.int32) for _ in range(2))
    return current, Placement(goal, num_experts, slots_per_rank)


@example((np.array([[1, 2, 0, 0]]), Placement(np.array([[EMPTY, 1, 2, 0]]), 3, 4)), 1, 1)
@given(changes(), st.integers(1, 4), st.integers(1, 3))
def test_every_chunk_covers_and_keeps_its_budget(change, max_received, max_layers):
    current, goal = change
    before = current
    for slots in chunks(current, goal, max_received, max_layers):
        assert (count_experts(slots, goal.num_experts) > 0).all()
        layers, targets = np.nonzero(slots != before)
        assert 1 <= len(set(layers.tolist())) <= max_layers
        arrivals = Counter((targets[slots[layers, targets] != EMPTY] // goal.slots_per_rank).tolist())
        for rank, count in arrivals.items():
            if count > max_received:  # one closed set asks for it
                row = goal.slots[layers[0]]
                sets = closed_sets(before[layers[0]], row, goal.num_experts)
                received = [[t // goal.slots_per_rank for t in one if row[t] != EMPTY].count(rank) for one in sets]
                assert count in received
        before = slots
    assert np.array_equal(before, goal.slots)


@given(changes())
def test_closed_sets_hold_each_changed_slot_once(change):
    current, goal = change
    for slots, wanted in zip(current, goal.slots, strict=True):
        sets = closed_sets(slots, wanted, goal.num_experts)
        assert sorted(slot for one in sets for slot in one) == np.flatnonzero(slots != wanted).tolist()
        seen = slots.copy()
        for one in sets:
            seen[one] = wanted[one]
            assert set(range(goal.num_experts)) <= set(seen.tolist())
