"""ExchangeLayout: regions do not overlap, sizes are what the docstring says, what does not fit is refused."""

import pytest

from elastic_moe.exchange.layout import ExchangeLayout, power_of_2


def regions(layout):
    """(offset, bytes) of every region, by the table of its docstring."""
    seats, rows = layout.num_seats, layout.num_seats * layout.max_tokens
    return [
        (layout.fence, 8),
        (layout.flags, 2 * 8 * layout.seats_padded),
        (layout.counts, 4 * seats * (layout.max_slots + 1)),
        (layout.choices, 4 * seats * layout.max_pairs),
        (layout.arrivals, rows * layout.row_bytes),
        (layout.results, layout.max_pairs * layout.row_bytes),
    ]


LAYOUTS = [
    ExchangeLayout(8, 36, 256, 8, 7168, 2),
    ExchangeLayout(3, 1, 1, 1, 8, 2),
    *(ExchangeLayout(seats, 31, 4, 8, 64, 2) for seats in range(1, 33)),  # each region a multiple of 128, or nearly so
    *(ExchangeLayout(seats, 36, 3, 2, 8, 4) for seats in range(1, 33)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_regions_follow_each_other_without_overlap(layout):
    end = 0
    for offset, num_bytes in regions(layout):
        assert offset >= end
        assert offset % 128 == 0
        end = offset + num_bytes
    assert end <= layout.num_bytes < end + 128


@pytest.mark.parametrize("seats", range(1, 33))
def test_every_source_has_its_own_place_in_every_region(seats):
    """By the addresses that the kernels compute: nobody's byte is anybody else's, and all lie within the buffer."""
    layout = ExchangeLayout(seats, 5, 3, 2, 8, 2)
    own = [range(layout.fence, layout.fence + 8)]
    for source in range(seats):
        for flag in (layout.flags, layout.flags + layout.seats_padded * 8):  # of dispatch, of combine
            own.append(range(flag + source * 8, flag + source * 8 + 8))
        for at, num_bytes in (
            (layout.counts, (layout.max_slots + 1) * 4),
            (layout.choices, layout.max_pairs * 4),
            (layout.arrivals, layout.max_tokens * layout.row_bytes),
        ):
            own.append(range(at + source * num_bytes, at + (source + 1) * num_bytes))
    own.append(range(layout.results, layout.results + layout.max_pairs * layout.row_bytes))
    used = [byte for part in own for byte in part]
    assert len(used) == len(set(used))
    assert max(used) < layout.num_bytes


def test_reserved_bytes_are_those_of_all_tokens_going_to_one_rank():
    layout = ExchangeLayout(8, 36, 4096, 8, 7168, 2)
    rows = (8 + 8) * 4096 * 7168 * 2
    assert rows < layout.num_bytes < rows * 1.01
    assert layout.max_rows(4096, 36) == 8 * 4096 * 8
    assert layout.max_rows(64, 2) == 8 * 64 * 2  # a token has at most one pair for each slot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((33, 4, 8, 2, 64, 2), "1 to 32 seats, got 33"),
        ((8, 2048, 8, 2, 64, 2), "1 to 2047 slots per rank, got 2048"),
        ((8, 4, 2**18, 4, 64, 2), r"max_tokens \* top_k must be 1 to 1048575, got 262144 \* 4"),
        ((8, 4, 8, 2, 20, 2), "multiple of 16 bytes, got 40"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExchangeLayout(*arguments)


def test_powers_of_2():
    assert [power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
