"""The lighthouses a process knows: heartbeats, which is asked, what happens when one goes and comes back."""

import dataclasses
import time
from datetime import timedelta
from typing import ClassVar

import msgspec
import pytest
from support.agreement import FAST, NOBODY, WAIT_S, member, wait_for_heartbeats, wait_until

from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.view import View
from elastic_moe.membership import lighthouses as lighthouses_module
from elastic_moe.membership.verdict import Record


def test_the_first_lighthouse_that_answers_is_asked(lighthouses, join):
    membership = join(member(0), NOBODY, lighthouses().url)
    membership.start()
    begin = time.monotonic()
    assert membership.request_view(2).result(WAIT_S).epoch == 3
    assert time.monotonic() - begin < 3 * FAST.connect_s + FAST.settle_s


def test_a_lighthouse_is_asked_only_when_all_have_had_the_time_for_a_heartbeat(lighthouses, join):
    membership = join(member(0), lighthouses().url, deadlines=Deadlines(settle_s=0.8, heartbeat_s=0.02))
    begin = time.monotonic()
    membership.start()
    membership.request_view(2).result(WAIT_S)
    assert 0.8 <= time.monotonic() - begin < 2


def test_lighthouses_are_learned_from_members_and_take_over_from_one_that_does_not_answer(lighthouses, join):
    """One that is shut keeps its connections, takes heartbeats, and answers no call."""
    first, second = lighthouses(), lighthouses()
    deadlines = dataclasses.replace(FAST, view_call_s=1.0)
    one = join(member(0, first.url), first.url, deadlines=deadlines)
    other = join(member(1, second.url), first.url, deadlines=deadlines)
    for membership in (one, other):
        membership.start()
    wait_for_heartbeats(one, other)
    asked = [membership.request_view(1) for membership in (one, other)]
    view = asked[0].result(WAIT_S)
    assert view.lighthouses == (first.url, second.url)
    asked[1].result(WAIT_S)
    wait_for_heartbeats(one, other, urls=2)
    first.shut()
    begin = time.monotonic()
    asked = [membership.request_view(view.epoch) for membership in (one, other)]
    assert [future.result(WAIT_S).epoch for future in asked] == [3, 3]
    assert time.monotonic() - begin < 3


class ScriptedClient:
    """A lighthouse that takes heartbeats or does not."""

    answers = True
    made = 0
    timeouts: ClassVar[set[float]] = set()

    def __init__(self, _url: str, timeout: timedelta) -> None:
        type(self).made += 1
        self.timeouts.add(timeout.total_seconds())

    def heartbeat(self, name: str, timeout: timedelta) -> None:
        assert name == "0:i0"
        self.timeouts.add(timeout.total_seconds())
        if not self.answers:
            raise TimeoutError("no answer")


def test_a_lighthouse_that_dies_and_comes_back_has_to_settle_anew(join, monkeypatch: pytest.MonkeyPatch):
    class Client(ScriptedClient):
        pass

    monkeypatch.setattr(lighthouses_module, "LighthouseClient", Client)
    membership = join(member(0), NOBODY)
    membership.start()
    wait_for_heartbeats(membership)
    since = membership._lighthouses._known_since[NOBODY]
    wait_a_few_heartbeats()
    assert (Client.made, membership._lighthouses._known_since[NOBODY]) == (1, since)
    Client.answers = False
    wait_until(lambda: not membership._lighthouses._known_since)
    with pytest.raises(PeerLost, match="it takes no heartbeats"):
        membership.request_view(1).result(WAIT_S)
    Client.answers = True
    wait_for_heartbeats(membership)
    assert membership._lighthouses._known_since[NOBODY] > since
    assert Client.made > 1, "the connection is made anew"
    assert Client.timeouts == {FAST.connect_s}


def wait_a_few_heartbeats() -> None:
    time.sleep(5 * FAST.heartbeat_s)


def test_a_closed_one_sends_no_heartbeats_and_has_no_threads(both):
    both[0].close()
    assert not any(thread.is_alive() for thread in both[0]._lighthouses._threads)


def test_a_call_that_a_lighthouse_out_of_reach_may_not_have_heard_is_made_again(join, monkeypatch: pytest.MonkeyPatch):
    """All others would wait for one whose heartbeats are heard and whose call is not."""
    calls: list[int] = []

    class Client(ScriptedClient):
        def quorum(self, **_request: object) -> object:
            calls.append(1)
            if len(calls) == 1:
                Client.answers = False  # the wire is cut, and healed soon after
                wait_until(lambda: not membership._lighthouses._known_since)
                Client.answers = True
                time.sleep(FAST.view_call_s)  # the call that nobody heard
                raise TimeoutError("not heard")
            record = msgspec.json.encode(Record(member(0))).decode()
            voter = type("Voter", (), {"replica_id": "0:i0", "step": 4, "data": {"record": record}})
            return type("Quorum", (), {"participants": [voter]})

    monkeypatch.setattr(lighthouses_module, "LighthouseClient", Client)
    membership = join(member(0), NOBODY)
    requests: list[View] = []
    begin = time.monotonic()
    assert membership.next_view(View(4, (member(0),)), requests.append, WAIT_S).epoch == 5
    assert time.monotonic() - begin < FAST.view_call_s / 2
    assert len(calls) == 2


def test_a_call_is_made_again_at_the_lighthouse_that_all_prefer_once_that_is_back(join, monkeypatch):
    preferred, other, asked = "http://127.0.0.1:7", "http://127.0.0.1:8", []

    class Client(ScriptedClient):
        dead: ClassVar[set[str]] = {preferred}

        def __init__(self, url: str, timeout: timedelta) -> None:
            self.url = url

        def heartbeat(self, name: str, timeout: timedelta) -> None:
            if self.url in self.dead:
                raise TimeoutError("no answer")

        def quorum(self, **_request: object) -> object:
            asked.append(self.url)
            if self.url == other:
                Client.dead = set()
                time.sleep(FAST.view_call_s)  # those who ask the preferred one are not heard here
                raise TimeoutError("too few have asked")
            record = msgspec.json.encode(Record(member(0))).decode()
            voter = type("Voter", (), {"replica_id": "0:i0", "step": 4, "data": {"record": record}})
            return type("Quorum", (), {"participants": [voter]})

    monkeypatch.setattr(lighthouses_module, "LighthouseClient", Client)
    membership = join(member(0), preferred, other)
    begin = time.monotonic()
    assert membership.next_view(View(4, (member(0),)), lambda _view: None, WAIT_S).epoch == 5
    assert time.monotonic() - begin < FAST.view_call_s / 2
    assert asked == [other, preferred]
