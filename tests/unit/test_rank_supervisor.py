"""The supervisor of one rank, with children and a clock that do as they are told."""

import sys

import pytest
from support.seat import DEADLINES, DYING, SIGTERM, VIEW, Bench, exited, member, said

from elastic_moe.group.view import View, incarnation_of
from elastic_moe.membership.launch import Launch
from elastic_moe.membership.signals import PeerDied
from elastic_moe.supervise import ScriptSupervisor
from elastic_moe.supervision.channel import Beat, Done, Ready, Refused, ViewChanged
from elastic_moe.supervision.rank_supervisor import LIGHTHOUSE, POLL_S, SEAT
from elastic_moe.supervision.supervisor import Event, EventKind
from elastic_moe.supervision.watch import MAX_BACKOFF_S, QUICK_DEATH_S, RESPAWN_S


def test_a_process_that_dies_is_announced_to_all_others_and_started_again_with_the_view(bench, capsys):
    at = bench()
    at.turn(said(ViewChanged(VIEW)))
    assert at.sender.connected == ["signals 0", "signals 2"]
    assert at.rank.views == [VIEW]
    at.turn(DYING)
    ((told, died),) = at.sender.told
    assert (told, type(died)) == (["signals 0", "signals 2"], PeerDied)
    assert (died.rank, incarnation_of(died.proof)) == (1, at.rank.starts[0].incarnation)
    assert at.turn(exited(-9)) is None
    assert capsys.readouterr().err == "elastic_moe: rank 1: the process died with code -9; respawn in 2 s\n"
    assert at.turn(after_s=RESPAWN_S - 0.01) is None
    assert at.num_starts == 1
    at.turn(after_s=0.01)
    assert at.num_starts == 2
    assert at.rank.starts[0].rejoin is None
    assert at.rank.starts[1].rejoin == VIEW
    assert at.rank.starts[0].incarnation != at.rank.starts[1].incarnation
    assert at.rank.starts[0].signals_port == at.rank.starts[1].signals_port > 0
    at.turn(after_s=100)
    assert at.num_starts == 2


def test_one_that_is_no_member_is_announced_to_nobody(bench):
    at = bench()
    at.turn(DYING)
    at.turn(said(ViewChanged(View(6, (member(0), member(2))))), DYING)
    at.turn(Event(EventKind.DYING, "other"))
    assert at.sender.told == []


def test_before_it_joined_its_death_is_that_of_the_launch(bench, capsys):
    at = bench()
    assert at.turn(exited(1)) == 1
    assert "rank 1: the process died with code 1 before it joined the group" in capsys.readouterr().err


def test_a_refusal_before_it_joined_is_a_users_mistake(bench, capsys):
    at = bench()
    assert at.turn(said(Refused("no such model")), exited(2)) == 2
    assert capsys.readouterr().err == ""


def test_a_refusal_later_ends_the_launch_if_no_other_rank_serves(bench, capsys):
    at = bench()
    assert at.turn(said(ViewChanged(VIEW)), said(Refused("disk is full")), exited(2)) == 1
    assert capsys.readouterr().err == "elastic_moe: rank 1: disk is full, and no other rank serves: the launch ends\n"


def test_else_it_tries_again_a_minute_later(bench, capsys):
    at = bench()
    at.rank.serving = True
    assert at.turn(said(ViewChanged(VIEW)), said(Refused("disk is full")), exited(2)) is None
    assert capsys.readouterr().err == "elastic_moe: rank 1: disk is full; respawn in 60 s\n"
    at.turn(after_s=59.9)
    assert at.num_starts == 1
    at.turn(after_s=0.1)
    assert at.num_starts == 2
    assert at.turn(exited(-9)) is None, "the next death is another matter"


def die_quickly(at: Bench) -> int | None:
    code = at.turn(DYING, exited(-9))
    at.turn(after_s=RESPAWN_S)
    return code


