"""Experts from rank to rank over an epoch's data group: point to point, a bounded number in flight."""

from collections.abc import Callable, Sequence

import torch

from elastic_moe.membership.groups import Group
from elastic_moe.placement.transfers import Move, TransferPlan

Tensors = Callable[[Move], Sequence[torch.Tensor]]


def move_experts(
    plan: TransferPlan, group: Group, ranks: Sequence[int], rank: int, *, read: Tensors, write: Tensors, in_flight: int
) -> None:
    """Run the moves of `plan` that go from one rank to another. Every rank of the group runs the same plan.

    Args:
        plan: the same on all ranks.
        group: its members are the EP `ranks`, in this order.
        rank: EP rank of this process.
        read: the tensors to send, for a move whose source is here.
        write: the tensors to receive into, for a move whose target is here; asked for when the move begins.
        in_flight: moves of the whole plan in flight at once, at least 1.

    Raises:
        PeerLost: a peer died, left, or missed the deadline; some targets are not filled.
    """
    position = {ep_rank: index for index, ep_rank in enumerate(ranks)}
    travels = [m for m in plan.moves if m.source >= 0 and plan.rank_of(m.source) != plan.rank_of(m.target)]
    for begin in range(0, len(travels), in_flight):
        sends, receives = [], []
        for tag, move in enumerate(travels[begin : begin + in_flight]):
            source, target = plan.rank_of(move.source), plan.rank_of(move.target)
            if source == rank:
                sends += [(tensor, position[target], tag) for tensor in read(move)]
            elif target == rank:
                receives += [(tensor, position[source], tag) for tensor in write(move)]
        group.exchange(sends, receives)
