"""What holds for every balanced placement, whatever the loads, the seats, and what is held."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.placement.balance import ALGORITHMS, balance
from elastic_moe.placement.balancedness import rank_loads
from elastic_moe.placement.placement import EMPTY, count_experts
from elastic_moe.placement.topology import Topology


def numbers(draw, *shape):
    """0..255 in an array: one draw of bytes, which is quick and shrinks to zeros."""
    size = int(np.prod(shape))
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8).reshape(shape).astype(np.int64)


@st.composite
def clusters(draw, all_alive=False):
    """Keyword arguments of `balance`: dead ranks, uneven rooms, any nodes, loads of every kind."""
    num_ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    alive = set(range(num_ranks)) if all_alive else draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    capacity = None
    if not all_alive and draw(st.booleans()):
        capacity = (numbers(draw, num_ranks) % (slots + 1)).tolist()
        capacity[min(alive)] = slots
    room = sum(slots if capacity is None else capacity[rank] for rank in alive)
    num_experts, num_layers = draw(st.integers(1, room)), draw(st.integers(1, 3))
    loads = numbers(draw, num_layers, num_experts) ** draw(st.sampled_from([0.5, 1.0, 5.0]))
    loads[[*draw(st.sets(st.integers(0, num_layers - 1)))]] = 0.0
    return {
        "loads": loads,
        "topology": Topology(tuple(int(node) for node in numbers(draw, num_ranks) % 4)),
        "slots_per_rank": slots,
        "alive": alive,
        "capacity": capacity,
    }


@st.composite
def held_clusters(draw):
    """The same with anything held: uncovered experts, copies that share a rank, holes."""
    case = draw(clusters())
    num_layers, num_experts = case["loads"].shape
    shape = num_layers, case["topology"].num_ranks * case["slots_per_rank"]
    return case | {"current": numbers(draw, *shape) % (num_experts + 1) + EMPTY}


@st.composite
def balanced_clusters(draw):
    """The same with a placement held that was balanced for other loads."""
    case = draw(clusters())
    other = numbers(draw, *case["loads"].shape)
    return case | {"current": balance(**(case | {"loads": other}))}


def rows_of_ranks(slots, slots_per_rank):
    return slots.reshape(len(slots), -1, slots_per_rank)


def num_moves(old, new, slots_per_rank):
    """Experts that a rank holds and did not hold."""
    pairs = zip(rows_of_ranks(old, slots_per_rank), rows_of_ranks(new, slots_per_rank), strict=True)
    return sum(len(set(b) - set(a) - {EMPTY}) for rows in pairs for a, b in zip(*rows, strict=True))


def check(placement, case, apart=True):
    num_experts = case["loads"].shape[1]
    assert (count_experts(placement.slots, num_experts) >= 1).all()
    for rank in range(case["topology"].num_ranks):
        room = case["slots_per_rank"] if case["capacity"] is None else case["capacity"][rank]
        block = placement.of_rank(rank)
        assert (block[:, room if rank in case["alive"] else 0 :] == EMPTY).all()
        for row in block:
            filled = row[row != EMPTY].tolist()
            assert not apart or len(set(filled)) == len(filled), "an expert twice on one rank"
    for (layer, expert), copies in np.ndenumerate(placement.copies):
        assert (placement.slots[layer, placement.slots_of(layer, expert)] == expert).all()
        assert len(placement.slots_of(layer, expert)) == copies


@given(clusters(), st.sampled_from(sorted(ALGORITHMS)))
@settings(max_examples=300, deadline=None)
def test_from_nothing(case, algorithm):
    new = balance(**case, algorithm=algorithm)
    check(new, case, apart=algorithm != "deepseek")
    assert balance(**case | {"alive": sorted(case["alive"], reverse=True)}, algorithm=algorithm).hash == new.hash
    doubled = balance(**case | {"loads": case["loads"] * 2}, algorithm=algorithm)
    assert doubled.hash == new.hash, "the unit of the loads does not matter"


@given(clusters(all_alive=True))
@settings(max_examples=300, deadline=None)
def test_from_nothing_every_slot_is_used_that_can_be(case):
    new = balance(**case)
    num_ranks, num_experts = case["topology"].num_ranks, case["loads"].shape[1]
    useful = min(num_ranks * case["slots_per_rank"], num_ranks * num_experts)
    filled = (new.slots != EMPTY).sum(axis=1)
    assert (filled <= useful).all()
    if num_experts >= case["slots_per_rank"] * num_ranks:
        assert (filled == useful).all()


@given(held_clusters())
@settings(max_examples=500, deadline=None)
def test_from_anything_held(case):
    new = balance(**case)
    check(new, case)
    assert balance(**case).hash == new.hash
    slots, live = case["slots_per_rank"], np.isin(np.arange(case["topology"].num_ranks), list(case["alive"]))
    old = rows_of_ranks(case["current"], slots)
    for layer, rows in enumerate(rows_of_ranks(new.slots, slots)):
        for rank in np.flatnonzero(live):
            room = slots if case["capacity"] is None else case["capacity"][rank]
            for slot, expert in enumerate(old[layer, rank, :room]):
                kept = rows[rank] == expert
                if expert != EMPTY and kept.any() and (old[layer, rank, :room] == expert).sum() == 1:
                    assert kept[slot], "an expert that its rank keeps stays in its slot"


@given(held_clusters())
@settings(max_examples=300, deadline=None)
def test_coverage_comes_before_the_bound(case):
    """What has to be placed is: each uncovered expert once. Beyond that nothing moves."""
    case = case | {"capacity": None}
    new = balance(**case, max_moves=0)
    check(new, case)
    slots = case["slots_per_rank"]
    live = np.isin(np.arange(case["topology"].num_ranks), list(case["alive"])).repeat(slots)
    held = np.where(live, case["current"], EMPTY)
    uncovered = (count_experts(held, case["loads"].shape[1]) == 0).sum()
    assert num_moves(held, new.slots, slots) == uncovered


MOST_ROUNDS = 4
"""In which the search comes to rest: what one round could not better, the next may, from where that ended."""


@given(balanced_clusters(), st.integers(0, 12))
@settings(max_examples=500, deadline=None)
def test_no_worse_than_doing_nothing_within_the_bound(case, max_moves):
    old, slots = case["current"], case["slots_per_rank"]
    before = rank_loads(old.slots, case["loads"], slots).max(axis=1)
    for bound in (max_moves, None):
        new = balance(**case, max_moves=bound)
        check(new, case)
        after = rank_loads(new.slots, case["loads"], slots).max(axis=1)
        assert (after <= before * (1 + 1e-5)).all()
        assert bound is None or num_moves(old.slots, new.slots, slots) <= bound
        idle = ~case["loads"].any(axis=1)
        assert (new.slots[idle] == old.slots[idle]).all(), "a layer without load moved"
    for _ in range(MOST_ROUNDS):
        old, new = new, balance(**case | {"current": new})
        if (old.slots == new.slots).all():
            return
    raise AssertionError(f"still moves experts after {MOST_ROUNDS} rounds under the same loads")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_two_copies_of_each_are_on_two_nodes(ranks_per_node, num_layers, slots):
    topology = Topology.uniform(2 * ranks_per_node, ranks_per_node)
    new = balance(np.ones((num_layers, ranks_per_node * slots)), topology, slots)
    for (layer, expert), copies in np.ndenumerate(new.copies):
        nodes = {topology.nodes[slot // slots] for slot in new.slots_of(layer, expert).tolist()}
        assert (len(nodes), copies) == (2, 2)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from(sorted(ALGORITHMS)))
@settings(max_examples=200, deadline=None)
def test_groups_stay_on_a_node(data, num_nodes, per_node, in_group, algorithm):
    num_groups = num_nodes * per_node
    num_experts = num_groups * in_group
    topology = Topology.uniform(num_nodes * 2, 2)
    slots = -(-per_node * in_group // 2) + data.draw(st.integers(0, 2))
    current = None
    for _ in range(3):
        loads = numbers(data.draw, 2, num_experts)
        new = balance(loads, topology, slots, num_groups=num_groups, current=current, algorithm=algorithm)
        homes = set()
        for (layer, expert), _ in np.ndenumerate(new.copies):
            nodes = {slot // slots // 2 for slot in new.slots_of(layer, expert).tolist()}
            homes.add((layer, expert // in_group, *nodes))
        assert len(homes) == 2 * num_groups, "one node for each group of each layer"
        current = new


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_an_unknown_rank_is_refused(case):
    with pytest.raises(ValueError, match="alive names ranks"):
        balance(**case | {"alive": {99}})
