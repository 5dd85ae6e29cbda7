"""The sums of `digest.py`, of many experts in one launch instead of some twenty calls of torch for each."""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def add_chunks(table_ptr, powers_ptr, sums_ptr, MIX: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Program (chunk, row): add a chunk's products, times the power of its number, to a sum. A row of the table, int64
    [4], is the address of a tensor, its words, the number of its first chunk, and which sum is its."""
    chunk, row = tl.program_id(0).to(tl.int64), table_ptr + tl.program_id(1) * 4
    words_ptr = tl.load(row).to(tl.pointer_type(tl.int32))
    num_words = tl.load(row + 1)
    begin = chunk * CHUNK
    if begin < num_words:
        total = tl.zeros((AT_ONCE,), tl.int64)
        for done in range(0, CHUNK, AT_ONCE):
            places = done + tl.arange(0, AT_ONCE).to(tl.int64)
            words = tl.load(words_ptr + begin + places, mask=begin + places < num_words, other=0)
            total += words.to(tl.int64) * (places * MIX | 1)
        product = tl.sum(total, 0) * tl.load(powers_ptr + tl.load(row + 2) + chunk)
        tl.atomic_add(sums_ptr + tl.load(row + 3), product)
