"""Triton kernels of the experts: route, grouped GEMM for few rows per slot, combine.

Rows are grouped by slot; `offsets` int32 [S] are the ends of the groups. A *pair* is one (token, k) of the router's
[T, K] choice, numbered t * K + k. Nothing here reads a count on the host, so all of it can be captured in a graph.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def gate_with(gate, ACTIVATION: tl.constexpr):
    """The activation of the gate; GELU in its tanh form, 0.5 (1 + tanh z) being sigmoid(2 z)."""
    if ACTIVATION == "gelu_tanh":
        return gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "silu")
        return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _slots_of(slots_ptr, pairs, num_pairs, num_slots):
    """Slots of the pairs; whatever is no slot of ours counts as slot `num_slots`, behind all others."""
    slots = tl.load(slots_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
    return tl.where((slots < 0) | (slots > num_slots), num_slots, slots)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def count_pairs(slots_ptr, counts_ptr, num_pairs, num_slots, BLOCK: tl.constexpr, S_PAD: tl.constexpr):
    """counts[block, slot]: how many of this block's pairs go to each slot."""
    block = tl.program_id(0)
    slots = _slots_of(slots_ptr, block * BLOCK + tl.arange(0, BLOCK), num_pairs, num_slots)
    tl.store(counts_ptr + block * S_PAD + tl.arange(0, S_PAD), tl.histogram(slots, S_PAD))


@triton.jit(do_not_specialize=["num_pairs", "num_slots", "num_blocks"])
def place_pairs(
    slots_ptr,
    counts_ptr,
    order_ptr,
    row_ptr,
    offsets_ptr,
    num_pairs,
    num_slots,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    S_PAD: tl.constexpr,
):
    """Stable counting sort: the pair of each row, and the row of each pair. One block needs no counts."""
    block = tl.program_id(0)
    bins = tl.arange(0, S_PAD)
    start = tl.zeros((S_PAD,), tl.int32)
    if counts_ptr is None:
        total = tl.histogram(_slots_of(slots_ptr, tl.arange(0, BLOCK), num_pairs, num_slots), S_PAD)
    else:
        total = tl.zeros((S_PAD,), tl.int32)
        for first in range(0, num_blocks, AT_ONCE):
            others = first + tl.arange(0, AT_ONCE)[:, None]
            counts = tl.load(counts_ptr + others * S_PAD + bins[None, :], mask=others < num_blocks, other=0)
            total += tl.sum(counts, 0)
            start += tl.sum(tl.where(others < block, counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets_ptr + bins, ends, mask=bins < num_slots)
    start += ends - total
    chunk = tl.arange(0, CHUNK)
    for first in range(0, BLOCK, CHUNK):
        pairs = block * BLOCK + first + chunk
        slots = _slots_of(slots_ptr, pairs, num_pairs, num_slots)
        earlier = (slots[:, None] == slots[None, :]) & (chunk[:, None] > chunk[None, :])
        row = tl.gather(start, slots, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order_ptr + row, pairs, mask=pairs < num_pairs)
        tl.store(row_ptr + pairs, row, mask=pairs < num_pairs)
        start += tl.histogram(slots, S_PAD)


@triton.jit(do_not_specialize=["num_slots"])
def grouped_gemm(
    x_ptr,
    w_ptr,
    out_ptr,
    offsets_ptr,
    order_ptr,
    num_slots,
    N,
    K,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    S_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = x @ w[slot].T for the rows of each slot, one tile of BM rows by BN columns per program.

    With ACTIVATION, the N rows of w[slot] are gate and up, and act(gate) * up of width N / 2 is written. With GATHER
    row j is token order[j] // TOP_K of x. N is a multiple of BN, K of BK.

    The weights are the left operand of the tensor cores, so the few rows are on their finer side. The tiles of a slot
    that share weights are neighbours: only the first reads them from memory.
    """
    slots = tl.arange(0, S_PAD)
    ends = tl.load(offsets_ptr + slots, mask=slots < num_slots, other=0)
    begins = tl.load(offsets_ptr + slots - 1, mask=(slots > 0) & (slots < num_slots), other=0)
    tiles_n = tl.cdiv(N, BN)
    tile_ends = tl.cumsum(tl.cdiv(ends - begins, BM), 0) * tiles_n
    tile = tl.program_id(0)
    if tile < tl.max(tl.where(slots < num_slots, tile_ends, 0), 0):
        slot = tl.sum(((tile_ends <= tile) & (slots < num_slots)).to(tl.int32), 0)
        begin = tl.sum(tl.where(slots == slot, begins, 0), 0)
        end = tl.sum(tl.where(slots == slot, ends, 0), 0)
        tiles_m = tl.cdiv(end - begin, BM)
        tile -= tl.sum(tl.where(slots == slot, tile_ends, 0), 0) - tiles_m * tiles_n
        row = begin + tile % tiles_m * BM
        rows = row + tl.arange(0, BM)
        inside = rows < end
        source = rows
        if GATHER:
            source = tl.load(order_ptr + rows, mask=inside, other=0) // TOP_K
        source = tl.where(inside, source, 0)
        n = tile // tiles_m
        row_of_w = tl.arange(0, BN)
        if ACTIVATION is None:
            row_of_w += n * BN
        else:
            row_of_w = row_of_w // (BN // 2) * (N // 2) + n * (BN // 2) + row_of_w % (BN // 2)
        depth = tl.arange(0, BK)
        x_tile = x_ptr + source.to(tl.int64)[:, None] * K + depth[None, :]
        w_tile = w_ptr + slot.to(tl.int64) * N * K + row_of_w[:, None] * K + depth[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(tl.load(w_tile + k), tl.load(x_tile + k).T, acc, input_precision="ieee")
        if ACTIVATION is None:
            WIDTH: tl.constexpr = BN
            out = acc.T
        else:
            WIDTH: tl.constexpr = BN // 2
            gate, up = acc.reshape(2, WIDTH, BM).permute(2, 1, 0).split()
            out = gate_with(gate, ACTIVATION) * up
        columns = n * WIDTH + tl.arange(0, WIDTH)
        pointers = out_ptr + rows.to(tl.int64)[:, None] * (N // BN * WIDTH) + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["num_slots"])
def combine_pairs(
    results_ptr, row_ptr, offsets_ptr, weights_ptr, out_ptr, num_slots, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = the sum over k, in this order and in float32, of weights[t, k] times the result of pair (t, k)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_rows = tl.load(offsets_ptr + num_slots - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        row = tl.load(row_ptr + pair).to(tl.int64)
        result = tl.load(results_ptr + row * D + columns, mask=(row < num_rows) & (columns < D), other=0.0)
        total += tl.load(weights_ptr + pair).to(tl.float32) * result.to(tl.float32)
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)
