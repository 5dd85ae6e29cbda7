"""Balance, its bound on moves, and whether moving pays: small cases by hand, and what each mistake is told."""

import numpy as np
import pytest

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.balance import ALGORITHMS, balance, warm_up
from elastic_moe.placement.balance.moves import steps_within
from elastic_moe.placement.balancedness import MoveCost, balancedness, max_over_mean, rank_loads, worth_moving
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.topology import Topology

FOUR = Topology.uniform(4, 2)


def skews(placement, loads):
    return max_over_mean(rank_loads(placement.slots, np.array(loads), placement.slots_per_rank)).tolist()


@pytest.mark.parametrize(
    ("loads", "slots", "skew"),
    [
        ([[1, 1, 1, 1]], 1, 1.0),
        ([[4, 3, 2, 1, 4, 3, 2, 1]], 2, 1.0),  # heavy with light
        ([[6, 1, 1, 2, 2, 2, 2]], 2, 1.0),  # 6 has two copies of 3
        ([[8, 1, 1, 1, 1]], 2, 1.0),  # 8 is on every rank
        ([[8, 0, 0, 0]], 1, 4.0),  # nothing to be done
        ([[0, 0, 0, 0]], 2, 1.0),
    ],
)
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_loads_that_can_be_evened_are(loads, slots, skew, algorithm):
    assert skews(balance(np.array(loads), FOUR, slots, algorithm=algorithm), loads) == pytest.approx([skew], abs=0.01)


def test_layers_are_balanced_each_for_itself():
    loads = [[6, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 6]]
    placement = balance(np.array(loads), FOUR, 2, version=3, epoch=4)
    assert (placement.copies == [[2, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 2]]).all()
    assert (placement.version, placement.epoch) == (3, 4)


