"""A background thread that dies is told of, whichever it is: by latch, by future, or by the end of its process."""

import logging
import queue
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq

from elastic_moe.background import Latch, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View, incarnation_of
from elastic_moe.membership import lighthouses
from elastic_moe.membership.current_epoch import CurrentEpoch
from elastic_moe.membership.lighthouses import Lighthouses
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.signals import PeerDied, Signals, SignalSender, ViewRequest
from elastic_moe.serving.engine.mailbox import Mailbox
from elastic_moe.serving.protocol import Hello, encode
from elastic_moe.supervision.channel import Beat, channel_pair
from elastic_moe.supervision.supervisor import Event, EventKind, Supervisor
from elastic_moe.weights.holding import Greet
from elastic_moe.weights.holding import encode as encode_request
from elastic_moe.weights.server import WeightServer

WAIT_S = 10.0
DEADLINES = Deadlines()
ME = Member(0, 0, "me", 1, "127.0.0.1", "tcp://127.0.0.1:1", "127.0.0.1:1")
PEER = Member(1, 0, "peer", 2, "127.0.0.1", "tcp://127.0.0.1:2", "127.0.0.1:2")


class Bug(Exception):
    """What no code expects."""


def break_down(*_args: object) -> None:
    raise Bug("of a test")


@pytest.fixture
def errors() -> "queue.SimpleQueue[BaseException]":
    return queue.SimpleQueue()


