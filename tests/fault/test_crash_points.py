"""Every point at which a rank can die, for every role it can have: the others finish with the right logits, the dead
come back, and all agree on a placement whose slots hold what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from elastic_harness import STEPS, WORLD, Death, make_checkpoint, run_cluster, wanted

FIRST = Death(3, "combine", nth=5)
"""The loss in whose recovery others die. Rank 0 then leads (its store is used), and each of 0 to 2 is a source or a
target of some expert, or stands by, as the placement will have it."""

IN_A_STEP = ["handshake", "dispatch", "all_to_all", "experts", "combine"]
IN_RECOVERY = ["view", "groups", "gather", "transfer", "vote", "commit"]
REJOIN = ["load", "view", "groups", "gather", "vote"]

CASES = {
    **{f"first step: {p} of {r}": [Death(r, p)] for p in IN_A_STEP for r in (0, 2)},
    **{f"mid stream: {p} of {r}": [Death(r, p, nth=4)] for p in IN_A_STEP for r in (0, 3)},
    **{f"between steps: {r}": [Death(r, "between", nth=2)] for r in (0, 1)},
    "two at once": [Death(1, "combine", nth=3), Death(2, "combine", nth=3)],
    "three of four": [Death(r, "dispatch", nth=3) for r in (0, 1, 2)],
    "all at once": [Death(r, "combine", nth=3) for r in range(4)],
    "all, one by one": [*(Death(r, "combine", nth=2) for r in range(3)), Death(3, "combine", nth=4)],
    **{f"recovery: {p} of {r}": [FIRST, Death(r, p, 2 if p == "groups" else 1)] for p in IN_RECOVERY for r in (0, 1)},
    "recovery: accept of 1": [FIRST, Death(1, "accept")],
    "recovery: two more": [FIRST, Death(0, "gather"), Death(1, "vote")],
    **{f"rejoin: {p} of the newcomer": [FIRST, Death(3, p, life=1)] for p in REJOIN},
    **{f"rejoin: {p} of a member": [FIRST, Death(0, p, nth=n)] for p, n in (("view", 2), ("groups", 3), ("vote", 2))},
    "one rank dies thrice": [Death(1, "dispatch", nth=2, life=life) for life in range(3)],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> dict[tuple[int, int], torch.Tensor]:
    return wanted(checkpoint)


@pytest.mark.parametrize(
    "redundant_slots", [pytest.param(0, id="bare"), pytest.param(1, id="replicas", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_crash_point(tmp_path: Path, checkpoint: Path, reference, case: str, redundant_slots: int):
    logits, ends = run_cluster(tmp_path, checkpoint, CASES[case], redundant_slots)
    for key in ((rank, step) for rank in range(WORLD) for step in range(STEPS)):
        torch.testing.assert_close(logits[key], reference[key], rtol=1e-5, atol=1e-5)
    assert len({end["placement"] for end in ends}) == 1
    for rank, end in enumerate(ends):
        assert not end["wrong"]
        seats = end["slots"].reshape(len(end["held"]), WORLD, -1)
        assert np.array_equal(seats[:, rank], end["held"])
        assert all(set(range(8)) <= set(layer.ravel().tolist()) for layer in seats)
        assert np.array_equal(end["digests"], ends[0]["digests"])
