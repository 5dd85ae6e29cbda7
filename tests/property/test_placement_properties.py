"""What holds for every placement and dispatch table, whatever the sizes."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.placement.dispatch import dispatch_tables
from elastic_moe.placement.placement import EMPTY, Placement, fewest_slots, initial_placement
from elastic_moe.placement.topology import Topology


@st.composite
def shapes(draw):
    num_ranks = draw(st.integers(1, 9))
    topology = Topology.uniform(num_ranks, draw(st.integers(1, num_ranks)))
    num_experts = draw(st.integers(1, 40))
    slots = fewest_slots(num_experts, num_ranks) + draw(st.integers(0, 6))
    return draw(st.integers(1, 3)), num_experts, topology, slots, draw(st.booleans())


@given(shapes())
@settings(max_examples=300, deadline=None)
def test_initial_placement(shape):
    num_layers, num_experts, topology, slots, replicate = shape
    placement = initial_placement(num_layers, num_experts, topology, slots, replicate=replicate)
    assert placement.slots.shape == (num_layers, topology.num_ranks * slots)
    assert (placement.copies >= 1).all()
    assert replicate or not placement.has_replicas
    for rank in range(topology.num_ranks):
        held = placement.of_rank(rank)[0]
        filled = held[held != EMPTY]
        assert len(set(filled.tolist())) == len(filled), "an expert twice on one rank"
        if replicate:
            assert len(filled) == min(slots, num_experts), "a slot left empty that could hold a replica"


@st.composite
def placements(draw):
    num_ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    num_slots = num_ranks * slots
    num_experts = draw(st.integers(1, num_slots))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        extra = draw(
            st.lists(
                st.integers(EMPTY, num_experts - 1), min_size=num_slots - num_experts, max_size=num_slots - num_experts
            )
        )
        rows.append(draw(st.permutations([*range(num_experts), *extra])))
    topology = Topology.uniform(num_ranks, draw(st.integers(1, num_ranks)))
    return Placement(np.array(rows), num_experts, slots), topology


@given(placements())
@settings(max_examples=300, deadline=None)
def test_dispatch_tables(case):
    placement, topology = case
    nodes = np.array(topology.nodes)
    for rank in range(topology.num_ranks):
        choices, counts = dispatch_tables(placement, rank, topology)
        layers, experts, _ = choices.shape
        for layer in range(layers):
            for expert in range(experts):
                where = placement.slots_of(layer, expert)
                owners = where // placement.slots_per_rank
                own, near = where[owners == rank], where[nodes[owners] == nodes[rank]]
                per_seat = {Fraction(int((nodes[owners] == n).sum()), int((nodes == n).sum())) for n in nodes[owners]}
                nearest = own if own.size else near if near.size else where
                allowed = nearest if len(per_seat) == 1 else where
                assert set(choices[layer, expert].tolist()) <= set(allowed.tolist())
                width = min(len(allowed), topology.num_ranks)
                assert counts[layer, expert] == width
                assert len(set(choices[layer, expert, :width].tolist())) == width


@given(shapes(), st.randoms())
@settings(max_examples=200, deadline=None)
def test_dispatch_gives_every_copy_an_even_share(shape, random):
    """Of the tokens that all ranks have for an expert, equally many each; its copies are on different ranks."""
    num_layers, num_experts, topology, slots, replicate = shape
    placement = initial_placement(num_layers, num_experts, topology, slots, replicate=replicate)
    topology = Topology(tuple(random.choice(topology.nodes) for _ in topology.nodes))
    share = [[Fraction(0)] * placement.slots.shape[1] for _ in range(num_layers)]
    for rank in range(topology.num_ranks):
        choices, counts = dispatch_tables(placement, rank, topology)
        for (layer, expert), count in np.ndenumerate(counts):
            for slot in choices[layer, expert, :count].tolist():
                share[layer][slot] += Fraction(1, int(count))
    for (layer, slot), expert in np.ndenumerate(placement.slots):
        if expert != EMPTY:
            assert share[layer][slot] == Fraction(topology.num_ranks, int(placement.copies[layer, expert]))


@given(placements())
def test_inverse_and_copies_agree(case):
    placement, _ = case
    for layer in range(placement.num_layers):
        found = [placement.slots_of(layer, expert) for expert in range(placement.num_experts)]
        assert [len(f) for f in found] == placement.copies[layer].tolist()
        assert (placement.slots[layer] != EMPTY).sum() == sum(map(len, found))
