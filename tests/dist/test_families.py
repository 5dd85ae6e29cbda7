"""Whole models of many families, experts spread over 1 to 4 ranks, against transformers' own forward (float32)."""

import pytest
import torch
from support.families import FAMILIES, build
from support.ranks import run_ranks

from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.runtime import ElasticRuntime

REQUIRED = (
    "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss", "glm4_moe", "phimoe",
)  # fmt: skip
CASES = [(1, 0), (2, 0), (2, 2), (3, 0), (4, 0), (4, 1)]
"""(ranks, redundant slots); six experts, so 4 ranks leave a remainder."""


def prompt_of(rank: int) -> torch.Tensor:
    return torch.randint(3, 90, (2, 7 + 3 * rank), generator=torch.Generator().manual_seed(rank))


def forward_all(launch, folder):
    """Each case with a runtime of its own; returns {case: logits}."""
    logits = {}
    for world_size, redundant in CASES:
        if launch.rank >= world_size:
            continue
        place = launch.__class__(launch.rank, world_size, store=launch.store, run=f"{world_size}-{redundant}")
        runtime = ElasticRuntime.join(place, device=torch.device("cpu"), exchange_timeout_s=30)
        model = meta_model(folder, torch.float32)
        model = elasticize(model, runtime, checkpoint=folder, redundant_slots=redundant)
        with torch.no_grad():
            logits[world_size, redundant] = model(input_ids=prompt_of(launch.rank), use_cache=False).logits
        runtime.groups.control.barrier()
        runtime.close()
    return logits


@pytest.mark.parametrize(
    "family", [*REQUIRED, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in REQUIRED)]
)
def test_logits_equal_transformers(family, tmp_path):
    model = build(FAMILIES[family]())
    model.save_pretrained(tmp_path)
    results = run_ranks(forward_all, 4, str(tmp_path))
    with torch.no_grad():
        wanted = [model(input_ids=prompt_of(rank), use_cache=False).logits for rank in range(4)]
    for rank, logits in enumerate(results):
        assert set(logits) == {case for case in CASES if case[0] > rank}
        for case, got in logits.items():
            difference = (got - wanted[rank]).abs().max().item()
            assert difference <= 1e-5, f"{family} on {case} rank {rank}: {difference}"
