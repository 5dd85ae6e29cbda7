"""ElasticMoELayer on 1 to 4 gloo ranks against the module it replaces."""

import copy
import time

import pytest
import torch
from support.ranks import run_ranks
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from elastic_moe.experts.slots import SlotExperts
from elastic_moe.layer import ElasticMoELayer
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.store import ExpertStore
from elastic_moe.experts.layout import ExpertLayout

HIDDEN, INTER, EXPERTS, TOP_K = 16, 12, 7, 3


def build_experts(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    if kind == "gpt_oss":
        config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS)
        module = GptOssExperts(config)
    else:
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTER, num_experts=EXPERTS)
        module = Qwen3MoeExperts(config)
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module.to(dtype)


def tokens_of(rank: int, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    hidden = torch.randn((num_tokens, HIDDEN), generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.rand((num_tokens, EXPERTS), generator=generator, dtype=torch.float64)
    weights, index = scores.topk(TOP_K)
    return hidden, index, weights.to(dtype)


def wrap(module: torch.nn.Module, runtime: ElasticRuntime) -> ElasticMoELayer:
    layout = ExpertLayout.of_module(module)
    sources = [getattr(module, name).detach().clone() for name in layout.names]
    slots = SlotExperts(module, layout, runtime.pool.placement.slots_per_rank, runtime.device)
    for slot, expert in enumerate(runtime.pool.placement.of_rank(runtime.rank)[0]):
        for ours, source in zip(slots.slot_tensors(slot), sources, strict=True):
            if expert >= 0:
                ours.copy_(source[expert])
    return ElasticMoELayer(0, slots, runtime.pool)


def forward_rank(launch, kind, dtype, redundant, num_tokens):
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), exchange_timeout_s=20)
    runtime.place(1, EXPERTS, redundant_slots=redundant)
    layer = wrap(build_experts(kind, dtype), runtime)
    with torch.no_grad():
        hidden, index, weights = tokens_of(launch.rank, num_tokens[launch.rank], dtype)
        if num_tokens[launch.rank] or launch.rank % 2:
            return layer(hidden, index, weights)
        layer.join_idle()
        return hidden


def load_slowly(launch):
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), exchange_timeout_s=0.5)
    runtime.place(1, EXPERTS)
    layer = wrap(build_experts("qwen3_moe", torch.float32), runtime)
    time.sleep(2 * launch.rank)
    runtime.hold(ExpertStore([layer.experts], runtime.pool.placement.of_rank(runtime.rank), trains=True))
    runtime.groups.control.barrier()
    assert runtime.groups.control.timeout_s == 0.5
    runtime.close()
    return True


def test_a_rank_that_loads_longer_than_an_exchange_may_take_is_waited_for():
    assert all(run_ranks(load_slowly, 2))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("world_size", "redundant"), [(1, 0), (2, 0), (3, 2), (4, 0), (4, 3)])
def test_equals_the_module_it_replaces(kind, world_size, redundant):
    num_tokens = [9, 0, 1, 0][:world_size]
    results = run_ranks(forward_rank, world_size, kind, torch.float64, redundant, num_tokens)
    reference = build_experts(kind, torch.float64)
    for rank, got in enumerate(results):
        wanted = reference(*tokens_of(rank, num_tokens[rank], torch.float64))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_where_an_expert_lives_does_not_change_the_result():
    """float32, one token per rank: bitwise equal on 1, 2 and 4 ranks, with and without replicas."""
    alone = run_ranks(forward_rank, 1, "qwen3_moe", torch.float32, 0, [1])[0]
    for world_size, redundant in ((2, 0), (4, 0), (4, 3)):
        spread = run_ranks(forward_rank, world_size, "qwen3_moe", torch.float32, redundant, [1, 0, 0, 0])[0]
        assert torch.equal(alone, spread)


NONE = (-1, EXPERTS, EXPERTS + 5, -7)
"""What a router may say for "none"."""


