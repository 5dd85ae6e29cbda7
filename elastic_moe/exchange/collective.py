"""TokenExchange by all-to-all collectives: gloo or NCCL, variable splits, differentiable."""

from dataclasses import dataclass

import torch

from elastic_moe.exchange.interface import Dispatched, TokenExchange
from elastic_moe.group.process_group import Group


@dataclass(frozen=True)
class _Ticket:
    order: torch.Tensor
    """int64 [T*K]: row j of what was sent is assignment order[j] of the flat [T*K] list."""
    sent: list[int]
    received: list[int]
    """Rows sent to and received from each group rank."""
    by_slot: torch.Tensor
    """int64 [M]: row j grouped by slot is row by_slot[j] as received."""
    num_tokens: int
    top_k: int


class CollectiveExchange(TokenExchange):
    """Two all-to-alls to dispatch (counts, then rows), one to combine.

    Rows travel sorted by physical slot; as slots are numbered rank by rank that is also the order of the peers,
    and the counts per slot are all the metadata a receiver needs.
    """

    def __init__(self, group: Group, ranks: tuple[int, ...], slots_per_rank: int) -> None:
        """`ranks` are the EP ranks of the group's members, in group order."""
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._num_slots = (max(ranks) + 1) * slots_per_rank
        self._members = torch.tensor(ranks)

    def dispatch(self, hidden: torch.Tensor, slots: torch.Tensor) -> Dispatched:
        """See `TokenExchange.dispatch`."""
        num_tokens, top_k = slots.shape
        flat = slots.reshape(-1)
        order = torch.argsort(flat, stable=True)
        per_slot = torch.bincount(flat, minlength=self._num_slots).view(-1, self._slots_per_rank)
        to_send = per_slot[self._members.to(flat.device)]
        counts = torch.empty_like(to_send)
        self._group.all_to_all(counts, to_send)
        sent, received = torch.stack((to_send.sum(1), counts.sum(1))).tolist()
        rows = hidden[order // top_k]
        arrived = _AllToAll.apply(rows, self._group, sent, received)
        # Received rows run by (source, slot); a stable sort by slot groups them and keeps the sources in order.
        slot_of_row = torch.arange(self._slots_per_rank, device=flat.device).repeat(len(received))
        by_slot = torch.argsort(slot_of_row.repeat_interleave(counts.reshape(-1)), stable=True)
        offsets = counts.sum(0).cumsum(0).to(torch.int32)
        ticket = _Ticket(order, sent, received, by_slot, num_tokens, top_k)
        return Dispatched(arrived[by_slot], offsets, ticket, arrived.shape[0])

    def combine(self, rows: torch.Tensor, ticket: _Ticket) -> torch.Tensor:
        """See `TokenExchange.combine`."""
        as_received = rows[_inverse(ticket.by_slot)]
        back = _AllToAll.apply(as_received, self._group, ticket.received, ticket.sent)
        return back[_inverse(ticket.order)].view(ticket.num_tokens, ticket.top_k, rows.shape[-1])


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


class _AllToAll(torch.autograd.Function):
    """Rows to and from every peer; its gradient is the same exchange the other way round."""

    @staticmethod
    def forward(ctx, rows, group, sent, received):  # noqa: ANN001, ANN205 - the signature is torch's
        ctx.group, ctx.sent, ctx.received = group, sent, received
        out = rows.new_empty((sum(received), rows.shape[1]))
        group.all_to_all(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        back = grad.new_empty((sum(ctx.sent), grad.shape[1]))
        ctx.group.all_to_all(back, grad.contiguous(), ctx.sent, ctx.received)
        return back, None, None, None
