"""Attention over a paged cache, by Triton. Rows of keys and values lie where a table says; nothing is copied for it.

The keys of a query are cut into segments at fixed positions, and each segment's part is added to those before it in
order: whoever else is in the batch, and however many programs share the work.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def store(
    key_ptr, value_ptr, keys_ptr, values_ptr, rows_ptr,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Program t: write the key and the value of token t, [T, heads, head_dim], to row rows[t] of a layer's cache."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < HEADS * HEAD_DIM
    head, dim = place // HEAD_DIM, place % HEAD_DIM
    key = tl.load(key_ptr + token * key_stride_t + head * key_stride_h + dim, mask=inside)
    value = tl.load(value_ptr + token * value_stride_t + head * value_stride_h + dim, mask=inside)
    tl.store(keys_ptr + row * (HEADS * HEAD_DIM) + place, key, mask=inside)
    tl.store(values_ptr + row * (HEADS * HEAD_DIM) + place, value, mask=inside)


@triton.jit
def _segment(
    query, positions, keys_ptr, values_ptr, table_ptr, begin, end, kv_head, scale,
    ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of weights, weighted values) of the keys at positions begin..end, for queries [ROWS, DIM]."""
    dims = tl.arange(0, DIM)
    has_dim = dims < HEAD_DIM
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(begin, end, AT_ONCE):
        places = first + tl.arange(0, AT_ONCE)
        inside = places < end
        row = tl.load(table_ptr + places // PAGE, mask=inside, other=0).to(tl.int64) + places % PAGE
        offsets = (row * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        wanted = inside[:, None] & has_dim[None, :]
        key = tl.load(keys_ptr + offsets, mask=wanted, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(inside[None, :] & (places[None, :] <= positions[:, None]), scores, float("-inf"))
        now = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - shift[:, None])
        faded = tl.exp2(best - shift)
        value = tl.load(values_ptr + offsets, mask=wanted, other=0.0)
        found = found * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * faded + tl.sum(weights, 1)
        best = now
    return best, total, found


@triton.jit
def _add(best, total, found, more_best, more_total, more_found):
    """Two neighbouring parts of the same queries as one."""
    now = tl.maximum(best, more_best)
    shift = tl.where(now == float("-inf"), 0.0, now)
    faded, more_faded = tl.exp2(best - shift), tl.exp2(more_best - shift)
    total = total * faded + more_total * more_faded
    found = found * faded[:, None] + more_found * more_faded[:, None]
    return now, total, found


@triton.jit
def attend(
    query_ptr, keys_ptr, values_ptr, out_ptr, parts_ptr, bests_ptr, totals_ptr, tiles_ptr, table_ptr,
    query_stride_t, query_stride_h, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, AT_ONCE: tl.constexpr, SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, share): the queries of a tile, int32 [4]: its row of the table (-1: no tile), its first
    token, how many, and the position of the first one; times all heads that share the kv head.

    IS_SPLIT: the shares take turns at the segments, and leave the parts of each to `join`: parts f32
    [T, heads, SEGMENTS, DIM], bests and totals f32 [T, heads, SEGMENTS]. Else there is one share, which writes out
    [T, heads, head_dim].
    """
    tile = tiles_ptr + tl.program_id(0) * 4
    sequence = tl.load(tile)
    if sequence >= 0:
        GROUP: tl.constexpr = HEADS // KV_HEADS
        kv_head = tl.program_id(1)
        first, count, begins = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        rows = tl.arange(0, ROWS)
        token, head = first + rows // GROUP, kv_head * GROUP + rows % GROUP
        is_real = rows // GROUP < count
        positions = begins + rows // GROUP
        dims = tl.arange(0, DIM)
        wanted = is_real[:, None] & (dims < HEAD_DIM)[None, :]
        places = token.to(tl.int64)[:, None] * query_stride_t + head[:, None] * query_stride_h + dims[None, :]
        query = tl.load(query_ptr + places, mask=wanted, other=0.0)
        table_ptr += sequence.to(tl.int64) * table_stride
        end = begins + count
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        found = tl.zeros((ROWS, DIM), tl.float32)
        line = token.to(tl.int64) * HEADS + head
        for segment in range(tl.program_id(2), tl.cdiv(end, SEGMENT), tl.num_programs(2)):
            more_best, more_total, more_found = _segment(
                query, positions, keys_ptr, values_ptr, table_ptr, segment * SEGMENT,
                tl.minimum(end, (segment + 1) * SEGMENT), kv_head, scale * 1.4426950408889634,
                ROWS, KV_HEADS, HEAD_DIM, DIM, PAGE, AT_ONCE,
            )  # fmt: skip
            if IS_SPLIT:
                at = line * SEGMENTS + segment
                tl.store(bests_ptr + at, more_best, mask=is_real)
                tl.store(totals_ptr + at, more_total, mask=is_real)
                tl.store(parts_ptr + at[:, None] * DIM + dims[None, :], more_found, mask=is_real[:, None])
            else:
                best, total, found = _add(best, total, found, more_best, more_total, more_found)
        if not IS_SPLIT:
            out = (found / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + line[:, None] * HEAD_DIM + dims[None, :], out, mask=wanted)


@triton.jit
def join(
    out_ptr, parts_ptr, bests_ptr, totals_ptr, ends_ptr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (token, group of GROUP heads): add the parts that `attend` left, of the segments before ends[token], the
    number of keys that the token sees; none: zeros."""
    token = tl.program_id(0)
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    dims = tl.arange(0, DIM)
    line = token.to(tl.int64) * HEADS + heads
    best = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, DIM), tl.float32)
    for segment in range(0, tl.cdiv(tl.load(ends_ptr + token), SEGMENT)):
        at = line * SEGMENTS + segment
        part = tl.load(parts_ptr + at[:, None] * DIM + dims[None, :])
        best, total, found = _add(best, total, found, tl.load(bests_ptr + at), tl.load(totals_ptr + at), part)
    out = (found / tl.where(total == 0.0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + line[:, None] * HEAD_DIM + dims[None, :], out, mask=(dims < HEAD_DIM)[None, :])
