"""Where each slot gets its expert from. Slots are written rank by rank."""

import numpy as np
import pytest

from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.repair import repair
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import OUTSIDE, Distance, Move, plan_transfers

_ = EMPTY
FOUR_ON_TWO_NODES = Topology.uniform(4, 2)


def plan(held, new, alive=None, topology=None, num_experts=None):
    """Plan for one layer, both given as one list of slots per rank."""
    held, new = np.array(held, dtype=np.int32), np.array(new, dtype=np.int32)
    topology = topology or Topology.uniform(len(held))
    placement = Placement(new.reshape(1, -1), num_experts or int(new.max()) + 1, new.shape[1])
    return plan_transfers(held.reshape(1, -1), placement, range(len(held)) if alive is None else alive, topology)


def sources(transfers):
    return {move.target: move.source for move in transfers.moves}


def test_nothing_to_do():
    assert plan([[0, 1], [1, _]], [[0, 1], [1, _]]).moves == ()


def test_a_slot_that_becomes_empty_needs_no_move():
    assert plan([[0, 1], [1, 0]], [[0, 1], [_, _]]).moves == ()


def test_the_own_rank_comes_first():
    transfers = plan([[0, 1], [2, 0], [0, _]], [[0, 1], [2, 0], [0, 0]])
    assert sources(transfers) == {5: 4}
    assert transfers.local_of(2) == transfers.moves == (Move(layer=0, expert=0, target=5, source=4),)
    assert transfers.sends_of(2) == transfers.receives_of(2) == transfers.missing == ()


def test_the_own_node_comes_before_another():
    transfers = plan([[0, 1], [1, 2], [0, _], [_, _]], [[0, 1], [1, 2], [0, _], [0, 1]], topology=FOUR_ON_TWO_NODES)
    assert sources(transfers) == {6: 4, 7: 1}
    assert transfers.num_moves() == {Distance.OWN: 0, Distance.NODE: 1, Distance.REMOTE: 1, Distance.OUTSIDE: 0}


def test_a_dead_rank_is_never_a_source_and_no_live_copy_means_outside():
    transfers = plan([[0, 1], [0, _], [_, _]], [[_, _], [0, _], [0, 1]], alive=[1, 2])
    assert sources(transfers) == {4: 2, 5: OUTSIDE}
    assert transfers.missing == (Move(layer=0, expert=1, target=5, source=OUTSIDE),)
    assert transfers.num_moves()[Distance.OUTSIDE] == 1


def test_a_live_replica_is_found_when_the_nearest_one_is_dead():
    """The source on the own node died; the copy on another node is used, not the disk."""
    transfers = plan([[0, 1], [_, _], [0, 1], [_, _]], [[_, _], [0, _], [0, 1], [_, _]], [1, 2, 3], FOUR_ON_TWO_NODES)
    assert sources(transfers) == {2: 4}


def test_slots_of_dead_ranks_are_not_filled():
    assert plan([[0, 1], [_, _]], [[0, 1], [0, 1]], alive=[0]).moves == ()


def test_equal_sources_take_turns():
    held = [[0, 1, 2], [0, 1, 2], [_, _, _]]
    assert sources(plan(held, [[0, 1, 2], [0, 1, 2], [0, 1, 2]])) == {6: 0, 7: 4, 8: 2}


def test_local_copies_do_not_count_as_sends():
    held = [[0, 1, _], [0, 1, _], [_, _, _]]
    assert sources(plan(held, [[0, 1, 0], [0, 1, _], [1, 0, _]])) == {2: 0, 6: 1, 7: 3}


def test_a_swap_reads_slots_that_the_plan_overwrites():
    """Sources are read before any target is published, so two ranks can exchange experts."""
    transfers = plan([[0], [1]], [[1], [0]])
    assert sources(transfers) == {0: 1, 1: 0}
    assert transfers.sends_of(0) == transfers.receives_of(1) == (Move(layer=0, expert=0, target=1, source=0),)


def test_moves_are_ordered_by_layer_then_target():
    held = np.array([[0, 1, _, _], [_, _, 1, 0]], dtype=np.int32)
    new = Placement(np.array([[0, 1, 1, 0], [1, 0, 1, 0]]), 2, 2)
    transfers = plan_transfers(held, new, [0, 1], Topology.uniform(2))
    assert [(m.layer, m.target, m.expert, m.source) for m in transfers.moves] == [
        (0, 2, 1, 1),
        (0, 3, 0, 0),
        (1, 0, 1, 2),
        (1, 1, 0, 3),
    ]
    assert transfers.sends_of(0) == transfers.moves[:2]
    assert transfers.receives_of(0) == transfers.moves[2:]


def test_a_repair_loads_only_what_no_live_slot_holds():
    held = np.array([[0, 1, 2, 0, _, _]], dtype=np.int32)
    new = repair(held, 3, 2, [1, 2], Topology.uniform(3), version=1, epoch=1)
    transfers = plan_transfers(held, new, [1, 2], Topology.uniform(3))
    assert transfers.moves == transfers.missing == (Move(layer=0, expert=1, target=4, source=OUTSIDE),)


def test_shapes_must_fit():
    new = Placement(np.array([[0, 1, 1, 0]]), 2, 2)
    with pytest.raises(ValueError, match=r"held \(1, 2\), the new placement \(1, 4\) and a topology of 2 ranks x 2"):
        plan_transfers(np.array([[0, 1]]), new, [0, 1], Topology.uniform(2))
    with pytest.raises(ValueError, match="topology of 3 ranks"):
        plan_transfers(new.slots, new, [0, 1], Topology.uniform(3))
