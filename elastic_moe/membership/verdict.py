"""Who is left out of a view: a pure function of what all who asked for it say, so that everybody finds the same."""

from collections.abc import Collection, Sequence
from itertools import combinations

import msgspec

from elastic_moe.group.view import Member

MAX_EXACT = 12
"""Among so many members that are in a dispute the smallest set is looked for; among more it is approached."""


class Record(msgspec.Struct, frozen=True):
    """What a process says when it asks for a view."""

    member: Member
    newcomer: bool = False
    """It is in no view now."""
    unreached: tuple[str, ...] = ()
    """Incarnations that it has not been able to reach since its last view."""


def members_without_disputes(records: Sequence[Record]) -> tuple[Member, ...]:
    """The members in the order of their ranks, without the smallest set that explains who did not reach whom.

    Newcomers go first, then the higher ranks. A report about one who has not asked says nothing; and a process that
    reports all others is itself the smallest set.
    """
    by_name = {record.member.incarnation: record for record in records}
    disputes = {
        frozenset((record.member.incarnation, other))
        for record in records
        for other in record.unreached
        if other in by_name and other != record.member.incarnation
    }
    dropped = _cover(disputes, by_name)
    members = [record.member for record in records if record.member.incarnation not in dropped]
    return tuple(sorted(members, key=lambda member: member.rank))


def _cover(disputes: Collection[frozenset[str]], by_name: dict[str, Record]) -> set[str]:
    """The fewest that are in each of `disputes`; of several such sets the one with the most newcomers, then with the
    higher ranks."""

    def preference(names: Collection[str]) -> tuple[int, list[int]]:
        newcomers = sum(by_name[name].newcomer for name in names)
        return -newcomers, sorted(-by_name[name].member.rank for name in names)

    if not disputes:
        return set()
    involved = sorted({name for dispute in disputes for name in dispute}, key=lambda name: preference([name]))
    if len(involved) <= MAX_EXACT:
        for size in range(len(involved)):
            covers = [set(names) for names in combinations(involved, size) if all(d & set(names) for d in disputes)]
            if covers:
                return min(covers, key=preference)
    return _approached(disputes, involved)


def _approached(disputes: Collection[frozenset[str]], involved: Sequence[str]) -> set[str]:
    """Again and again the one with the most disputes left, of several the first of `involved`."""
    others: dict[str, set[str]] = {name: set() for name in involved}
    for one, other in disputes:
        others[one].add(other)
        others[other].add(one)
    dropped: set[str] = set()
    while others[worst := max(involved, key=lambda name: len(others[name]))]:
        dropped.add(worst)
        for other in others[worst]:
            others[other].discard(worst)
        others[worst] = set()
    return dropped
