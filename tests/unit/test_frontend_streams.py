"""Streams on real connections: what is written in the gateway's turn, and when that cannot be."""

import asyncio
import json
import socket
from collections.abc import Sequence

import httpx
import pytest
from support.front_end import END, FakeEngine, FrontEnd, front_end, until

from elastic_moe.config import ServeConfig
from elastic_moe.serving.front_end.connection import Connection

pytestmark = pytest.mark.anyio

TEXT = " the quick brown fox jumps over the lazy dog"


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written past ASGI."""
    written: list[bytes] = []
    write = Connection.write_chunk

    def spy(self: Connection, body: bytes) -> None:
        written.append(body)
        write(self, body)

    monkeypatch.setattr(Connection, "write_chunk", spy)
    return written


@pytest.mark.parametrize("stop", [None, "lazy"])
async def test_a_stream_is_the_same_whoever_writes_it(config: ServeConfig, chunks: list[bytes], stop: str | None):
    """In the gateway's turn, by HTTP/1.0, or in memory, where the response's task writes."""
    told = []
    for http, version in ((True, "1.1"), (True, "1.0"), (False, "")):
        chunks.clear()
        async with front_end(config, http=http) as fe:
            engine = FakeEngine(0, answer := [*fe.tokens(TEXT), END], sends=0)
            await fe.join(engine)
            fields = {"max_tokens": 100, "stop": stop, "stream_options": {"include_usage": True}}
            reading = asyncio.create_task(raw_stream(fe, version, **fields) if version else fe.stream(**fields))
            await until(lambda engine=engine: len(engine.submits) == 1)
            await send_one_by_one(fe, engine, answer)
            *texts, usage = await reading
            told.append(([event["choices"][0] for event in texts], usage["usage"]))
        assert bool(chunks) == (version == "1.1")
    assert told[0] == told[1] == told[2]
    shown = "".join(choice["text"] for choice in told[0][0])
    assert shown == (TEXT if stop is None else TEXT[: TEXT.index(stop)])
    assert told[0][0][-1]["finish_reason"] == "stop"


async def test_all_tokens_but_the_first_and_the_last_are_written_at_once(config: ServeConfig, chunks: list[bytes]):
    async with front_end(config, http=True) as fe:
        engine = FakeEngine(0, answer := [*fe.tokens(TEXT), END], sends=0)
        await fe.join(engine)
        reading = asyncio.create_task(fe.stream(max_tokens=100))
        await until(lambda: len(engine.submits) == 1)
        await send_one_by_one(fe, engine, answer)
        await reading
    assert len(chunks) >= len(answer) - 2


async def test_a_client_that_reads_slowly_holds_up_nobody_and_loses_nothing(
    config: ServeConfig, chunks: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    """Tokens wait in the journal while its connection is full, and come in few events when it reads again."""
    connections: list[Connection] = []
    made = Connection.connection_made

    def small(self: Connection, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        transport.set_write_buffer_limits(1024)
        made(self, transport)
        connections.append(self)

    monkeypatch.setattr(Connection, "connection_made", small)
    async with front_end(config, http=True) as fe:
        answer = [*(fe.tokens(TEXT) * 10)[:200], END]
        engine = FakeEngine(0, answer, sends=0)
        await fe.join(engine)
        reader, writer = await ask(fe, "1.1", rcvbuf=2048, max_tokens=250)
        await until(lambda: len(engine.submits) == 1)
        connection, name = connections[-1], engine.submits[0].request_id
        position = 0
        while not connection.is_full:
            await engine.send(name, position, [answer[position]])
            position += 1
            await until(lambda n=position: len(entry_of(fe).tokens) == n)
        written = len(chunks)
        await send_one_by_one(fe, engine, answer, position)
        assert len(chunks) == written, "nothing is written to a full connection"
        texts = await read_events(reader)
        writer.close()
    shown = "".join(event["choices"][0]["text"] for event in texts)
    assert shown == fe.model.decode(answer)
    assert position < len(texts) + 1 < len(answer)


async def test_a_bug_in_one_stream_is_that_streams(config: ServeConfig):
    async with front_end(config, http=True) as fe:
        decode = fe.model.decode

        def fail(tokens: Sequence[int]) -> str:
            if 299 in tokens:
                raise RuntimeError("a bug")
            return decode(tokens)

        fe.model.decode = fail
        engine = FakeEngine(0, answer := [*fe.tokens(TEXT), END], sends=0)
        await fe.join(engine)
        first, second = (asyncio.create_task(fe.stream(max_tokens=100)) for _ in range(2))
        await until(lambda: len(engine.submits) == 2)
        names = [submit.request_id for submit in engine.submits]
        for name in names:
            await engine.send(name, 0, answer[:1])
        await engine.send(names[0], 1, [299])
        await engine.send(names[1], 1, answer[1:], "stop")
        ended = await asyncio.gather(first, second, return_exceptions=True)
        texts = next(one for one in ended if not isinstance(one, BaseException))
        assert [type(one) for one in ended if one is not texts] == [httpx.RemoteProtocolError]
        assert "".join(event["choices"][0]["text"] for event in texts) == TEXT
        await until(lambda: engine.cancels == names[:1])


async def send_one_by_one(fe: FrontEnd, engine: FakeEngine, answer: list[int], position: int = 0) -> None:
    """The answer from a position, each token when the one before it has come; to its end, or to a stop string."""
    name = engine.submits[0].request_id
    for at in range(position, len(answer)):
        await engine.send(name, at, [answer[at]], "stop" if at == len(answer) - 1 else "")
        await until(lambda n=at: engine.cancels or not list(fe.gateway._journal) or len(entry_of(fe).tokens) > n)


def entry_of(fe: FrontEnd):
    (entry,) = fe.gateway._journal
    return entry


async def ask(
    fe: FrontEnd, version: str, rcvbuf: int = 0, **fields: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of its own, with a request for a stream on its way."""
    body = json.dumps({"model": "tiny", "prompt": "the", "stream": True, **fields}).encode()
    sock = socket.socket()
    if rcvbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.setblocking(False)
    url = httpx.URL(fe.url)
    await asyncio.get_running_loop().sock_connect(sock, (url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    head = f"POST /v1/completions HTTP/{version}\r\nHost: test\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def raw_stream(fe: FrontEnd, version: str, **fields: object) -> list[dict]:
    """The events of a streamed completion, by hand."""
    reader, writer = await ask(fe, version, **fields)
    events = await read_events(reader)
    writer.close()
    return events


async def read_events(reader: asyncio.StreamReader) -> list[dict]:
    """All events of an answer. A chunk is an event, so what is around them are lines of their own."""
    lines = [line async for line in reader]
    assert lines[0].endswith(b" 200 OK\r\n")
    data = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert data.pop() == b"[DONE]"
    return [json.loads(event) for event in data]
