"""One CUDA graph for all the life of a rank: rebalances, deaths in the middle of a replay, repairs, joins."""

from pathlib import Path

import pytest
import torch
from graph_ranks import IN_REPLAY, make_checkpoint, wanted, work
from support.deaths import Death
from support.elastic import STEPS, WORLD, run_cluster

from elastic_moe.control.rebalance import load_balancer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

CASES = {
    "rebalances": ([], 1, 2),
    "a death in a replay": ([Death(1, IN_REPLAY, nth=2)], 1, 0),
    "two deaths in replays, and rebalances": ([Death(0, IN_REPLAY, nth=1), Death(3, IN_REPLAY, nth=3)], 2, 1),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    load_balancer()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("case", CASES)
def test_the_same_graph_gives_right_results(tmp_path: Path, checkpoint: Path, case: str):
    deaths, redundant_slots, rounds = CASES[case]
    results, ends = run_cluster(
        tmp_path, checkpoint, deaths, redundant_slots, rounds=rounds, work=work, respawn_s=2.0, deadline_s=150
    )
    reference = wanted(checkpoint, range(WORLD), range(STEPS + 1))
    died = {death.rank for death in deaths}
    for (rank, step), result in results.items():
        torch.testing.assert_close(result.double(), reference[rank, step], rtol=1e-5, atol=1e-6)
    for rank, end in enumerate(ends):
        torch.testing.assert_close(end["last"].double(), reference[rank, STEPS], rtol=1e-5, atol=1e-6)
        assert not end["wrong"]
        assert end["graphs"] == 1, f"rank {rank} captured {end['graphs']} times"
        assert end["addresses"] == 1
        assert end["replays"] >= 1 if rank in died else end["replays"] >= STEPS
    assert len({end["placement"] for end in ends}) == 1
    if rounds:
        assert all(end["moved"] > 0 for rank, end in enumerate(ends) if rank not in died)
