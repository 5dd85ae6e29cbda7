"""The load balancer on gloo ranks: right logits while experts move, in both modes; budgets; what it tells."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.elastic import make_checkpoint
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM

from elastic_moe.config import EplbConfig
from elastic_moe.control import rebalancer
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.group.process_group import Group
from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.digest import digest

WORLD = 4
EXPERT_BYTES = 3 * 16 * 32 * 4
EXPERT_MB = EXPERT_BYTES / 1e6


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


def spy_on_exchanges(runtime):
    """For each exchange of experts of this rank: the steps before it, and the bytes that it took and brought."""
    exchange, seen = Group.exchange, []

    def spied(group, sends, receives):
        num_bytes = [sum(tensor.nbytes for tensor, *_ in tensors) for tensors in (sends, receives)]
        seen.append((runtime.steps, *num_bytes))
        exchange(group, sends, receives)

    Group.exchange = spied
    return seen


def serve(launch, folder, mode, rounds, layers_per_chunk=1):
    """Forwards until so many rounds have ended on every rank."""
    eplb = EplbConfig(
        mode=mode, interval_s=60.0, layers_per_chunk=layers_per_chunk, half_life_steps=20, mb_per_step=1.5 * EXPERT_MB
    )
    rebalancer.STEP_WAIT_S = 30.0  # steps come all the while, so each transfer waits for the next one
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), eplb=eplb)
    placements, exchanges = [], spy_on_exchanges(runtime)
    runtime.on_placement_changed.append(placements.append)
    model = elasticize(meta_model(folder, torch.float32), runtime, checkpoint=folder, redundant_slots=1)
    placements.append(runtime.pool.placement)
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
    return {
        "logits": logits,
        "reports": reports,
        "placements": [(p.version, p.slots) for p in placements],
        "exchanges": exchanges,
        "wrong": wrong,
        "held": held,
    }


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
        for (version, slots), (same_version, same_slots) in zip(
            result["placements"], results[0]["placements"], strict=True
        ):
            assert version == same_version
            assert np.array_equal(slots, same_slots)
    for number in range(3):
        reports = [result["reports"][number] for result in results]
        assert {report.ops for report in reports} == {(f"op{number}",)}
        assert len({(r.epoch, r.number, r.version, r.outcome, r.reason, r.max_mean_after) for r in reports}) == 1
    first = results[0]["reports"][0]
    assert first.outcome == "moved"
    assert first.max_mean_after < first.max_mean_before
    assert first.num_moves > 0
    far = sum(count for source, count in first.bytes_by_source.items() if source != "own")
    assert far == first.bytes_lower_bound > 0


@pytest.mark.parametrize(("mode", "layers_per_chunk"), [("async", 1), ("sync", 2)])
def test_a_round_keeps_its_budgets(checkpoint, mode, layers_per_chunk):
    results = run_ranks(serve, WORLD, str(checkpoint), mode, 1, layers_per_chunk)
    for result in results:
        (report,) = result["reports"]
        versions, slots = zip(*result["placements"], strict=True)
        changed = [(old != new).any(axis=1).sum() for old, new in pairwise(slots)]
        assert versions == tuple(range(versions[0], versions[0] + len(versions))), "each chunk was told of"
        assert len(changed) == report.num_chunks > 0
        assert max(changed) <= layers_per_chunk
        assert sum(changed) == 2, "both layers have moved"
        assert len(changed) == 2 // layers_per_chunk
        assert report.num_moves == sum(report.bytes_by_source.values()) / EXPERT_BYTES
        assert max(max(num_bytes) for _, *num_bytes in result["exchanges"]) <= EXPERT_BYTES
        steps = [step for step, *_ in result["exchanges"]]
        assert len(steps) > report.num_chunks, "some chunk is more than what one step may move"
        assert len(set(steps)) == (len(steps) if mode == "async" else 1), "sync stops the steps, async moves in each"
    moved = [np.sum([num_bytes for _, *num_bytes in result["exchanges"]], axis=0) for result in results]
    report = results[0]["reports"][0]
    assert np.sum(moved, axis=0).tolist() == [report.bytes_lower_bound] * 2


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_rank_alone_answers_too(checkpoint, mode):
    (result,) = run_ranks(serve, 1, str(checkpoint), mode, 1)
    (report,) = result["reports"]
    assert (report.ops, report.outcome) == (("op0",), "kept")
    assert report.reason == "no better placement than the present one, max/mean 1.000"
