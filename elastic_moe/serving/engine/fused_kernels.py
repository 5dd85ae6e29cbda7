"""Rotary embeddings, and the choice of experts, in one launch each instead of some ten of torch."""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def rotate(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, cos_ptr, sin_ptr,
    query_stride_t, query_stride_h, key_stride_t, key_stride_h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (token, block of AT_ONCE heads, queries' heads first): turn each head's halves, HALF wide, by cos and sin
    [T, 2 HALF]. Outputs are [T, heads, 2 HALF]. DIM: HALF or the next power of two."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM)
    inside = dims < HALF
    angle = token * (2 * HALF) + dims
    cos_first = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    block = tl.program_id(1)
    of_queries: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    if block < of_queries:
        heads = block * AT_ONCE + tl.arange(0, AT_ONCE)
        wanted = (heads < HEADS)[:, None] & inside[None, :]
        source = query_ptr + token * query_stride_t + heads[:, None] * query_stride_h + dims[None, :]
        target = query_out_ptr + (token * HEADS + heads)[:, None] * (2 * HALF) + dims[None, :]
    else:
        heads = (block - of_queries) * AT_ONCE + tl.arange(0, AT_ONCE)
        wanted = (heads < KV_HEADS)[:, None] & inside[None, :]
        source = key_ptr + token * key_stride_t + heads[:, None] * key_stride_h + dims[None, :]
        target = key_out_ptr + (token * KV_HEADS + heads)[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=wanted, other=0.0).to(tl.float32)
    turned = first * cos_first[None, :] - second * sin_first[None, :]
    other = second * cos_second[None, :] + first * sin_second[None, :]
    tl.store(target, turned.to(query_out_ptr.dtype.element_ty), mask=wanted)
    tl.store(target + HALF, other.to(query_out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def route(
    logits_ptr, scores_ptr, chosen_ptr, num_experts,
    TOP_K: tl.constexpr, NORMALIZED: tl.constexpr, EXPERTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Program (token): softmax over its logits [T, num_experts], the TOP_K largest in falling order, of equals the
    lower number first, and their scores [T, TOP_K], which then sum up to 1 if NORMALIZED. EXPERTS and PLACES are
    num_experts and TOP_K or the next power of two. Of logits that are not numbers some expert is chosen."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERTS)
    inside = experts < num_experts
    logits = tl.load(logits_ptr + token * num_experts + experts, mask=inside, other=float("-inf")).to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, axis=0))
    total = tl.sum(powers, axis=0)
    left = tl.where(inside, powers / total, -1.0)
    places = tl.arange(0, PLACES)
    scores = tl.zeros((PLACES,), tl.float32)
    chosen = tl.zeros((PLACES,), tl.int32)
    for place in tl.static_range(TOP_K):
        best = tl.max(left, axis=0)
        expert = tl.minimum(tl.min(tl.where(left == best, experts, EXPERTS), axis=0), num_experts - 1)
        scores = tl.where(places == place, best, scores)
        chosen = tl.where(places == place, expert, chosen)
        left = tl.where(experts == expert, -1.0, left)
    if NORMALIZED:
        scores = scores / tl.sum(scores, axis=0)
    scores = tl.where(total == total, scores, float("nan"))  # as torch: the comparisons above pass over such numbers
    wanted = places < TOP_K
    tl.store(scores_ptr + token * TOP_K + places, scores.to(scores_ptr.dtype.element_ty), mask=wanted)
    tl.store(chosen_ptr + token * TOP_K + places, chosen.to(tl.int64), mask=wanted)