def test_after_too_many_quick_deaths_the_launch_ends_if_no_other_rank_serves(bench, capsys):
    at = bench()
    at.turn(said(ViewChanged(VIEW)))
    assert [die_quickly(at) for _ in range(3)] == [None, None, 1]
    said_last = capsys.readouterr().err.splitlines()[-1]
    reason = "it died 3 times in a row, each within 10 s, and no other rank serves: the launch ends"
    assert said_last == f"elastic_moe: rank 1: {reason}"


def test_while_others_serve_a_rank_is_tried_for_ever_ever_more_rarely(bench):
    at = bench()
    at.rank.serving = True
    at.turn(said(ViewChanged(VIEW)))
    for _ in range(12):
        assert at.turn(DYING, exited(-9)) is None
        at.turn(after_s=MAX_BACKOFF_S)
    assert at.num_starts == 13
    at.turn(DYING, exited(-9))
    at.turn(after_s=MAX_BACKOFF_S - 0.1)
    assert at.num_starts == 13


def test_a_life_is_counted_from_when_it_was_taken_in(bench):
    """However long it loads before."""
    at = bench()
    at.turn(said(ViewChanged(VIEW)))
    for _ in range(6):
        at.turn(after_s=20.0)
        at.turn(said(ViewChanged(VIEW)))
        assert at.turn(DYING, exited(-9), after_s=QUICK_DEATH_S) is None
        at.turn(after_s=RESPAWN_S)
    assert at.num_starts == 7
    for code in (None, None, 1):
        assert at.turn(DYING, exited(-9), after_s=25.0) == code, "it loads, and dies"
        at.turn(after_s=RESPAWN_S)


def test_a_process_that_hangs_is_killed_once(bench, capsys):
    at = bench()
    at.turn(said(Beat(1, None)), after_s=100)
    at.turn(after_s=1.4)
    assert at.process.killed == 0
    at.turn(after_s=0.2)
    assert at.process.killed == 1
    line = "elastic_moe: rank 1: the process (pid 77) is without a beat for 1.6 s; killing it\n"
    assert capsys.readouterr().err == line
    at.turn(after_s=10)
    assert at.process.killed == 1


def test_a_process_that_died_is_not_called_hung_while_it_waits_for_its_respawn(bench, capsys):
    at = bench(max_quick_deaths=9)
    at.turn(said(ViewChanged(VIEW)))
    for _ in range(6):
        at.turn(said(Beat(1, 1.5)), DYING, exited(-9))
        for _ in range(64):
            at.turn(after_s=0.5)
    assert at.num_starts == 7
    assert {child.killed for child in at.fake.started} == {0}
    assert "killing it" not in capsys.readouterr().err


def test_what_does_not_concern_the_seat_is_handed_on(bench):
    at = bench(keeps_lighthouse=True)
    ready = said(Ready("http://"), LIGHTHOUSE)
    at.turn(ready, said(Beat(1, 1.5)), said(ViewChanged(VIEW)))
    assert at.rank.heard == [ready]


def test_a_lighthouse_is_started_beside_the_rank_and_again_and_knows_the_deadlines(bench):
    at = bench(keeps_lighthouse=True)
    (first,) = [child for child in at.fake.started if child.name == LIGHTHOUSE]
    url = at.rank.starts[0].lighthouse
    wanted = ["--bind", url.removeprefix("http://"), "--join-timeout-ms", "60000", "--heartbeat-timeout-ms", "1000"]
    assert url.startswith("http://127.0.0.1:")
    assert first.command == [sys.executable, "-m", "elastic_moe.supervision.lighthouse", *wanted]
    assert at.turn(exited(1, LIGHTHOUSE)) is None
    again = at.fake.children[LIGHTHOUSE]
    assert again is not first
    assert again.command == first.command
    assert [child.name for child in at.fake.started].count(LIGHTHOUSE) == 2


def test_a_service_that_cannot_work_ends_the_launch(bench, capsys):
    at = bench(keeps_lighthouse=True)
    assert at.turn(said(Refused("no tokenizer"), LIGHTHOUSE), exited(2, LIGHTHOUSE)) == 2
    assert at.rank._refused == "no tokenizer"


