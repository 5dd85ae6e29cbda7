"""The tensors of a batch for attention out of pages: a slow `attend` by them says what masked attention says."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batching import NEW_TOKENS, PROMPTS, Harness
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from elastic_moe.serving.engine import attention
from elastic_moe.serving.engine.attention import Plan, supports, wanted

LONG = [(7 * i) % 60 for i in range(70)]
MORE = {"long": LONG, "as long": [*LONG[:64], 1, 2], "one": [5]}


def slow(module: Any, query: Any, key: Any, value: Any, mask: Any, *, cache: Any, block_table: Plan, **_: Any) -> Any:
    """Token by token: the tiles say whose it is, the table where its keys are."""
    plan, layer = block_table, module.layer_idx
    keys, values = cache.layer_to_allocator[layer]._kv_token_views[layer]
    keys[plan.rows.long()], values[plan.rows.long()] = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = torch.zeros_like(query.transpose(1, 2))
    seen = []
    for sequence, first, count, position in plan.tiles[plan.tiles[:, 0] >= 0].tolist():
        assert count <= plan.tile_rows // (query.shape[1] // key.shape[1])
        for number in range(count):
            places = torch.arange(position + number + 1)
            assert plan.ends[first + number] == len(places)
            rows = (plan.table[sequence, places // plan.page] + places % plan.page).long()
            one = query[:, :, first + number].unsqueeze(2)
            k, v = (held[rows].transpose(0, 1)[None] for held in (keys, values))
            out[:, first + number] = F.scaled_dot_product_attention(one, k, v, enable_gqa=True)[:, :, 0]
            seen.append(first + number)
    assert sorted(seen) == list(range(len(seen)))
    assert not plan.ends[len(seen) :].any()
    return out, None


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(**settings: Any) -> dict[str, list[int]]:
    harness = Harness(model(), **settings)
    harness.batcher._runner.pad_inputs = "graph_tokens" in settings
    for name in PROMPTS:
        harness.submit(name)
    for _ in range(4):
        harness.step(num_forwards=2)
    for name, prompt in MORE.items():  # "as long" shares pages with "long"
        harness.submit(name, tokens=prompt, max_new_tokens=9)
    return harness.run()


@pytest.mark.parametrize(
    "settings", [{}, {"max_requests": 3}, {"max_requests": 4, "max_batch_tokens": 8}, {"graph_tokens": 2}], ids=str
)
def test_attention_by_pages_is_masked_attention(monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]):
    expected = tokens(**settings)
    assert set(expected) == {*NEW_TOKENS, *MORE}
    monkeypatch.setattr(attention, "attend", slow)
    monkeypatch.setattr(attention, "supports", lambda _: True)
    assert tokens(**settings) == expected


def test_it_warms_up_with_more_tokens_than_a_request_may_have(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "attend", slow)
    monkeypatch.setattr(attention, "supports", lambda _: True)
    Harness(model(), max_model_len=4, max_batch_tokens=40, graph_tokens=8, max_requests=8).batcher.warm_up()


def test_who_has_it():
    on_cpu = model()
    assert not supports(on_cpu)
    assert not wanted(on_cpu, "auto")
    assert not wanted(on_cpu, "sdpa")
    with pytest.raises(ValueError, match=r"serving\.attention=paged needs a GPU, Triton"):
        wanted(on_cpu, "paged")
