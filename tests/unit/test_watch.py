"""What a supervisor decides: hung or not, and how long until the next start."""

import os
import threading
import time

import pytest

from elastic_moe.deadlines import Deadlines
from elastic_moe.supervision.busy import Busy, busy_ns
from elastic_moe.supervision.channel import Beat, Ready, Refused
from elastic_moe.supervision.watch import (
    BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_STARTS,
    QUICK_DEATH_S,
    RESPAWN_S,
    HangWatch,
    Respawns,
    ServiceHealth,
)

START_S, HANG_S, STILL_S = 30.0, 6.0, 1.5
POLL_S = 0.1


class Watched:
    """A process under watch. `main` and `rest` are the share of the time that its threads are busy."""

    def __init__(self) -> None:
        self.watch = HangWatch(Deadlines(start_s=START_S, hang_s=HANG_S, exchange_s=5.0, progress_s=STILL_S))
        self.now = 100.0
        self._main = self._all = 0.0
        self.watch.begin(self.now)

    def after(self, seconds: float, *, main: float = 1.0, rest: float = 0.05, beats: object = None) -> float | None:
        """Let it be so for so long, with beats `beats(seconds since)` if it sends any. When it was called hung."""
        begin = self.now
        for _ in range(round(seconds / POLL_S)):
            self.now += POLL_S
            self._main += main * POLL_S * 1e9
            self._all += (main + rest) * POLL_S * 1e9
            if beats is not None:
                self.watch.hear(beats(self.now - begin), self.now)  # pyright: ignore[reportCallIssue]
            if self.watch.verdict(self.now, Busy(int(self._main), int(self._all))):
                return self.now - begin
        return None


def still(within_s: float | None):
    return lambda _: Beat(7, within_s)


def working(within_s: float | None):
    return lambda seconds: Beat(int(seconds * 10), within_s)


def about(seconds: float):
    return pytest.approx(seconds, abs=2.1 * POLL_S)


@pytest.mark.parametrize("main", [0.0, 1.0])
def test_a_start_may_take_its_time_but_not_more(main: float):
    assert Watched().after(100, main=main) == about(START_S)


def test_a_process_whose_main_thread_stands_still_hangs():
    """It breathes: the thread that beats goes on."""
    process = Watched()
    assert process.after(20, beats=working(STILL_S)) is None
    assert process.after(20, main=0.0, beats=still(STILL_S)) == about(STILL_S)


def test_a_thread_that_only_looks_whether_it_may_go_on_stands_still():
    process = Watched()
    process.after(5, beats=working(STILL_S))
    assert process.after(20, main=0.01, beats=still(STILL_S)) == about(STILL_S)


def test_a_process_that_is_stopped_hangs():
    """Neither beats nor a busy thread."""
    process = Watched()
    process.after(5, beats=working(STILL_S))
    assert process.after(20, main=0.0, rest=0.0) == about(STILL_S)


def test_one_that_is_asleep_and_stopped_hangs():
    process = Watched()
    assert process.after(50, main=0.0, rest=0.01, beats=still(None)) is None
    assert process.after(20, main=0.0, rest=0.0) == about(STILL_S)


def test_a_long_step_is_no_hang_until_the_outer_limit():
    process = Watched()
    process.after(5, beats=working(STILL_S))
    assert process.after(HANG_S - 0.3, beats=still(STILL_S)) is None
    assert process.after(20, beats=still(STILL_S)) is not None


def test_a_machine_that_does_not_run_it_makes_nobody_hang():
    """Its threads wait for a processor: that counts as busy, with and without beats."""
    for beats in (still(STILL_S), None):
        process = Watched()
        process.after(5, beats=working(STILL_S))
        assert process.after(HANG_S - 0.3, main=0.9, beats=beats) is None


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_slow_process_is_no_hang(share: float):
    process = Watched()
    assert process.after(60, main=share, rest=0.0, beats=lambda seconds: Beat(int(seconds), STILL_S)) is None


def test_who_waits_for_others_has_longer():
    process = Watched()
    process.after(5, beats=working(STILL_S))
    assert process.after(HANG_S - 0.3, main=0.0, beats=still(HANG_S)) is None
    assert process.after(20, main=0.0, beats=still(HANG_S)) is not None