def test_what_a_thread_raises_is_logged_and_told(errors, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        start_thread("one", break_down, 1, 2, on_error=errors.put).join(WAIT_S)
    assert isinstance(errors.get(timeout=WAIT_S), Bug)
    assert "thread one died" in caplog.text
    assert "Bug: of a test" in caplog.text


def test_the_latch_keeps_the_first_error():
    latch = Latch()
    latch.check()
    first = Bug("first")
    latch.set(first)
    latch.set(Bug("second"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"thread of this rank died.*first") as raised:
            latch.check()
        assert raised.value.__cause__ is first


def test_a_process_in_which_nobody_waits_ends():
    script = "from elastic_moe.background import *; start_thread('x', lambda: 1 / 0, on_error=end_process).join(60)"
    ended = subprocess.run(
        [sys.executable, "-c", script + "; print('alive')"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "ZeroDivisionError" in ended.stderr


def test_signals(errors):
    signals = Signals("127.0.0.1")
    signals.on(ViewRequest, break_down)
    signals.start("me", DEADLINES, break_down, errors.put)
    sender = SignalSender()
    sender.tell([signals.address], ViewRequest(1, "d"))
    assert isinstance(errors.get(timeout=WAIT_S), Bug)
    sender.close()


def test_weights(errors):
    server = WeightServer("127.0.0.1")
    shelf: Any = SimpleNamespace(holding=break_down)
    server.start(shelf, errors.put)
    with zmq.Context() as context, context.socket(zmq.DEALER) as asker:
        asker.setsockopt(zmq.LINGER, 0)
        asker.connect(server.address)
        asker.send(encode_request(Greet()))
        assert isinstance(errors.get(timeout=WAIT_S), Bug)


def test_the_mailbox(errors):
    mailbox = Mailbox("127.0.0.1", break_down)
    mailbox.start(errors.put)
    with zmq.Context() as context, context.socket(zmq.DEALER) as front_end:
        front_end.setsockopt(zmq.LINGER, 0)
        front_end.connect(mailbox.address)
        front_end.send(encode(Hello("x")))
        assert isinstance(errors.get(timeout=WAIT_S), Bug)


def test_heartbeats(errors, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lighthouses, "LighthouseClient", break_down)
    membership = Membership(ME, ["http://127.0.0.1:1"], DEADLINES, errors.put)
    membership.start()
    assert isinstance(errors.get(timeout=WAIT_S), Bug)
    membership.close()


def test_whoever_waits_for_a_view_gets_what_its_thread_raised(errors, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Lighthouses, "call", break_down)
    membership = Membership(ME, [], DEADLINES, errors.put)
    view = View(1, (ME, PEER))
    with pytest.raises(Bug):
        membership.next_view(view, request_join=lambda _view: None, deadline_s=WAIT_S)
    membership.note_death(1, "peer")
    membership.request_view(1)  # and so somebody votes for the one that died
    assert isinstance(errors.get(timeout=WAIT_S), Bug)


@pytest.mark.parametrize("said", ["no JSON", '{"rank": 0}', '{"rank": "zero"}'])
def test_a_malformed_answer_of_a_lighthouse_is_no_view(errors, monkeypatch: pytest.MonkeyPatch, said: str):
    """It is asked again until the deadline, and nobody waits for an answer that never comes."""

    class Participant:
        replica_id, step, data = "1:peer", 1, {"record": said}

    class Client:
        def __init__(self, *_args: object) -> None:
            pass

        def quorum(self, **_request: object) -> object:
            return type("Quorum", (), {"participants": [Participant]})

        def heartbeat(self, *_args: object) -> None:
            pass

    monkeypatch.setattr(lighthouses, "LighthouseClient", Client)
    membership = Membership(ME, ["http://127.0.0.1:1"], DEADLINES, errors.put)
    with pytest.raises(PeerLost, match="no view after epoch 1 within"):
        membership.next_view(View(1, (ME, PEER)), request_join=lambda _view: None, deadline_s=0.1)
    membership.close()
    assert errors.empty()


def test_whoever_builds_groups_gets_what_the_thread_raised(monkeypatch: pytest.MonkeyPatch):
    groups = EpochGroups(View(1, (ME, PEER)), 0, torch.device("cpu"), DEADLINES)
    monkeypatch.setattr(groups, "_connect", break_down)
    with pytest.raises(Bug):
        groups.build()
    assert groups.turns > 0


def test_a_child_that_nobody_understands_is_killed(monkeypatch: pytest.MonkeyPatch):
    supervisor = Supervisor()
    script = "import os, sys, time; os.write(int(sys.argv[-1]), b'not JSON\\n'); time.sleep(60)"
    child = supervisor.start("child", [sys.executable, "-c", script])
    assert supervisor.next_event(WAIT_S) == Event(EventKind.DYING, "child")
    assert supervisor.next_event(WAIT_S) == Event(EventKind.EXIT, "child", code=-9)
    child.end(0)


class FakeMembership:
    """Counts the views asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def request_view(self, after: int) -> "Future[View]":
        self.asked.append(after)
        return Future()

    def knows_a_death(self, _view: View) -> bool:
        return False

    def note_death(self, _rank: int, _incarnation: str) -> None:
        pass


class FakeGroups:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_a_lost_neighbour_wakes_who_sleeps(errors):
    """The loss is noticed in the signals' thread: the rank leaves, says so to the others, and its sleeper is woken
    after that, not before."""
    peers = [Signals("127.0.0.1") for _ in range(3)]
    members = [Member(rank, 0, f"i{rank}", 1, "127.0.0.1", s.address, "") for rank, s in enumerate(peers)]
    view, membership, groups = View(4, tuple(members)), FakeMembership(), FakeGroups()
    woken: queue.SimpleQueue[bool] = queue.SimpleQueue()
    told: queue.SimpleQueue[ViewRequest] = queue.SimpleQueue()
    epoch = CurrentEpoch(members[0], view, peers[0], membership, lambda: woken.put(epoch.is_left))  # pyright: ignore[reportArgumentType]
    epoch.listen(Deadlines(progress_s=1.5), errors.put)
    epoch.enter(view, groups)  # pyright: ignore[reportArgumentType]
    peers[2].on(ViewRequest, told.put)
    peers[2].start("i2", Deadlines(progress_s=60), break_down, errors.put)
    peers[2].watch(view, 2)  # it speaks; rank 1 has a socket, and nobody who does
    assert woken.get(timeout=WAIT_S) is True
    assert (membership.asked, groups.aborted) == ([4], True)
    assert told.get(timeout=WAIT_S) == ViewRequest(4, view.digest)
    assert errors.empty()
    for signals in peers:
        signals.close()


def test_only_the_proof_of_a_death_is_believed(errors):
    """A member knows the name of every other, and says in vain that it has died."""
    peers = [Signals("127.0.0.1") for _ in range(3)]
    names = [f"i{rank}" for rank in range(2)] + [incarnation_of("proof")]
    members = [Member(rank, 0, names[rank], 1, "127.0.0.1", s.address, "") for rank, s in enumerate(peers)]
    view, membership, groups = View(4, tuple(members)), FakeMembership(), FakeGroups()
    heard: queue.SimpleQueue[None] = queue.SimpleQueue()
    epoch = CurrentEpoch(members[0], view, peers[0], membership, lambda: heard.put(None))  # pyright: ignore[reportArgumentType]
    epoch.listen(Deadlines(progress_s=60), errors.put)
    epoch.enter(view, groups)  # pyright: ignore[reportArgumentType]
    peers[1].tell(members[:1], PeerDied(2, names[2]))
    heard.get(timeout=WAIT_S)
    assert (membership.asked, groups.aborted) == ([], False)
    peers[1].tell(members[:1], PeerDied(2, "proof"))
    heard.get(timeout=WAIT_S)
    assert (membership.asked, groups.aborted) == ([4], True)
    assert errors.empty()
    for signals in peers:
        signals.close()


def test_a_beat_is_the_last_line_of_a_channel():
    """What `Child` relies on: the end of the other side is an end, not an error."""
    ours, theirs = channel_pair()
    theirs.sendall(msgspec.json.encode(Beat(1, None)) + b"\n")
    theirs.close()
    assert isinstance(ours.receive(), Beat)
    assert ours.receive() is None
    ours.close()
