"""Attention out of a paged cache against torch's own, request by request."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from elastic_moe.config import ServingConfig
from elastic_moe.serving.engine import attention
from elastic_moe.serving.engine.attention import Plan, attend
from elastic_moe.serving.engine.batching import Batcher
from elastic_moe.serving.protocol import Submit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PAGE = 32


class FakeCache:
    """Of one layer."""

    def __init__(self, pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys, self.values = torch.randn(2, pages * PAGE, kv_heads, head_dim, device="cuda", dtype=dtype)
        self.layer_to_allocator = [self]
        self._kv_token_views = [(self.keys, self.values)]
        self.layer_idx = 0


def run(lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, split: bool):
    """(what `attend` says, what it should be, a call of it, its plan) of requests of (keys before, queries)."""
    """`split`: as a batch of few tokens."""
    torch.manual_seed(0)
    width = max(-(-(past + count) // PAGE) for past, count in lengths)
    cache = FakeCache(len(lengths) * width + 1, kv_heads, head_dim, dtype)
    order = torch.randperm(len(lengths) * width) + 1
    table = (order.view(len(lengths), width) * PAGE).to(torch.int32)
    rows, ends, tiles, at = [], [], [], 0
    of_a_tile = (16 if split else 64) // (heads // kv_heads)
    for number, (past, count) in enumerate(lengths):
        places = torch.arange(past, past + count)
        rows.append(table[number, places // PAGE] + places % PAGE)
        ends.append(places + 1)
        for begin in range(0, count, of_a_tile):
            tiles.append([number, at + begin, min(of_a_tile, count - begin), past + begin])
        at += count
    tiles.append([-1, 0, 0, 0])
    total = at + 3  # three of padding
    rows.append(torch.zeros(3)), ends.append(torch.zeros(3))
    plan = Plan(
        torch.tensor(tiles, dtype=torch.int32).cuda(), table.cuda(), torch.cat(rows).int().cuda(),
        torch.cat(ends).int().cuda(), 16 if split else 64, split, PAGE,
    )  # fmt: skip
    query, key, value = (torch.randn(1, total, n, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
                         for n in (heads, kv_heads, kv_heads))  # fmt: skip

    def call(plan: Plan) -> torch.Tensor:
        return attend(cache, query, key, value, None, cache=cache, block_table=plan)[0]

    out = call(plan)
    assert not out[0, at:].any()
    wanted, at = [], 0
    for number, (past, count) in enumerate(lengths):
        places = torch.arange(past + count)
        here = (table[number, places // PAGE] + places % PAGE).cuda()
        k, v = (one[here].transpose(0, 1)[None].float() for one in (cache.keys, cache.values))
        mask = torch.arange(past + count)[None] <= torch.arange(past, past + count)[:, None]
        q = query[:, :, at : at + count].float()
        wanted.append(F.scaled_dot_product_attention(q, k, v, mask.cuda(), enable_gqa=True)[0].transpose(0, 1))
        at += count
    return out[0, :at].float(), torch.cat(wanted), call, plan


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", [(32, 4, 128), (6, 2, 80), (16, 16, 64), (64, 8, 256)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_it_is_attention(shape: tuple[int, int, int], dtype: torch.dtype, within: float, *, split: bool):
    lengths = [(0, 1), (7, 1), (511, 1), (512, 1), (5000, 1), (0, 40), (700, 33), (31, 2)]
    found, wanted, *_ = run(lengths, *shape, dtype, split=split)
    torch.testing.assert_close(found, wanted, atol=within, rtol=within)


def test_a_token_has_the_same_bits_whoever_is_in_its_batch():
    _, _, call, plan = run([(1500, 1), (3, 1), (900, 20)], 32, 4, 128, torch.bfloat16, split=True)
    together, alone = call(plan), call(plan._replace(tiles=plan.tiles[:1].clone()))
    assert torch.equal(together[0, 0], alone[0, 0])
    assert together[0, 0].any()


def test_a_batcher_gives_the_tokens_of_masked_attention():
    def tokens(kind: str) -> dict[str, list[int]]:
        torch.manual_seed(1)
        config = Qwen3MoeConfig(
            vocab_size=128, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().eval()
        found: dict[str, list[int]] = {}
        serving = ServingConfig(kv_cache_tokens=8192, max_batch_tokens=64, max_requests=8, attention=kind)

        def deliver(name: str, _start: int, some: list[int], *_: object) -> None:
            found.setdefault(name, []).extend(some)

        batcher = Batcher(model, serving, [], deliver)
        assert (model.config._attn_implementation == attention.NAME) == (kind == "paged")
        for number in range(12):
            prompt = [(7 * number + i) % 128 for i in range(5 + 40 * number)]
            batcher.submit(Submit(str(number), prompt, num_generated=0, max_new_tokens=30))
        while batcher.has_requests:
            if batcher.prepare():
                batcher.forward()
                batcher.commit()
        return found

    assert tokens("paged") == tokens("sdpa")
