"""A front end's link to one engine, which is a plain ROUTER here: what is known of its load; nothing is lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from elastic_moe.group.view import Member, View
from elastic_moe.serving.front_end.engine_link import EngineLink
from elastic_moe.serving.front_end.routing import STATUS_MAX_AGE_S, RankLoad
from elastic_moe.serving.protocol import Cancel, Hello, Phase, Status, Step, Submit, Tokens, decode_to_engine, encode

pytestmark = pytest.mark.anyio

NOW_S = 1000.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


def member(port: int = 1) -> Member:
    return Member(3, 0, "mine", 1, "host", "", "", f"tcp://127.0.0.1:{port}")


def status(incarnation: str = "mine", **fields: object) -> Status:
    return Status(
        **{"rank": 3, "incarnation": incarnation, "phase": Phase.SERVING, "view": View(1, (member(),))} | fields
    )


def submit(number: int) -> Submit:
    return Submit(f"request {number}", [1, 2, 3], 0, 8)


async def test_the_load_is_what_was_reported_and_what_was_given_since(context: zmq.asyncio.Context):
    link = EngineLink(context, member())
    assert link.load(NOW_S) == RankLoad(3, Phase.SILENT, 0), "nothing was heard of it yet"
    link.send(submit(0))
    assert link.load(NOW_S) == RankLoad(3, Phase.SILENT, 0)
    link.heard(status(running=5, waiting=2), NOW_S)
    assert link.load(NOW_S) == RankLoad(3, Phase.SERVING, 7), "the report counts what came before it"
    for message in (submit(1), Cancel("request 1"), submit(2), Hello("me")):
        link.send(message)
    assert link.load(NOW_S) == RankLoad(3, Phase.SERVING, 9)
    link.heard(status(phase=Phase.RECOVERING, running=8), NOW_S + 1)
    assert link.load(NOW_S + 1) == RankLoad(3, "recovering", 8)


async def test_a_report_is_good_for_some_seconds(context: zmq.asyncio.Context):
    link = EngineLink(context, member())
    link.heard(status(), NOW_S)
    assert link.load(NOW_S + STATUS_MAX_AGE_S).healthy
    assert link.load(NOW_S + STATUS_MAX_AGE_S + 0.01) == RankLoad(3, Phase.SILENT, 0)
    link.heard(status(), NOW_S + STATUS_MAX_AGE_S + 1)
    assert link.load(NOW_S + STATUS_MAX_AGE_S + 1).healthy


async def test_what_another_process_reports_is_not_kept(context: zmq.asyncio.Context):
    link = EngineLink(context, member())
    link.heard(status("former"), NOW_S)
    assert link.status is None
    link.heard(mine := status(), NOW_S)
    link.send(submit(0))
    link.heard(status("former", running=9), NOW_S + STATUS_MAX_AGE_S)
    assert link.status == mine
    assert link.load(NOW_S).load == 1
    assert not link.load(NOW_S + STATUS_MAX_AGE_S + 1).healthy, "nor does it make the report younger"


async def test_nothing_is_lost_on_its_way_to_an_engine_that_does_not_listen_yet(context: zmq.asyncio.Context):
    """Nor is anybody kept waiting: there is more on its way than ZMQ queues by itself (1000 messages at either end)."""
    with zmq.Context() as other, other.socket(zmq.ROUTER) as engine:
        engine.setsockopt(zmq.LINGER, 0)
        port = engine.bind_to_random_port("tcp://127.0.0.1")
        link = EngineLink(context, member(port))
        big = list(range(1000))
        for number in range(5000):
            link.send(Submit(f"request {number}", big, 0, 8))
        for number in range(5000):
            while not engine.poll(0):
                await asyncio.sleep(0.001)
            assert decode_to_engine(engine.recv_multipart()[1]).request_id == f"request {number}"
        link.close()
        assert link._socket.closed


async def test_a_message_that_cannot_be_read_is_left_out(context: zmq.asyncio.Context):
    with zmq.Context() as other, other.socket(zmq.ROUTER) as engine:
        engine.setsockopt(zmq.LINGER, 0)
        link = EngineLink(context, member(engine.bind_to_random_port("tcp://127.0.0.1")))
        link.send(Hello("me"))
        while not engine.poll(0):
            await asyncio.sleep(0.001)
        front_end, _ = engine.recv_multipart()
        told = Step([Tokens("request 0", "mine", 0, [5])])
        for frame in (b"", b"\xff", encode(Hello("me")), encode(told)):
            engine.send_multipart([front_end, frame])
        async with asyncio.timeout(10):
            assert await link.receive() == told
        link.close()
