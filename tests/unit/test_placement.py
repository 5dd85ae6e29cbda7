"""Placement, initial placement, dispatch tables and the registry: small cases by hand."""

import numpy as np
import pytest
import torch

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.dispatch import dispatch_tables
from elastic_moe.placement.placement import Placement, initial_placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology


def place(rows, num_experts, slots_per_rank, **numbers):
    return Placement(np.array(rows), num_experts, slots_per_rank, **numbers)


def test_experts_are_dealt_in_order():
    placement = initial_placement(2, 8, Topology.uniform(4), 2)
    assert placement.slots.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    assert placement.of_rank(2).tolist() == [[4, 5], [4, 5]]
    assert not placement.has_replicas


def test_a_remainder_leaves_a_slot_empty_unless_replicas_are_wanted():
    bare = initial_placement(1, 7, Topology.uniform(4), 2, replicate=False)
    assert sorted(bare.slots[0].tolist()) == [-1, 0, 1, 2, 3, 4, 5, 6]
    full = initial_placement(1, 7, Topology.uniform(4), 2)
    assert full.copies.sum() == 8
    assert full.has_replicas


def test_replicas_avoid_the_rank_then_the_node():
    placement = initial_placement(1, 4, Topology.uniform(4, ranks_per_node=2), 2)
    for expert in range(4):
        ranks = placement.slots_of(0, expert) // 2
        assert len(set(ranks.tolist())) == 2
        assert {r // 2 for r in ranks.tolist()} == {0, 1}


def test_too_few_slots_says_how_many_are_needed():
    with pytest.raises(NotEnoughSlots, match=r"3 ranks x 2 slots hold 6 of 8 experts: 3 slots per rank or more"):
        initial_placement(1, 8, Topology.uniform(3), 2)


def test_more_slots_than_a_rank_can_use_stay_empty():
    placement = initial_placement(1, 2, Topology.uniform(2), 3)
    assert placement.slots.tolist() == [[0, 1, -1, 1, 0, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2]], "not \\[L, R \\* 2\\]"),
        ([[0, 1, 2, 4]], "outside -1..3"),
        ([[0, 1, 2, -2]], "outside -1..3"),
        ([[0, 1, 2, -1]], "layer 0 expert 3"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(rows, message):
    with pytest.raises((ValueError, NotEnoughSlots), match=message):
        place(rows, 4, 2)


def test_the_first_placement_is_version_0_of_no_epoch():
    first = initial_placement(1, 2, Topology.uniform(2), 1)
    assert (first.version, first.epoch, len(first.hash)) == (0, 0, 16)


def test_spare_slots_are_filled_from_the_next_rank_on():
    """Of equally good replicas each rank takes the first expert after its own, so that all get the same."""
    placement = initial_placement(1, 6, Topology.uniform(3, 1), 3)
    assert placement.slots[0].tolist() == [0, 1, 2, 2, 3, 4, 4, 5, 0]
    placement = initial_placement(1, 4, Topology.uniform(2), 4)
    assert placement.slots[0].tolist() == [0, 1, 2, 3, 2, 3, 0, 1]


def test_a_placement_is_frozen_and_its_hash_names_it():
    first, same, other = place([[0, 1]], 2, 1), place([[0, 1]], 2, 1, version=5), place([[1, 0]], 2, 1)
    assert first.hash == same.hash != other.hash
    with pytest.raises(ValueError, match="read-only"):
        first.slots[0, 0] = 1


def test_integrity_check_finds_a_flipped_entry():
    placement = place([[0, 1]], 2, 1)
    placement.slots.setflags(write=True)
    placement.slots[0] = [1, 0]
    with pytest.raises(ValueError, match="hash"):
        placement.check_integrity()


def test_uncovered_counts_live_ranks_only():
    placement = place([[0, 1, 1, 2]], 3, 2)
    assert placement.uncovered([0, 1]) == []
    assert placement.uncovered([0]) == [(0, 2)]
    assert placement.uncovered([1]) == [(0, 0)]


def test_dispatch_prefers_own_rank_then_node_where_that_is_even():
    #            rank 0  rank 1  rank 2  rank 3 ; nodes 0 0 1 1
    placement = place([[0, 1, 0, 2, 0, 3, 1, 2]], 4, 2)
    topology = Topology.uniform(4, ranks_per_node=2)
    choices, counts = dispatch_tables(placement, 1, topology)
    assert counts[0].tolist() == [3, 1, 1, 1]  # node 0 has two of the three copies of expert 0
    assert choices[0].tolist() == [[2, 4, 0, 2], [1] * 4, [3] * 4, [5] * 4]
    choices, counts = dispatch_tables(placement, 3, topology)
    assert counts[0].tolist() == [3, 1, 1, 1]
    assert choices[0].tolist() == [[0, 2, 4, 0], [6] * 4, [7] * 4, [5] * 4]


def test_dispatch_counts_copies_for_the_seats_of_a_node():
    #            rank 0  1  2 ; nodes 0 0 1
    placement = place([[0, 1, 0]], 2, 1)
    nodes_of_two_and_one = Topology((0, 0, 1))
    assert dispatch_tables(placement, 0, nodes_of_two_and_one)[1][0].tolist() == [2, 1]
    assert dispatch_tables(placement, 0, Topology((0, 2, 1)))[1][0].tolist() == [1, 1]


def test_ranks_start_at_different_replicas_when_none_is_near():
    placement = place([[0, 0, 1, 1]], 2, 1)
    topology = Topology.uniform(4, ranks_per_node=1)
    starts = [dispatch_tables(placement, rank, topology)[0][0, 0, 0] for rank in (2, 3)]
    assert sorted(starts) == [0, 1]


def test_registry_spreads_tokens_and_commits_in_place():
    topology = Topology.uniform(4, ranks_per_node=1)
    registry = PlacementRegistry(place([[0, 0, 1, 2]], 3, 1), 2, topology, torch.device("cpu"))
    address = registry._choices.data_ptr()
    picked = registry.choose_slots(0, torch.zeros((6, 1), dtype=torch.int64))
    assert picked[:, 0].tolist() == [0, 1] * 3
    registry.commit(place([[1, 0, 2, 0]], 3, 1, version=1))
    assert registry._choices.data_ptr() == address
    picked = registry.choose_slots(0, torch.tensor([[0, 1], [2, 1]]))
    assert picked.tolist()[0][1] == 0
    assert picked.tolist()[1] == [2, 0]
    registry.check_integrity()


def test_none_has_no_slot_before_and_after_a_commit():
    registry = PlacementRegistry(place([[0, 1], [1, 0]], 2, 1), 0, Topology.uniform(2), torch.device("cpu"))
    none = torch.tensor([[-1, 0], [1, -1], [-1, -1]])
    assert registry.choose_slots(1, none).tolist() == [[-1, 1], [0, -1], [-1, -1]]
    registry.commit(place([[0, 1], [0, 1]], 2, 1, version=1))
    assert registry.choose_slots(1, none).tolist() == [[-1, 0], [1, -1], [-1, -1]]
    assert registry.choose_slots(0, torch.empty((0, 2), dtype=torch.int64)).shape == (0, 2)
    registry.check_integrity()


@pytest.mark.parametrize("name", ["_choices", "_num_choices"])
@pytest.mark.parametrize("expert", [0, -1])
def test_integrity_of_the_tables_includes_what_none_becomes(name, expert):
    registry = PlacementRegistry(place([[0, 1]], 2, 1), 0, Topology.uniform(2), torch.device("cpu"))
    registry.check_integrity()
    getattr(registry, name)[0, expert] += 1
    with pytest.raises(ValueError, match="dispatch tables differ"):
        registry.check_integrity()


def registry_of(placement, rank=0, topology=None):
    return PlacementRegistry(placement, rank, topology or Topology.uniform(placement.num_ranks), torch.device("cpu"))


def tables_of(registry):
    return registry._choices.tolist(), registry._num_choices.tolist()


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_commit_may_change_the_number_of_copies(is_prepared):
    """More copies, fewer, and a layer as it was; the tables are those of a registry made anew."""
    apart = Topology.uniform(3, ranks_per_node=1)
    before = place([[0, 0, 1], [0, 1, 1], [0, 1, -1]], 2, 1, version=1)
    after = place([[0, 1, 1], [0, 1, 1], [0, 1, 0]], 2, 1, version=2)
    registry = registry_of(before, 1, apart)
    registry.commit(after, registry.prepare(after) if is_prepared else None)
    assert registry.placement is after
    registry.check_integrity()
    assert tables_of(registry) == tables_of(registry_of(after, 1, apart))
    used = [registry.choose_slots(layer, torch.tensor([[0, 1]] * 4)).T.tolist() for layer in range(3)]
    assert [[set(slots) for slots in experts] for experts in used] == [[{0}, {1}], [{0}, {1}], [{0, 2}, {1}]]


def test_only_the_layers_that_differ_are_prepared():
    registry = registry_of(place([[0, 1], [0, 1], [1, 0]], 2, 1, version=1))
    tables = registry.prepare(place([[0, 1], [1, 0], [1, 0]], 2, 1, version=2))
    assert (tables.base_version, tables.layers.tolist(), len(tables.choices), len(tables.num_choices)) == (1, [1], 1, 1)


def test_a_commit_of_the_same_slots_takes_the_new_version():
    registry = registry_of(place([[0, 1]], 2, 1, version=1))
    before, same = tables_of(registry), place([[0, 1]], 2, 1, version=2, epoch=3)
    tables = registry.prepare(same)
    assert (tables.base_version, tables.layers.size) == (1, 0)
    registry.commit(same, tables)
    assert (registry.placement.version, registry.placement.epoch) == (2, 3)
    assert tables_of(registry) == before


def test_a_commit_with_more_slots_writes_every_layer():
    """As after a loss that makes ranks grow: another shape, so nothing can be compared slot by slot."""
    topology = Topology.uniform(2)
    registry = registry_of(place([[0, 1], [1, 0]], 2, 1, version=1), 1, topology)
    grown = place([[0, 1, 1, -1], [1, 0, 0, -1]], 2, 2, version=2)
    assert registry.prepare(grown).layers.tolist() == [0, 1]
    registry.commit(grown)
    registry.check_integrity()
    assert registry.choose_slots(0, torch.tensor([[0, 1]])).tolist() == [[0, 2]]
    assert registry.choose_slots(1, torch.tensor([[0, 1]])).tolist() == [[2, 0]]


def test_tables_over_another_version_are_refused():
    registry = registry_of(place([[0, 1]], 2, 1, version=1))
    late = place([[1, 0]], 2, 1, version=3)
    tables = registry.prepare(late)
    registry.commit(place([[0, 1]], 2, 1, version=2))
    before = tables_of(registry)
    with pytest.raises(ValueError, match="tables prepared over version 1, but 2 is committed"):
        registry.commit(late, tables)
    assert registry.placement.version == 2
    assert tables_of(registry) == before


def test_a_placement_for_other_seats_is_refused():
    registry = registry_of(place([[0, 1]], 2, 1, version=1))
    with pytest.raises(ValueError, match="placement for 1 ranks, but the topology has 2"):
        registry.commit(place([[0, 1]], 2, 2, version=2))
    assert registry.placement.version == 1


def test_the_registry_finds_a_placement_that_has_changed():
    registry = registry_of(place([[0, 1]], 2, 1))
    registry.check_integrity()
    registry.placement.slots.setflags(write=True)
    registry.placement.slots[0] = [1, 0]
    with pytest.raises(ValueError, match="does not match its hash"):
        registry.check_integrity()


def test_integrity_looks_at_both_tables():
    for spoil in ("_choices", "_num_choices"):
        registry = registry_of(place([[0, 1]], 2, 1))
        getattr(registry, spoil)[0, 1] += 1
        with pytest.raises(ValueError, match="dispatch tables differ"):
            registry.check_integrity()


def test_registry_refuses_old_versions_and_other_shapes():
    registry = PlacementRegistry(place([[0, 1]], 2, 1, version=3), 0, Topology.uniform(2), torch.device("cpu"))
    with pytest.raises(ValueError, match="not newer"):
        registry.commit(place([[1, 0]], 2, 1, version=3))
    with pytest.raises(ValueError, match="layers and experts"):
        registry.commit(place([[1, 0], [0, 1]], 2, 1, version=4))
    registry._choices += 1
    with pytest.raises(ValueError, match="dispatch tables differ"):
        registry.check_integrity()


def test_topology_of_members_with_a_hole():
    topology = Topology.of_members([(0, 0), (1, 0), (3, 1)])
    assert topology.num_ranks == 4
    assert topology.nodes[2] not in (0, 1)
