"""Each rule of the repair, on cases small enough to follow by hand. Slots are written rank by rank."""

import re

import numpy as np
import pytest

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.placement import EMPTY, initial_placement
from elastic_moe.placement.repair import grow, lower_bound_moves, only_alive, repair
from elastic_moe.placement.topology import Topology

_ = EMPTY


def fix(rows, num_experts, alive, *, topology=None, loads=None):
    """Repair `rows`, one list of slots per rank for each layer; returns the result in the same form."""
    grid = np.array(rows, dtype=np.int32)
    num_layers, num_ranks, slots = grid.shape
    topology = topology or Topology.uniform(num_ranks)
    held = grid.reshape(num_layers, -1)
    new = repair(held, num_experts, slots, alive, topology, version=7, epoch=3, loads=loads)
    assert (new.version, new.epoch) == (7, 3)
    return new.slots.reshape(grid.shape).tolist()


def test_nothing_is_lost_nothing_moves():
    rows = [[[0, 1], [1, 0], [_, _]]]
    assert fix(rows, 2, [0, 1, 2]) == rows


def test_a_dead_ranks_slots_become_empty_never_expert_0():
    assert fix([[[0, 1], [0, 1]]], 2, [1]) == [[[_, _], [0, 1]]]


def test_what_a_dead_rank_held_is_ignored_even_if_senseless():
    assert fix([[[99, -7], [0, 1]]], 2, [1]) == [[[_, _], [0, 1]]]


def test_a_lost_expert_takes_an_empty_slot_before_a_replicas():
    assert fix([[[2, _], [0, 1], [0, _]]], 3, [1, 2]) == [[[_, _], [0, 1], [0, 2]]]


def test_without_an_empty_slot_a_replica_gives_way_and_a_sole_copy_never():
    assert fix([[[2, _], [0, 1], [0, 3]]], 4, [1, 2]) == [[[_, _], [2, 1], [0, 3]]]


def test_empty_slots_first_then_replicas_in_one_layer():
    rows = [[[2, 3, _], [0, 1, _], [0, 4, 1]]]
    new = fix(rows, 5, [1, 2])[0]
    assert new == [[_, _, _], [3, 1, 2], [0, 4, 1]], "2 in the empty slot, 3 over the lowest replica"


def test_the_expert_with_most_copies_gives_way():
    rows = [[[3, _], [0, 1], [2, 0], [2, 4], [2, 4]]]
    assert fix(rows, 5, [1, 2, 3, 4]) == [[[_, _], [0, 1], [3, 0], [2, 4], [2, 4]]]


def test_copies_left_stay_on_different_nodes():
    topology = Topology((0, 1, 1, 2))
    # Expert 0 is on two nodes, expert 1 twice on node 1: losing one of expert 1 loses no fault domain.
    rows = [[[2, 3], [0, 1], [1, 4], [0, _]]]
    assert fix(rows, 4 + 1, [1, 2, 3], topology=topology) == [[[_, _], [0, 3], [1, 4], [0, 2]]]


def test_replicas_thin_out_where_they_are_densest():
    topology = Topology((0, 0, 0, 1, 2))
    rows = [[[0], [0], [0], [0], [1]]]
    new = fix(rows, 2, [0, 1, 2, 3], topology=topology)
    assert new == [[[1], [0], [0], [0], [_]]], "a copy stays on node 0 and on node 1"


def test_lost_experts_spread_over_the_ranks():
    rows = [[[0, 1, 2], [3, _, _], [4, _, _], [5, _, _]]]
    assert fix(rows, 6, [1, 2, 3]) == [[[_, _, _], [3, 0, _], [4, 1, _], [5, 2, _]]]


def test_the_rank_that_holds_least_gets_the_lost_expert():
    assert fix([[[3, _, _], [0, 1, _], [2, _, _]]], 4, [1, 2]) == [[[_, _, _], [0, 1, _], [2, 3, _]]]


def test_a_rank_that_shares_its_experts_counts_as_less_loaded():
    # Rank 1 holds three replicas (half a load each), rank 2 two sole copies: 1.5 against 2.
    rows = [[[5, _, _, _], [0, 1, 2, _], [3, 4, _, _], [0, 1, 2, _]]]
    assert fix(rows, 6, [1, 2, 3])[0] == [[_, _, _, _], [0, 1, 2, 5], [3, 4, _, _], [0, 1, 2, _]]


def test_the_heaviest_lost_expert_goes_to_the_least_loaded_rank():
    loads = np.array([[1.0, 9.0, 5.0, 2.0]])
    rows = [[[0, 1], [2, _], [3, _]]]
    assert fix(rows, 4, [1, 2], loads=loads) == [[[_, _], [2, 0], [3, 1]]]


def test_loads_outweigh_the_number_of_experts():
    loads = np.array([[10.0, 1.0, 1.0, 3.0]])
    rows = [[[3, _, _], [0, _, _], [1, 2, _]]]
    assert fix(rows, 4, [1, 2], loads=loads) == [[[_, _, _], [0, _, _], [1, 2, 3]]]


def test_an_overwritten_replica_hands_its_load_to_the_others():
    # Expert 3 overwrites 0 on rank 1, where 1 unit of load is left beside it. Now rank 3 carries all of expert 0:
    # without expert 1 it would keep 8 units, and rank 2 only 6, so expert 4 goes to rank 2.
    loads = np.array([[8.0, 8.0, 1.0, 4.0, 2.0, 6.0]])
    rows = [[[3, 4], [0, 2], [1, 5], [0, 1]]]
    assert fix(rows, 6, [1, 2, 3], loads=loads) == [[[_, _], [3, 2], [4, 5], [0, 1]]]


