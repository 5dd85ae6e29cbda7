"""The engine's mailbox, with front ends that are plain DEALER sockets."""

import queue
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from elastic_moe.control.report import Report
from elastic_moe.group.view import Member, View
from elastic_moe.serving.engine import mailbox as module
from elastic_moe.serving.engine.mailbox import Mailbox
from elastic_moe.serving.protocol import (
    AskLoads,
    Cancel,
    Event,
    Finish,
    Hello,
    Loads,
    Rebalance,
    Status,
    Step,
    Submit,
    ToFrontEnd,
    Tokens,
    decode_to_front_end,
    encode,
)

STATUS = Status(rank=3, incarnation="x", phase="serving", view=View(1, (Member(3, 0, "x", 1, "host", "", ""),)))
WAIT_S = 10.0


class FrontEnd:
    """A DEALER."""

    def __init__(self, context: zmq.Context, address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, message: msgspec.Struct) -> None:
        self.socket.send(encode(message))

    def receive(self, within_s: float = WAIT_S) -> ToFrontEnd | None:
        """The next message, None when there is none in time."""
        return decode_to_front_end(self.socket.recv()) if self.socket.poll(within_s * 1000) else None


class Harness:
    """A mailbox that reports `status`, and whoever talks to it."""

    def __init__(self, stack: ExitStack) -> None:
        self.status: Status | None = STATUS
        self._stack = stack
        self._context = stack.enter_context(zmq.Context())
        self.loads = np.array([[1.0, 2.4], [2.6, 0.0]])
        self.mailbox = Mailbox("127.0.0.1", lambda: self.status, lambda: self.loads)
        self.mailbox.start()

    def front_end(self) -> FrontEnd:
        front_end = FrontEnd(self._context, self.mailbox.address)
        self._stack.callback(front_end.socket.close)
        return front_end

    def next(self) -> Any:
        return self.mailbox.inbox.get(timeout=WAIT_S)


