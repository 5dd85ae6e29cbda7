"""One kernel instead of many gives what transformers' own code gives, and takes the place of nothing else."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3_moe import modeling_qwen3_moe as family

from elastic_moe.serving.engine.fused import OURS, fuse, fuse_norm, fuse_router, rotate, route

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
        assert isinstance(model.model.layers[0].mlp.gate.forward, partial)
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


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shape", [(128, 8), (60, 4), (256, 6), (1000, 10), (8, 8), (5, 1)], ids=str)
def test_the_largest_are_chosen(shape: tuple[int, int], normalized: bool):
    num_experts, top_k = shape
    logits = torch.randn(33, num_experts, device="cuda")
    scores, chosen = torch.softmax(logits, -1).topk(top_k)
    ours, ours_chosen = route(logits, top_k, normalized=normalized)
    assert torch.equal(ours_chosen, chosen)
    torch.testing.assert_close(ours, scores / scores.sum(-1, keepdim=True) if normalized else scores)


def test_equal_scores_and_what_is_no_number():
    logits = torch.zeros(2, 12, device="cuda", dtype=torch.bfloat16)
    logits[1] = float("nan")
    scores, chosen = route(logits, 3, normalized=True)
    assert chosen[0].tolist() == [0, 1, 2]
    assert ((chosen >= 0) & (chosen < 12)).all()
    assert scores[1].isnan().all()
    assert [len(one) for one in route(logits[:0], 3, normalized=True)] == [0, 0]


class Sigmoid(family.Qwen3MoeTopKRouter):
    """Chooses otherwise."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, _, _ = super().forward(hidden_states)
        return logits, *logits.sigmoid().topk(self.top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_router_is_replaced_if_it_does_the_same(dtype: torch.dtype, normalized: bool):
    sizes = SimpleNamespace(num_experts=128, num_experts_per_tok=8, hidden_size=64, norm_topk_prob=normalized)
    router = family.Qwen3MoeTopKRouter(sizes).to("cuda", dtype)
    nn.init.normal_(router.weight, std=0.02)
    assert fuse_router(router)
    assert router.forward.keywords == {"normalized": normalized}
    other = Sigmoid(sizes).to("cuda", dtype)
    nn.init.normal_(other.weight, std=0.02)
    assert not fuse_router(other)
