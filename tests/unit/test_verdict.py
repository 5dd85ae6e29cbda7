"""Who is left out of a view when not everybody reaches everybody."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.group.view import Member
from elastic_moe.membership.verdict import Record, members_without_disputes


def record(rank: int, *unreached: int, newcomer: bool = False) -> Record:
    member = Member(rank, 0, f"i{rank}", 1, "host", "", "")
    return Record(member, newcomer, tuple(f"i{other}" for other in unreached))


def left(*records: Record) -> list[int]:
    return [member.rank for member in members_without_disputes(records)]


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([record(2), record(0), record(1)], [0, 1, 2]),
        ([record(0, 2), record(1), record(2, 0)], [0, 1]),
        ([record(0, 2), record(1), record(2)], [0, 1]),
        ([record(0), record(1), record(2, 0)], [0, 1]),
        ([record(0, newcomer=True), record(1), record(2, 0)], [1, 2]),
        ([record(0, 1, 2, 3), record(1), record(2), record(3)], [1, 2, 3]),
        ([record(0), record(1, 0), record(2, 0), record(3, 0)], [1, 2, 3]),
        ([record(0, 2, 3), record(1, 2, 3), record(2, 0, 1), record(3, 0, 1)], [0, 1]),
        ([record(0, 1), record(1, 0)], [0]),
        ([record(0, 9), record(1, 1)], [0, 1]),
        ([record(5)], [5]),
    ],
    ids=[
        "nobody", "a pair", "one of them says it", "the other does", "newcomers first", "who reaches nobody",
        "whom nobody reaches", "halves", "two", "strangers and oneself say nothing", "alone",
    ],
)  # fmt: skip
def test_the_smallest_set_goes(records, kept):
    assert left(*records) == kept


pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=14)


@given(st.integers(1, 8), pairs, st.sets(st.integers(0, 7)), st.randoms())
def test_all_find_the_same_and_nobody_that_is_left_is_in_a_dispute(size, disputes, newcomers, random):
    said = {rank: [b for a, b in disputes if a == rank] for rank in range(size)}
    records = [record(rank, *said[rank], newcomer=rank in newcomers) for rank in range(size)]
    kept = left(*records)
    random.shuffle(records)
    assert left(*records) == kept
    real = {frozenset(pair) for pair in disputes if pair[0] != pair[1] and max(pair) < size}
    assert not any(pair <= set(kept) for pair in real)
    smallest = next(
        n for n in range(size + 1) if any(all(p & set(c) for p in real) for c in combinations(range(size), n))
    )
    assert size - len(kept) == smallest


def test_among_many_it_is_quick_and_right_enough():
    """A hundred that do not reach one: it goes alone."""
    records = [record(0), *(record(rank, 0) for rank in range(1, 101))]
    assert left(*records) == list(range(1, 101))
