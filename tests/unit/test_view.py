"""Members and views: what a view refuses, and what it says of its members."""

import msgspec
import pytest

from elastic_moe.group.view import Member, View


def member(rank: int, incarnation: str = "") -> Member:
    return Member(rank, 0, incarnation or f"i{rank}", 1, "host", f"tcp://host:{rank + 1}", f"host:{rank + 100}")


THREE = View(7, (member(1), member(4), member(6)), ("http://host:1",))


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0), (0, 2, 1), (2, 1, 3), (0, 1, 1)])
def test_members_come_in_rising_order_of_their_ranks(ranks: tuple[int, ...]):
    with pytest.raises(ValueError, match="members in rising order of rank") as refused:
        View(1, tuple(member(rank) for rank in ranks))
    assert str(ranks) in str(refused.value)


@pytest.mark.parametrize("ranks", [(0,), (5,), (0, 1), (1, 4, 6)])
def test_ranks_may_have_holes(ranks: tuple[int, ...]):
    assert View(1, tuple(member(rank) for rank in ranks)).ranks == ranks


@pytest.mark.parametrize("place", range(3))
def test_the_digest_differs_with_any_member_and_with_nothing_else(place: int):
    members = list(THREE.members)
    members[place] = msgspec.structs.replace(members[place], incarnation="another life")
    assert View(7, tuple(members)).digest != THREE.digest
    assert View(7, THREE.members[:place] + THREE.members[place + 1 :]).digest != THREE.digest
    assert View(8, THREE.members).digest == THREE.digest


def test_the_digest_is_the_same_in_every_process():
    assert THREE.digest == "6b213490eaf2"
    assert len(THREE.digest) == 12


def test_who_is_a_member():
    assert THREE.has(4, "i4")
    assert not THREE.has(4, "i6")
    assert not THREE.has(4, "another life")
    assert not THREE.has(6, "i4")
    assert not THREE.has(0, "i0")


def test_the_place_of_a_rank_in_the_groups():
    assert [THREE.group_rank(rank) for rank in (1, 4, 6)] == [0, 1, 2]
    assert [THREE.member(rank) for rank in (1, 4, 6)] == list(THREE.members)
    for rank in (0, 2, 7, -1):
        with pytest.raises(ValueError, match="not in tuple"):
            THREE.group_rank(rank)
        with pytest.raises(ValueError, match="not in tuple"):
            THREE.member(rank)


def test_views_travel_as_they_are_and_are_never_changed():
    assert msgspec.json.decode(msgspec.json.encode(THREE), type=View) == THREE
    with pytest.raises(AttributeError):
        THREE.epoch = 8  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        THREE.members[0].rank = 8  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(THREE) == hash(msgspec.structs.replace(THREE))


def test_a_view_that_is_decoded_is_checked_too():
    said = msgspec.to_builtins(THREE)
    said["members"] = said["members"][::-1]
    with pytest.raises(msgspec.ValidationError, match="rising order"):
        msgspec.json.decode(msgspec.json.encode(said), type=View)
