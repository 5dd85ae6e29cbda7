"""What holds for every repair and every transfer plan, whatever is held and whoever is alive."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.repair import grow, lower_bound_moves, only_alive, repair
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import OUTSIDE, Distance, plan_transfers


def numbers(draw, *shape):
    """0..255 in an array: one draw of bytes, which is quick and shrinks to zeros."""
    size = int(np.prod(shape))
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8).reshape(shape).astype(np.int32)


@st.composite
def clusters(draw):
    """(held, num_experts, slots_per_rank, alive, topology): anything members may say, holes and all."""
    num_ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    alive = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
    num_experts = draw(st.integers(1, len(alive) * slots + 1))
    held = numbers(draw, draw(st.integers(1, 3)), num_ranks * slots) % (num_experts + 1) + EMPTY
    return held, num_experts, slots, alive, Topology(tuple((numbers(draw, num_ranks) % 4).tolist()))


@st.composite
def loaded_clusters(draw):
    """A cluster, and loads of every kind for it: none, idle layers, small, skewed."""
    case = draw(clusters())
    held, num_experts = case[:2]
    power = draw(st.none() | st.sampled_from([0.5, 1.0, 9.0]))
    return case, None if power is None else numbers(draw, len(held), num_experts) ** power


def repair_if_it_fits(case, loads=None):
    """The repaired placement, or None where the slots are too few; then the error has to say so."""
    held, num_experts, slots, alive, topology = case
    if len(alive) * slots < num_experts:
        with pytest.raises(NotEnoughSlots, match=f"{-(-num_experts // len(alive))} slots per rank"):
            repair(held, num_experts, slots, alive, topology, version=1, epoch=1, loads=loads)
        return None
    return repair(held, num_experts, slots, alive, topology, version=1, epoch=1, loads=loads)


@given(loaded_clusters())
@settings(max_examples=800, deadline=None)
def test_repair_covers_with_the_fewest_moves(loaded):
    case, loads = loaded
    held, num_experts, slots, alive, _ = case
    new = repair_if_it_fits(case, loads)
    if new is None:
        return
    live = np.isin(np.arange(held.shape[1]) // slots, list(alive))
    assert (new.slots[:, ~live] == EMPTY).all(), "a dead rank holds something"
    assert new.uncovered(alive) == []
    changed = live & (new.slots != held)
    assert changed.sum() == lower_bound_moves(held, num_experts, slots, alive)
    for layer in range(len(held)):
        before, after, moved = held[layer], new.slots[layer], changed[layer]
        copies = Counter(before[live].tolist())
        lost = set(range(num_experts)) - set(copies)
        assert sorted(after[moved].tolist()) == sorted(lost), "a lost expert goes into exactly one slot"
        given_away = Counter(before[moved].tolist())
        assert all(copies[e] > n for e, n in given_away.items() if e != EMPTY), "a sole copy was overwritten"
        empty_before, empty_after = copies[EMPTY], int((after[live] == EMPTY).sum())
        assert empty_before - empty_after == min(empty_before, len(lost)), "a replica gave way beside an empty slot"


def plain_repair(row, num_experts, slots, alive, topology, weights):
    """One layer, slot by slot, everything counted anew at each step."""
    owner = [slot // slots for slot in range(len(row))]
    row = [expert if rank in alive else EMPTY for rank, expert in zip(owner, row.tolist(), strict=True)]
    for lost in sorted(set(range(num_experts)) - set(row), key=lambda e: (-weights[e], e)):
        copies = Counter(row)
        copies[EMPTY] = len(row) + 1
        share = {expert: weights[expert] // copies[expert] for expert in copies if expert != EMPTY} | {EMPTY: 0}
        load = {rank: sum(share[e] for e in row[rank * slots : (rank + 1) * slots]) for rank in alive}
        choices = []
        for slot, (expert, rank) in enumerate(zip(row, owner, strict=True)):
            if rank in alive and copies[expert] > 1:
                nodes = [topology.nodes[r] for r, e in zip(owner, row, strict=True) if e == expert != EMPTY]
                near = nodes.count(topology.nodes[rank])
                choices.append((-copies[expert], -near, load[rank] - share[expert], slot))
        row[min(choices)[-1]] = lost
    return row


@given(loaded_clusters())
@settings(max_examples=500, deadline=None)
def test_repair_equals_a_plain_one(loaded):
    case, loads = loaded
    held, num_experts, slots, alive, topology = case
    new = repair_if_it_fits(case, loads)
    if new is None:
        return
    for layer, row in enumerate(held):
        of_layer = np.ones(num_experts) if loads is None else loads[layer]
        weights = [int(load / max(of_layer.max(), 1e-9) * 2**32) + (loads is not None) for load in of_layer.tolist()]
        assert plain_repair(row, num_experts, slots, alive, topology, weights) == new.slots[layer].tolist()


@given(loaded_clusters(), st.randoms())
@settings(max_examples=300, deadline=None)
def test_all_survivors_compute_the_same(loaded, random):
    case, loads = loaded
    held, num_experts, slots, alive, topology = case
    new = repair_if_it_fits(case, loads)
    if new is None:
        return
    hearsay = np.where(only_alive(held, slots, alive) == EMPTY, EMPTY, held).astype(np.int64)
    other_order = random.sample(sorted(alive), len(alive))
    again = repair(hearsay, num_experts, slots, other_order, topology, version=1, epoch=1, loads=loads)
    assert again.hash == new.hash
    assert plan_transfers(hearsay, again, other_order, topology) == plan_transfers(held, new, alive, topology)


@given(clusters())
@settings(max_examples=300, deadline=None)
def test_a_second_repair_moves_nothing(case):
    _, num_experts, slots, alive, topology = case
    new = repair_if_it_fits(case)
    if new is not None:
        assert repair(new.slots, num_experts, slots, alive, topology, version=2, epoch=2).hash == new.hash


@given(clusters(), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_grow_keeps_what_is_held_and_makes_room(case, more):
    held, num_experts, slots, alive, topology = case
    needed = max(slots, -(-num_experts // len(alive))) + more
    grown = grow(held, slots, needed)
    blocks = grown.reshape(len(held), -1, needed)
    assert (blocks[:, :, :slots] == held.reshape(len(held), -1, slots)).all()
    assert (blocks[:, :, slots:] == EMPTY).all()
    assert lower_bound_moves(grown, num_experts, needed, alive) == lower_bound_moves(held, num_experts, slots, alive)
    assert repair(grown, num_experts, needed, alive, topology, version=1, epoch=1).uncovered(alive) == []


@given(clusters())
@settings(max_examples=500, deadline=None)
def test_empty_slots_are_filled_evenly(case):
    """Without loads and replicas, a rank gets a second lost expert only where no lighter rank has room."""
    held, _, slots, alive, _ = case
    for row in held:
        first = {expert: slot for slot, expert in reversed([*enumerate(row.tolist())]) if slot // slots in alive}
        row[:] = EMPTY
        row[[*first.values()]] = [*first]
    new = repair_if_it_fits(case)
    if new is None:
        return
    before = (held.reshape(len(held), -1, slots) != EMPTY).sum(axis=2)
    after = (new.slots.reshape(len(held), -1, slots) != EMPTY).sum(axis=2)
    for layer in range(len(held)):
        for taker in alive:
            for other in alive:
                took = after[layer, taker] > before[layer, taker]
                assert not took or after[layer, other] >= after[layer, taker] - 1


@st.composite
def transitions(draw):
    """(held, new, alive, topology): any placement to reach from anything held; not only repairs."""
    held, num_experts, slots, alive, topology = draw(clusters().filter(lambda c: c[1] <= c[0].shape[1]))
    wanted = numbers(draw, *held.shape) % (num_experts + 1) + EMPTY
    everyone = range(topology.num_ranks)
    return held, repair(wanted, num_experts, slots, everyone, topology, version=1, epoch=1), alive, topology


def replay(transfers, held, num_layers):
    """Carry the plan out on a memory in which each slot holds (layer, expert): all reads, then all writes."""
    memory = {(layer, s): (layer, int(e)) for layer, row in enumerate(held) for s, e in enumerate(row) if e != EMPTY}
    for layer in range(num_layers):
        of_layer = [m for m in transfers.moves if m.layer == layer]
        staged = [(layer, m.expert) if m.source == OUTSIDE else memory[layer, m.source] for m in of_layer]
        memory |= {(layer, m.target): token for m, token in zip(of_layer, staged, strict=True)}
    return memory


def check_plan(held, new, alive, topology):
    transfers = plan_transfers(held, new, alive, topology)
    slots = new.slots_per_rank
    live = only_alive(held, slots, alive)
    memory = replay(transfers, live, new.num_layers)
    for (layer, slot), expert in np.ndenumerate(new.slots):
        if slot // slots in alive and expert != EMPTY:
            assert memory[layer, slot] == (layer, expert)
    assert all(held[m.layer, m.target] != m.expert for m in transfers.moves), "a move that moves nothing"
    assert [(m.layer, m.target) for m in transfers.moves] == sorted({(m.layer, m.target) for m in transfers.moves})
    for move in transfers.moves:
        here = move.target // slots
        assert here in alive
        holders = [s // slots for s in np.flatnonzero(live[move.layer] == move.expert)]
        near = [Distance.NODE if topology.nodes[r] == topology.nodes[here] else Distance.REMOTE for r in holders]
        near += [Distance.OWN] * (here in holders)
        assert transfers.distance(move) == min(near, default=Distance.OUTSIDE), "not the nearest live source"
        assert (move.source == OUTSIDE) == (not holders)
    split = list(transfers.missing)
    sent = []
    for rank in alive:
        split += [*transfers.receives_of(rank), *transfers.local_of(rank)]
        sent += transfers.sends_of(rank)
    assert Counter(split) == Counter(transfers.moves)
    counts = transfers.num_moves()
    assert len(sent) == counts[Distance.NODE] + counts[Distance.REMOTE]
    assert sum(counts.values()) == len(transfers.moves)
    return transfers


@given(transitions())
@settings(max_examples=800, deadline=None)
def test_a_plan_replays_to_the_new_placement(case):
    check_plan(*case)


@given(loaded_clusters())
@settings(max_examples=500, deadline=None)
def test_the_plan_of_a_repair_is_the_lower_bound_and_reads_no_overwritten_slot(loaded):
    case, loads = loaded
    held, num_experts, slots, alive, topology = case
    new = repair_if_it_fits(case, loads)
    if new is None:
        return
    transfers = check_plan(held, new, alive, topology)
    assert len(transfers.moves) == lower_bound_moves(held, num_experts, slots, alive)
    assert transfers.moves == transfers.missing, "what a live slot holds is never lost"


@given(st.integers(2, 5), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_equal_sources_send_equally_many(num_sources, num_experts):
    """All but the last rank hold everything; the last takes its copies from them in turn."""
    held = np.array([[*range(num_experts)] * num_sources + [EMPTY] * num_experts])
    new = Placement(np.array([[*range(num_experts)] * (num_sources + 1)]), num_experts, num_experts)
    ranks = range(num_sources + 1)
    transfers = plan_transfers(held, new, ranks, Topology.uniform(len(ranks)))
    sends = [len(transfers.sends_of(rank)) for rank in ranks[:-1]]
    assert sum(sends) == num_experts
    assert max(sends) - min(sends) <= 1
