"""The figures of bench=rebalance, from windows made by hand."""

from itertools import accumulate

import pytest

from launch.benchmarks.windows import Window, summary, verdict
from launch.streams import Answer

KEYS = {"mode", "tokens_per_s", "itl_ms", "seconds_to_balance", "bytes_moved", "bytes_lower_bound", "tokens_equal"}


def answer(gaps_ms, text="same"):
    return Answer(
        text, "length", len(gaps_ms) + 1, "", [1000.0, *accumulate((g / 1e3 for g in gaps_ms), initial=1000)][1:]
    )


def moved(at, before, after, bound=100, **sources):
    return {
        "ended_at": at,
        "max_mean_before": before,
        "max_mean_after": after,
        "bytes_by_source": sources,
        "bytes_lower_bound": bound,
    }


def window(gaps_ms=(100,) * 99, reports=(), text="same"):
    return Window(1000.0, 1010.0, 1020.0, tuple(reports), 1.25, answers=(answer(gaps_ms, text),))


def test_seconds_to_balance_are_those_to_the_last_round_that_crossed_the_threshold():
    before_the_shift = moved(1005.0, 1.9, 1.0)
    not_yet = moved(1011.0, 1.9, 1.2)
    crossed = [moved(1012.5, 1.5, 1.01), moved(1014.0, 1.06, 1.05)]
    asked = moved(1018.0, 1.03, 1.0)
    assert window(reports=[before_the_shift, not_yet]).seconds_to_balance(1.05) is None
    assert window(reports=[before_the_shift, not_yet, *crossed, asked]).seconds_to_balance(1.05) == 4.0


def test_one_result_a_mode_of_medians():
    slow = [100] * 97 + [500, 500]
    reports = [moved(1005.0, 1.5, 1.0, 80, own=7, node=80), moved(1012.0, 1.4, 1.0, 20, remote=25, disk=5)]
    windows = {
        "off": [window(), window([200] * 99), window()],
        "sync": [window(slow, reports)] * 3,
        "async": [window(reports=reports), window(), window(text="another")],
    }
    off, sync, free = summary(windows, threshold=1.05, count_us=3.0)
    assert [row["mode"] for row in (off, sync, free)] == ["off", "sync", "async"]
    assert all(set(row) >= KEYS and row["count_us_per_layer"] == 3.0 and row["rounds"] == 3 for row in (off, sync))
    assert off["itl_ms"] == {"p50": 100.0, "p99": 100.0, "max": 100.0}
    assert off["tokens_per_s"] == 5.0
    assert (off["seconds_to_balance"], off["bytes_moved"], off["tokens_equal"]) == (None, 0, True)
    assert off["p99_over_off_spread"] == {"min": 0.5, "max": 2.0}, "of its rounds among each other"
    assert sync["itl_ms"] == {"p50": 100.0, "p99": 500.0, "max": 500.0}
    assert (sync["bytes_moved"], sync["bytes_lower_bound"], sync["seconds_to_balance"]) == (110, 100, 2.0)
    assert sync["p99_over_off_spread"] == {"min": 2.5, "max": 5.0}
    assert sync["verdict"] == "over 1.05 x in every round"
    assert (sync["rebalances"], sync["max_mean_before"], sync["max_mean_end"]) == (2, 1.4, 1.25)
    assert (sync["moved_at_s"], sync["shift_at_s"]) == ([5.0, 12.0], [10.0])
    assert (free["tokens_equal"], free["different_texts"]) == (False, 1)
    assert (free["bytes_moved"], free["rebalances"]) == (0, 0)


def test_the_timeline_has_the_longest_wait_of_each_quarter_second():
    assert window([100, 50, 200, 400]).timeline() == [(0.0, 100.0), (0.25, 200.0), (0.75, 400.0)]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0.9, 1.0, 1.05], "within 1.05 x in every round"),
        ([1.06, 2.0, 3.0], "over 1.05 x in every round"),
        ([1.0, 1.06, 1.0], "hidden by noise: on both sides of 1.05 x"),
        ([1.0, 1.0], "too few rounds to tell: 2"),
    ],
)
def test_a_claim_needs_all_rounds(ratios, said):
    assert verdict(ratios) == said
