"""The front end while the cluster changes: health, routing, lost ranks, clients that go away."""

import asyncio

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.front_end import END, FakeEngine, front_end, until

from elastic_moe.config import ServeConfig
from elastic_moe.group.view import View
from elastic_moe.serving.front_end.cluster_status import RequestStatus
from elastic_moe.serving.protocol import Finish

pytestmark = pytest.mark.anyio

TEXT = " the quick brown fox jumps over the lazy dog"


@pytest.fixture(autouse=True)
def hellos_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing of what is to be done at once is done by the next report, a second later."""
    monkeypatch.setattr("elastic_moe.serving.front_end.gateway.HELLO_INTERVAL_S", 1000.0)


async def test_duplicates_and_strangers_change_nothing(config: ServeConfig):
    async with front_end(config) as fe:
        answer = [*fe.tokens(TEXT), END]
        engine, stranger = FakeEngine(0, answer, sends=0), FakeEngine(1, answer, sends=0)
        await fe.join(engine, stranger)
        response = asyncio.create_task(fe.complete(max_tokens=100))
        await until(lambda: len(engine.submits) == 1)
        name, last = engine.submits[0].request_id, len(answer) - 1
        await stranger.send(name, 0, [9, 9, 9])
        await engine.send("unknown", 0, [9])
        await engine.send(name, 0, answer[:4])
        await engine.send(name, 0, answer[:4])
        await engine.send(name, 2, answer[2:last])
        await engine.send(name, last, [END], "stop")
        choice = (await response).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")


@pytest.mark.parametrize("what", ["gap", Finish.DROPPED])
async def test_what_an_engine_has_dropped_or_left_out_is_submitted_again(config: ServeConfig, what: str):
    async with front_end(config) as fe:
        answer = [*fe.tokens(TEXT), END]
        engine = FakeEngine(0, answer, sends=2)
        await fe.join(engine)
        response = asyncio.create_task(fe.complete(max_tokens=50))
        await until(lambda: len(engine.submits) == 1 and len(only_entry(fe).tokens) == 2)
        engine.sends = None
        name = engine.submits[0].request_id
        await (engine.send(name, 6, [9, 9]) if what == "gap" else engine.send(name, 0, [], Finish.DROPPED))
        assert (await response).json()["choices"][0]["text"] == TEXT
        assert await resubmitted(fe) == 1
    assert engine.cancels == [name]
    assert [submit.num_generated for submit in engine.submits] == [0, 2]


@pytest.mark.parametrize("sent", [0, 1, 5])
async def test_a_stream_goes_on_when_its_rank_is_lost(config: ServeConfig, sent: int):
    async with front_end(config, http=True) as fe:
        answer = [*fe.tokens(TEXT), END]
        lost, heir = FakeEngine(0, answer, sends=sent), FakeEngine(1, answer)
        await fe.join(lost, heir)
        events = asyncio.create_task(fe.stream(max_tokens=50, seed=3, stream_options={"include_usage": True}))
        await until(lambda: len(lost.submits) == 1 and len(only_entry(fe).tokens) == sent)
        lost.close()
        fe.show(heir)
        *texts, usage = await events
        metrics = (await fe.client.get("/metrics")).text
    assert "".join(e["choices"][0]["text"] for e in texts) == TEXT
    assert usage["usage"]["completion_tokens"] == len(answer)
    first, second = lost.submits[0], heir.submits[0]
    assert second.tokens == first.tokens + answer[:sent]
    assert (second.num_generated, second.max_new_tokens, second.sampling) == (sent, 50 - sent, first.sampling)
    assert "elastic_moe_requests_resubmitted_total 1.0" in metrics
    assert f"elastic_moe_generated_tokens_total {len(answer)}.0" in metrics


async def test_a_respawned_rank_starts_from_the_tokens_known(config: ServeConfig):
    async with front_end(config) as fe:
        answer = [*fe.tokens(TEXT), END]
        former, respawned = FakeEngine(0, answer, sends=3), FakeEngine(0, answer)
        await fe.join(former)
        response = asyncio.create_task(fe.complete(max_tokens=50))
        await until(lambda: len(former.submits) == 1 and len(only_entry(fe).tokens) == 3)
        former.close()
        fe.show(respawned)
        assert (await response).json()["choices"][0]["text"] == TEXT
    assert respawned.submits[0].num_generated == 3


async def test_orphans_are_placed_at_once(config: ServeConfig):
    """With the view that tells of the loss, not when the next rank reports. What moves is counted, each time."""
    async with front_end(config) as fe:
        first, second, third, fourth = (FakeEngine(rank, [END], sends=0) for rank in (0, 1, 2, 0))
        await fe.join(first, second)
        requests = [asyncio.create_task(fe.complete()) for _ in range(4)]
        await until(lambda: (len(first.submits), len(second.submits)) == (2, 2))
        third.phase = "loading"
        fe.show(third)
        assert fe.gateway.status().requests == RequestStatus(running=0, waiting=4)
        assert await resubmitted(fe) == 0, "none has a place yet"
        third.phase = "serving"
        await fe.join(fourth, third)
        assert fe.gateway.status().requests == RequestStatus(running=4, waiting=0)
        assert await resubmitted(fe) == 4
        await until(lambda: len(third.submits) + len(fourth.submits) == 4)
        for submit in third.submits:  # or it would look as if they were killing their processes
            await third.send(submit.request_id, 0, [9])
        await until(lambda: sum(len(entry.tokens) for entry in journal(fe)) == len(third.submits))
        fe.show(fourth)
        assert fe.gateway.status().requests == RequestStatus(running=4, waiting=0), "no report was needed"
        await until(lambda: len(fourth.submits) == 4)
        assert await resubmitted(fe) == 4 + len(third.submits) > 4
        for submit in fourth.submits:
            await fourth.send(submit.request_id, 0, [END], "stop")
        assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 4


async def test_a_request_that_stays_is_not_submitted_again(config: ServeConfig):
    async with front_end(config) as fe:
        lost, heir = FakeEngine(0, [END], sends=0), FakeEngine(1, [END], sends=0)
        await fe.join(lost, heir)
        requests = [asyncio.create_task(fe.complete()) for _ in range(2)]
        await until(lambda: (len(lost.submits), len(heir.submits)) == (1, 1))
        lost.close()
        fe.show(heir)
        await until(lambda: len(heir.submits) == 2)
        assert heir.submits[1].request_id == lost.submits[0].request_id
        assert await resubmitted(fe) == 1
        for submit in heir.submits:
            await heir.send(submit.request_id, 0, [END], "stop")
        await asyncio.gather(*requests)


async def test_an_engine_that_knows_a_newer_view_is_followed(config: ServeConfig):
    """The front end's own supervisor may tell later: its own engine may be the one that died."""
    async with front_end(config) as fe:
        answer = [*fe.tokens(TEXT), END]
        lost, heir = FakeEngine(0, answer, sends=3), FakeEngine(1, answer)
        await fe.join(lost, heir)
        response = asyncio.create_task(fe.complete(max_tokens=50))
        await until(lambda: len(lost.submits) == 1 and len(only_entry(fe).tokens) == 3)
        lost.close()
        heir.view = View(5, (heir.member,))
        await heir.report()
        assert (await response).json()["choices"][0]["text"] == TEXT
        assert [submit.num_generated for submit in heir.submits] == [3]
        assert (fe.gateway.status().epoch, ranks_of(fe)) == (5, [1])
        fe.gateway.set_view(View(4, (lost.member, heir.member)))
        assert (fe.gateway.status().epoch, ranks_of(fe)) == (5, [1]), "what the supervisor tells late is old"
        fe.gateway.set_view(View(5, (heir.member,)))
        fe.gateway.set_view(View(6, (heir.member,)))
        assert (fe.gateway.status().epoch, ranks_of(fe)) == (6, [1])


