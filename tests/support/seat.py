"""The supervisor of one rank, with children and a clock that do as they are told: the fixture `bench`."""

import queue
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.supervision import rank_supervisor as module
from elastic_moe.supervision.busy import Busy
from elastic_moe.supervision.rank_supervisor import SEAT, RankSupervisor
from elastic_moe.supervision.supervisor import Event, EventKind
from elastic_moe.wire import Wire

DEADLINES = Deadlines.of(3, exchange_s=2, hang_s=4)
SIGTERM = Event(EventKind.SIGNAL, code=15)
DYING = Event(EventKind.DYING, SEAT)


def member(rank: int) -> Member:
    return Member(rank, 0, f"i{rank}", 1, "host", f"signals {rank}", "")


VIEW = View(5, tuple(member(rank) for rank in range(3)))


def said(message: object, child: str = SEAT) -> Event:
    return Event(EventKind.MESSAGE, child, message)


def exited(code: int, child: str = SEAT) -> Event:
    return Event(EventKind.EXIT, child, code=code)


class FakeChild:
    def __init__(self, name: str, command: list[str], fd_variable: str) -> None:
        self.name, self.command, self.fd_variable = name, command, fd_variable
        self.pid, self.killed = 77, 0
        self.sent: list[object] = []
        self.send = self.sent.append

    def kill(self) -> None:
        self.killed += 1


class FakeSupervisor:
    """`children` are the present ones, `started` all there ever were."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.children: dict[str, FakeChild] = {}
        self.started: list[FakeChild] = []
        self.stopped = 0
        self.waits: list[float] = []

    def start(self, name: str, command: list[str], pass_fds: object = (), fd_variable: str = "") -> FakeChild:
        self.children[name] = child = FakeChild(name, command, fd_variable)
        self.started.append(child)
        return child

    def promote(self, name: str, to: str) -> FakeChild | None:
        child = self.children.pop(name, None)
        if child:
            self.children[to] = child
        return child

    def has(self, name: str) -> bool:
        return name in self.children

    def next_event(self, timeout_s: float) -> Event | None:
        self.waits.append(timeout_s)
        return None if self.events.empty() else self.events.get()

    def stop(self) -> None:
        self.stopped += 1


class FakeSender:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.connected: list[str] = []
        self.told: list[tuple[list[str], object]] = []
        self.closed = False

    def connect(self, addresses: object) -> None:
        self.connected = list(addresses)  # pyright: ignore[reportArgumentType]

    def tell(self, addresses: list[str], signal: object) -> None:
        self.told.append((addresses, signal))

    def close(self) -> None:
        self.closed = True


class Seated(RankSupervisor):
    """Keeps what it is asked to do."""

    def __init__(self, **settings: object) -> None:
        self.starts: list[SeatStart] = []
        self.heard: list[Event] = []
        self.views: list[View] = []
        self.serving = False
        settings = {"max_quick_deaths": 2, "keeps_lighthouse": False} | settings
        super().__init__(Launch(1, 3), DEADLINES, **settings)  # pyright: ignore[reportArgumentType]

    def start_process(self, start: SeatStart):
        self.starts.append(start)
        return self._supervisor.start(SEAT, ["the process"])

    def others_serve(self) -> bool:
        return self.serving

    def on_message(self, event: Event) -> None:
        self.heard.append(event)

    def on_view(self, view: View) -> None:
        self.views.append(view)


class Bench:
    """A supervisor under test, at `now`."""

    def __init__(self, supervisor: RankSupervisor, clock: SimpleNamespace) -> None:
        self.rank, self._clock = supervisor, clock
        self.fake: FakeSupervisor = supervisor._supervisor  # pyright: ignore[reportAttributeAccessIssue]
        self.sender: FakeSender = supervisor._sender  # pyright: ignore[reportAttributeAccessIssue]
        for name in supervisor.services():
            supervisor._start_service(name)
        supervisor._start_process()

    def turn(self, *events: Event, after_s: float = 0.0) -> int | None:
        """Let the time pass, then act on each event, or look once if there is none."""
        self._clock.now += after_s
        for event in events:
            self.fake.events.put(event)
        codes = [self.rank._turn() for _ in events or [None]]
        assert codes[:-1] == [None] * len(codes[:-1])
        return codes[-1]

    @property
    def process(self) -> FakeChild:
        return self.fake.children[SEAT]

    @property
    def num_starts(self) -> int:
        return len([child for child in self.fake.started if child.name == SEAT])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(module, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(module, "SignalSender", FakeSender)
    monkeypatch.setattr(module, "busy_ns", lambda _pid: Busy(0, 0))
    return lambda make=Seated, **settings: Bench(make(**settings), clock)