@pytest.fixture
def harness() -> Iterator[Harness]:
    with ExitStack() as stack:
        yield Harness(stack)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports every 50 ms; a front end is gone after 0.4 s."""
    monkeypatch.setattr(module, "STATUS_EVERY_S", 0.05)
    monkeypatch.setattr(module, "FRONT_END_GONE_S", 0.4)


def submit(request_id: str) -> Submit:
    return Submit(request_id, [1, 2, 3], 0, 8)


def test_hello_is_answered_with_a_status_at_once(harness: Harness):
    front_end = harness.front_end()
    front_end.send(Hello("a"))
    assert front_end.receive() == STATUS


def test_there_is_no_answer_before_there_is_a_status(harness: Harness, quick: None):
    harness.status = None
    front_end = harness.front_end()
    front_end.send(Hello("a"))
    assert front_end.receive(0.3) is None
    harness.status = STATUS
    assert front_end.receive() == STATUS


def test_every_front_end_hears_the_status_again_and_again(harness: Harness, quick: None):
    front_ends = [harness.front_end() for _ in range(2)]
    for front_end in front_ends:
        front_end.send(Hello("a"))
    for _ in range(3):
        assert [front_end.receive() for front_end in front_ends] == [STATUS, STATUS]


def test_announce_does_not_wait_for_the_next_turn(harness: Harness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STATUS_EVERY_S", 1000.0)
    front_end = harness.front_end()
    front_end.send(Hello("a"))
    while front_end.receive(0.2):  # the answer, and the first turn
        pass
    harness.mailbox.announce()
    assert front_end.receive() == STATUS


def test_requests_come_in_order(harness: Harness):
    front_end = harness.front_end()
    sent = [submit("a"), Cancel("a"), submit("b"), submit("a"), Cancel("unknown")]
    for message in sent:
        front_end.send(message)
    assert [harness.next() for _ in sent] == sent


def test_tokens_go_to_the_front_end_that_asked(harness: Harness):
    first, second = harness.front_end(), harness.front_end()
    first.send(submit("a"))
    second.send(submit("b"))
    assert {harness.next().request_id for _ in range(2)} == {"a", "b"}
    b, a = Tokens("b", "x", 0, [5]), Tokens("a", "x", 0, [6])
    harness.mailbox.send(Step([b, a, Tokens("nobody", "x", 0, [7])]))
    assert first.receive() == Step([a])
    assert second.receive() == Step([b])


def test_a_step_comes_in_one_message(harness: Harness):
    front_end = harness.front_end()
    for request_id in ("a", "b"):
        front_end.send(submit(request_id))
        harness.next()
    step = Step([Tokens("b", "x", 0, [5]), Tokens("a", "x", 0, [6], Finish.LENGTH)])
    harness.mailbox.send(step)
    assert front_end.receive() == step
    assert front_end.receive(0.2) is None


def test_a_request_has_no_owner_after_its_end_or_its_cancellation(harness: Harness):
    front_end = harness.front_end()
    for request_id in ("a", "b"):
        front_end.send(submit(request_id))
    front_end.send(Cancel("b"))
    for _ in range(3):
        harness.next()
    ended = Tokens("a", "x", 0, [1], Finish.LENGTH)
    harness.mailbox.send(Step([Tokens("b", "x", 0, [1]), ended, Tokens("a", "x", 1, [2])]))
    harness.mailbox.send(Step([Tokens("a", "x", 2, [3])]))
    assert front_end.receive() == Step([ended])
    assert front_end.receive(0.2) is None


@pytest.mark.parametrize("frames", [[b""], [b"\xff\x00garbage"], [b"a", b"b", b""], [encode(STATUS)], [b"\x80"]])
def test_strange_frames_are_ignored(harness: Harness, frames: list[bytes]):
    stranger, front_end = harness.front_end(), harness.front_end()
    stranger.socket.send_multipart(frames)
    front_end.send(submit("a"))
    assert harness.next() == submit("a")
    front_end.send(Hello("a"))
    assert front_end.receive() == STATUS


def test_the_requests_of_a_silent_front_end_are_cancelled(harness: Harness, quick: None):
    silent, alive = harness.front_end(), harness.front_end()
    for front_end, request_id in ((silent, "a"), (alive, "b")):
        front_end.send(Hello(request_id))
        front_end.send(submit(request_id))
    assert {harness.next().request_id for _ in range(2)} == {"a", "b"}
    cancelled = None
    for _ in range(100):
        alive.send(Hello("b"))
        alive.receive(0.05)
        try:
            cancelled = harness.mailbox.inbox.get_nowait()
            break
        except queue.Empty:
            continue
    assert cancelled == Cancel("a")
    while isinstance(message := silent.receive(), Status):
        pass
    assert message == Step([Tokens("a", "x", 0, [], Finish.DROPPED)])
    harness.mailbox.send(Step([Tokens("a", "x", 0, [1])]))
    harness.mailbox.send(Step([Tokens("b", "x", 0, [2])]))
    while isinstance(message := alive.receive(), Status):
        pass
    assert message == Step([Tokens("b", "x", 0, [2])])
    assert harness.mailbox.inbox.empty()


def test_loads_are_told_without_the_step_loop(harness: Harness):
    front_end, another = harness.front_end(), harness.front_end()
    front_end.send(AskLoads("first"))
    assert front_end.receive() == Loads("first", [[1, 2], [3, 0]])
    harness.status = None  # before the model is loaded
    another.send(AskLoads("second"))
    assert another.receive() == Loads("second", [])
    assert harness.mailbox.inbox.empty()


def test_a_rank_without_a_balancer_has_no_loads():
    with ExitStack() as stack:
        mailbox = Mailbox("127.0.0.1", lambda: STATUS)
        mailbox.start()
        front_end = FrontEnd(stack.enter_context(zmq.Context()), mailbox.address)
        stack.callback(front_end.socket.close)
        front_end.send(AskLoads("first"))
        assert front_end.receive() == Loads("first", [])


def test_events_go_to_every_front_end(harness: Harness, monkeypatch: pytest.MonkeyPatch):
    """To those that have said hello, whether they have requests here or not."""
    monkeypatch.setattr(module, "STATUS_EVERY_S", 1000.0)
    first, second, stranger = (harness.front_end() for _ in range(3))
    for front_end in (first, second):
        front_end.send(Hello("a"))
        assert front_end.receive() == STATUS
    stranger.send(submit("a"))
    assert harness.next() == submit("a")
    event = Event(3, Report(2, (3,), (1,), (), "a loss", 1.0, {"view": 0.1}, {"disk": 5}, 5, 0, 1))
    harness.mailbox.send(event)
    for front_end in (first, second):
        while isinstance(message := front_end.receive(), Status):
            pass
        assert message == event
    harness.mailbox.send(Step([Tokens("a", "x", 0, [6])]))
    assert stranger.receive() == Step([Tokens("a", "x", 0, [6])]), "the event did not come before it"


def test_a_front_end_that_reads_slowly_loses_no_token(harness: Harness):
    """More than ZMQ queues unless it is told to (1000 messages at either end)."""
    front_end = harness.front_end()
    front_end.send(submit("a"))
    assert harness.next() == submit("a")
    big = list(range(1000))
    for number in range(5000):
        harness.mailbox.send(Step([Tokens("a", "x", number, big)]))
    assert [front_end.receive().tokens[0].start for _ in range(5000)] == list(range(5000))


def test_requests_that_no_status_can_tell_of_are_cancelled_too(harness: Harness, quick: None):
    """The front end is silent, and this rank has nothing to report yet: the step loop is told all the same."""
    silent = harness.front_end()
    silent.send(Hello("a"))
    silent.send(submit("a"))
    assert silent.receive() == STATUS
    harness.status = None
    assert [harness.next(), harness.next()] == [submit("a"), Cancel("a")]


def test_a_rebalance_is_the_step_loops(harness: Harness):
    front_end = harness.front_end()
    front_end.send(Rebalance("op"))
    front_end.send(submit("a"))
    assert [harness.next() for _ in range(2)] == [Rebalance("op"), submit("a")]
