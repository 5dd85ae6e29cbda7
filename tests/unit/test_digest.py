"""Digests: by their definition in whole numbers of Python, in blocks of any size; every bit counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.weights import digest as module
from elastic_moe.weights.digest import digest

CHUNK, MIX = 1 << 16, 0x1E3779B97F4A7C15


def by_definition(tensors) -> int:
    total, factor = 0, 1
    for tensor in tensors:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
        words = data.view(torch.int32).tolist()
        for begin in range(0, len(words), CHUNK):
            of_chunk = sum((i * MIX | 1) * word for i, word in enumerate(words[begin : begin + CHUNK]))
            total += of_chunk * factor
            factor = factor * MIX % 2**64
    return total % 2**63


@pytest.mark.parametrize("shapes", [[(1,)], [(3,), (5, 7)], [(70_000,), (65_536,), (131_073,)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_it_is_what_its_docstring_says(monkeypatch, shapes, dtype, at_once):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    monkeypatch.setattr(module, "_CHUNKS_AT_ONCE", at_once)
    assert digest(tensors) == module._sum(tensors) == by_definition(tensors)


@given(st.integers(0, 199_999), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_every_bit_counts(word, bit):
    tensor = torch.arange(200_000, dtype=torch.int32)
    before = digest([tensor])
    tensor[word] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert digest([tensor]) != before


def test_the_order_of_tensors_counts_and_their_layout_does_not():
    one, other = torch.randn(300, 7), torch.randn(300, 7)
    assert digest([one, other]) != digest([other, one])
    assert digest([one.T.contiguous().T, other]) == digest([one, other])
