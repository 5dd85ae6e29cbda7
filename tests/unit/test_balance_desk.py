"""The front end's side of the balancer: operations, loads, events and metrics, and the HTTP API over them."""

import asyncio
from typing import Any

import pytest
from support.front_end import FakeEngine, front_end

from elastic_moe.config import ServeConfig
from elastic_moe.control.report import RebalanceReport, Report
from elastic_moe.serving.front_end import balance_desk as module
from elastic_moe.serving.front_end.balance_desk import BalanceDesk, BalancerOff, LoadDump
from elastic_moe.serving.front_end.events import EventLog
from elastic_moe.serving.front_end.metrics import Metrics
from elastic_moe.serving.protocol import AskLoads, Event, Loads, Rebalance

pytestmark = pytest.mark.anyio

OFF = "eplb.mode=off: start the server with eplb.mode=async (or sync) to rebalance"


class Link:
    """What a desk needs of a link to an engine."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def engines(*ranks) -> Any:
    return {rank: Link() for rank in ranks}


def report(number=1, outcome="moved", ops=(), epoch=1, **fields):
    return RebalanceReport(epoch, number, 1, tuple(ops), outcome, "because", **fields)


def test_every_engine_is_asked_and_the_first_report_is_the_end():
    links = engines(0, 3)
    desk = BalanceDesk("async", links)
    asked = desk.rebalance()
    assert [link.sent for link in links.values()] == [[Rebalance(asked.id)]] * 2
    assert (desk.operation(asked.id), asked.state) == (asked, "pending")
    desk.finish(report(1, ops=["another"]))
    assert asked.state == "pending"
    first = report(2, "moved", ops=["another", asked.id])
    desk.finish(first)
    desk.finish(report(3, "failed", ops=[asked.id]))
    assert (asked.state, asked.report) == ("moved", first)


def test_a_round_that_moved_nothing_tells_of_nothing():
    kept = report(1, "kept")
    assert (kept.max_mean_before, kept.max_mean_after, kept.ended_at) == (0.0, 0.0, 0.0)
    assert (kept.num_moves, kept.num_chunks, kept.bytes_lower_bound) == (0, 0, 0)
    assert (kept.balancedness, kept.phase_s, kept.bytes_by_source) == ([], {}, {})


@pytest.mark.parametrize(
    ("told", "field"),
    [
        (report(), "outcome"),
        (Report(2, (0,), (1,), (), "a loss", 1.0, {}, {}, 0, 0, 1), "lost"),
        (LoadDump([[1, 2]], [0], []), "ranks"),
    ],
)
def test_what_was_told_does_not_change(told, field):
    with pytest.raises(AttributeError):
        setattr(told, field, None)


def test_a_new_engine_hears_of_what_is_pending_only():
    desk = BalanceDesk("sync", {})
    done, pending = desk.rebalance(), desk.rebalance()
    desk.finish(report(ops=[done.id]))
    (newcomer,) = engines(1).values()
    desk.greet(newcomer)
    assert newcomer.sent == [Rebalance(pending.id)]


def test_the_oldest_operation_is_forgotten(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    desk = BalanceDesk("async", {})
    first, second, third = desk.rebalance(), desk.rebalance(), desk.rebalance()
    assert [desk.operation(op.id) for op in (first, second, third)] == [None, second, third]


def test_off_refuses():
    desk = BalanceDesk("off", links := engines(0))
    with pytest.raises(BalancerOff) as refused:
        desk.rebalance()
    assert str(refused.value) == OFF
    assert not links[0].sent


async def ask(desk, links):
    """`desk.loads()` in a task, and the name under which it asked."""
    task = asyncio.create_task(desk.loads())
    while not all(link.sent for link in links.values()):
        await asyncio.sleep(0)
    (names,) = {link.sent[-1] for link in links.values()}
    assert isinstance(names, AskLoads)
    return task, names.ask


async def test_loads_are_summed_and_nobody_waits_when_all_have_answered(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 1000.0)
    links = engines(0, 2)
    desk = BalanceDesk("off", links)
    async with asyncio.timeout(10):
        task, name = await ask(desk, links)
        desk.take(0, Loads("of another question", [[100, 100]]))
        desk.take(2, Loads(name, [[1, 2], [3, 4]]))
        desk.take(2, Loads(name, [[100, 100], [100, 100]]))
        desk.take(0, Loads(name, [[10, 20], [30, 40]]))
        assert await task == LoadDump([[11, 22], [33, 44]], [0, 2], [])


async def test_a_silent_rank_and_one_that_has_nothing_are_named_after_the_deadline(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    links = engines(0, 1, 2)
    desk = BalanceDesk("async", links)
    async with asyncio.timeout(10):
        task, name = await ask(desk, links)
        desk.take(1, Loads(name, [[1, 2]]))
        desk.take(2, Loads(name, []))
        assert await task == LoadDump([[1, 2]], [1], [0, 2])
        desk.take(0, Loads(name, [[5, 5]]))  # too late, and nobody minds


async def test_loads_of_nobody():
    assert await BalanceDesk("async", {}).loads() == LoadDump([], [], [])


def count_of(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"elastic_moe_{name}", labels)


def test_a_round_that_every_rank_tells_of_is_one_event():
    log = EventLog(metrics := Metrics())
    moved = {"bytes_by_source": {"node": 70, "own": 7}, "phase_s": {"plan": 0.5}, "balancedness": [0.5, 0.75]}
    for rank in (2, 0, 1):
        log.add(Event(rank, report(1, "moved", **moved)))
    for rank in (0, 1, 2):
        log.add(Event(rank, report(2, "kept", balancedness=[0.5, 1.0])))
    log.add(Event(1, report(3, "kept", ops=["asked"])))
    log.add(Event(1, report(1, "failed", epoch=2)))
    log.add(Event(0, report(1, "failed", epoch=2)))
    log.add(Event(0, report(9, "moved", epoch=1)))  # late, of an epoch that is over
    told = [
        (event.rank, getattr(event.report, "number", 0), getattr(event.report, "outcome", "")) for event in log.all()
    ]
    assert told == [(2, 1, "moved"), (1, 3, "kept"), (1, 1, "failed")], "none that nobody asked for and moved nothing"
    outcomes = {outcome: count_of(metrics, "rebalances_total", outcome=outcome) for outcome in ("moved", "kept")}
    assert outcomes == {"moved": 1.0, "kept": 2.0}
    assert count_of(metrics, "rebalances_total", outcome="failed") == 1.0
    assert count_of(metrics, "balancedness", layer="1") == 1.0
    assert count_of(metrics, "transfer_bytes_total", source="node") == 70.0
    assert count_of(metrics, "rebalance_seconds_count", phase="plan") == 1.0


def test_recoveries_are_told_beside_rounds():
    log = EventLog(metrics := Metrics())
    recovery = Report(2, (0,), (1,), (), "a loss", 1.0, {"view": 0.1}, {"disk": 5}, 5, 0, 1)
    log.add(Event(0, report(4)))
    log.add(Event(0, recovery))
    log.add(Event(0, report(1, epoch=2)))
    assert [type(event.report) for event in log.all()] == [RebalanceReport, Report, RebalanceReport]
    assert count_of(metrics, "faults_total") == 1.0


async def test_the_api_of_a_server_without_balancer(config: ServeConfig):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(0, [0]))
        refused = await fe.client.post("/elastic/rebalance")
        unknown = await fe.client.get("/elastic/ops/nobody")
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, OFF)
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404,
        "no operation 'nobody' here; POST /elastic/rebalance names one",
    )
