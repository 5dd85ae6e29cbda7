"""launch/chaos.py: its parts that are functions of their arguments, and one run as a user does it."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.server import DEMO_MODEL, Server

from launch.config import REPO, load
from launch.faults.config import KINDS, ChaosRunConfig, server_overrides
from launch.faults.disk import flip_experts
from launch.faults.fork import fork_fault, fork_overrides
from launch.faults.kinds import AFTER, Fault, schedule
from launch.faults.summary import Round, is_good, longest_wait, placement_fault, summary
from launch.faults.verdict import Verdict, compare
from launch.figures import percentile
from launch.fork import NO_WEIGHTS, without_weights
from launch.server import torchrun
from launch.streams import LENGTHS, Answer, Ask, Load, gaps_s, make_asks

TWO_NODES = [0, 0, 1, 1]


def test_the_schedule_and_the_load_are_functions_of_the_seed():
    assert schedule(3, 12, KINDS, TWO_NODES) == schedule(3, 12, KINDS, TWO_NODES)
    assert schedule(3, 12, KINDS, TWO_NODES) != schedule(4, 12, KINDS, TWO_NODES)
    assert make_asks(3, 40) == make_asks(3, 40) != make_asks(4, 40)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_schedule_holds(seed: int):
    again = sorted(set(KINDS) - {"kill_node"})
    faults = schedule(seed, len(again) + 5, KINDS, TWO_NODES)
    assert sorted(f.kind for f in faults[:-5]) == again
    assert set(f.kind for f in faults[-5:-1]) < set(again)
    assert faults[-1].kind == "kill_node"
    assert [f.kind for f in schedule(seed, 5, ["kill_node"], TWO_NODES)] == ["kill_node"]
    for fault in faults:
        assert AFTER[0] <= fault.after <= AFTER[1]
        two = ("kill_two", "kill_in_recovery", "hang_in_recovery", "kill_node", "cut", "partition")
        victims = 2 if fault.kind in two else 0 if fault.kind in ("calm", "poison") else 1
        assert len(set(fault.ranks)) == len(fault.ranks) == victims
        assert fault.delay_s == 0 or fault.kind in ("kill_in_recovery", "hang_in_recovery", "fork")
        assert fault.kind not in ("kill_node", "partition") or fault.ranks == (2, 3)
        assert fault.kind != "cut" or sorted(fault.ranks) == [0, 2], "two ranks of one host have no wire between them"
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


def a_round(
    lost: list[int], answer: Answer, kind: str = "kill", rejected: int = 0, ranks: tuple[int, ...] = (2,)
) -> Round:
    report = {
        "epoch": 5, "lost": lost, "joined": [], "noticed_at": 10.1, "attempts": 1, "bytes_lower_bound": 64,
        "phase_s": {"view": 0.01, "groups": 0.02, "repair": 0.03, "commit": 0.04}, "bytes_by_source": {"disk": 64},
        "rejected": rejected,
    }  # fmt: skip
    reports = tuple({"rank": rank, "report": report} for rank in (0, 1))
    return Round(Fault(kind, ranks, 0.5, 0.0), 10.0, True, reports, 3.0, "", answers=(answer,), client_lag_s=0.05)


def test_the_summary():
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    same = Answer(text="ab", finish="length", num_tokens=2, arrivals=[9.9, 10.3])
    good = summary([a_round([2], same)], [wanted], 1)
    assert is_good(good)
    assert not is_good(summary([a_round([2], same)], [wanted], 2))
    assert good["gap_ms"] == {"p50": 400.0, "p99": 400.0, "max": 400.0}
    wanted_ms = {"detect": 100.0, "view": 10.0, "groups": 20.0, "repair": 30.0, "commit": 40.0, "repeat": 100.0}
    assert good["phase_ms"] == {phase: {"p50": ms, "p99": ms} for phase, ms in wanted_ms.items()}
    assert good["bytes_by_source"] == {"disk": 64}
    assert good["client_lag_ms"] == 50.0
    assert good["bytes_lower_bound"] == 64
    assert not is_good(good, max_gap_ms=399)
    assert not is_good(good | {"bytes_lower_bound": 63})
    unseen = summary([a_round([3], same)], [wanted], 1)
    assert unseen["faults"] == {"planned": 1, "fired": 1, "counted": 0}
    assert not is_good(unseen)
    assert not is_good(summary([a_round([2], Answer(text="a"))], [wanted], 1))
    assert not is_good(summary([a_round([2], same, "corrupt")], [wanted], 1)), "nothing was refused"
    refused = summary([a_round([2], same, "corrupt", rejected=3)], [wanted], 1)
    assert (is_good(refused), refused["rejected"]) == (True, 6)


@pytest.mark.parametrize(("kind", "lost", "counted"), [
    ("cut", [], 0), ("cut", [1], 1), ("cut", [2], 1), ("cut", [0], 0), ("slow", [], 1), ("slow", [1], 0),
    ("partition", [1], 0), ("partition", [1, 2], 1), ("hang", [1, 2], 1), ("hang", [1], 0),
])  # fmt: skip
def test_who_must_be_lost(kind: str, lost: list[int], counted: int):
    """One end of a cut wire, all of the smaller half, all that hang; and nobody for being slow."""
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    found = summary([a_round(lost, wanted, kind, ranks=(1, 2))], [wanted], 1)
    assert found["faults"]["counted"] == counted


def test_poison_counts_when_it_is_refused_as_an_error():
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    for status, counted in ((500, 1), (200, 0), (503, 0), (None, 0)):
        one = dataclasses.replace(a_round([], wanted, "poison", ranks=()), poison_status=status)
        assert summary([one], [wanted], 1)["faults"]["counted"] == counted


def test_a_fork_is_right_when_it_answers_as_its_seed_does():
    right, other, failed = Answer("a", "length", 1), Answer("b", "length", 1), Answer(error="500: it broke")
    assert fork_fault([right, other], [right, other]) == ""
    assert fork_fault([right, right], [right, other]) == "the fork's answer is mismatched:  wanted 'a', got 'b'"
    assert "unfinished: 500: it broke" in fork_fault([right], [failed])


@pytest.mark.parametrize(("finish", "num_answers"), [("length", 6), ("", 2)])
def test_a_load_goes_on_while_all_is_well(finish: str, num_answers: int):
    class Answered(Load):
        async def _stream(self, client: object, ask: Ask, answer: Answer) -> None:
            answer.text, answer.finish = ask.prompt, finish

    load, asks = Answered("http://127.0.0.1:9", "demo", make_asks(0, 2)), make_asks(0, 2)
    asyncio.run(load.run(lambda: len(load.answers) < 6))
    assert [answer.text for answer in load.answers] == [asks[i % 2].prompt for i in range(num_answers)]


def test_the_summary_of_a_fork():
    """The load was asked three times meanwhile, and every answer counts."""
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    other = dataclasses.replace(wanted, text="ac")
    one = dataclasses.replace(a_round([2], wanted, "fork"), answers=(wanted,) * 3, in_load=True)
    found = summary([one], [wanted], 1)
    assert is_good(found)
    assert (found["requests"], found["killed_in_load"], found["forks_wrong"]) == (3, 1, 0)
    changed = summary([dataclasses.replace(one, answers=(wanted, wanted, other))], [wanted], 1)
    assert (changed["mismatched"], is_good(changed)) == (1, False)
    wrong = summary([dataclasses.replace(one, fork_fault="the fork does not serve")], [wanted], 1)
    assert (wrong["forks_wrong"], is_good(wrong)) == (1, False)


def test_whether_the_second_victim_was_lost_in_the_recovery_from_the_first():
    """One recovery tells of both, then; else there were two, and the fault was not the one that its name says."""
    wanted = Answer(text="ab", finish="length", num_tokens=2, arrivals=[1.0, 1.1])
    both = a_round([1, 2], wanted, "kill_in_recovery", ranks=(2, 1))
    one_by_one = dataclasses.replace(
        a_round([2], wanted, "kill_in_recovery", ranks=(2, 1)),
        reports=(*a_round([2], wanted).reports, *a_round([1], wanted).reports),
    )
    at_once = a_round([1, 2], wanted, "kill_two", ranks=(2, 1))
    found = [summary([one], [wanted], 1) for one in (both, one_by_one, at_once)]
    assert [one["killed_in_recovery"] for one in found] == [1, 0, 0]
    assert [one["faults"]["counted"] for one in found] == [1, 1, 1]
    assert summary([both, one_by_one, both], [wanted], 3)["killed_in_recovery"] == 2


def test_the_longest_wait():
    answers = [Answer(arrivals=[1.0, 3.0, 3.1]), Answer(arrivals=[1.2, 2.9]), Answer(arrivals=[2.5, 3.2]), Answer()]
    assert longest_wait(answers) == (2.0, 1.0, 2)
    assert longest_wait([]) == (0.0, 0.0, 0)


def test_a_disk_goes_bad_and_is_mended(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    weights = {"a.experts.0.w": torch.zeros(1024), "a.gate.w": torch.zeros(1024), "a.experts.1.w": torch.zeros(3)}
    save_file(weights, path)
    before = path.read_bytes()
    with safe_open(path, "pt") as mapped:
        assert flip_experts(tmp_path) == 5
        wrong = {name: int(mapped.get_tensor(name).count_nonzero()) for name in weights}
        assert wrong == {"a.experts.0.w": 4, "a.gate.w": 0, "a.experts.1.w": 1}
    assert flip_experts(tmp_path) == 5
    assert path.read_bytes() == before


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
        "chaos.kinds=corrupt",
        "chaos.kinds=partition",
        "chaos.kinds=fork chaos.url=http://127.0.0.1:8000",
        "chaos.kinds=fork,partition chaos.nodes=2",
        "model.path=/nowhere chaos.kinds=fork",
    ):
        with pytest.raises(ValueError, match=mistake.partition("=")[0]):
            load(ChaosRunConfig, "chaos", mistake.split())


def test_what_a_fork_is_told(tmp_path: Path):
    """Of the same model, and how it is run; its slots and its port are its own."""
    overrides = ["model=hf", f"model.path={DEMO_MODEL}", "elastic.slots_per_rank=4", "serving.page_size=16"]
    told = server_overrides(load(ChaosRunConfig, "chaos", overrides), overrides)
    own = [f"model.path={tmp_path}", "server.port=0", "log_level=info"]
    assert fork_overrides(told, tmp_path) == ["model=hf", f"model.path={DEMO_MODEL}", "serving.page_size=16", *own]
    with without_weights(DEMO_MODEL) as folder:
        assert {path.name for path in folder.iterdir()} == set(NO_WEIGHTS)
    assert not folder.exists()


def run_chaos(*overrides: str) -> dict:
    """The summary of a run that is good."""
    command = [sys.executable, "launch/chaos.py", "chaos.requests=8", *overrides]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=160, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    planned = found["faults"]["planned"]
    assert found["requests"] == found["finished"] >= 8 * planned
    assert found["mismatched"] == found["duplicated"] == found["lost"] == 0
    assert found["faults"] == {"planned": planned, "fired": planned, "counted": planned}
    return found


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_two_faults_by_the_command_line():
    found = run_chaos("chaos.faults=2", "chaos.kinds=kill,kill_two")
    assert found["faults"]["planned"] == 2
    assert found["gap_ms"].keys() == {"p50", "p99", "max"}
    assert found["phase_ms"].keys() == {"detect", "view", "groups", "repair", "commit", "repeat"}
    assert sum(found["bytes_by_source"].values()) == found["bytes_lower_bound"] > 0
    assert found["rejected"] == 0


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_ranks_are_killed_in_a_recovery():
    found = run_chaos("chaos.faults=4", "chaos.kinds=kill_in_recovery")
    assert found["killed_in_recovery"] > 0


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_bad_disk_then_the_loss_of_a_node():
    found = run_chaos("chaos.faults=2", "chaos.kinds=kill_node,corrupt", "chaos.nodes=2")
    assert found["faults"]["planned"] == 2
    assert found["gap_ms_by_kind"].keys() == {"corrupt", "kill_node"}
    assert found["rejected"] > 0
    assert sum(found["bytes_by_source"].values()) == found["bytes_lower_bound"] > 0


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_rank_is_killed_while_another_instance_takes_its_weights_from_it():
    found = run_chaos("chaos.faults=1", "chaos.kinds=fork", "chaos.seed=1")
    assert found["gap_ms_by_kind"].keys() == {"fork"}
    assert found["killed_in_load"] == 1
    assert (found["forks_wrong"], found["not_rejoined"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_ranks_that_hang_and_a_request_that_kills():
    found = run_chaos("chaos.faults=3", "chaos.kinds=hang,hang_in_recovery,poison")
    assert found["gap_ms_by_kind"]["hang"]["max"] < 4000


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces")
def test_a_cut_wire_and_a_partition():
    found = run_chaos("chaos.faults=2", "chaos.kinds=cut,partition", "chaos.nodes=4")
    assert found["not_rejoined"] == 0


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_server_that_runs_already():
    with Server(torchrun(3), "log_level=warning", "elastic.hang_timeout_s=5") as server:
        found = run_chaos("chaos.faults=2", "chaos.kinds=kill,term", f"chaos.url={server.url}")
        assert found["faults"]["planned"] == 2
        server.wait_until_idle()
        server.stop()
