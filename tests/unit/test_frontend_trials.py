"""Requests under which processes die: each is tried alone, and only the one that kills is ended."""

import asyncio

import pytest
from support.front_end import END, FakeEngine, front_end, until

from elastic_moe.config import ServeConfig
from elastic_moe.serving.front_end.cluster_status import RequestStatus

pytestmark = pytest.mark.anyio


def journal(fe) -> list:
    return list(fe.gateway._journal)


async def test_a_request_that_kills_its_processes_ends_and_its_neighbour_does_not(config: ServeConfig):
    """Two die under two requests: each runs alone next. Under which the third dies is guilty."""
    async with front_end(config, http=True) as fe:
        engines = [FakeEngine(rank, [END], sends=0) for rank in range(4)]
        await fe.join(engines[0])
        requests = [asyncio.create_task(fe.complete()) for _ in range(2)]
        await until(lambda: len(engines[0].submits) == 2)
        await fe.join(engines[1])
        await until(lambda: len(engines[1].submits) == 2)
        assert not any(submit.alone for submit in engines[0].submits + engines[1].submits)
        await fe.join(engines[2])
        await until(lambda: len(engines[2].submits) == 1)
        poison, neighbour = (submit.request_id for submit in engines[1].submits)
        assert (engines[2].submits[0].request_id, engines[2].submits[0].alone) == (poison, True)
        assert fe.gateway.status().requests == RequestStatus(running=1, waiting=1)
        await fe.join(engines[3])
        await until(lambda: len(engines[3].submits) == 1)
        assert (engines[3].submits[0].request_id, engines[3].submits[0].alone) == (neighbour, True)
        await engines[3].send(neighbour, 0, [END], "stop")
        died, lived = await asyncio.gather(*requests)
    assert (died.status_code, lived.status_code) == (500, 200)
    assert died.json()["error"]["message"].startswith("3 processes died while they ran this request")


async def test_a_trial_that_is_passed_makes_room_for_the_next(config: ServeConfig):
    async with front_end(config) as fe:
        engines = [FakeEngine(rank, [END], sends=0) for rank in range(4)]
        requests: list[asyncio.Task] = []
        for engine in engines[:3]:
            await fe.join(engine)
            requests = requests or [asyncio.create_task(fe.complete(max_tokens=9)) for _ in range(3)]
            await until(lambda engine=engine: engine.submits)
            await until(lambda: len(journal(fe)) == 3)
        third, fourth = engines[2:]
        for number in (1, 2):
            await third.send(third.submits[-1].request_id, 0, [9])
            await until(lambda number=number: len(third.submits) == number + 1)
        assert all(submit.alone for submit in third.submits)
        await third.send(third.submits[-1].request_id, 0, [9])
        await until(lambda: all(entry.tokens for entry in journal(fe)))
        await fe.join(fourth)  # the death of the third is the first in a row, for those who have had a token from it
        await until(lambda: len(fourth.submits) == 3)
        assert not any(submit.alone for submit in fourth.submits)
        for submit in fourth.submits:
            await fourth.send(submit.request_id, 1, [END], "stop")
        assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 3


async def test_a_rank_whose_connection_ends_is_given_nothing(config: ServeConfig):
    """At once: not when it has not reported for long."""
    async with front_end(config) as fe:
        dead, other = FakeEngine(0, [END]), FakeEngine(1, [END])
        await fe.join(dead, other)
        dead.close()
        await until(lambda: fe.gateway.status().members[0].phase == "silent", within_s=1.0)
        assert (await fe.complete()).status_code == 200
        assert len(other.submits) == 1
        other.close()
        await until(lambda: fe.gateway.status().phase == "unavailable", within_s=1.0)
