"""launch/chaos.py: its parts that are functions of their arguments, and one run as a user does it."""

import json
import subprocess
import sys

import pytest
from serving_harness import REPOSITORY

from launch.chaos_config import KINDS, ChaosRunConfig, server_overrides
from launch.chaos_faults import AFTER, Fault, schedule
from launch.chaos_load import LENGTHS, Answer, Verdict, compare, gaps_s, make_asks, percentile
from launch.chaos_summary import Round, is_good, placement_fault, summary
from launch.config import load

TWO_NODES = [0, 0, 1, 1]


def test_the_schedule_and_the_load_are_functions_of_the_seed():
    assert schedule(3, 12, KINDS, TWO_NODES) == schedule(3, 12, KINDS, TWO_NODES)
    assert schedule(3, 12, KINDS, TWO_NODES) != schedule(4, 12, KINDS, TWO_NODES)
    assert make_asks(3, 40) == make_asks(3, 40) != make_asks(4, 40)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_schedule_holds(seed: int):
    faults = schedule(seed, 12, KINDS, TWO_NODES)
    assert sorted(f.kind for f in faults[:6]) == sorted(f.kind for f in faults[6:]) == sorted(KINDS)
    for fault in faults:
        assert AFTER[0] <= fault.after <= AFTER[1]
        assert len(set(fault.ranks)) == len(fault.ranks) == (1 if fault.kind in ("kill", "stop", "term") else 2)
        assert fault.delay_s == 0 or fault.kind == "kill_in_recovery"
        assert fault.kind != "kill_node" or fault.ranks == (2, 3)
    asks = make_asks(seed, 8)
    assert sum(ask.temperature == 0 for ask in asks) == 4
    assert all(LENGTHS[0] <= ask.max_tokens <= LENGTHS[1] for ask in asks)


@pytest.mark.parametrize(
    ("text", "num_tokens", "finish", "verdict"),
    [
        ("one two three", 3, "length", Verdict.SAME),
        ("one two three", 3, "", Verdict.UNFINISHED),
        ("one two two three", 3, "length", Verdict.DUPLICATED),
        ("one two three", 4, "length", Verdict.DUPLICATED),
        ("one two", 2, "stop", Verdict.LOST),
        ("one three", 3, "length", Verdict.LOST),
        ("one six three", 3, "length", Verdict.MISMATCHED),
        ("one two three", 3, "stop", Verdict.MISMATCHED),
    ],
)
def test_how_answers_compare(text: str, num_tokens: int, finish: str, verdict: Verdict):
    wanted = Answer(text="one two three", finish="length", num_tokens=3)
    assert compare(wanted, Answer(text=text, finish=finish, num_tokens=num_tokens)) is verdict


def test_percentiles_and_gaps():
    hundred = list(range(100, 0, -1))
    assert [percentile(hundred, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None
    assert gaps_s([Answer(arrivals=[1.0, 1.5, 3.5]), Answer(arrivals=[9.0]), Answer()]) == [0.5, 2.0]


def test_a_placement_is_wrong_when_ranks_differ_or_an_expert_is_nowhere():
    def members(*hashes_and_slots: tuple[str, list[list[int]]]) -> dict:
        ranks = [
            {"placement_version": 2, "placement_hash": h, "slots": slots, "num_experts": 3}
            for h, slots in hashes_and_slots
        ]
        return {"members": ranks}

    assert placement_fault(members(("a", [[0, 1]]), ("a", [[2, -1]]))) == ""
    assert placement_fault(members(("a", [[0, 1]]), ("b", [[2, -1]]))) == "the ranks' placements differ"
    missing = placement_fault(members(("a", [[0, 1], [0, 0]]), ("a", [[2, -1], [2, -1]])))
    assert missing == "layer 1 has no slot with experts [1]"


def a_round(lost: list[int], answer: Answer) -> Round:
    report = {
        "epoch": 5, "lost": lost, "joined": [], "noticed_at": 10.1, "attempts": 1, "bytes_lower_bound": 64,
        "phase_s": {"view": 0.01, "groups": 0.02, "repair": 0.03, "commit": 0.04}, "bytes_by_source": {"disk": 64},
    }  # fmt: skip
    reports = tuple({"rank": rank, "report": report} for rank in (0, 1))
    return Round(Fault("kill", (2,), 0.5, 0.0), 10.0, True, (answer,), reports, 3.0, "")


def test_the_summary():
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    same = Answer(text="ab", finish="length", num_tokens=2, arrivals=[9.9, 10.3])
    good = summary([a_round([2], same)], [wanted])
    assert is_good(good, 1)
    assert not is_good(good, 2)
    assert good["gap_ms"] == {"p50": 400.0, "p99": 400.0, "max": 400.0}
    wanted_ms = {"detect": 100.0, "view": 10.0, "groups": 20.0, "repair": 30.0, "commit": 40.0, "repeat": 100.0}
    assert good["phase_ms"] == {phase: {"p50": ms, "p99": ms} for phase, ms in wanted_ms.items()}
    assert good["bytes_by_source"] == {"disk": 64}
    assert good["bytes_lower_bound"] == 64
    assert not is_good(good, 1, max_gap_ms=399)
    assert not is_good(good | {"bytes_lower_bound": 63}, 1)
    unseen = summary([a_round([3], same)], [wanted])
    assert unseen["faults"] == {"fired": 1, "counted": 0}
    assert not is_good(unseen, 1)
    assert not is_good(summary([a_round([2], Answer(text="a"))], [wanted]), 1)


def test_what_the_server_is_told():
    overrides = ["chaos.kinds=kill,stop", "elastic.hang_timeout_s=3", "chaos.seed=2"]
    config = load(ChaosRunConfig, "chaos", overrides)
    assert config.chaos.kind_names() == ("kill", "stop")
    told = ["elastic.hang_timeout_s=3", "elastic.max_quick_deaths=1000", "server.port=0", "log_level=warning"]
    assert server_overrides(config, overrides) == told
    for mistake in (
        "chaos.kinds=kill,stab",
        "chaos.nodes=3",
        "chaos.ranks=2",
        "chaos.faults=0",
        "chaos.kinds=kill_node",
    ):
        with pytest.raises(ValueError, match=mistake.partition("=")[0]):
            load(ChaosRunConfig, "chaos", [mistake])


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_two_faults_by_the_command_line():
    command = [sys.executable, "launch/chaos.py", "chaos.faults=2", "chaos.kinds=kill,kill_two", "chaos.requests=8"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=160, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["requests"] == found["finished"] == 16
    assert found["mismatched"] == found["duplicated"] == found["lost"] == 0
    assert found["faults"] == {"fired": 2, "counted": 2}
    assert found["gap_ms"].keys() == {"p50", "p99", "max"}
    assert found["phase_ms"].keys() == {"detect", "view", "groups", "repair", "commit", "repeat"}
    assert sum(found["bytes_by_source"].values()) > 0
    assert found["bytes_lower_bound"] > 0