def test_idle_experts_spread_too():
    rows = [[[0, 1, 2], [3, _, _], [4, _, _], [5, _, _]]]
    new = fix(rows, 6, [1, 2, 3], loads=np.zeros((1, 6)))
    assert new == [[[_, _, _], [3, 0, _], [4, 1, _], [5, 2, _]]]


def test_layers_are_repaired_each_for_itself():
    rows = [[[0, 1], [2, _], [0, 1]], [[2, _], [0, 1], [0, _]], [[0, 1], [2, 1], [0, _]]]
    new = fix(rows, 3, [1, 2])
    assert new == [[[_, _], [2, _], [0, 1]], [[_, _], [0, 1], [0, 2]], [[_, _], [2, 1], [0, _]]]


def test_a_half_filled_repair_is_finished():
    """Slots marked -1 by a repair that broke off are empty again; nothing needs to know of the broken one."""
    assert fix([[[0, _], [2, _], [3, _]]], 4, [0, 1, 2]) == [[[0, 1], [2, _], [3, _]]]


def test_all_is_lost_and_fits():
    new = fix([[[_, _], [_, _], [_, _]]], 5, [0, 1, 2])
    assert new == [[[0, 3], [1, 4], [2, _]]]


def test_too_few_slots_says_how_many_would_do():
    rows = [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]]
    said = "3 live ranks x 4 slots hold 12 of 16 experts, 4 slots short in every layer: 6 slots per rank or more"
    with pytest.raises(NotEnoughSlots, match=re.escape(said)):
        fix(rows, 16, [0, 1, 3])
    held = grow(np.array(rows, dtype=np.int32).reshape(1, -1), 4, 6)
    assert repair(held, 16, 6, [0, 1, 3], Topology.uniform(4), version=1, epoch=1).uncovered([0, 1, 3]) == []


def test_no_live_rank():
    with pytest.raises(NotEnoughSlots, match="no live rank is left"):
        fix([[[0], [1]]], 2, [])


@pytest.mark.parametrize("num_experts", [1, 5, 7])
def test_one_rank_left_holds_everything(num_experts):
    new = fix([[[_] * 7, [_] * 7]], num_experts, [1])
    assert new == [[[_] * 7, [*range(num_experts), *[_] * (7 - num_experts)]]]


def test_bad_arguments_are_named():
    held = np.array([[0, 1, 1, 0]], dtype=np.int32)
    two = Topology.uniform(2)
    for change, said in (
        ({"slots_per_rank": 3}, r"held of shape \(1, 4\) is not \[L, R \* 3\]"),
        ({"alive": [0, 2, 5]}, r"alive names ranks \[2, 5\], but the seats are 0..1"),
        ({"topology": Topology.uniform(3)}, "held has 2 seats, but the topology 3"),
        ({"num_experts": 1}, r"held names experts outside -1..0"),
        ({"loads": np.ones((1, 3))}, r"loads of shape \(1, 3\) are not \[L, E\] = \[1, 2\]"),
        ({"loads": np.array([[1.0, np.nan]])}, "loads must be finite and >= 0"),
        ({"loads": np.array([[1.0, -1.0]])}, "loads must be finite and >= 0"),
    ):
        kwargs = {"num_experts": 2, "slots_per_rank": 2, "alive": [0, 1], "topology": two, "loads": None} | change
        with pytest.raises(ValueError, match=said):
            repair(held, version=1, epoch=1, **kwargs)


def test_the_input_stays_as_it_was():
    held = np.array([[0, 1, 2, _]], dtype=np.int32)
    held.setflags(write=False)
    repair(held, 3, 2, [0, 1], Topology.uniform(2), version=1, epoch=1)


def test_grow_adds_empty_slots_to_every_rank():
    held = np.array([[0, 1, 2, 3], [4, 5, 6, _]], dtype=np.int32)
    grown = grow(held, 2, 3)
    assert grown.dtype == np.int32
    assert grown.tolist() == [[0, 1, _, 2, 3, _], [4, 5, _, 6, _, _]]
    assert grow(held, 2, 2).tolist() == held.tolist()
    with pytest.raises(ValueError, match="2 slots per rank cannot grow to 1"):
        grow(held, 2, 1)


def test_only_alive():
    assert only_alive(np.array([[0, 1, 2, 3]]), 2, {1}).tolist() == [[_, _, 2, 3]]


def test_lower_bound():
    held = np.array([[0, 1, 1, _], [0, 1, 0, 1]])
    assert lower_bound_moves(held, 2, 2, [0, 1]) == 0
    assert lower_bound_moves(held, 2, 2, [1]) == 1
    assert lower_bound_moves(held, 2, 2, []) == 4


def test_a_lost_rank_at_full_size():
    topology = Topology.uniform(64, 8)
    held = grow(initial_placement(61, 512, topology, 8).slots, 8, 10)
    alive = [rank for rank in range(64) if rank != 3]
    new = repair(held, 512, 10, alive, topology, version=1, epoch=1)
    filled = (new.slots != EMPTY) & (new.slots != held)
    assert filled.sum() == lower_bound_moves(held, 512, 10, alive) == 61 * 8
    per_rank = filled.reshape(61, 64, 10).sum(axis=2)
    assert (per_rank == [*[1] * 3, 0, *[1] * 5, *[0] * 55]).all(), "the lowest of equally loaded ranks, one each"