async def test_an_engine_that_knows_an_older_view_is_not_followed(config: ServeConfig):
    """Nor is one that knows the same: a status is on its way while the supervisor tells of the next view."""
    async with front_end(config) as fe:
        former, newcomer = FakeEngine(0, [END]), FakeEngine(1, [END])
        await fe.join(former)
        await fe.join(former, newcomer)
        for epoch in (1, 2):
            former.view, former.running = View(epoch, (former.member,)), epoch
            await former.report()
            await until(lambda: fe.gateway.status().members[0].running == former.running)
            assert (fe.gateway.status().epoch, ranks_of(fe)) == (2, [0, 1])


async def test_a_process_in_the_same_seat_is_another_member(config: ServeConfig):
    """What its predecessor still says is not its status, and a member that stays keeps its link."""
    async with front_end(config) as fe:
        former, respawned, stays = FakeEngine(0, [END]), FakeEngine(0, [END]), FakeEngine(1, [END])
        await fe.join(former, stays)
        hellos = stays.hellos
        respawned.phase = "loading"
        fe.show(respawned, stays)
        assert [m.phase for m in fe.gateway.status().members] == ["silent", "serving"], "nothing was heard of it yet"
        await until(lambda: fe.gateway.status().members[0].phase == "loading")
        assert fe.gateway.status().members[0].incarnation == respawned.member.incarnation
        assert stays.hellos == hellos
        moved = FakeEngine(1, [END])
        moved.member = msgspec.structs.replace(moved.member, incarnation=stays.member.incarnation)
        fe.show(respawned, moved)
        await until(lambda: moved.hellos == 1)
        stays.close()