def test_one_that_dies_at_its_start_is_started_ever_later_and_then_the_launch_ends(bench, capsys):
    at = bench(keeps_lighthouse=True)
    for wait_s in (0.0, 2.0, 4.0):
        assert at.turn(exited(1, LIGHTHOUSE)) is None
        line = f"elastic_moe: node 0: the lighthouse: died with code 1; started again in {wait_s:g} s\n"
        assert capsys.readouterr().err == line
        at.turn(after_s=wait_s)
    assert at.turn(exited(1, LIGHTHOUSE)) == 1


def test_one_that_has_worked_is_tried_for_ever(bench):
    at = bench(keeps_lighthouse=True)
    at.turn(said(Ready(), LIGHTHOUSE))
    for _ in range(9):
        assert at.turn(said(Refused("port is taken"), LIGHTHOUSE), exited(1, LIGHTHOUSE)) is None
        at.turn(after_s=MAX_BACKOFF_S)
    assert [child.name for child in at.fake.started].count(LIGHTHOUSE) == 10


def test_without_one_there_is_no_lighthouse(bench):
    at = bench()
    assert [child.name for child in at.fake.started] == [SEAT]
    assert [(start.lighthouse, start.rejoin) for start in at.rank.starts] == [("", None)]


def test_a_signal_ends_the_run_and_all_children(bench):
    at = bench()
    at.fake.events.put(said(ViewChanged(VIEW)))
    at.fake.events.put(SIGTERM)
    assert at.rank.run() == 0
    assert (at.fake.stopped, at.sender.closed) == (1, True)
    assert at.rank.views == [VIEW]
    assert set(at.fake.waits) == {POLL_S}
    assert at.num_starts == 2, "the bench has started one, and the run another"


def test_children_are_stopped_also_when_a_turn_raises(bench, monkeypatch: pytest.MonkeyPatch):
    at = bench()
    monkeypatch.setattr(at.rank, "_turn", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        at.rank.run()
    assert (at.fake.stopped, at.sender.closed) == (1, True)


@pytest.fixture
def script(bench) -> Bench:
    def make() -> ScriptSupervisor:
        return ScriptSupervisor(Launch(1, 3, local_rank=1), ["python", "script.py"], DEADLINES, 1)

    return bench(make)


def test_a_script_is_started_unchanged_and_told_its_place(script):
    assert script.process.command == ["python", "script.py"]
    assert script.process.fd_variable == "ELASTIC_MOE_SUPERVISOR_FD"
    (start,) = script.process.sent
    assert (start.launch, start.lighthouse, start.rejoin) == (Launch(1, 3, local_rank=1), "", None)


@pytest.mark.parametrize(("events", "code"), [
    ([exited(0)], 0),
    ([exited(3)], 3),
    ([exited(-9)], 137),
    ([said(ViewChanged(VIEW)), exited(0)], 0),
    ([said(ViewChanged(VIEW)), exited(3)], None),
    ([said(ViewChanged(VIEW)), said(Ready("done")), exited(-9)], None),
    ([said(ViewChanged(VIEW)), said(Done()), exited(3)], 3),
    ([said(ViewChanged(VIEW)), said(Done()), exited(-11)], 0),
])  # fmt: skip
def test_how_a_script_ends_its_rank(script, events, code):
    assert script.turn(*events) == code


def test_a_script_that_is_done_is_no_loss(script):
    script.turn(said(ViewChanged(VIEW)), said(Done()), DYING)
    assert script.sender.told == []


def test_a_script_that_dies_again_and_again_ends_the_launch(script):
    script.turn(said(ViewChanged(VIEW)))
    assert die_quickly(script) is None
    assert script.turn(DYING, exited(-9)) == 1


def test_the_first_rank_of_a_node_has_a_lighthouse_beside_its_script(bench):
    at = bench(lambda: ScriptSupervisor(Launch(), ["python"], DEADLINES, 1))
    assert [child.name for child in at.fake.started] == [LIGHTHOUSE, SEAT]
