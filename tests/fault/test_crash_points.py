"""Every point at which a rank can die, for every role it can have: the others finish with the right logits, the dead
come back, and all agree on a placement whose slots hold what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.deaths import BUG, Death
from support.elastic import STEPS, WORLD, make_checkpoint, run_cluster, wanted

from elastic_moe.control.rebalance import load_balancer
from elastic_moe.group.process_group import BURY_S

FIRST = Death(3, "combine", nth=5)
"""The loss in whose recovery others die. Rank 0 then leads (its store is used), and each of 0 to 2 is a source or a
target of some expert, or stands by, as the placement will have it."""

IN_A_STEP = ["handshake", "dispatch", "all_to_all", "experts", "combine"]
IN_RECOVERY = ["view", "groups", "gather", "fill", "vote", "commit"]
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


IN_A_ROUND = ["plan", "stage", "barrier", "swap"]
REBALANCE = {
    **{f"{p} of {r}": [Death(r, p)] for p in IN_A_ROUND for r in (0, 2)},
    "later swap of 1": [Death(1, "swap", nth=3)],
    "two at once": [Death(0, "swap"), Death(3, "swap")],
    "in its recovery": [Death(0, "stage"), Death(1, "gather")],
    "amid a step": [Death(2, "combine", nth=30)],
    "of the newcomer": [Death(1, "swap"), Death(1, "stage", life=1)],
}  # fmt: skip

REBALANCE_IN_CI = ("stage of 2", "swap of 0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def compiled() -> None:
    """The balancer, before any deadline runs: on a fresh machine that takes as long as a whole case."""
    load_balancer()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> dict[tuple[int, int], torch.Tensor]:
    return wanted(checkpoint)


@pytest.mark.parametrize(
    "redundant_slots", [pytest.param(0, id="bare"), pytest.param(1, id="replicas", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_crash_point(tmp_path: Path, checkpoint: Path, reference, case: str, redundant_slots: int):
    logits, ends = run_cluster(tmp_path, checkpoint, CASES[case], redundant_slots)
    check(logits, ends, reference)


@pytest.mark.parametrize(
    "case", [c if c in REBALANCE_IN_CI else pytest.param(c, marks=pytest.mark.slow) for c in REBALANCE]
)
@pytest.mark.usefixtures("compiled")
@pytest.mark.timeout(240)
def test_crash_point_of_a_rebalance(tmp_path: Path, checkpoint: Path, reference, case: str):
    logits, ends = run_cluster(tmp_path, checkpoint, REBALANCE[case], redundant_slots=1, rounds=2)
    check(logits, ends, reference)
    died = {death.rank for death in REBALANCE[case]}
    moved = [end["moved"] for rank, end in enumerate(ends) if rank not in died]
    assert min(moved) > 0, "the rounds that the loss has not cost move experts"


def check(logits: dict, ends: list[dict], reference: dict) -> None:
    """The oracles: right logits; one placement, covering all experts; slots that hold what it says."""
    for key in ((rank, step) for rank in range(WORLD) for step in range(STEPS)):
        torch.testing.assert_close(logits[key], reference[key], rtol=1e-5, atol=1e-5)
    assert len({end["placement"] for end in ends}) == 1
    for rank, end in enumerate(ends):
        assert not end["wrong"]
        seats = end["slots"].reshape(len(end["held"]), WORLD, -1)
        assert np.array_equal(seats[:, rank], end["held"])
        assert all(set(range(8)) <= set(layer.ravel().tolist()) for layer in seats)
        assert np.array_equal(end["digests"], ends[0]["digests"])


def test_wrong_weights_of_peers_are_refused_and_read_from_disk(tmp_path: Path, checkpoint: Path, reference):
    lies = [Death(rank, "gives wrong weights") for rank in range(3)]
    logits, ends = run_cluster(tmp_path, checkpoint, [FIRST, *lies], redundant_slots=1)
    check(logits, ends, reference)
    assert set(ends[3]["loaded"]) == {"disk"}
    assert "; 0.0 of " in (tmp_path / "log-3").read_text()


def test_a_newcomer_takes_its_experts_from_members(tmp_path: Path, checkpoint: Path, reference):
    logits, ends = run_cluster(tmp_path, checkpoint, [FIRST], redundant_slots=4)
    check(logits, ends, reference)
    assert [set(end["loaded"]) for end in ends] == [{"disk"}, {"disk"}, {"disk"}, {"node"}]
    assert ends[3]["loaded"]["node"] == ends[0]["loaded"]["disk"] > 0


def test_a_newcomer_with_wrong_weights_does_not_use_them(tmp_path: Path, checkpoint: Path, reference):
    """It reads wrong bytes from disk while its peers give it none: the group's digests tell, and peers send it right
    ones when it joins."""
    lies = [Death(rank, "gives wrong weights") for rank in range(3)]
    logits, ends = run_cluster(tmp_path, checkpoint, [FIRST, *lies, Death(3, "loads wrong bytes", life=1)], 0)
    check(logits, ends, reference)
    assert "experts brought along have wrong digests" in (tmp_path / "log-3").read_text()


def test_a_rank_whose_thread_has_died_ends_and_is_replaced(tmp_path: Path, checkpoint: Path, reference):
    """The newcomer asks it for weights; nobody is left with half a rank."""
    logits, ends = run_cluster(tmp_path, checkpoint, [FIRST, Death(1, BUG)], 0)
    check(logits, ends, reference)
    said = (tmp_path / "log-1").read_text()
    assert "thread weights died" in said
    assert "RuntimeError: a background thread of this rank died: ZeroDivisionError" in said


@pytest.mark.parametrize("bad", [(0,), (0, 1)])
def test_what_one_disk_has_wrong_is_read_from_another(
    tmp_path: Path, checkpoint: Path, reference, bad: tuple[int, ...]
):
    logits, ends = run_cluster(tmp_path, checkpoint, [FIRST, *(Death(rank, "has a bad disk") for rank in bad)], 0)
    check(logits, ends, reference)
    for rank in range(3):
        said = (tmp_path / f"log-{rank}").read_text()
        assert ("disk: the bytes have another digest than the group's" in said) == (rank in bad)
        assert "attempts=1" in said


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.timeout(900)
def test_five_hundred_rebalances_with_deaths_in_between(tmp_path: Path, checkpoint: Path, reference):
    deaths = [Death(1, "dispatch", nth=600, life=life) for life in range(8)]
    logits, ends = run_cluster(tmp_path, checkpoint, deaths, redundant_slots=1, deadline_s=800, rounds=100)
    check(logits, ends, reference)
    for rank in (0, 2, 3):
        usage = np.array(ends[rank]["usage"])
        assert ends[rank]["moved"] >= 300
        early, late = np.median(usage[50:150], axis=0)[1], np.median(usage[-100:], axis=0)[1]
        # the deaths fall between; descriptors and threads of their epochs are held for BURY_S, see the hundred deaths
        assert late <= early * 1.1, f"rank {rank}: memory grew from {early} to {late} bytes"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_deaths_leave_nothing_behind(tmp_path: Path, checkpoint: Path, reference):
    deaths = [Death(1, "dispatch", nth=2, life=life) for life in range(100)]
    logits, ends = run_cluster(tmp_path, checkpoint, deaths, deadline_s=800, respawn_s=0.0)
    check(logits, ends, reference)
    for rank in (0, 2, 3):
        usage = np.array(ends[rank]["usage"])
        assert len(usage) >= 150  # two epochs for each death, or one when the next came first
        for column, (what, allowed) in enumerate([("memory", 0.05), ("file descriptors", 0.2), ("threads", 0.2)], 1):
            grown, early = growth(usage[:, 0], usage[:, column])
            assert grown < early * allowed, f"rank {rank}: {what} grew by {grown} from {early}"


def growth(times: np.ndarray, used: np.ndarray) -> tuple[float, float]:
    """How much more is used late than early, and how much early; apart from the groups that are held for `BURY_S` after
    their epoch: there are the more of these, the faster the deaths come."""
    held = np.array([((times <= now) & (times > now - BURY_S)).sum() for now in times])
    held, used = held[20:], used[20:]  # without the warm-up
    rest = used - np.polynomial.Polynomial.fit(held, used, 1)(held)
    return float(np.median(rest[-40:]) - np.median(rest[:40])), float(np.median(used[:40]))


def test_growth_is_told_from_fast_deaths():
    times = np.cumsum(np.where(np.arange(200) < 100, 2.0, 0.5))
    held = np.array([((times <= now) & (times > now - BURY_S)).sum() for now in times])
    assert growth(times, 70.0 + 10 * held)[0] == pytest.approx(0, abs=1e-6)
    steady = np.cumsum(np.full(200, 1.0) + 0.5 * (np.arange(200) // 10 % 2))
    assert growth(steady, 70.0 + np.arange(200))[0] > 100