async def test_engines_are_greeted_at_once_and_again(config: ServeConfig, monkeypatch: pytest.MonkeyPatch):
    """At once: a new engine reports when it is greeted. Again: an engine forgets whoever greets it no more."""
    monkeypatch.setattr("elastic_moe.serving.front_end.gateway.HELLO_INTERVAL_S", 0.02)
    async with front_end(config) as fe:
        engine = FakeEngine(0, [END])
        await fe.join(engine)
        await until(lambda: engine.hellos >= 5)
    monkeypatch.setattr("elastic_moe.serving.front_end.gateway.HELLO_INTERVAL_S", 1000.0)
    async with front_end(config) as fe:
        await asyncio.sleep(0)  # the greeter has greeted nobody, and sleeps
        await fe.join(engine := FakeEngine(0, [END]))
        assert engine.hellos == 1


async def test_requests_wait_for_a_healthy_rank(config: ServeConfig):
    async with front_end(config) as fe:
        early = asyncio.create_task(fe.complete())
        await until(lambda: fe.gateway.status().requests.waiting == 1)
        engine = FakeEngine(0, [END])
        engine.phase = "loading"
        fe.show(engine)
        await until(lambda: fe.gateway.status().members[0].phase == "loading")
        assert fe.gateway.status().requests.waiting == 1
        engine.phase = "serving"
        await engine.report()
        assert (await early).status_code == 200


async def test_the_least_loaded_rank_is_chosen(config: ServeConfig):
    async with front_end(config) as fe:
        busy, idle = FakeEngine(0, [END], sends=0), FakeEngine(1, [END], sends=0)
        busy.running = 2
        await fe.join(busy, idle)
        requests = [asyncio.create_task(fe.complete()) for _ in range(4)]
        await until(lambda: len(busy.submits) + len(idle.submits) == 4)
        assert (len(busy.submits), len(idle.submits)) == (1, 3)
        for engine in (busy, idle):
            for submit in engine.submits:
                await engine.send(submit.request_id, 0, [END], "stop")
        await asyncio.gather(*requests)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sent", [0, 2])
async def test_a_client_that_goes_away_frees_its_request(config: ServeConfig, stream: bool, sent: int):
    async with front_end(config, http=True) as fe:
        engine = FakeEngine(0, [*fe.tokens(TEXT), END], sends=sent)
        await fe.join(engine)
        request = asyncio.create_task(fe.stream() if stream else fe.complete())
        await until(lambda: len(engine.submits) == 1)
        request.cancel()
        await until(lambda: engine.cancels == [engine.submits[0].request_id])
        await until(lambda: fe.gateway.status().requests.running == 0)
        assert b'requests_total{outcome="cancelled"} 1.0' in (await fe.client.get("/metrics")).content


async def test_health(config: ServeConfig):
    async with front_end(config) as fe:

        async def health() -> tuple[int, str]:
            response = await fe.client.get("/health")
            return response.status_code, response.json().get("reason", response.json()["status"])

        assert await health() == (503, "no engine has joined yet")
        assert fe.gateway.status().epoch == 0
        first, second = FakeEngine(0, [END]), FakeEngine(1, [END])
        second.phase = "loading"
        fe.show(first, second)
        await until(lambda: [m.phase for m in fe.gateway.status().members] == ["serving", "loading"])
        assert await health() == (503, "these ranks are not serving yet: 1")
        second.phase = "serving"
        await second.report()
        await until(lambda: fe.gateway.status().phase == "serving")
        assert await health() == (200, "ok")
        second.phase = "stopping"
        await second.report()
        await until(lambda: fe.gateway.status().members[1].phase == "stopping")
        assert await health() == (200, "ok"), "one rank is enough once all have served"
        newcomer = FakeEngine(5, [END])
        newcomer.phase = "loading"
        first.close()
        fe.show(newcomer)
        await until(lambda: fe.gateway.status().members[0].phase == "loading")
        assert await health() == (503, "no rank is serving")


async def test_ranks_that_cannot_serve_say_why(config: ServeConfig):
    """New requests are refused with the reason; one in flight waits, and goes on when a rank serves again."""
    async with front_end(config) as fe:
        engine = FakeEngine(0, [5, 6, END], sends=1)
        await fe.join(engine)
        waiting = asyncio.create_task(fe.complete())
        await until(lambda: len(engine.submits) == 1)
        engine.phase, engine.reason = "unavailable", "4 slots are short"
        await engine.report()
        await until(lambda: fe.gateway.status().phase == "unavailable")
        assert (await fe.client.get("/health")).json() == {"status": "unavailable", "reason": "4 slots are short"}
        refused = await fe.complete()
        assert refused.status_code == 503
        assert refused.json()["error"] == {
            "message": "4 slots are short", "type": "server_error", "param": None, "code": "unavailable",
        }  # fmt: skip
        engine.phase = "serving"
        await engine.report()
        await until(lambda: fe.gateway.status().phase == "serving")
        await engine.send(engine.submits[0].request_id, 1, [6, END], "stop")
        assert (await waiting).status_code == 200