def with_none(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six tokens, of which some pairs and one whole token are for nobody; on rank 1 all are."""
    hidden, index, weights = tokens_of(rank, 6, torch.float64)
    generator = torch.Generator().manual_seed(rank)
    none = torch.rand(index.shape, generator=generator) < 0.4
    none[2] = True
    none |= torch.tensor(rank == 1)
    said = torch.tensor(NONE)[torch.randint(len(NONE), index.shape, generator=generator)]
    hidden[none.all(1)] = torch.nan
    return hidden, torch.where(none, said, index), weights


def forward_with_none(launch, redundant):
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), exchange_timeout_s=20)
    runtime.place(1, EXPERTS, redundant_slots=redundant)
    layer = wrap(build_experts("qwen3_moe", torch.float64), runtime)
    came = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: came.append(len(arguments[0])))
    with torch.no_grad():
        result = layer(*with_none(launch.rank))
    return result, sum(came), torch.from_numpy(runtime.pool.loads.read()[0])


@pytest.mark.parametrize(("world_size", "redundant"), [(1, 0), (2, 0), (3, 2)])
def test_none_adds_nothing_does_not_travel_and_does_not_count(world_size, redundant):
    results, came, counted = zip(*run_ranks(forward_with_none, world_size, redundant), strict=True)
    reference = build_experts("qwen3_moe", torch.float64)
    loads = torch.zeros(EXPERTS, dtype=torch.int64)
    for rank, got in enumerate(results):
        hidden, index, weights = with_none(rank)
        chosen = (index >= 0) & (index < EXPERTS)
        own = torch.bincount(index[chosen], minlength=EXPERTS)
        assert torch.equal(counted[rank], own)
        loads += own
        wanted = reference(hidden.nan_to_num(), index * chosen, weights * chosen)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert not got[~chosen.any(1)].any()
    assert 0 < loads.sum() == sum(came)


def backward_rank(launch, kind, one_expert):
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), exchange_timeout_s=20)
    placement = runtime.place(1, EXPERTS)
    layer = wrap(build_experts(kind, torch.float64), runtime)
    hidden, index, weights = tokens_of(launch.rank, 3 * launch.rank, torch.float64)
    index = torch.zeros_like(index) if one_expert else index
    hidden.requires_grad_()
    weights.requires_grad_()
    (layer(hidden, index, weights) ** 2).sum().backward()
    grads = {name: getattr(layer.experts, name).grad for name in layer.experts.layout.names}
    return placement.of_rank(launch.rank)[0].tolist(), grads, hidden.grad, weights.grad


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("world_size", "one_expert"), [(2, False), (3, False), (3, True)])
def test_gradients_equal_a_one_process_run(kind, world_size, one_expert):
    """Rank 0 has no tokens; with `one_expert` only rank 0 computes: all take part in the backward all the same."""
    results = run_ranks(backward_rank, world_size, kind, one_expert)
    reference = build_experts(kind, torch.float64)
    inputs = [tokens_of(rank, 3 * rank, torch.float64) for rank in range(world_size)]
    leaves = [(h.requires_grad_(), i * (not one_expert), w.requires_grad_()) for h, i, w in inputs]
    sum((reference(*leaf) ** 2).sum() for leaf in leaves).backward()
    seen = set()
    for rank, (experts, grads, hidden_grad, weights_grad) in enumerate(results):
        for got, leaf in ((hidden_grad, leaves[rank][0]), (weights_grad, leaves[rank][2])):
            wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        for slot, expert in enumerate(experts):
            for name, grad in grads.items():
                wanted = getattr(reference, name).grad[expert] if expert >= 0 else torch.zeros_like(grad[slot])
                torch.testing.assert_close(grad[slot], wanted, rtol=1e-10, atol=1e-10)
        seen.update(expert for expert in experts if expert >= 0)
    assert seen == set(range(EXPERTS))


def train_with_replicas(launch):
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), exchange_timeout_s=20)
    runtime.place(1, EXPERTS, redundant_slots=2)
    layer = wrap(build_experts("qwen3_moe", torch.float32), runtime)
    with pytest.raises(ValueError, match="without replicas"):
        layer(*tokens_of(0, 2, torch.float32))
    return "refused"


def test_training_with_replicas_is_refused():
    assert run_ranks(train_with_replicas, 2) == ["refused", "refused"]


def test_template_is_not_shared():
    """Wrapping one module must not take the tensors of a copy."""
    module = build_experts("qwen3_moe", torch.float32)
    other = copy.deepcopy(module)
    SlotExperts(module, ExpertLayout.of_module(module), 4, torch.device("cpu"))
    assert other.gate_up_proj.shape[0] == EXPERTS