def test_who_waits_for_what_may_never_come_has_for_ever():
    process = Watched()
    assert process.after(500, main=0.0, beats=still(None)) is None
    assert process.after(20, main=0.0, beats=still(STILL_S)) == about(STILL_S)


def test_doing_something_else_is_progress():
    process = Watched()
    turns = iter(range(1000))
    assert process.after(50, main=0.0, beats=lambda _: Beat(7, [STILL_S, HANG_S][next(turns) % 2])) is None


def test_another_process_begins_anew():
    process = Watched()
    process.after(5, beats=working(STILL_S))
    process.watch.begin(process.now)
    assert process.after(START_S - 1, main=0.0, rest=0.0) is None


def test_where_the_kernel_says_nothing_the_outer_limit_holds():
    watch = HangWatch(Deadlines(hang_s=HANG_S, exchange_s=5.0))
    watch.begin(0.0)
    watch.hear(Beat(1, STILL_S), 1.0)
    assert watch.verdict(6.9, None) == ""
    assert watch.verdict(7.1, None) == "without a beat for 6.1 s"
    watch.hear(Beat(1, STILL_S), 7.2)
    assert watch.verdict(7.2, None) == "without progress for 6.2 s"


def test_how_busy_this_process_is():
    done, end = threading.Event(), threading.Event()

    def spin() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    before = busy_ns(os.getpid())
    thread = threading.Thread(target=lambda: (spin(), done.set(), end.wait()))
    thread.start()
    done.wait()
    between = busy_ns(os.getpid())
    end.set()
    thread.join()
    spin()
    after = busy_ns(os.getpid())
    assert before is not None
    assert between is not None
    assert after is not None
    assert between.all - before.all > 0.15e9
    assert between.main - before.main < 0.1e9
    assert after.main - between.main > 0.15e9
    assert busy_ns(2**22 + 1) is None


def test_the_wait_doubles_with_each_quick_death():
    respawns = Respawns(max_quick_deaths=5)
    waits = [respawns.after_death(QUICK_DEATH_S - 1) for _ in range(7)]
    assert waits == [RESPAWN_S, RESPAWN_S, RESPAWN_S, *[n * BACKOFF_S for n in (4, 8, 16, 32)]]
    assert [respawns.after_death(0.0) for _ in range(20)][-1] == MAX_BACKOFF_S
    assert respawns.reason == "it died 27 times in a row, each within 10 s"


def test_a_rank_that_served_for_a_while_begins_anew():
    respawns = Respawns(max_quick_deaths=1)
    assert respawns.after_death(0.0) == RESPAWN_S
    assert not respawns.is_hopeless
    assert respawns.after_death(9.9) == RESPAWN_S
    assert respawns.is_hopeless
    assert respawns.after_death(QUICK_DEATH_S) == RESPAWN_S
    assert not respawns.is_hopeless


def test_a_service_that_lived_is_started_at_once_and_one_that_dies_at_its_start_later_and_later():
    health = ServiceHealth()
    health.begin(0.0)
    health.hear(Ready())
    assert health.after_death(QUICK_DEATH_S) == 0.0
    waits = []
    for _ in range(5):
        health.begin(50.0)
        waits.append(health.after_death(51.0))
    assert waits == [0.0, *[n * BACKOFF_S for n in (2, 4, 8, 16)]]
    assert not health.is_hopeless, "it has worked before"


def test_a_service_that_never_works_is_hopeless():
    health = ServiceHealth()
    for _ in range(MAX_STARTS):
        health.begin(0.0)
        health.after_death(1.0)
        assert not health.is_hopeless
    health.begin(0.0)
    health.after_death(1.0)
    assert health.is_hopeless


def test_what_a_service_says_of_itself():
    health = ServiceHealth()
    health.begin(0.0)
    health.hear(Refused("no tokenizer"))
    assert (health.refused, health.has_worked) == ("no tokenizer", False)
    health.begin(1.0)
    health.hear(Ready())
    assert (health.refused, health.has_worked) == ("", True)
