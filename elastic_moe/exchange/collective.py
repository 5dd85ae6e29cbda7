"""TokenExchange by all-to-all collectives: gloo or NCCL, variable splits, differentiable."""

from dataclasses import dataclass

import torch

from elastic_moe.exchange.interface import Dispatched, TokenExchange
from elastic_moe.group.process_group import Group
from elastic_moe.placement.placement import EMPTY


@dataclass(frozen=True)
class _Ticket:
    order: torch.Tensor
    """int64 [N]: row j of what was sent is pair order[j] of the flat [T*K] list; pairs of nobody are not in it."""
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
    and the counts per slot are all the metadata a receiver needs. The host waits for the device once, in dispatch, for
    the splits of the rows; differentiable, and a pair of nobody has no gradient.
    """

    def __init__(self, group: Group, ranks: tuple[int, ...], slots_per_rank: int) -> None:
        """`ranks` are the EP ranks of the group's members, in group order."""
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._num_slots = (max(ranks) + 1) * slots_per_rank
        self._members = torch.tensor(ranks)

    def dispatch(self, hidden: torch.Tensor, slots: torch.Tensor) -> Dispatched:
        """See `TokenExchange.dispatch`. A slot of no member is refused here, by its sender."""
        num_tokens, top_k = slots.shape
        flat = slots.reshape(-1)
        nowhere = self._num_slots  # a bin behind all slots, for pairs that do not travel
        bins = torch.where((flat < 0) | (flat > nowhere), nowhere, flat)
        per_slot = flat.new_zeros(nowhere + 1).scatter_add_(0, bins, torch.ones_like(flat))
        self._members = self._members.to(flat.device)
        to_send = per_slot[:-1].view(-1, self._slots_per_rank)[self._members]
        counts = torch.empty_like(to_send)
        self._group.all_to_all(counts, to_send)
        self._group.confirm()  # the counts: the host is about to believe them
        num_empty = (flat == EMPTY).sum(0, keepdim=True)
        *splits, empty = torch.cat((to_send.sum(1), counts.sum(1), num_empty)).tolist()
        sent, received = splits[: len(to_send)], splits[len(to_send) :]
        if sum(sent) + empty != flat.numel():
            self._refuse(flat)
        order = torch.argsort(bins, stable=True)[: sum(sent)]
        rows = hidden[order // top_k]
        arrived = _AllToAll.apply(rows, self._group, sent, received)
        # Received rows run by (source, slot); a stable sort by slot groups them and keeps the sources in order.
        slot_of_row = torch.arange(self._slots_per_rank, device=flat.device).repeat(len(received))
        slot_of_row = slot_of_row.repeat_interleave(counts.reshape(-1), output_size=sum(received))
        by_slot = torch.argsort(slot_of_row, stable=True)
        offsets = counts.sum(0).cumsum(0).to(torch.int32)
        ticket = _Ticket(order, sent, received, by_slot, num_tokens, top_k)
        return Dispatched(arrived[by_slot], offsets, ticket, arrived.shape[0])

    def combine(self, rows: torch.Tensor, ticket: _Ticket) -> torch.Tensor:
        """See `TokenExchange.combine`."""
        as_received = rows[_inverse(ticket.by_slot)]
        back = _AllToAll.apply(as_received, self._group, ticket.received, ticket.sent)
        results = back.new_zeros((ticket.num_tokens * ticket.top_k, back.shape[1])).index_copy(0, ticket.order, back)
        return results.view(ticket.num_tokens, ticket.top_k, back.shape[1])

    def check(self) -> None:
        """See `TokenExchange.check`: on a GPU nothing has raised yet."""
        self._group.confirm()

    def _refuse(self, slots: torch.Tensor) -> None:
        owners = torch.div(slots, self._slots_per_rank, rounding_mode="floor")
        strays = slots[(slots != EMPTY) & ~torch.isin(owners, self._members)].unique().tolist()
        raise ValueError(
            f"slots {strays[:8]} are none of ranks {self._members.tolist()} with {self._slots_per_rank} slots each: "
            f"a pair is sent to a slot of a member, or to {EMPTY}, nobody"
        )


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
