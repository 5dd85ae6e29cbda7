"""Experts from rank to rank over an epoch's group: point to point, a bounded number in flight."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from elastic_moe.group.process_group import Group
from elastic_moe.placement.transfers import Move, TransferPlan

Tensors = Callable[[Move], Sequence[torch.Tensor]]


def move_experts(
    plan: TransferPlan,
    group: Group,
    ranks: Sequence[int],
    rank: int,
    *,
    read: Tensors,
    write: Tensors,
    in_flight: int,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run the moves of `plan` that go from one rank to another. Every rank of the group runs the same plan.

    Args:
        plan: the same on all ranks.
        group: its members are the EP `ranks`, in this order. Over one on the CPU, GPU tensors go through host memory.
        rank: EP rank of this process.
        read: the tensors to send, for a move whose source is here.
        write: the tensors to receive into, for a move whose target is here; asked for when the move begins.
        in_flight: moves from or to any one rank in flight at once, at least 1.
        between: called after each round of moves but the last, on every rank.

    Raises:
        PeerLost: a peer died, left, or missed the deadline; some targets are not filled.
    """
    position = {ep_rank: index for index, ep_rank in enumerate(ranks)}
    for number, moves in enumerate(rounds(plan, in_flight)):
        if number:
            between()
        sends, receives, via_host = [], [], []
        for tag, move in enumerate(moves):
            source, target = plan.rank_of(move.source), plan.rank_of(move.target)
            if source == rank:
                sends += [(tensor.cpu() if group.on_cpu else tensor, position[target], tag) for tensor in read(move)]
            elif target == rank:
                for tensor in write(move):
                    landing = torch.empty_like(tensor, device="cpu") if group.on_cpu and tensor.is_cuda else tensor
                    via_host.append((tensor, landing))
                    receives.append((landing, position[source], tag))
        group.exchange(sends, receives)
        for tensor, landing in via_host:
            if landing is not tensor:
                tensor.copy_(landing)


def rounds(plan: TransferPlan, in_flight: int) -> Iterator[list[Move]]:
    """The moves of `plan` between ranks, in its order, in rounds in which no rank sends or receives more than
    `in_flight`."""
    moves: list[Move] = []
    busy: Counter[tuple[str, int]] = Counter()
    for move in travels(plan):
        ends = (("sends", plan.rank_of(move.source)), ("receives", plan.rank_of(move.target)))
        if any(busy[end] >= in_flight for end in ends):
            yield moves
            moves, busy = [], Counter()
        moves.append(move)
        busy.update(ends)
    if moves:
        yield moves


def travels(plan: TransferPlan) -> Iterator[Move]:
    """The moves of `plan` from one rank to another, in its order."""
    for move in plan.moves:
        if move.source >= 0 and plan.rank_of(move.source) != plan.rank_of(move.target):
            yield move
