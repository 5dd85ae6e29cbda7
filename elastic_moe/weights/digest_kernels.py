"""The sum of `digest.py` in one launch for a tensor, instead of some twenty calls of torch."""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_words", "first"])
def add_chunks(
    words_ptr, num_words, powers_ptr, first, sum_ptr, MIX: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """sum += the products of the chunk that the program numbers, times the power of chunk `first` and so on."""
    chunk = tl.program_id(0)
    begin = chunk.to(tl.int64) * CHUNK
    total = tl.zeros((AT_ONCE,), tl.int64)
    for done in range(0, CHUNK, AT_ONCE):
        places = done + tl.arange(0, AT_ONCE).to(tl.int64)
        words = tl.load(words_ptr + begin + places, mask=begin + places < num_words, other=0)
        total += words.to(tl.int64) * (places * MIX | 1)
    tl.atomic_add(sum_ptr, tl.sum(total, 0) * tl.load(powers_ptr + first + chunk))