async def test_a_rank_that_stops_reporting_is_not_healthy(config: ServeConfig, monkeypatch: pytest.MonkeyPatch):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(0, [END]))
        monkeypatch.setattr("elastic_moe.serving.front_end.engine_link.STATUS_MAX_AGE_S", -1.0)
        assert (await fe.client.get("/health")).json() == {"status": "unavailable", "reason": "no rank is serving"}
        assert fe.gateway.status().members[0].phase == "silent"


async def test_status(config: ServeConfig):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(2, [END]), FakeEngine(0, [END]))
        status = (await fe.client.get("/elastic/status")).json()
    assert (status["epoch"], status["phase"]) == (1, "serving")
    assert status["placement"] == {"version": 3, "hash": "abc"}
    assert status["requests"] == {"running": 0, "waiting": 0}
    assert [m["rank"] for m in status["members"]] == [0, 2]
    member = status["members"][0]
    expected = {"node": 0, "pid": 4000, "host": "host", "phase": "serving", "slots": [[0, 1], [1, -1]]}
    expected |= {"num_experts": 2, "running": 0, "waiting": 0, "steps": 0, "tokens_generated": 7}
    assert expected.items() <= member.items()
    assert {"incarnation", "memory_bytes"} <= member.keys()


async def test_metrics(config: ServeConfig):
    async with front_end(config) as fe:
        engine, other = FakeEngine(0, [*fe.tokens(TEXT), END]), FakeEngine(4, [END])
        await fe.join(engine, other)
        await fe.complete("the", max_tokens=100)
        before = samples((await fe.client.get("/metrics")).text)
        fe.show(engine)
        after = samples((await fe.client.get("/metrics")).text)
    num_tokens = float(len(engine.answer))
    assert before["elastic_moe_requests_total", "stop"] == 1.0
    assert before["elastic_moe_generated_tokens_total", ""] == num_tokens
    assert before["elastic_moe_prompt_tokens_total", ""] == len(engine.submits[0].tokens)
    assert before["elastic_moe_time_to_first_token_seconds_count", ""] == 1.0
    assert before["elastic_moe_inter_token_seconds_count", ""] == num_tokens - 1
    for what in ("time_to_first_token", "inter_token"):
        assert 0 < before[f"elastic_moe_{what}_seconds_sum", ""] < 60
    assert before["elastic_moe_ranks", "serving"] == 2.0
    assert before["elastic_moe_rank_running", "4"] == 0.0
    assert (before["elastic_moe_epoch", ""], after["elastic_moe_epoch", ""]) == (1.0, 2.0)
    assert before["elastic_moe_placement_version", ""] == 3.0
    assert after["elastic_moe_ranks", "serving"] == 1.0
    assert ("elastic_moe_rank_running", "4") not in after


async def test_stopping_ends_streams_with_an_error(config: ServeConfig):
    async with front_end(config, http=True) as fe:
        engine = FakeEngine(0, [*fe.tokens(TEXT), END], sends=2)
        await fe.join(engine)
        events = asyncio.create_task(fe.stream())
        whole = asyncio.create_task(fe.complete())
        await until(lambda: len(engine.submits) == 2)
        fe.gateway.stop("the server is stopping")
        assert (await events)[-1]["error"]["code"] == "server_stopping"
        assert (await whole).status_code == 503
        assert (await fe.complete()).status_code == 503
        assert (await fe.client.get("/health")).json()["status"] == "stopping"
        await until(lambda: len(engine.cancels) == 2)


def ranks_of(fe) -> list[int]:
    return [member.rank for member in fe.gateway.status().members]


async def resubmitted(fe) -> float:
    exposition = (await fe.client.get("/metrics")).text
    return samples(exposition)["elastic_moe_requests_resubmitted_total", ""]


def journal(fe) -> list:
    return list(fe.gateway._journal)


def only_entry(fe):
    (entry,) = journal(fe)
    return entry


def samples(exposition: str) -> dict[tuple[str, str], float]:
    """(name, value of its one label) -> value; parsing is part of the test."""
    families = list(text_string_to_metric_families(exposition))
    assert families
    return {(s.name, next(iter(s.labels.values()), "")): s.value for family in families for s in family.samples}
