"""Weights on a GPU: their digests are those of the CPU, and what is read from files is what the files hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elastic_moe.weights import digest as digest_module
from elastic_moe.weights.digest import digest, digests
from elastic_moe.weights.lanes import Lane, Part
from elastic_moe.weights.shards import Shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("shapes", [[(1,)], [(3,), (5, 7)], [(70_000,), (65_536,), (131_073,)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_digest_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch, shapes, dtype, kernels: bool):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if not kernels:
        monkeypatch.setattr(digest_module, "_kernels", lambda: None)
    assert digest([tensor.cuda() for tensor in tensors]) == digest(tensors)
    several = [tensors, tensors[::-1], tensors[:1]]
    assert digests([[t.cuda() for t in one] for one in several]) == [digest(one) for one in several]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["whole", "a part", "strided"])
def test_a_lane_fills_memory_of_a_gpu(tmp_path: Path, dtype: torch.dtype, way: str):
    torch.manual_seed(0)
    save_file({"one": torch.randn(5, 3000, 1001).bfloat16()}, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    index = 3 if way == "a part" else None
    right = shards.read("one", index).to(dtype)
    out = torch.zeros(*right.shape[:-1], 2 * right.shape[-1], dtype=dtype, device="cuda")
    out = out[..., ::2] if way == "strided" else out[..., : right.shape[-1]]
    if way == "whole":
        out = torch.zeros_like(right, device="cuda")
    Lane().read(shards, [Part("one", index, out)])
    assert torch.equal(out.cpu(), right)
