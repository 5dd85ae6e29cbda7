"""bench=front_end: tokens per second through one front end process, and what a token costs it.

The front end is the real process over the demo model's tokenizer. All else is this process: an engine without a model,
behind the mailbox of real ones, which has a token for every stream in each step, and the clients, sockets that count
events. A step begins when all clients have their tokens of the last one, so no two tokens share an event, and a front
end that is late gains nothing. The first token and the last are not counted. `cpu_us`: of the front end's process, for
a token; `others_us`: of this one. Limit: a bare asyncio server that writes as many bytes to as many sockets.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from elastic_moe.config import ServeConfig
from elastic_moe.group.view import Member, View
from elastic_moe.serving.engine.mailbox import Mailbox
from elastic_moe.serving.front_end.listener import listen
from elastic_moe.serving.protocol import Finish, Phase, Status, Step, Submit, Tokens
from elastic_moe.serving.starts import FrontEndStart
from elastic_moe.supervision.channel import Ready, ViewChanged, channel_pair
from launch.benchmarks.config import BenchConfig
from launch.config import REPO, load

BAR_TOKENS_PER_S = 20_000
TEXT = "Every rank runs the attention of its own requests; in each layer the tokens of all travel to their experts. "
"""ASCII, so that every token of it is text at once."""
HOST = "127.0.0.1"
WAIT_S = 60.0
"""Deadline of all that is waited for."""
READ_BYTES = 1 << 16


class Server(NamedTuple):
    """One of the two that are measured."""

    pid: int
    address: tuple[str, int]
    await_requests: Callable[[int], None]
    """Return when so many requests are there."""
    step: Callable[[int, bool], None]
    """Have a token written to every stream: at which position, whether it is the last."""


class Round(NamedTuple):
    """What one batch of streams came to."""

    tokens_per_s: float
    cpu_us: float
    others_us: float
    bytes_per_token: float


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each number of streams.

    Raises:
        ValueError: the front end does not start, or a stream stops before its end.
    """
    tokens = config.tokens
    with _front_end() as front_end, _bare_server() as (bare, set_event):
        for streams in config.numbers("stream_list"):
            rounds = []
            for _ in range(1 + config.repeats):
                here = _round(front_end, streams, tokens)
                set_event(b"x" * (round(here.bytes_per_token) - 2) + b"\n\n")
                rounds.append((here, _round(bare, streams, tokens)))
            here, limit = (Round(*map(median, zip(*some, strict=True))) for some in zip(*rounds[1:], strict=True))
            yield {
                "machine": f"{os.cpu_count()} CPU cores",
                "streams": streams,
                **{key: round(value, 1) for key, value in here._asdict().items()},
                "limit_tokens_per_s": round(limit.tokens_per_s),
                "limit_cpu_us": round(limit.cpu_us, 1),
                "of_bar": round(here.tokens_per_s / BAR_TOKENS_PER_S, 2),
                "of_limit": round(here.tokens_per_s / limit.tokens_per_s, 2),
            }


