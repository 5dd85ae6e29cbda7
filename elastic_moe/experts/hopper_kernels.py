"""Grouped GEMM for Hopper in Gluon, for many rows per slot: persistent, one warp or warpgroup loads, two multiply.

A tile is BM = 128 rows by BN columns of weights. The loader runs ahead through a ring of STAGES buffers, over the ends
of tiles, so the next tile loads while the last one is written. Each of the two multiplying warpgroups owns 64 rows
and leaves a tile alone that has none for it: a group's last tile costs what its rows cost, rounded up to 64.

A ring of n buffers has two mbarriers for each: `full`, counted by the loader (and by the bytes as they land), and
`empty`, counted by both warpgroups. Each turn through the ring completes one phase of each of them, and what waits
gives the parity of the phase it needs, 0 first: the number of its turn modulo 2. Both sides keep stage and parity by
themselves, in step, for both see the same tiles and parts of K. A new barrier is in phase 0, and that before it passes
for completed: the loader begins with parity 1 and finds the whole ring empty, the others with 0 and wait for the first
load. One bit is enough since nobody can be two turns behind: a buffer is filled again only when both have given it
back. The numbers of the tiles travel the same way, through a ring of DEALT.

Tiles are dealt by a counter, in order, to whoever is free: the tiles that share weights are at work at the same time
and find them in the L2 cache. (Dealt by turns the programs drift apart; weights then came twice from memory.)
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elastic_moe.experts.triton_kernels import gate_with

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
DEALT = gl.constexpr(2)  # tiles the loader may be ahead: the ring of their numbers


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tile_table(offsets_ptr, num_slots, tiles_n, S_PAD: gl.constexpr, BM: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Per slot: first row, end, end of its tiles; each warp holds all of it, so looking up needs no barrier."""
    layout: gl.constexpr = gl.BlockedLayout([S_PAD // 32], [32], [NUM_WARPS], [0])
    slots = gl.arange(0, S_PAD, layout=layout)
    ends = gl.load(offsets_ptr + slots, mask=slots < num_slots, other=0)
    begins = gl.load(offsets_ptr + slots - 1, mask=(slots > 0) & (slots < num_slots), other=0)
    tile_ends = gl.associative_scan((ends - begins + BM - 1) // BM, 0, _add) * tiles_n
    num_tiles = gl.max(gl.where(slots < num_slots, tile_ends, 0), 0)
    tile_ends = gl.where(slots < num_slots, tile_ends, 0x7FFFFFFF)
    return slots, begins, ends, tile_ends, num_tiles


@gluon.jit
def _find_tile(tile, slots, begins, ends, tile_ends, tiles_n, BM: gl.constexpr, GROUP: gl.constexpr):
    """Slot, first row, end of the slot's rows, and column of a tile; GROUP row tiles share columns before the next."""
    slot = gl.sum((tile_ends <= tile).to(gl.int32), 0)
    begin = gl.sum(gl.where(slots == slot, begins, 0), 0)
    end = gl.sum(gl.where(slots == slot, ends, 0), 0)
    tiles_m = (end - begin + BM - 1) // BM
    tile -= gl.sum(gl.where(slots == slot, tile_ends, 0), 0) - tiles_m * tiles_n
    first = tile // (GROUP * tiles_n) * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    tile = tile % (GROUP * tiles_n)
    return slot, begin + (first + tile % size) * BM, end, tile // size


@gluon.jit
def _load(
    sources,
    ring,
    dealer,
    groups,
    N,
    K,
    TOP_K: gl.constexpr,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    SHAPE: gl.constexpr,
):
    S_PAD: gl.constexpr = SHAPE[0]
    BM: gl.constexpr = SHAPE[1]
    BN: gl.constexpr = SHAPE[2]
    BK: gl.constexpr = SHAPE[3]
    GROUP: gl.constexpr = SHAPE[4]
    STAGES: gl.constexpr = SHAPE[5]
    HALF: gl.constexpr = BM // 2
    WARPS: gl.constexpr = 4 if GATHER else 1
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    x_ptr, x_desc, w_desc = sources
    x_ring, w_ring, full, empty = ring
    next_ptr, dealt, dealt_full, dealt_empty = dealer
    offsets_ptr, order_ptr, num_slots = groups
    tiles_n = (N + BN - 1) // BN
    slots, begins, ends, tile_ends, num_tiles = _tile_table(offsets_ptr, num_slots, tiles_n, S_PAD, BM, WARPS)
    stage = 0
    phase = 1  # of `empty`: the first turn waits for nobody
    turn = 0
    tile = gl.program_id(0)
    while tile < num_tiles:
        slot, row, end, n = _find_tile(tile, slots, begins, ends, tile_ends, tiles_n, BM, GROUP)
        both = row + HALF < end
        if GATHER:
            rows = row + gl.arange(0, BM, layout=gl.SliceLayout(1, copy))
            inside = gl.expand_dims(rows < end, 1)
            token = gl.load(order_ptr + rows, mask=rows < end, other=0) // TOP_K
            columns = gl.arange(0, BK, layout=gl.SliceLayout(0, copy))
            x_rows = x_ptr + gl.expand_dims(token.to(gl.int64) * K, 1) + gl.expand_dims(columns, 0)
        for k in range(0, K, BK):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            x = x_ring.index(stage)
            w = w_ring.index(stage)
            if GATHER:
                mbarrier.expect(ready, BN * BK * 2)
            elif both:
                mbarrier.expect(ready, (BM + BN) * BK * 2)
            else:
                mbarrier.expect(ready, (HALF + BN) * BK * 2)
            if GATED:
                gate = slot * N + n * (BN // 2)
                tma.async_copy_global_to_shared(w_desc, [gate, k], ready, w.slice(0, BN // 2, 0))
                tma.async_copy_global_to_shared(w_desc, [gate + N // 2, k], ready, w.slice(BN // 2, BN // 2, 0))
            else:
                tma.async_copy_global_to_shared(w_desc, [slot * N + n * BN, k], ready, w)
            if GATHER:
                async_copy.async_copy_global_to_shared(x, x_rows + k, mask=inside)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            else:
                tma.async_copy_global_to_shared(x_desc, [row, k], ready, x.slice(0, HALF, 0))
                tma.async_copy_global_to_shared(x_desc, [row + HALF, k], ready, x.slice(HALF, HALF, 0), pred=both)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        tile = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
        place = turn % DEALT
        mbarrier.wait(dealt_empty.index(place), (turn // DEALT + 1) & 1)  # 1 first, like `phase`
        dealt.index(place).store(gl.full([1], 0, gl.int32, single) + tile)
        barrier()
        mbarrier.arrive(dealt_full.index(place))
        turn += 1


@gluon.jit
def _multiply_tile(
    stage, phase, x_ring, w_ring, full, empty, K, FIRST: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr
):
    """x[FIRST:FIRST + ROWS] @ w.T of the tile whose first part is in `stage`; each part is given back one step late."""
    BN: gl.constexpr = w_ring.shape[1]
    BK: gl.constexpr = w_ring.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    acc = gl.zeros((ROWS, BN), gl.float32, layout)
    for k in range(0, K, BK):
        mbarrier.wait(full.index(stage), phase)
        x = x_ring.index(stage).slice(FIRST, ROWS, 0)
        acc = warpgroup_mma(x, w_ring.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        barrier()
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=k > 0)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
    return acc, stage, phase


@gluon.jit
def _pass_tile(stage, phase, full, empty, K, BK: gl.constexpr, STAGES: gl.constexpr):
    """Give back a tile of which this warpgroup has no rows: `empty` counts two, and stage and phase stay in step."""
    for _ in range(0, K, BK):
        mbarrier.wait(full.index(stage), phase)
        barrier()
        mbarrier.arrive(empty.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    return stage, phase


@gluon.jit
def _multiply(
    out_ptr,
    ring,
    dealer,
    groups,
    N,
    K,
    FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SHAPE: gl.constexpr,
):
    S_PAD: gl.constexpr = SHAPE[0]
    BM: gl.constexpr = SHAPE[1]
    BN: gl.constexpr = SHAPE[2]
    BK: gl.constexpr = SHAPE[3]
    GROUP: gl.constexpr = SHAPE[4]
    STAGES: gl.constexpr = SHAPE[5]
    x_ring, w_ring, full, empty = ring
    _next_ptr, dealt, dealt_full, dealt_empty = dealer
    offsets_ptr, _order_ptr, num_slots = groups
    ROWS: gl.constexpr = BM // 2
    WIDTH: gl.constexpr = BN if ACTIVATION is None else BN // 2
    store: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tiles_n = (N + BN - 1) // BN
    width = tiles_n * WIDTH
    slots, begins, ends, tile_ends, num_tiles = _tile_table(offsets_ptr, num_slots, tiles_n, S_PAD, BM, 4)
    stage = 0
    phase = 0  # of `full`: the first turn waits for the first load
    turn = 0
    tile = gl.program_id(0)
    while tile < num_tiles:
        _slot, row, end, n = _find_tile(tile, slots, begins, ends, tile_ends, tiles_n, BM, GROUP)
        row += FIRST
        if row < end:
            acc, stage, phase = _multiply_tile(stage, phase, x_ring, w_ring, full, empty, K, FIRST, ROWS, STAGES)
            if ACTIVATION is None:
                out = acc
            else:
                gate, up = acc.reshape((ROWS, 2, WIDTH)).permute((0, 2, 1)).split()
                out = gate_with(gate, ACTIVATION) * up
            out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), store)
            rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store))
            columns = n * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, store))
            pointers = out_ptr + gl.expand_dims(rows.to(gl.int64) * width, 1) + gl.expand_dims(columns, 0)
            gl.store(pointers, out, mask=gl.expand_dims(rows < end, 1))
        else:
            stage, phase = _pass_tile(stage, phase, full, empty, K, BK, STAGES)
        place = turn % DEALT
        mbarrier.wait(dealt_full.index(place), turn // DEALT & 1)
        tile = gl.max(dealt.index(place).load(single), 0)
        barrier()
        mbarrier.arrive(dealt_empty.index(place))
        turn += 1


@gluon.jit(do_not_specialize=["num_slots"])
def grouped_gemm(
    x_ptr,
    x_desc,
    w_desc,
    out_ptr,
    offsets_ptr,
    order_ptr,
    next_ptr,
    num_slots,
    N,
    K,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATHER: gl.constexpr,
    S_PAD: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `triton_kernels.grouped_gemm`; `w_desc` is over all slots' rows [S * N, K], int32 next[0] is zero."""
    GATED: gl.constexpr = ACTIVATION is not None
    x_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], w_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129 if GATHER else 1)  # 128 copying threads and the TMA's bytes
        mbarrier.init(empty.index(stage), count=2)  # the two warpgroups
    dealt = gl.allocate_shared_memory(gl.int32, [DEALT, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dealt_full = gl.allocate_shared_memory(gl.int64, [DEALT, 1], mbarrier.MBarrierLayout())
    dealt_empty = gl.allocate_shared_memory(gl.int64, [DEALT, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(DEALT):
        mbarrier.init(dealt_full.index(place), count=1)
        mbarrier.init(dealt_empty.index(place), count=2)
    fence_async_shared()
    sources = (x_ptr, x_desc, w_desc)
    ring = (x_ring, w_ring, full, empty)
    dealer = (next_ptr, dealt, dealt_full, dealt_empty)
    groups = (offsets_ptr, order_ptr, num_slots)
    SHAPE: gl.constexpr = (S_PAD, BM, BN, BK, GROUP, STAGES)
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, ring, dealer, groups, N, K, 0, ACTIVATION, SHAPE)),
            (_multiply, (out_ptr, ring, dealer, groups, N, K, BM // 2, ACTIVATION, SHAPE)),
            (_load, (sources, ring, dealer, groups, N, K, TOP_K, GATED, GATHER, SHAPE)),
        ],
        [4, 4 if GATHER else 1],
        [224, 56],
    )
