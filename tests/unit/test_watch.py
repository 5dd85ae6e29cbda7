"""What a supervisor decides: hung or not, and how long until the next start."""

import pytest

from elastic_moe.supervision.channel import Beat
from elastic_moe.supervision.watch import BACKOFF_S, QUICK_DEATH_S, RESPAWN_S, HangWatch, Respawns

HANG_S = 4.0


def test_before_the_first_beat_a_process_may_take_any_time():
    assert HangWatch(HANG_S).verdict(1e9) == ""


def test_a_process_without_a_beat_hangs():
    watch = HangWatch(HANG_S)
    watch.hear(Beat(1, working=False), 10.0)
    assert watch.verdict(14.0) == ""
    assert watch.verdict(14.5) == "without a beat for 4.5 s"
    watch.hear(Beat(1, working=False), 14.5)
    assert watch.verdict(18.5) == ""


def test_a_process_that_works_without_progress_hangs():
    watch = HangWatch(HANG_S)
    for now in range(10, 15):
        watch.hear(Beat(7, working=True), float(now))
        assert watch.verdict(now) == ""
    watch.hear(Beat(7, working=True), 14.6)
    assert watch.verdict(14.6) == "without progress for 4.6 s"


def test_progress_of_any_kind_counts():
    watch = HangWatch(HANG_S)
    for now in range(10, 30):
        watch.hear(Beat(100 - now, working=True), float(now))
        assert watch.verdict(now + 0.9) == ""


def test_a_process_that_waits_makes_no_progress_and_does_not_hang():
    watch = HangWatch(HANG_S)
    for now in range(10, 30):
        watch.hear(Beat(7, working=False), float(now))
        assert watch.verdict(now) == ""
    watch.hear(Beat(7, working=True), 30.0)
    watch.hear(Beat(7, working=True), 33.0)
    assert watch.verdict(33.0) == "", "since its last beat that said it waits"
    watch.hear(Beat(7, working=True), 33.2)
    assert watch.verdict(33.2) == "without progress for 4.2 s"


def test_the_first_beat_is_progress_and_another_process_begins_anew():
    watch = HangWatch(HANG_S)
    watch.hear(Beat(0, working=True), 100.0)
    assert watch.verdict(104.0) == ""
    watch.forget()
    assert watch.verdict(1e9) == ""
    watch.hear(Beat(0, working=True), 200.0)
    assert watch.verdict(204.0) == ""
    assert watch.verdict(204.1) == "without a beat for 4.1 s"


def test_the_wait_doubles_with_each_quick_death_and_the_rank_is_given_up_after_so_many():
    respawns = Respawns(max_quick_deaths=6)
    waits = [respawns.after_death(QUICK_DEATH_S - 1) for _ in range(7)]
    assert waits == [RESPAWN_S, RESPAWN_S, RESPAWN_S, 4 * BACKOFF_S, 8 * BACKOFF_S, 16 * BACKOFF_S, None]
    assert respawns.reason == "it died 7 times within 60 s of its start"


def test_a_long_life_forgives():
    respawns = Respawns(max_quick_deaths=1)
    assert respawns.after_death(0.0) == RESPAWN_S
    assert respawns.after_death(QUICK_DEATH_S) == RESPAWN_S
    assert respawns.after_death(59.9) == RESPAWN_S
    assert respawns.after_death(59.9) is None


@pytest.mark.parametrize("deaths", [1, 3])
def test_exactly_so_many_quick_deaths_are_borne(deaths: int):
    respawns = Respawns(deaths)
    assert None not in [respawns.after_death(1.0) for _ in range(deaths)]
    assert respawns.after_death(1.0) is None
