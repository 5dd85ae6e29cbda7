"""The step barrier of one rank, over a group whose messages arrive when the test says so."""

import threading
import time

import pytest

from elastic_moe.errors import PeerLost
from elastic_moe.group.step_barrier import MARGIN, StepBarrier

WAIT_S = 10.0


class FakeGroup:
    """Group rank 1 of 3."""

    rank, size, timeout_s = 1, 3, 0.3

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int]] = []
        self.tags: list[int] = []
        self.arrived = threading.Event()
        self.steps = (0, 0)
        self.error: Exception | None = None
        self.refuses = False

    def post(self, sends, receives):
        if self.refuses:
            raise PeerLost("this rank has left the group")
        self.sent += [(int(tensor), peer, tag) for tensor, peer, tag in sends]
        self.tags += [tag for _, _, tag in receives]
        self._receives = receives
        assert [peer for _, peer, _ in receives] == [0, 2]
        return self

    def wait(self) -> None:
        assert self.arrived.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        for (tensor, _, _), step in zip(self._receives, self.steps, strict=True):
            tensor.fill_(step)

    def deliver(self, *steps: int, error: Exception | None = None) -> None:
        self.steps, self.error = steps or (0, 0), error
        self.arrived.set()


@pytest.fixture
def group() -> FakeGroup:
    return FakeGroup()


@pytest.fixture
def barrier(group) -> StepBarrier:
    return StepBarrier(group)


def wait_until_known(barrier: StepBarrier) -> int:
    assert barrier._agreed is not None
    return barrier._agreed.result(WAIT_S)


@pytest.mark.parametrize(("steps", "largest"), [((3, 4), 7), ((9, 4), 9), ((3, 12), 12)])
def test_the_largest_step_plus_the_margin_is_agreed_on(barrier, group, steps, largest):
    barrier.begin(7)
    assert group.sent == [(7, 0, 1), (7, 2, 1)]
    assert barrier._agreed is not None
    assert not barrier._agreed.done()
    group.deliver(*steps)
    assert wait_until_known(barrier) == largest + MARGIN
    assert [barrier.due(step) for step in range(7, largest + MARGIN)] == [False] * (largest + MARGIN - 7)
    assert barrier.due(largest + MARGIN)
    assert not barrier.due(largest + MARGIN)


def test_each_use_has_a_tag_of_its_own(barrier, group):
    group.deliver(1, 1)
    for use in (1, 2, 3):
        barrier.begin(1)
        wait_until_known(barrier)
        assert barrier.due(1 + MARGIN)
        assert group.sent[-2:] == [(1, 0, use), (1, 2, use)]
    assert group.tags == [1, 1, 2, 2, 3, 3]


def test_a_rank_waits_only_where_the_step_may_be_due(barrier, group):
    barrier.begin(7)
    begin = time.monotonic()
    assert not any(barrier.due(step) for step in range(7, 7 + MARGIN))
    assert time.monotonic() - begin < group.timeout_s / 2
    with pytest.raises(PeerLost, match=r"step barrier begun at 7: no answer within 0\.3 s"):
        barrier.due(7 + MARGIN)
    assert time.monotonic() - begin >= group.timeout_s


def test_it_waits_there_for_the_last_message(barrier, group):
    barrier.begin(7)
    threading.Timer(0.1, group.deliver, (7, 7)).start()
    assert barrier.due(7 + MARGIN)


def test_without_a_use_nothing_is_due(barrier):
    assert not any(barrier.due(step) for step in range(10))


def test_two_at_once_are_refused(barrier, group):
    barrier.begin(1)
    with pytest.raises(RuntimeError, match="agreed on already"):
        barrier.begin(2)
    group.deliver(1, 1)
    wait_until_known(barrier)
    with pytest.raises(RuntimeError, match=r"agreed on already \(begun at step 1\)"):
        barrier.begin(2)


def test_a_step_that_is_over_is_told(barrier, group):
    barrier.begin(1)
    group.deliver(1, 1)
    with pytest.raises(RuntimeError, match="step 3 was agreed on, but step 4 has come"):
        barrier.due(4)


def test_a_lost_peer_is_told_whenever_a_step_may_be_due(barrier, group):
    barrier.begin(1)
    group.deliver(error=PeerLost("rank 2"))
    for step in (1 + MARGIN, 2 + MARGIN):
        with pytest.raises(PeerLost, match="rank 2"):
            barrier.due(step)


def test_a_bug_in_its_thread_is_told_too(barrier, group, caplog):
    barrier.begin(1)
    group.deliver(error=ZeroDivisionError("of a test"))
    with pytest.raises(ZeroDivisionError):
        barrier.due(1 + MARGIN)
    assert "thread step barrier died" in caplog.text


def test_a_group_that_was_left_refuses(barrier, group):
    group.refuses = True
    with pytest.raises(PeerLost, match="left the group"):
        barrier.begin(1)
