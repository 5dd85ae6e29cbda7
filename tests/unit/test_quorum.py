"""Agreement on a view, with torchft's lighthouse: votes, deaths, join requests."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta

import msgspec
import pytest
from support.agreement import FAST, NOBODY, QUICK_S, WAIT_S, member, no_join, wait_for_heartbeats
from torchft.coordination import LighthouseClient

from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.view import View
from elastic_moe.membership import quorum as module
from elastic_moe.membership.lighthouses import Lighthouses
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.verdict import Record
from elastic_moe.wire import Wire


def test_members_agree_on_themselves_in_the_order_of_their_ranks(both):
    asked = [membership.request_view(1) for membership in both]
    views = [future.result(WAIT_S) for future in asked]
    assert views[0] == views[1] == View(2, (member(1), member(3)), views[0].lighthouses)
    assert len(views[0].lighthouses) == 1


def test_a_stranger_at_the_lighthouse_is_no_member_and_moves_no_epoch(lighthouses, join, caplog):
    """It gives a record of its own, or a member's: under its own name."""
    url, wire = lighthouses().url, Wire("the secret of this launch")
    two = join(member(3), url, wire=wire), join(member(1), url, wire=wire)
    for membership in two:
        membership.start()
    wait_for_heartbeats(*two)
    stolen = wire.seal(msgspec.json.encode(two[0]._record()).decode(), "3:i3 after 1")
    forged = msgspec.json.encode(Record(member(2))).decode()
    strangers = [("2:i2", stolen, 1), ("2:i2", forged, 999), ("0:i0", f"{'0' * 64}.{forged}", 9)]
    with ThreadPoolExecutor() as pool:
        for epoch, (name, record, step) in enumerate(strangers, start=1):
            client, patience = LighthouseClient(url, timedelta(seconds=1)), timedelta(seconds=FAST.view_call_s)
            lie = {"record": record}
            pool.submit(client.quorum, replica_id=name, timeout=patience, step=step, world_size=1, data=lie)
            time.sleep(10 * FAST.heartbeat_s)
            views = [membership.request_view(epoch).result(WAIT_S) for membership in both_ask(two, epoch)]
            assert views[0] == views[1]
            assert (views[0].epoch, views[0].members) == (epoch + 1, (member(1), member(3)))
            assert f"the record of {name} after {step} was not made with the secret of this launch" in caplog.text


def both_ask(two: Sequence[Membership], epoch: int) -> Sequence[Membership]:
    for membership in two:
        membership.request_view(epoch)
    return two


def test_the_epoch_follows_the_largest_that_any_of_them_knows(both):
    asked = [membership.request_view(after) for membership, after in zip(both, (4, 9), strict=True)]
    assert [future.result(WAIT_S).epoch for future in asked] == [10, 10]


def test_a_member_that_lives_is_waited_for(both):
    first = both[0].request_view(1)
    wait([first], 0.5)
    assert not first.done()
    both[1].request_view(1)
    assert first.result(QUICK_S).ranks == (1, 3)


def test_who_sends_no_heartbeats_yet_is_not_waited_for(lighthouses, join):
    url = lighthouses().url
    one, _loading = join(member(0), url), join(member(1), url)
    one.start()
    assert one.request_view(0).result(QUICK_S).ranks == (0,)


def test_a_death_known_before_is_voted_for(both):
    both[1].close()
    both[0].note_death(1, "i1")
    assert both[0].request_view(1).result(QUICK_S).ranks == (3,)


def test_a_death_told_while_all_wait_is_voted_for(both):
    both[1].close()
    asked = both[0].request_view(1)
    wait([asked], 0.3)
    assert not asked.done()
    both[0].note_death(1, "i1")
    assert asked.result(QUICK_S).ranks == (3,)


def test_a_death_without_a_word_counts_until_its_heartbeats_are_missing(lighthouses, join):
    url = lighthouses(heartbeat_timeout_s=1.0).url
    one, other = join(member(0), url), join(member(1), url)
    one.start()
    other.start()
    wait_for_heartbeats(one, other)
    other.close()
    begin = time.monotonic()
    assert one.request_view(1).result(WAIT_S).ranks == (0,)
    assert 0.5 < time.monotonic() - begin < 3


def test_deaths_are_known_of_these_very_processes_and_voted_for_a_while(join, monkeypatch: pytest.MonkeyPatch):
    votes: list[str] = []
    monkeypatch.setattr(Membership, "_vote_for", lambda _self, name: votes.append(name))
    membership = join(member(0), deadlines=Deadlines(death_vote_s=1.0))
    view = View(4, (member(0), member(1)))
    assert not membership.knows_a_death(view)
    membership.note_death(1, "another life")
    assert not membership.knows_a_death(view)
    membership.note_death(1, "i1")
    assert membership.knows_a_death(view)
    assert not votes, "nobody asks for a view"
    membership.request_view(4)
    assert votes == ["1:another life", "1:i1"]
    time.sleep(1.1)
    membership.request_view(5)
    assert len(votes) == 2, "it was too long ago"
    assert not membership.knows_a_death(view)


