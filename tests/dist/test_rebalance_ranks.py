"""The load balancer on gloo ranks: right logits while experts move, in both modes; budgets; what it tells."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.elastic import make_checkpoint
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.digest import digest

WORLD = 4


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The balancer, before any deadline runs."""
    load_balancer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def tokens_of(rank, step):
    """Few different tokens: a skewed load."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 4, (1, 6 + rank), generator=generator)


def serve(launch, folder, mode, rounds, layers_per_chunk=1):
    """Forwards until so many rounds have ended on every rank."""
    eplb = EplbConfig(mode=mode, interval_s=60.0, layers_per_chunk=layers_per_chunk, half_life_steps=20)
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), eplb=eplb)
    placements = []
    runtime.on_placement_changed.append(placements.append)
    model = elasticize(meta_model(folder, torch.float32), runtime, checkpoint=folder, redundant_slots=1)
    logits, reports, step = {}, [], 0
    with torch.no_grad():
        for number in range(rounds):
            for _ in range(6):
                tokens = tokens_of(launch.rank + 10 * number, step)
                logits[10 * number, step] = runtime.run(lambda: model(input_ids=tokens).logits)  # noqa: B023
                step += 1
            runtime.pool.balancer.request(f"op{number}")
            while True:
                if not runtime.pool.balancer.reports.empty():
                    reports.append(runtime.pool.balancer.reports.get())
                if not runtime.agree(int(len(reports) <= number))[0]:
                    break
                tokens = tokens_of(launch.rank + 10 * number, step)
                with runtime.step():
                    logits[10 * number, step] = model(input_ids=tokens).logits
                step += 1
    store, placement = runtime.pool.store, runtime.pool.placement
    wrong = [
        (layer, slot)
        for layer, slot in np.argwhere(store.held >= 0).tolist()
        if digest(store.tensors(layer, slot)) != store.digests[layer, store.held[layer, slot]]
    ]
    held = np.array_equal(store.held, placement.of_rank(runtime.rank))
    runtime.pool.registry.check_integrity()
    runtime.groups.control.barrier()
    runtime.close()
    hashes = [(p.version, p.hash) for p in placements]
    return {"logits": logits, "reports": reports, "hashes": hashes, "wrong": wrong, "held": held}


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_tokens_are_right_while_experts_move(checkpoint, mode):
    results = run_ranks(serve, WORLD, str(checkpoint), mode, 3)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for rank, result in enumerate(results):
        with torch.no_grad():
            for (base, step), logits in result["logits"].items():
                wanted = reference(input_ids=tokens_of(rank + base, step)).logits
                torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert not result["wrong"]
        assert result["held"]
        assert result["hashes"] == results[0]["hashes"]
    for number in range(3):
        reports = [result["reports"][number] for result in results]
        assert {report.ops for report in reports} == {(f"op{number}",)}
        assert len({(r.epoch, r.number, r.version, r.outcome, r.reason, r.max_mean_after) for r in reports}) == 1
    first = results[0]["reports"][0]
    assert first.outcome == "moved"
    assert first.max_mean_after < first.max_mean_before
    assert first.num_moves > 0
    assert first.num_chunks == len(results[0]["hashes"]) or len(results[0]["reports"]) > 1
    far = sum(count for source, count in first.bytes_by_source.items() if source != "own")
    assert far == first.bytes_lower_bound > 0


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_rank_alone_answers_too(checkpoint, mode):
    (result,) = run_ranks(serve, 1, str(checkpoint), mode, 1)
    (report,) = result["reports"]
    assert (report.ops, report.outcome) == (("op0",), "kept")
    assert report.reason == "no better placement than the present one, max/mean 1.000"
