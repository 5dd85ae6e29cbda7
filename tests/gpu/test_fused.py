"""One kernel instead of many gives what transformers' own code gives, and takes the place of nothing else."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3_moe import modeling_qwen3_moe as family

from elastic_moe.serving.engine.fused import OURS, fuse, fuse_norm, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_fused_model_says_what_it_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(family, "apply_rotary_pos_emb", family.apply_rotary_pos_emb)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=48, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=24, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().eval()
    tokens = torch.arange(40, device="cuda")[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        fuse(model)
        assert hasattr(family.apply_rotary_pos_emb, OURS)
        assert model.model.norm.forward.__module__ == "elastic_moe.serving.engine.fused"
        torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 4, 128), (5, 1, 20), (7, 7, 64)], ids=str)
def test_halves_are_turned(shape: tuple[int, int, int]):
    heads, kv_heads, dim = shape
    query, key = (torch.randn(1, 9, n, dim, device="cuda").transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = torch.randn(2, 1, 9, dim, device="cuda")
    for ours, theirs in zip(
        rotate(query, key, cos, sin), family.apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class Centred(nn.Module):
    """Not an RMSNorm, but named like one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64, device="cuda")), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (64,), self.weight, None, self.eps)


def test_a_norm_that_does_something_else_is_left_alone():
    assert not fuse_norm(Gemma2RMSNorm(64).cuda())
    assert not fuse_norm(Centred())
    assert fuse_norm(family.Qwen3MoeRMSNorm(64).cuda())
