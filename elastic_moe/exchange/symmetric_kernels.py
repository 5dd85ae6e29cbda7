"""Triton kernels of the symmetric exchange: tokens out, rows in order, results back. `ExchangeLayout` says where.

`dispatch_tokens` and `return_results` end as `signal_kernels` says: by telling all live peers and waiting for them. So
- nobody reads arrivals before they are complete, nor results;
- what a peer got in dispatch n (counts, choices, arrivals) is overwritten by dispatch n + 1 only after it told the end
  of combine n, so after it read them; its results by combine n + 1 only after it told the end of dispatch n + 1, so
  after it used them. One buffer of each is enough: no ring.

The flags have a row for dispatch and, SEATS_PAD behind, one for combine. Both kernels of call n tell the same value, so
in one row the flag of dispatch n would do for combine n.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from elastic_moe.exchange.layout import COUNT_BITS
from elastic_moe.exchange.signal_kernels import (
    EPOCH,
    ERROR,
    OVERFLOW,
    SEQUENCE,
    acquire,
    has,
    is_last,
    peer,
    peer_row,
    tell,
    wait,
    working,
)

_COUNT_BITS = tl.constexpr(COUNT_BITS)
_COUNT_MASK = tl.constexpr((1 << COUNT_BITS) - 1)
_OVERFLOW = tl.constexpr(OVERFLOW)
_ERROR = tl.constexpr(ERROR)
_EPOCH = tl.constexpr(EPOCH)
_SEQUENCE = tl.constexpr(SEQUENCE)
_SCALED = tl.constexpr(128)
_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _slots_of(slots_ptr, pairs, end, all_slots):
    """Slots of the pairs below `end`; "none" is a slot behind all others."""
    slots = tl.load(slots_ptr + pairs, mask=pairs < end, other=-1).to(tl.int32)
    return tl.where((slots < 0) | (slots > all_slots), all_slots, slots)


@triton.jit
def _send_choices(
    table_ptr,
    slots_ptr,
    live,
    chunk,
    num_tokens,
    num_slots,
    rank,
    max_slots,
    max_pairs,
    at_counts,
    at_choices,
    TOP_K: tl.constexpr,
    SEATS: tl.constexpr,
    SEATS_PAD: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tell each peer which pairs of this chunk are for its slots, and their places; the last chunk tells the counts.

    A pair's place is how many earlier pairs of this rank have its slot, so rows can be ordered without another sort.
    """
    num_pairs = num_tokens * TOP_K
    all_slots = SEATS * num_slots
    lane = tl.arange(0, CHUNK)
    pairs = chunk * CHUNK + lane
    slots = _slots_of(slots_ptr, pairs, num_pairs, all_slots)
    before = tl.zeros((BINS,), tl.int32)
    for begin in range(0, chunk * CHUNK, 1024):
        before += tl.histogram(_slots_of(slots_ptr, begin + tl.arange(0, 1024), chunk * CHUNK, all_slots), BINS)
    earlier = (slots[:, None] == slots[None, :]) & (lane[:, None] > lane[None, :])
    place = tl.gather(before, slots, 0) + tl.sum(earlier.to(tl.int32), 1)
    choice = ((slots % num_slots) << _COUNT_BITS) | place
    seats = tl.arange(0, SEATS_PAD)
    told = has(seats, live)
    targets = peer(table_ptr, seats, at_choices + rank * max_pairs * 4, told, tl.int32)[:, None] + pairs[None, :]
    theirs = tl.where((slots // num_slots)[None, :] == seats[:, None], choice[None, :], -1)
    tl.store(targets, theirs, mask=told[:, None] & (pairs < num_pairs)[None, :])
    if (chunk + 1) * CHUNK >= num_pairs:
        total = before + tl.histogram(slots, BINS)
        bins = tl.arange(0, BINS)
        owner = tl.minimum(bins // num_slots, SEATS - 1)
        known = (bins < all_slots) & has(owner, live)
        row = at_counts + rank * (max_slots + 1) * 4
        tl.store(peer(table_ptr, owner, row + bins % num_slots * 4, known, tl.int32), total, mask=known)
        tl.store(peer(table_ptr, seats, row + max_slots * 4, told, tl.int32), num_tokens, mask=told)


@triton.jit
def _send_tokens(
    table_ptr,
    hidden_ptr,
    slots_ptr,
    live,
    first,
    step,
    num_tokens,
    num_slots,
    rank,
    max_tokens,
    at_arrivals,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    SEATS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Every `step`th token from `first` on, once to each live rank that has one of its slots."""
    ks = tl.arange(0, K_PAD)
    columns = tl.arange(0, D_PAD)
    for token in range(first, num_tokens, step):
        slots = tl.load(slots_ptr + token * TOP_K + ks, mask=ks < TOP_K, other=-1)
        owners = tl.where(slots < 0, -1, (slots // num_slots).to(tl.int32))
        offset = at_arrivals + tl.cast(rank * max_tokens + token, tl.int64) * ROW_BYTES
        row = tl.load(hidden_ptr + tl.cast(token, tl.int64) * D + columns, mask=columns < D, other=0)
        if FP8:
            parts = tl.arange(0, D_PAD // _SCALED)
            values = row.to(tl.float32).reshape(D_PAD // _SCALED, _SCALED)
            largest = tl.max(tl.abs(values), 1)
            scale = tl.where(largest == 0, 1.0, largest / _E4M3_MAX)
            small = (values / scale[:, None]).to(tl.float8e4nv).reshape(D_PAD)
        for turn in range(1, SEATS + 1):  # begin with the next seat: not all ranks with the same
            seat = (rank + turn) % SEATS
            if has(seat, live) & (tl.max((owners == seat).to(tl.int32), 0) != 0):
                if FP8:
                    tl.store(peer_row(table_ptr, seat, offset, tl.float8e4nv) + columns, small, mask=columns < D)
                    target = peer(table_ptr, seat, offset + D, True, tl.float32)
                    tl.store(target + parts, scale, mask=parts < D // _SCALED)
                else:
                    target = peer_row(table_ptr, seat, offset, hidden_ptr.dtype.element_ty)
                    tl.store(target + columns, row, mask=columns < D)


@triton.jit
def _order_rows(
    state_ptr,
    buffer_ptr,
    begins_ptr,
    tokens_ptr,
    offsets_ptr,
    live,
    error,
    num_slots,
    max_slots,
    max_rows,
    at_counts,
    SEATS_PAD: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
):
    """From the counts of all sources: where the rows of each (slot, source) begin, and where each slot's end.

    After an error, or if more would arrive than there is room for, no rows.
    """
    counts_ptr = (buffer_ptr + at_counts).to(tl.pointer_type(tl.int32))
    seats = tl.arange(0, SEATS_PAD)
    slots = tl.arange(0, SLOTS_PAD)
    live = tl.where(error == 0, live, 0)
    here = has(seats, live)
    row = seats[None, :] * (max_slots + 1)
    counts = tl.load(counts_ptr + row + slots[:, None], mask=(slots < num_slots)[:, None] & here[None, :], other=0)
    flat = tl.reshape(counts, (SLOTS_PAD * SEATS_PAD,))
    ends = tl.cumsum(flat, 0)
    tl.store(begins_ptr + tl.arange(0, SLOTS_PAD * SEATS_PAD), ends - flat)
    of_slot = tl.max(tl.reshape(ends, (SLOTS_PAD, SEATS_PAD)), 1)
    fits = tl.max(of_slot, 0) <= max_rows
    if not fits:
        tl.store(state_ptr + _ERROR, error | _OVERFLOW)
    tl.store(offsets_ptr + slots, tl.where(fits, of_slot, 0), mask=slots < num_slots)
    num_tokens = tl.load(counts_ptr + seats * (max_slots + 1) + max_slots, mask=here, other=0)
    tl.store(tokens_ptr + seats, tl.where(fits, num_tokens, 0))


@triton.jit(do_not_specialize=["num_tokens", "max_rows", "rank", "num_slots", "max_tokens", "max_slots"])
def dispatch_tokens(
    table_ptr,
    state_ptr,
    buffer_ptr,
    hidden_ptr,
    slots_ptr,
    begins_ptr,
    tokens_ptr,
    offsets_ptr,
    num_tokens,
    max_rows,
    rank,
    num_slots,
    max_tokens,
    max_slots,
    at_flags,
    at_counts,
    at_choices,
    at_arrivals,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    SEATS: tl.constexpr,
    SEATS_PAD: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Send this rank's tokens [T, D] to the slots [T, K], wait for everybody's, and say where rows go.

    The first programs send choices, a chunk each, the others tokens. Written here: `begins` int32 [S_PAD * R_PAD],
    `tokens` int32 [R_PAD], of each source, `offsets` int32 [S].
    """
    live = working(state_ptr)
    program = tl.program_id(0)
    chunks = tl.maximum(tl.cdiv(num_tokens * TOP_K, CHUNK), 1)
    # fmt: off
    if program < chunks:
        _send_choices(
            table_ptr, slots_ptr, live, program, num_tokens, num_slots, rank, max_slots, max_tokens * TOP_K,
            at_counts, at_choices, TOP_K, SEATS, SEATS_PAD, BINS, CHUNK,
        )
    else:
        _send_tokens(
            table_ptr, hidden_ptr, slots_ptr, live, program - chunks, tl.num_programs(0) - chunks, num_tokens,
            num_slots, rank, max_tokens, at_arrivals, TOP_K, K_PAD, SEATS, D, D_PAD, ROW_BYTES, FP8,
        )
    if is_last(state_ptr):  # nobody else touches SEQUENCE: no atomic
        sequence = tl.load(state_ptr + _SEQUENCE) + 1
        tl.store(state_ptr + _SEQUENCE, sequence)
        value = (tl.load(state_ptr + _EPOCH) << 32) + sequence
        tell(table_ptr, at_flags, rank, live, value, SEATS_PAD)
        error = wait(state_ptr, buffer_ptr, at_flags, live, value, SEATS_PAD)
        _order_rows(
            state_ptr, buffer_ptr, begins_ptr, tokens_ptr, offsets_ptr, live, error, num_slots, max_slots, max_rows,
            at_counts, SEATS_PAD, SLOTS_PAD,
        )
    # fmt: on


@triton.jit(do_not_specialize=["max_tokens"])
def place_rows(
    buffer_ptr,
    begins_ptr,
    tokens_ptr,
    rows_ptr,
    origins_ptr,
    max_tokens,
    at_choices,
    at_arrivals,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    SEATS: tl.constexpr,
    SEATS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Copy arrivals to `rows` [M, D] by slot, then source, then pair; `origins` int32 [M] = source << 20 | pair."""
    choices_ptr = (buffer_ptr + at_choices).to(tl.pointer_type(tl.int32))
    seats = tl.arange(0, SEATS_PAD)
    ks = tl.arange(0, K_PAD)
    columns = tl.arange(0, D_PAD)
    num_tokens = tl.load(tokens_ptr + seats)
    for index in range(tl.program_id(0), tl.max(num_tokens, 0) * SEATS, tl.num_programs(0)):
        source = index % SEATS
        token = index // SEATS
        if token < tl.sum(tl.where(seats == source, num_tokens, 0), 0):
            pairs = token * TOP_K + ks
            choice = tl.load(choices_ptr + source * (max_tokens * TOP_K) + pairs, mask=ks < TOP_K, other=-1)
            mine = choice >= 0
            begin = tl.load(begins_ptr + (choice >> _COUNT_BITS) * SEATS_PAD + source, mask=mine, other=0)
            places = tl.where(mine, begin + (choice & _COUNT_MASK), -1)
            tl.store(origins_ptr + places, (source << _COUNT_BITS) | pairs, mask=mine)
            if tl.max(places, 0) >= 0:
                arrival = buffer_ptr + at_arrivals + tl.cast(source * max_tokens + token, tl.int64) * ROW_BYTES
                if FP8:
                    parts = tl.arange(0, D_PAD // _SCALED)
                    small = tl.load(arrival.to(tl.pointer_type(tl.float8e4nv)) + columns, mask=columns < D)
                    scale = tl.load((arrival + D).to(tl.pointer_type(tl.float32)) + parts, mask=parts < D // _SCALED)
                    row = small.to(tl.float32).reshape(D_PAD // _SCALED, _SCALED) * scale[:, None]
                    row = row.reshape(D_PAD).to(rows_ptr.dtype.element_ty)
                else:
                    row = tl.load(arrival.to(tl.pointer_type(rows_ptr.dtype.element_ty)) + columns, mask=columns < D)
                for k in range(TOP_K):
                    place = tl.sum(tl.where(ks == k, places, 0), 0)
                    if place >= 0:
                        tl.store(rows_ptr + tl.cast(place, tl.int64) * D + columns, row, mask=columns < D)


@triton.jit(do_not_specialize=["num_tokens", "rank", "num_slots"])
def return_results(
    table_ptr,
    state_ptr,
    buffer_ptr,
    rows_ptr,
    origins_ptr,
    offsets_ptr,
    slots_ptr,
    num_tokens,
    rank,
    num_slots,
    at_flags,
    at_results,
    TOP_K: tl.constexpr,
    SEATS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Write each row of `rows` [M, D] to the results of its origin, zeros to this rank's pairs of no slot, and wait.

    A rank that was left behind while it computed must not write into results of a later epoch: it looks at its fence.
    """
    live = working(state_ptr)
    program = tl.program_id(0)
    columns = tl.arange(0, D_PAD)
    over = acquire(buffer_ptr.to(tl.int64)) > tl.load(state_ptr + _EPOCH)
    num_rows = tl.where((live == 0) | over, 0, tl.load(offsets_ptr + num_slots - 1))
    for place in range(program, num_rows, tl.num_programs(0)):
        row = tl.load(rows_ptr + tl.cast(place, tl.int64) * D + columns, mask=columns < D)
        origin = tl.load(origins_ptr + place)
        offset = at_results + tl.cast(origin & _COUNT_MASK, tl.int64) * ROW_BYTES
        target = peer_row(table_ptr, origin >> _COUNT_BITS, offset, rows_ptr.dtype.element_ty)
        tl.store(target + columns, row, mask=columns < D)
    for begin in range(program * CHUNK, num_tokens * TOP_K, tl.num_programs(0) * CHUNK):
        pairs = begin + tl.arange(0, CHUNK)
        empty = tl.load(slots_ptr + pairs, mask=pairs < num_tokens * TOP_K, other=0) < 0
        if tl.max(empty.to(tl.int32), 0) != 0:
            for lane in range(CHUNK):
                if tl.max((empty & (tl.arange(0, CHUNK) == lane)).to(tl.int32), 0) != 0:
                    result = buffer_ptr + at_results + tl.cast(begin + lane, tl.int64) * ROW_BYTES
                    result = result.to(tl.pointer_type(rows_ptr.dtype.element_ty))
                    tl.store(result + columns, tl.zeros((D_PAD,), rows_ptr.dtype.element_ty), mask=columns < D)
    if is_last(state_ptr):  # the value that its dispatch told, in the other row
        value = (tl.load(state_ptr + _EPOCH) << 32) + tl.load(state_ptr + _SEQUENCE)
        tell(table_ptr, at_flags + SEATS_PAD * 8, rank, live, value, SEATS_PAD)
        wait(state_ptr, buffer_ptr, at_flags + SEATS_PAD * 8, live, value, SEATS_PAD)
