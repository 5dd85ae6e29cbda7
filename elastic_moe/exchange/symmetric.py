"""TokenExchange over GPU memory that all ranks of a host have mapped: no collective, no word to the host.

Shapes are fixed and every count stays on the device, so a CUDA graph may hold calls; it stays valid over losses and
joins, for all that changes then (who is alive, where a newcomer's buffer is) is read from tables that keep their
place. Not differentiable.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from elastic_moe.errors import PeerLost
from elastic_moe.exchange import symmetric_kernels
from elastic_moe.exchange.interface import Dispatched, TokenExchange
from elastic_moe.exchange.layout import ExchangeLayout, power_of_2
from elastic_moe.exchange.signal_kernels import ABORT, ALIVE, EPOCH, ERROR, LEFT, OVERFLOW, PATIENCE_NS, STATE_SIZE
from elastic_moe.group.view import View
from elastic_moe.memory.peer_memory import PeerMemory

_kernels: Any = symmetric_kernels
CHUNK = 128
"""Pairs that one program sorts among each other."""
PROGRAMS_PER_SM = 4
FEW_TOKENS = 16
"""A rank that has none of its own expects that the others have as many."""
SCALED = 128
"""Elements with a common scale in an 8-bit payload."""


@dataclass(frozen=True)
class _Ticket:
    slots: torch.Tensor
    """int64 [T, K]."""
    offsets: torch.Tensor
    """int32 [S]."""


class SymmetricExchange(TokenExchange):
    """Dispatch in two kernels, combine in one.

    Of one rank, for as long as its process lives: buffers are reserved once, for `max_tokens` of every rank going to
    one (`ExchangeLayout.num_bytes`). `enter` begins an epoch; before the first, meanwhile, and after an error, calls do
    nothing. All calls are made on one stream. An error shows up in `check` only: until then results are garbage.
    """

    def __init__(
        self,
        incarnation: str,
        rank: int,
        layout: ExchangeLayout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        timeout_s: float,
        fp8: bool = False,
    ) -> None:
        """Reserve the buffer and offer it to peers.

        Args:
            incarnation: of this process, as its `Member` says.
            rank: EP rank.
            layout: the same on all ranks.
            dtype: of tokens and results.
            device: a CUDA device.
            timeout_s: deadline of each wait inside a kernel, and of a newcomer's connection.
            fp8: tokens travel as float8_e4m3fn, with a float32 scale for every 128 elements; results never do.

        Raises:
            ValueError: the layout does not fit `dtype` or `fp8`.
        """
        if layout.element_bytes != dtype.itemsize or not dtype.is_floating_point:
            raise ValueError(f"a layout of {layout.element_bytes} bytes an element does not fit {dtype}")
        if fp8 and (layout.hidden_size % SCALED or dtype.itemsize < 2):
            raise ValueError(f"an 8-bit payload needs a multiple of {SCALED} elements, got {layout.hidden_size}")
        self._layout = layout
        self._rank = rank
        self._dtype = dtype
        self._device = device
        self._timeout_s = timeout_s
        self._fp8 = fp8
        self._slots_per_rank = 0
        self._epoch = -1
        self._memory = PeerMemory(_name(incarnation), rank, layout.num_seats, layout.num_bytes, device)
        self._state = torch.zeros(STATE_SIZE, dtype=torch.int64, device=device)
        self._state[ERROR] = LEFT
        seats = layout.seats_padded
        self._tokens = torch.zeros(seats, dtype=torch.int32, device=device)
        self._begins = torch.zeros(power_of_2(layout.max_slots) * seats, dtype=torch.int32, device=device)
        origins = layout.max_rows(layout.max_tokens, layout.max_slots)
        self._origins = torch.zeros(origins, dtype=torch.int32, device=device)
        self._programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
        self._word = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    def enter(self, view: View, slots_per_rank: int, barrier: Callable[[], None]) -> None:
        """Begin the epoch of `view`. Collective. When members only leave, nothing but tables is written.

        No member may send before every other has left its last epoch with nothing in flight: each waits here for its
        own stream, and then, in `barrier`, for the others.

        Args:
            view: with this rank in it; all members are on this host.
            slots_per_rank: S. A graph captured with another S is not valid any more.
            barrier: waits for all members of `view`, over the CPU.

        Raises:
            PeerLost: a member did not come.
            ValueError: S is more than was reserved for, the epoch is not newer, or a member is elsewhere.
        """
        hosts = {member.host for member in view.members}
        if slots_per_rank > self._layout.max_slots or view.epoch <= self._epoch or len(hosts) > 1:
            raise ValueError(
                f"cannot enter epoch {view.epoch} after {self._epoch} with {slots_per_rank} slots (reserved: "
                f"{self._layout.max_slots}) on hosts {sorted(hosts)}: a symmetric exchange works within one host"
            )
        self._state[ERROR] = LEFT
        torch.cuda.synchronize(self._device)
        self._shut_out(view)
        self._memory.connect({m.rank: _name(m.incarnation) for m in view.members}, self._timeout_s)
        self._use_slots(slots_per_rank)
        torch.cuda.synchronize(self._device)
        barrier()
        self._epoch = view.epoch
        state = [0] * STATE_SIZE
        state[EPOCH] = view.epoch
        state[PATIENCE_NS] = int(self._timeout_s * 1e9)
        state[ALIVE] = sum(1 << rank for rank in view.ranks)
        state[ABORT] = self._word.data_ptr()
        self._state.copy_(torch.tensor(state))

    @contextlib.contextmanager
    def muted(self, slots_per_rank: int) -> Iterator["SymmetricExchange"]:
        """Calls in here reach nobody and return garbage; a graph that is captured is good afterwards. While no peer
        waits for this rank, in an epoch or before the first."""
        state = self._state.clone()
        self._state[ERROR] = LEFT
        try:
            self._use_slots(slots_per_rank)
            yield self
        finally:
            torch.cuda.synchronize(self._device)
            self._state.copy_(state)

    def dispatch(self, hidden: torch.Tensor, slots: torch.Tensor) -> Dispatched:
        """See `TokenExchange.dispatch`. Slots are not looked at by the host: one of no member is not noticed.

        `rows` has room for all that could come. With S < K the slots of a token must differ, as those of different
        experts do; if they do not, and too many rows come, `check` says so.

        Raises:
            ValueError: more tokens than reserved, another K, D or dtype, or a gradient is wanted.
        """
        layout, num_tokens = self._layout, hidden.shape[0]
        shape = (num_tokens, layout.top_k)
        if num_tokens > layout.max_tokens or hidden.shape[1] != layout.hidden_size or hidden.dtype != self._dtype:
            raise ValueError(
                f"takes at most {layout.max_tokens} tokens of {layout.hidden_size} {self._dtype}, "
                f"got {tuple(hidden.shape)} {hidden.dtype}"
            )
        if num_tokens and slots.shape != shape:
            raise ValueError(f"slots must be {shape}, got {tuple(slots.shape)}")
        if hidden.requires_grad and torch.is_grad_enabled():
            raise ValueError("a symmetric exchange has no gradient: train with exchange.kind=collective")
        hidden, slots = hidden.contiguous(), slots.contiguous()
        max_rows = layout.max_rows(layout.max_tokens, self._slots_per_rank)
        rows = hidden.new_empty((max_rows, layout.hidden_size))
        offsets = torch.empty(self._slots_per_rank, dtype=torch.int32, device=self._device)
        self._send(hidden, slots, offsets, max_rows)
        self._place(rows)
        even = max(num_tokens, FEW_TOKENS) * layout.top_k  # as if all ranks had as many tokens, and chose evenly
        return Dispatched(rows, offsets, _Ticket(slots, offsets), min(even, max_rows))

    def combine(self, rows: torch.Tensor, ticket: Any) -> torch.Tensor:
        """See `TokenExchange.combine`.

        The result lies in the exchange's own buffer: it is valid until this rank's next `dispatch`.
        """
        layout = self._layout
        num_tokens = ticket.slots.shape[0]
        _kernels.return_results[(min(max(1, rows.shape[0]), self._programs),)](
            self._memory.table,
            self._state,
            self._memory.local,
            rows.contiguous(),
            self._origins,
            ticket.offsets,
            ticket.slots,
            num_tokens,
            self._rank,
            self._slots_per_rank,
            at_flags=layout.flags,
            at_results=layout.results,
            CHUNK=CHUNK,
            **self._row_settings(),
        )
        begin, num_bytes = layout.results, num_tokens * layout.top_k * layout.row_bytes
        results = self._memory.local[begin : begin + num_bytes].view(self._dtype)
        return results.view(num_tokens, layout.top_k, layout.hidden_size)

    def check(self) -> None:
        """Whether everything since `enter` went well. Waits for the current stream: once a step.

        Raises:
            PeerLost: it did not, and no result since the last `check` counts.
        """
        error = int(self._state[ERROR].item())
        if not error:
            return
        where = f"symmetric exchange of epoch {self._epoch} on rank {self._rank}"
        if error & LEFT:
            raise PeerLost(f"{where} broke off: this rank has left the epoch, or was left behind")
        if error & OVERFLOW:
            room = f"{self._layout.max_tokens} tokens of every rank, each to different slots"
            raise PeerLost(f"{where} broke off: more rows came than there is room for: {room}")
        silent = [rank for rank in range(self._layout.num_seats) if error >> rank & 1]
        raise PeerLost(f"{where} broke off: ranks {silent} missed the deadline of {self._timeout_s} s")

    def abort(self, epoch: int) -> None:
        """Free whoever waits in `epoch`, here; later waits of that epoch end at once. From any thread.

        No call of CUDA is needed: another thread may be stuck in one behind the kernel that waits.
        """
        self._word[0] = max(int(self._word[0]), epoch + 1)

    def close(self) -> None:
        """Give the buffer back. Peers must have left the epoch, or count this rank as dead."""
        self._memory.close()

    def _shut_out(self, view: View) -> None:
        """Tell those who are left behind, in their memory: a process that slept may still want to send results."""
        fence = torch.tensor([view.epoch], device=self._device)
        for rank in self._memory.ranks:
            if rank != self._rank and rank not in view.ranks:
                self._memory.write(rank, self._layout.fence, fence, torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)

    def _send(self, hidden: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, max_rows: int) -> None:
        layout, num_tokens = self._layout, hidden.shape[0]
        chunks = max(1, -(-num_tokens * layout.top_k // CHUNK))
        _kernels.dispatch_tokens[(chunks + min(num_tokens, self._programs),)](
            self._memory.table,
            self._state,
            self._memory.local,
            hidden,
            slots,
            self._begins,
            self._tokens,
            offsets,
            num_tokens,
            max_rows,
            self._rank,
            self._slots_per_rank,
            max_tokens=layout.max_tokens,
            max_slots=layout.max_slots,
            at_flags=layout.flags,
            at_counts=layout.counts,
            at_choices=layout.choices,
            at_arrivals=layout.arrivals,
            SEATS=layout.num_seats,
            SLOTS_PAD=power_of_2(self._slots_per_rank),
            BINS=power_of_2(layout.num_seats * self._slots_per_rank + 1),
            K_PAD=power_of_2(layout.top_k),
            CHUNK=CHUNK,
            FP8=self._fp8,
            **self._row_settings(),
        )

    def _place(self, rows: torch.Tensor) -> None:
        layout = self._layout
        _kernels.place_rows[(min(layout.max_tokens * layout.num_seats, self._programs),)](
            self._memory.local,
            self._begins,
            self._tokens,
            rows,
            self._origins,
            max_tokens=layout.max_tokens,
            at_choices=layout.choices,
            at_arrivals=layout.arrivals,
            SEATS=layout.num_seats,
            K_PAD=power_of_2(layout.top_k),
            FP8=self._fp8,
            **self._row_settings(),
        )

    def _use_slots(self, slots_per_rank: int) -> None:
        """Run every kernel once, outside of any epoch: nothing is sent, and peers need not wait for a compiler."""
        if slots_per_rank == self._slots_per_rank:
            return
        self._slots_per_rank = slots_per_rank
        layout = self._layout
        hidden = torch.zeros((1, layout.hidden_size), dtype=self._dtype, device=self._device)
        slots = torch.full((1, layout.top_k), -1, device=self._device)
        sent = self.dispatch(hidden, slots)
        self.combine(sent.rows, sent.ticket)

    def _row_settings(self) -> dict[str, int]:
        layout = self._layout
        padded = power_of_2(layout.hidden_size)
        return {
            "TOP_K": layout.top_k,
            "SEATS_PAD": layout.seats_padded,
            "D": layout.hidden_size,
            "D_PAD": padded,
            "ROW_BYTES": layout.row_bytes,
            "num_warps": 8 if padded >= 4096 else 4,
        }


def _name(incarnation: str) -> str:
    return f"{incarnation}/exchange"
