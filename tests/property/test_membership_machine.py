"""A cluster through any history of losses, returns, growth and broken-off repairs."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.placement import EMPTY, fewest_slots, initial_placement
from elastic_moe.placement.repair import grow, lower_bound_moves, repair
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import OUTSIDE, plan_transfers

_SLOTS_AT_MOST = 8


class Cluster(RuleBasedStateMachine):
    """Seats with inventories (int32 [L, S], what a member says it holds) around the committed placement.

    Beside each inventory is the memory itself: the expert that a slot's bytes belong to, whatever is said of it.
    """

    @initialize(
        nodes=st.lists(st.integers(0, 2), min_size=2, max_size=5),
        num_experts=st.integers(1, 9),
        spare=st.integers(0, 2),
        num_layers=st.integers(1, 2),
    )
    def start(self, nodes, num_experts, spare, num_layers):
        self.topology = Topology(tuple(nodes))
        self.num_experts = num_experts
        slots = fewest_slots(num_experts, len(nodes)) + spare
        self.committed = initial_placement(num_layers, num_experts, self.topology, slots)
        self.epoch = 0
        self.slots_per_rank = slots
        self.members = {rank: self.committed.of_rank(rank).copy() for rank in range(len(nodes))}
        self.bytes_of = {rank: held.copy() for rank, held in self.members.items()}
        self.last_words = {}
        self.outage = False

    def held(self):
        """int32 [L, R * S]: the inventories side by side, absent seats empty."""
        absent = np.full((self.committed.num_layers, self.slots_per_rank), EMPTY, dtype=np.int32)
        return np.hstack([self.members.get(rank, absent) for rank in range(self.topology.num_ranks)])

    def lose(self, rank):
        self.last_words[rank] = self.members.pop(rank)
        del self.bytes_of[rank]

    def plan(self):
        """The placement that all members agree on: each computes it for itself, from its own copy."""
        self.epoch += 1
        version = self.committed.version + 1
        plans = [
            repair(
                self.held(),
                self.num_experts,
                self.slots_per_rank,
                alive,
                self.topology,
                version=version,
                epoch=self.epoch,
            )
            for alive in (list(self.members), sorted(self.members, reverse=True), set(self.members))
        ]
        assert len({p.hash for p in plans}) == 1
        return plans[0]

    def carry_out(self, new, only=None):
        """Mark the targets empty, then fill them (or the first `only` of them) with what the sources really hold."""
        slots = self.slots_per_rank
        held = self.held()
        moves = plan_transfers(held, new, self.members, self.topology).moves
        assert len(moves) == lower_bound_moves(held, self.num_experts, slots, self.members)
        staged = []
        for move in moves:
            rank, slot = divmod(move.source, slots)
            staged.append(move.expert if move.source == OUTSIDE else self.bytes_of[rank][move.layer, slot])
            rank, slot = divmod(move.target, slots)
            self.members[rank][move.layer, slot] = EMPTY
        for move, expert in list(zip(moves, staged, strict=True))[:only]:
            rank, slot = divmod(move.target, slots)
            self.bytes_of[rank][move.layer, slot] = expert
            self.members[rank][move.layer, slot] = move.expert

    def recover(self):
        before = self.committed
        room = len(self.members) * self.slots_per_rank
        self.outage = room < self.num_experts
        if self.outage:
            held = self.held()
            with pytest.raises(NotEnoughSlots):
                self.plan()
            assert self.committed is before
            assert (self.held() == held).all()
            return
        new = self.plan()
        self.carry_out(new)
        self.committed = new
        assert new.version == before.version + 1
        assert new.epoch == self.epoch > before.epoch

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def kill_one(self, data):
        self.lose(data.draw(st.sampled_from(sorted(self.members))))
        self.recover()

    @precondition(lambda self: len(self.members) >= 2)
    @rule(data=st.data())
    def kill_two_at_once(self, data):
        for rank in data.draw(st.permutations(sorted(self.members)))[:2]:
            self.lose(rank)
        self.recover()

    @precondition(lambda self: len(self.members) < self.topology.num_ranks)
    @rule(data=st.data(), what=st.sampled_from(["empty", "former", "partial"]))
    def rejoin_one(self, data, what):
        """One seat is taken again, whatever the other empty ones do, by a process that may have kept its memory."""
        rank = data.draw(st.sampled_from(sorted(set(range(self.topology.num_ranks)) - set(self.members))))
        former = self.last_words.pop(rank)
        held = grow(former, former.shape[1], self.slots_per_rank)
        if what == "empty":
            held[:] = EMPTY
        elif what == "partial":
            held[data.draw(st.integers(0, len(held) - 1)), data.draw(st.integers(0, held.shape[1] - 1)) :] = EMPTY
        self.members[rank] = held
        self.bytes_of[rank] = held.copy()
        self.recover()

    @precondition(lambda self: self.slots_per_rank < _SLOTS_AT_MOST)
    @rule(more=st.integers(1, 2))
    def grow_slots(self, more):
        wider = self.slots_per_rank + more
        for inventories in (self.members, self.bytes_of):
            for rank, held in inventories.items():
                inventories[rank] = grow(held, self.slots_per_rank, wider)
        self.slots_per_rank = wider
        self.recover()

    @precondition(lambda self: len(self.members) >= 2)
    @rule(data=st.data())
    def repair_breaks_off(self, data):
        """One dies; in the middle of the repair a second one does. The half-filled targets are repaired anew."""
        first, second = data.draw(st.permutations(sorted(self.members)))[:2]
        self.lose(first)
        if len(self.members) * self.slots_per_rank >= self.num_experts:
            committed = self.committed
            self.carry_out(self.plan(), only=data.draw(st.integers(0, 5)))
            assert self.committed is committed
        self.lose(second)
        self.recover()

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def slots_are_lost(self, data):
        """A member gives up slots (a digest was wrong): they are -1, and the next repair fills what is missing."""
        rank = data.draw(st.sampled_from(sorted(self.members)))
        held = self.members[rank]
        held[data.draw(st.integers(0, len(held) - 1)), data.draw(st.integers(0, held.shape[1] - 1))] = EMPTY
        self.recover()

    @invariant()
    def what_is_said_is_what_is_there(self):
        for rank, held in self.members.items():
            assert (self.bytes_of[rank][held != EMPTY] == held[held != EMPTY]).all()

    @invariant()
    def every_expert_is_covered_or_the_old_placement_stands(self):
        assert self.outage == (len(self.members) * self.slots_per_rank < self.num_experts)
        if self.outage:
            return
        assert self.committed.uncovered(self.members) == []
        assert (self.committed.slots == self.held()).all(), "the committed placement is what the members hold"

    @invariant()
    def an_absent_seat_holds_nothing(self):
        if not self.outage:
            for rank in set(range(self.topology.num_ranks)) - set(self.members):
                assert (self.committed.of_rank(rank) == EMPTY).all()


Cluster.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestMembership = Cluster.TestCase