def test_asking_again_gets_the_same_answer_unless_that_failed(join, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def call(_self: Lighthouses, _what: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise PeerLost("for once")
        time.sleep(0.2)
        raise PeerLost("again")

    monkeypatch.setattr(Lighthouses, "call", call)
    membership = join(member(0), NOBODY)
    first = membership.request_view(3)
    with pytest.raises(PeerLost, match="for once"):
        first.result(WAIT_S)
    second = membership.request_view(3)
    assert second is not first
    assert membership.request_view(3) is second
    later = membership.request_view(4)
    assert membership.request_view(4) is later is not second
    assert set(membership._requests) == {4}, "older ones are forgotten"
    wait([second, later], WAIT_S)


def test_a_newcomer_asks_to_join_once_its_call_is_there_and_again_until_the_members_ask(both, lighthouses, join):
    url = both[0]._lighthouses.urls[0]
    newcomer, old = join(member(2), url), View(6, (member(1), member(3)))
    requests: list[float] = []
    begin = time.monotonic()

    def request_join(view: View) -> None:
        assert view is old
        requests.append(time.monotonic() - begin)
        if len(requests) == 2:
            for membership in both:
                membership.request_view(6)

    view = newcomer.next_view(old, request_join, WAIT_S)
    assert (view.epoch, view.ranks) == (7, (1, 2, 3))
    assert len(requests) == 2
    assert FAST.settle_s + module.ASKED_S <= requests[0] < module.JOIN_REQUEST_EVERY_S
    assert requests[1] - requests[0] >= module.JOIN_REQUEST_EVERY_S - 0.1


def test_a_member_that_waits_for_the_others_asks_to_join_only_when_that_takes_long(both):
    requests: list[View] = []
    old = View(1, (member(1), member(3)))
    both[1].request_view(1)
    assert both[0].next_view(old, requests.append, WAIT_S).ranks == (1, 3)
    assert not requests


def test_next_view_asks_again_after_a_call_that_failed(lighthouses, join, monkeypatch: pytest.MonkeyPatch):
    membership = join(member(0), lighthouses().url)
    real, calls = Lighthouses.call, []

    def call(self: Lighthouses, what: Callable[..., object]) -> object:
        calls.append(1)
        if len(calls) < 3:
            raise PeerLost("not yet")
        return real(self, what)

    monkeypatch.setattr(Lighthouses, "call", call)
    assert membership.next_view(View(1, (member(0),)), no_join, WAIT_S).epoch == 2
    assert len(calls) == 3


def test_nobody_agrees_within_the_deadline(join):
    membership = join(member(0), NOBODY, deadlines=Deadlines(connect_s=0.1, heartbeat_s=0.01))
    begin = time.monotonic()
    with pytest.raises(
        PeerLost, match=r"no view after epoch 5 within 0\.5 s: no lighthouse answered \(http://127.0.0.1:9: "
    ):
        membership.next_view(View(5, (member(0),)), lambda _view: None, 0.5)
    assert 0.5 <= time.monotonic() - begin < 3


def test_without_any_lighthouse_the_error_says_so(join):
    with pytest.raises(PeerLost, match="none is known"):
        join(member(0)).request_view(1).result(WAIT_S)


def test_a_group_that_joins_another_does_not_take_itself_for_the_answer(lighthouses, join):
    """The halves of a network that has healed neither ask in the same instant, nor does one's lighthouse count the
    other at once: who joins asks until both are in."""
    url = lighthouses().url
    joins, others = join(member(2), url), [join(member(1), url), join(member(3), url)]
    mine, theirs = View(3, (member(2),)), View(6, (member(1), member(3)))
    joins.entered(mine)
    joins.start()

    def answer() -> list[View]:
        time.sleep(1.0)
        for membership in others:
            membership.entered(theirs)
            membership.start()
        asked = [membership.request_view(theirs.epoch) for membership in others]
        return [future.result(WAIT_S) for future in asked]

    with ThreadPoolExecutor() as pool:
        answered = pool.submit(answer)
        view = joins.next_view(theirs, lambda _view: None, WAIT_S)
        assert view.ranks == (1, 2, 3)
        assert view.epoch > theirs.epoch
        assert answered.result(WAIT_S) == [view, view]