def _round(server: Server, streams: int, num_tokens: int) -> Round:
    """All streams from request to end; measured from their first token to the last but one."""
    with Clients(server.address, streams, num_tokens) as clients:
        server.await_requests(streams)
        server.step(0, False)
        clients.until(1)
        begin = time.perf_counter(), _cpu_s(server.pid), time.process_time(), clients.num_bytes
        for position in range(1, num_tokens - 1):
            server.step(position, False)
            clients.until(position + 1)
        end = time.perf_counter(), _cpu_s(server.pid), time.process_time(), clients.num_bytes
        server.step(num_tokens - 1, True)
        clients.until(num_tokens)
    seconds, cpu_s, others_s, num_bytes = (b - a for a, b in zip(begin, end, strict=True))
    tokens = streams * (num_tokens - 2)
    return Round(tokens / seconds, cpu_s / tokens * 1e6, others_s / tokens * 1e6, num_bytes / tokens)


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far, all threads, in ns and not in ticks: by the clock id that glibc makes of a pid."""
    return time.clock_gettime(~pid << 3 | 2)


class Clients:
    """A raw socket for each stream. They do not parse: an event has two newlines without a carriage return before
    them, and nothing else that HTTP or JSON writes has one."""

    def __init__(self, address: tuple[str, int], streams: int, max_tokens: int) -> None:
        """Ask for so many streams, of greedy tokens."""
        fields = {"model": "demo", "prompt": TEXT, "max_tokens": max_tokens, "stream": True, "temperature": 0}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.num_bytes = 0
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(streams):
            one = socket.create_connection(address, WAIT_S)
            one.sendall(request)
            self._sockets[one.fileno()] = one
            self._epoll.register(one, select.EPOLLIN)
        self._newlines = dict.fromkeys(self._sockets, 0)

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_exc: object) -> None:
        for one in self._sockets.values():
            one.close()
        self._epoll.close()

    def until(self, num_events: int) -> None:
        """Read until every stream has had so many events."""
        wanted = 2 * num_events
        num_behind = sum(newlines < wanted for newlines in self._newlines.values())
        while num_behind:
            ready = self._epoll.poll(WAIT_S)
            if not ready:
                raise ValueError(f"{num_behind} streams have had no event {num_events} within {WAIT_S:.0f} s")
            for fd, _ in ready:
                data = self._sockets[fd].recv(READ_BYTES)
                if not data:
                    raise ValueError(f"a stream ended before event {num_events}")
                before = self._newlines[fd]
                self._newlines[fd] = now = before + data.count(b"\n") - data.count(b"\r")
                self.num_bytes += len(data)
                num_behind -= before < wanted <= now


class Engine:
    """One engine as a front end sees it."""

    def __init__(self, text: Sequence[int]) -> None:
        """`text` is what it says, over and over, to everybody."""
        self._mailbox = Mailbox(HOST, self._status)
        self._text = text
        self._requests: list[str] = []
        self.member = Member(0, 0, "0" * 32, os.getpid(), "host", "", "", self._mailbox.address)
        self._mailbox.start()

    def await_requests(self, num: int) -> None:
        """See `Server`."""
        self._requests = []
        while len(self._requests) < num:
            message = self._mailbox.inbox.get(timeout=WAIT_S)
            if isinstance(message, Submit):
                self._requests.append(message.request_id)

    def step(self, position: int, last: bool) -> None:
        """See `Server`."""
        name, token = self.member.incarnation, [self._text[position % len(self._text)]]
        finish = Finish.LENGTH if last else Finish.NOT_YET
        self._mailbox.send(Step([Tokens(request, name, position, token, finish) for request in self._requests]))

    def _status(self) -> Status:
        return Status(0, self.member.incarnation, Phase.SERVING, View(1, (self.member,)))


@contextlib.contextmanager
def _front_end() -> Iterator[Server]:
    """The process, with one engine as all members."""
    config = load(ServeConfig, "config", ["model=demo", "server.port=0", "log_level=warning"])
    engine = Engine(Tokenizer.from_file(str(Path(config.model.path) / "tokenizer.json")).encode(TEXT).ids)
    channel, theirs = channel_pair()
    with listen(config.server) as listener:
        fds = (theirs.fileno(), listener.fileno())
        command = [sys.executable, "-m", "elastic_moe.serving.front_end.process"]
        command += ["--supervisor-fd", str(fds[0]), "--listen-fd", str(fds[1])]
        process = subprocess.Popen(command, pass_fds=fds, cwd=REPO)
        address = listener.getsockname()
    theirs.close()
    try:
        channel.send(FrontEndStart(config, node=0))
        channel.send(ViewChanged(View(1, (engine.member,))))
        if not isinstance(said := channel.receive(), Ready):
            raise ValueError(f"the front end did not start: {said}")  # noqa: TRY004 - a mistake, not a bug
        yield Server(process.pid, address, engine.await_requests, engine.step)
    finally:
        process.kill()
        process.wait()
        channel.close()


@contextlib.contextmanager
def _bare_server() -> Iterator[tuple[Server, Callable[[bytes], None]]]:
    """A process, and how to say what it writes in a step."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_write_events, args=(there,), daemon=True)
    process.start()
    event = b""

    def set_event(text: bytes) -> None:
        nonlocal event
        event = text

    def await_requests(num: int) -> None:
        for _ in range(num):
            here.recv()

    try:
        pid, address = here.recv()
        yield Server(pid, address, await_requests, lambda *_step: here.send_bytes(event)), set_event
    finally:
        process.kill()
        process.join()


def _write_events(parent: Connection) -> None:
    """Until killed: tell of each request, and write to all connections what the parent says."""

    class Stream(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            streams.add(transport)

        def data_received(self, data: bytes) -> None:
            parent.send(None)

        def connection_lost(self, exc: Exception | None) -> None:
            streams.discard(self.transport)

    def step() -> None:
        event = parent.recv_bytes()
        for stream in streams:
            stream.write(event)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Stream, HOST, 0, backlog=1024)
        loop.add_reader(parent.fileno(), step)
        parent.send((os.getpid(), server.sockets[0].getsockname()))
        await server.serve_forever()

    streams: set[Any] = set()
    asyncio.run(serve())
