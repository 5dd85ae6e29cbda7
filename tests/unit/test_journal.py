"""The journal's rules, and where a request goes."""

import pytest

from elastic_moe.group.view import Member, View
from elastic_moe.serving.front_end.journal import Entry, Journal, Owner
from elastic_moe.serving.front_end.routing import RankLoad, choose_rank
from elastic_moe.serving.protocol import Phase, Sampling, Submit, Tokens


def member(rank: int, incarnation: str) -> Member:
    return Member(rank, 0, incarnation, 1, "host", "", "", f"tcp://127.0.0.1:{rank + 1}")


def entry(request_id: str = "a", max_tokens: int = 8) -> Entry:
    return Entry(request_id, [1, 2, 3], max_tokens, Sampling(0.7, 0.9, 5), arrived_s=0.0)


def tokens(start: int, ids: list[int], incarnation: str = "x", finish: str = "", request_id: str = "a") -> Tokens:
    return Tokens(request_id, incarnation, start, ids, finish)


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        ([], None),
        ([RankLoad(0, Phase.LOADING, 0), RankLoad(1, Phase.RECOVERING, 0), RankLoad(2, Phase.SILENT, 0)], None),
        ([RankLoad(0, Phase.SERVING, 3), RankLoad(1, Phase.SERVING, 2), RankLoad(5, Phase.SERVING, 4)], 1),
        ([RankLoad(7, Phase.SERVING, 2), RankLoad(3, Phase.SERVING, 2)], 3),
        ([RankLoad(0, Phase.SILENT, 0), RankLoad(1, Phase.SERVING, 100)], 1),
    ],
)
def test_routing(ranks: list[RankLoad], chosen: int | None):
    assert choose_rank(ranks) == chosen


def test_tokens_are_taken_once_and_in_order():
    one = entry()
    assert one.apply(tokens(0, [10, 11])) == 2
    assert one.apply(tokens(0, [10, 11])) == 0
    assert one.apply(tokens(1, [11, 12])) == 1
    assert one.apply(tokens(4, [14])) is None
    assert one.tokens == [10, 11, 12]
    assert one.apply(tokens(3, [13], finish="stop")) == 1
    assert (one.tokens, one.finish) == ([10, 11, 12, 13], "stop")


def test_tokens_beyond_the_limit_are_cut():
    one = entry(max_tokens=4)
    assert one.apply(tokens(0, [10, 11])) == 2
    assert one.apply(tokens(1, [11, 12, 13, 14, 15])) == 2
    assert (one.tokens, one.finish) == ([10, 11, 12, 13], "length")


def test_the_last_token_finishes_the_request_even_if_the_engine_does_not_say_so():
    one = entry(max_tokens=2)
    one.apply(tokens(0, [10, 11, 12]))
    assert (one.tokens, one.finish) == ([10, 11], "length")


def test_only_the_present_owner_is_heard():
    journal, one = Journal(), entry()
    journal.add(one)
    assert journal.addressee(tokens(0, [9])) is None
    one.assign(Owner(0, "x"))
    assert journal.addressee(tokens(0, [9])) is one
    assert journal.addressee(tokens(0, [9], incarnation="former")) is None
    assert journal.addressee(tokens(0, [9], request_id="unknown")) is None
    one.fail("gone")
    assert journal.addressee(tokens(0, [9])) is None


def test_orphans_go_on_from_the_tokens_they_have():
    journal = Journal()
    stays, leaves, respawned, done, unplaced = (entry(name) for name in ("s", "l", "r", "d", "u"))
    for one in (stays, leaves, respawned, done, unplaced):
        journal.add(one)
    stays.assign(Owner(0, "x0"))
    leaves.assign(Owner(1, "x1"))
    respawned.assign(Owner(2, "x2"))
    done.assign(Owner(1, "x1"))
    done.finish = "stop"
    leaves.apply(tokens(0, [10, 11], "x1"))
    view = View(2, (member(0, "x0"), member(2, "new")))

    assert journal.orphans(view) == [leaves, respawned]
    assert journal.orphans(view) == [leaves, respawned], "asking changes nothing"
    assert leaves.assign(Owner(0, "x0")) == Submit("l", [1, 2, 3, 10, 11], 2, 6, Sampling(0.7, 0.9, 5))
    assert journal.orphans(view) == [respawned]
    assert journal.unplaced() == [unplaced]


def test_removed_entries_are_forgotten():
    journal, one = Journal(), entry()
    journal.add(one)
    one.assign(Owner(0, "x"))
    journal.remove(one)
    assert len(journal) == 0
    assert journal.addressee(tokens(0, [9])) is None