def test_copies_are_on_different_nodes():
    placement = balance(np.array([[6, 1, 1, 1, 1, 1, 1]]), FOUR, 2)
    assert {slot // 4 for slot in placement.slots_of(0, 0).tolist()} == {0, 1}


def test_balance_goes_before_nodes_beyond_the_tolerance():
    """Even loads need every expert twice; node 1 has two of the eight slots."""
    loads = np.array([[4, 4, 4, 4]])
    placement = balance(loads, Topology((0, 0, 0, 1)), 2)
    assert skews(placement, loads) == [1.0]
    assert (placement.copies == 2).all()


def test_few_moves_from_the_current_placement():
    loads = np.array([[4, 3, 2, 1, 1, 2, 3, 4]])
    current = np.array([[0, 7, 1, 6, 2, 5, 3, 4]])  # 8, 6, 4, 2
    new = balance(loads, FOUR, 2, current=current)
    assert skews(new, loads) == [1.0]
    assert (new.slots != current).sum() == 4


def test_an_even_placement_stays():
    current = balance(np.array([[4, 3, 2, 1, 4, 3, 2, 1]]), FOUR, 2)
    assert balance(np.array([[4, 3, 2, 1, 4, 3, 2, 1]]), FOUR, 2, current=current).hash == current.hash


def test_the_bound_takes_the_moves_with_the_most_gain():
    loads = np.array([[10, 10, 1, 1], [6, 6, 5, 5]])  # both layers can swap, the first gains more
    current = np.array([[0, 1, 2, 3]] * 2)
    two = Topology.uniform(2)
    new = balance(loads, two, 2, current=current, max_moves=2)
    assert (new.slots != current).sum(axis=1).tolist() == [2, 0]
    assert (balance(loads, two, 2, current=current, max_moves=1).slots == current).all()
    assert (balance(loads, two, 2, current=current).slots != current).sum(axis=1).tolist() == [2, 2]


def test_steps_within_a_bound():
    trail = np.array([[[0, 100], [1, 95], [2, 60], [4, 59]], [[1, 100], [2, 90], [2, 90], [2, 90]]])
    unit = np.ones(2)
    steps = np.array([3, 1])
    #  bound 1 is used up by the coverage of layer 1; 2 moves gain 20 each in layer 0, then 10, then 0.5
    assert [steps_within(bound, trail, steps, unit).tolist() for bound in (0, 1, 2, 3, 4, 6)] == [
        [0, 0],
        [0, 0],
        [0, 1],
        [2, 0],
        [2, 1],
        [3, 1],
    ]


@pytest.mark.parametrize(
    ("trail", "max_moves", "allowed"),
    [
        ([[0, 100], [1, 100]], 5, 0),  # no gain, no step
        ([[0, 100], [1, 99]], 5, 1),
        ([[0, 100], [1, 89], [2, 79]], 1, 1),  # 11 for the first move, 10 for the second
        ([[0, 100], [3, 40], [4, 35]], 2, 0),  # the cheap second step is none without the first
        ([[0, 100], [3, 40], [4, 35]], 3, 1),
        ([[0, 100], [0, 95], [1, 94]], 0, 1),  # a step may cost nothing
        ([[2, 100], [3, 90]], 2, 0),  # coverage has used up the bound
        ([[2, 100], [3, 90]], 1, 0),  # and more
        ([[2, 100], [1, 90]], 1, 1),  # a step may take a move back
        ([[2, 100], [3, 90]], 3, 1),
        ([[0, 100], [1, 110], [2, 60]], 2, 2),  # worse at first
        ([[0, 100], [1, 110], [2, 60]], 1, 0),
    ],
)
def test_steps_of_one_layer_within_a_bound(trail, max_moves, allowed):
    found = steps_within(max_moves, np.array([trail]), np.array([len(trail) - 1]), np.ones(1))
    assert found.tolist() == [allowed]


def test_gains_count_in_the_unit_of_each_layer():
    """Layer 1 loses more of its load for a move, though less in its own numbers."""
    trail = np.array([[[0, 1000], [1, 900]], [[0, 100], [1, 80]]])
    assert steps_within(1, trail, np.array([1, 1]), np.array([0.001, 0.01])).tolist() == [0, 1]
    assert steps_within(1, trail, np.array([1, 1]), np.array([0.001, 0.001])).tolist() == [1, 0]


def test_a_lost_rank_is_covered_with_the_fewest_moves():
    current = np.array([[0, 1, 2, 3, 0, 1, -1, -1]])
    new = balance(np.ones((1, 4)), FOUR, 2, alive=[0, 2, 3], current=current, max_moves=0)
    assert new.slots[0, 2:4].tolist() == [-1, -1]
    assert (new.slots != current).sum() == 4
    assert (new.copies >= 1).all()


def test_capacity_limits_a_rank():
    placement = balance(np.ones((1, 4)), Topology.uniform(2), 4, capacity=[1, 3])
    assert (placement.slots[0] != -1).tolist() == [True, False, False, False, True, True, True, False]


def test_one_rank_holds_each_expert_once():
    assert sorted(balance(np.ones((1, 2)), Topology.uniform(1), 4).slots[0].tolist()) == [-1, -1, 0, 1]


def test_groups_go_to_nodes():
    loads = np.array([[8, 8, 1, 1, 4, 4, 5, 5]])
    placement = balance(loads, FOUR, 2, num_groups=4)
    nodes = {e: {slot // 4 for slot in placement.slots_of(0, e).tolist()} for e in range(8)}
    assert nodes[0] == nodes[1] == nodes[2] == nodes[3]
    assert nodes[4] == nodes[5] == nodes[6] == nodes[7]
    assert balance(loads, FOUR, 2, num_groups=1).hash == balance(loads, FOUR, 2).hash  # 1 is no multiple of 2 nodes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loads": np.ones(4)}, r"loads of shape \(4,\) are not \[L, E\]"),
        ({"loads": np.array([[1.0, np.nan, 1, 1]])}, "loads must be finite and >= 0"),
        ({"loads": -np.ones((1, 4))}, "loads must be finite and >= 0"),
        ({"slots_per_rank": 0}, "slots_per_rank=0 must be 1 or more"),
        ({"alive": [0, 7]}, r"alive names ranks \[7\], but the seats are 0..3"),
        ({"capacity": [1, 1, 1]}, r"capacity must be 4 numbers of slots, 0..2 each"),
        ({"capacity": [1, 1, 1, 3]}, r"capacity must be 4 numbers of slots, 0..2 each"),
        ({"current": np.zeros((1, 4), int)}, r"current of shape \(1, 4\) is not \[L, R \* S\] = \[1, 8\]"),
        ({"current": np.full((1, 8), 4)}, "current names experts outside -1..3"),
        ({"max_moves": 3}, "max_moves=3 must be 0 or more, with current and the algorithm search"),
        ({"current": np.zeros((1, 8), int), "max_moves": -1}, "max_moves=-1 must be 0 or more"),
        ({"num_groups": 3}, "num_groups=3 must divide the 4 experts"),
        ({"target": 0.9}, "target=0.9 must be 1 to 1000"),
        ({"algorithm": "best"}, "algorithm 'best' must be one of search, deepseek"),
    ],
)
def test_a_mistake_is_told_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        balance(**{"loads": np.ones((1, 4)), "topology": FOUR, "slots_per_rank": 2} | changes)
    assert "\n" not in str(refused.value)


def test_too_few_slots():
    with pytest.raises(NotEnoughSlots, match="3 live ranks with 5 usable slots hold 5 of 6 experts, 1 slots short"):
        balance(np.ones((1, 6)), FOUR, 2, alive=[0, 1, 2], capacity=[2, 2, 1, 2])
    with pytest.raises(NotEnoughSlots, match="no live rank is left to hold 6 experts"):
        balance(np.ones((1, 6)), FOUR, 2, alive=[])


def test_warm_up_leaves_nothing_to_compile():
    from elastic_moe.placement.balance import layer as balance_layer
    from elastic_moe.placement.balance import search as balance_search

    warm_up()
    kernels = [balance_search.solve, balance_search.replicate, balance_search.pack, balance_layer.keep_in_place]
    before = [len(kernel.signatures) for kernel in kernels]
    current = balance(np.ones((3, 4)), FOUR, 2)
    balance(np.array([[1, 2, 3, 4]] * 3), FOUR, 2, current=current, alive=[0, 1], max_moves=1)
    balance(np.ones((1, 4)), FOUR, 2, num_groups=2, algorithm="deepseek", current=current.slots[:1])
    assert [len(kernel.signatures) for kernel in kernels] == before


def test_rank_loads_share_an_expert_by_its_copies():
    placement = Placement(np.array([[0, 1, 0, -1]]), 2, 2)
    loads = np.array([[6, 1]])
    assert rank_loads(placement.slots, loads, 2).tolist() == [[4, 3]]
    assert balancedness(placement.slots, loads, 2).tolist() == [3.5 / 4]
    assert balancedness(placement.slots, np.zeros((1, 2)), 2).tolist() == [1.0]
    assert max_over_mean(np.array([[4.0, 2.0, 0.0]]), np.array([True, True, False])).tolist() == [4 / 3]


def test_loads_below_one_are_loads():
    assert max_over_mean(np.array([[0.5, 0.25], [0.0, 0.0]])).tolist() == [4 / 3, 1.0]


def test_a_rank_that_holds_anything_in_any_layer_counts():
    slots = np.array([[0, 1, 0, -1, -1, -1], [0, 1, -1, -1, -1, -1]])
    assert balancedness(slots, np.array([[2, 2], [1, 1]]), 2).tolist() == [2 / 3, 0.5]


def test_an_expert_in_no_slot_is_no_load_of_anybody():
    assert rank_loads(np.array([[0, -1], [-1, -1]]), np.array([[6, 5], [1, 1]]), 1).tolist() == [[6, 0], [0, 0]]


def test_the_bounds_of_a_cost_are_allowed():
    for allowed in (
        {"horizon_s": 0.0},
        {"expert_share": 0.0},
        {"expert_share": 1.0},
        {"slowdown": 0.0, "horizon_s": 1.0},
    ):
        MoveCost(**{"link_bytes_per_s": 0.5, "horizon_s": 1.0, "slowdown": 1.0} | allowed)
    assert (MoveCost(1.0, 1.0).expert_share, MoveCost(1.0, 1.0).slowdown) == (0.5, 0.05)


def test_what_gains_as_much_as_it_costs_stays():
    """Half of a step is experts: from 2 to 1 the steps get a quarter faster; a second of transfer costs one second."""
    for horizon_s, is_worth in ((5.0, False), (5.01, True)):
        cost = MoveCost(link_bytes_per_s=100.0, horizon_s=horizon_s, expert_share=0.5, slowdown=1.0)
        assert worth_moving(np.array([2.0]), np.array([1.0]), 100.0, cost)[0] is is_worth


COST = MoveCost(link_bytes_per_s=1e9, horizon_s=60.0, expert_share=0.5, slowdown=0.1)


@pytest.mark.parametrize(
    ("old", "new", "moved", "is_worth", "reason"),
    [
        (1.5, 1.0, 1e9, True, "steps +16.67% faster for 60 s gain 9.83 s; 1 s of transfer cost 0.1 s"),
        (1.5, 1.0, 0, False, "nothing moves"),
        (1.01, 1.0, 30e9, False, "steps +0.50% faster for 60 s gain 0.149 s; 30 s of transfer cost 3 s"),
        (1.5, 1.0, 100e9, False, "steps +16.67% faster for 60 s gain 0 s; 100 s of transfer cost 10 s"),
        (1.0, 1.1, 1, False, "steps -5.00% faster"),
    ],
)
def test_moving_has_to_pay(old, new, moved, is_worth, reason):
    found = worth_moving(np.full(3, old), np.full(3, new), moved, COST)
    assert found[0] is is_worth
    assert found[1].startswith(reason)


@pytest.mark.parametrize(
    "wrong",
    [
        {"link_bytes_per_s": 0.0},
        {"link_bytes_per_s": -1.0},
        {"horizon_s": -1.0},
        {"expert_share": 2.0},
        {"expert_share": -0.1},
        {"slowdown": 1.1},
        {"slowdown": -0.1},
    ],
)
def test_a_cost_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        MoveCost(**{"link_bytes_per_s": 1.0, "horizon_s": 1.0} | wrong)
