"""Supervisor and its children, which are one-line Python programs here."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elastic_moe.group.view import Member, View
from elastic_moe.supervision import supervisor as module
from elastic_moe.supervision.channel import Ready, ViewChanged
from elastic_moe.supervision.supervisor import Event, EventKind, Supervisor, complain

CHILD = """
import os, signal, subprocess, sys, time
from elastic_moe.supervision.channel import Channel, Ready, ViewChanged
channel = Channel.of_child(int(sys.argv[-1]), ViewChanged)
"""
TELLS_ITS_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
channel.send(Ready(str(child.pid)))
"""


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    supervisor = Supervisor()
    yield supervisor
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    for child in supervisor.children.values():
        child.end(0)


def start(supervisor: Supervisor, program: str, name: str = "child") -> None:
    supervisor.start(name, [sys.executable, "-c", CHILD + program])


def next_event(supervisor: Supervisor) -> Event:
    """But for those that a child is dying."""
    while (event := supervisor.events.get(timeout=20)).kind is EventKind.DYING:
        pass
    return event


def detail(event: Event) -> str:
    assert isinstance(event.message, Ready)
    return event.message.detail


def has_died(pid: int, within_s: float) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        deadline = time.monotonic() + within_s
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    return True


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("signal.raise_signal(signal.SIGKILL)", -9), ("", 0)])
def test_messages_come_before_the_end_and_the_end_has_its_code(supervisor: Supervisor, end: str, code: int):
    start(supervisor, f"channel.send(Ready('one')); channel.send(Ready('two')); {end}")
    assert [detail(next_event(supervisor)) for _ in range(2)] == ["one", "two"]
    assert next_event(supervisor) == Event(EventKind.EXIT, "child", code=code)


def test_a_child_that_takes_long_to_end_is_dying_at_once(supervisor: Supervisor):
    begin = time.monotonic()
    start(supervisor, "channel.close(); time.sleep(1)")
    assert supervisor.events.get(timeout=20) == Event(EventKind.DYING, "child")
    assert supervisor.events.empty()
    assert supervisor.events.get(timeout=20) == Event(EventKind.EXIT, "child", code=0)
    assert time.monotonic() - begin > 1


@pytest.mark.parametrize("fork", ["os.fork()", "subprocess.Popen(['sleep', '100'], close_fds=False)"])
def test_who_is_forked_from_a_child_does_not_hide_its_death(supervisor: Supervisor, fork: str):
    """Such as the worker of a data loader: it has the child's end of the channel too."""
    start(supervisor, f"if {fork}:\n    channel.send(Ready('now'))\ntime.sleep(100)")
    assert detail(next_event(supervisor)) == "now"
    begin = time.monotonic()
    supervisor.children["child"].kill()
    assert supervisor.events.get(timeout=5).kind is EventKind.DYING
    assert time.monotonic() - begin < 0.5
    assert next_event(supervisor) == Event(EventKind.EXIT, "child", code=-9)


def test_a_child_that_reads_nothing_holds_nobody_up_and_hears_the_newest_last(supervisor: Supervisor):
    start(
        supervisor,
        """
time.sleep(1.0)
last = None
while not isinstance(last, ViewChanged) or last.view.epoch < 3000:
    last = channel.receive()
channel.send(Ready("heard"))
time.sleep(100)
""",
    )
    members = tuple(Member(rank, 0, "x" * 12, 1, "host", "s" * 30, "t" * 30) for rank in range(64))
    begin = time.monotonic()
    for epoch in range(1, 3001):
        supervisor.children["child"].send(ViewChanged(View(epoch, members)))
    assert time.monotonic() - begin < 0.5
    assert detail(next_event(supervisor)) == "heard"


def test_no_thread_is_left_of_a_child(supervisor: Supervisor):
    before = threading.active_count()
    for number in range(10):
        start(supervisor, "", name=f"child {number}")
    for _ in range(10):
        assert next_event(supervisor).kind is EventKind.EXIT
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_a_process_ends_with_its_parent():
    program = """
import os, sys, time
from elastic_moe.supervision.supervisor import end_with_parent
if os.fork() == 0:
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(100)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert has_died(pid, within_s=5)


def test_children_are_told_apart(supervisor: Supervisor):
    start(supervisor, "channel.receive(); sys.exit(4)", "first")
    start(supervisor, "sys.exit(5)", "second")
    assert next_event(supervisor) == Event(EventKind.EXIT, "second", code=5)
    supervisor.children["first"].channel.send(Ready())  # of no type it knows: it ends with a traceback
    assert next_event(supervisor).child == "first"


def test_a_child_is_promoted_while_it_lives(supervisor: Supervisor):
    start(supervisor, "channel.receive(); channel.send(Ready('told')); channel.receive()", "spare")
    spare = supervisor.children["spare"]
    assert supervisor.has("spare")
    assert supervisor.promote("spare", "seat") is spare
    assert (supervisor.children, supervisor.promote("spare", "seat")) == ({"seat": spare}, None)
    spare.send(ViewChanged(View(1, (Member(0, 0, "i", 1, "host", "", ""),))))
    assert (event := next_event(supervisor)).child == "seat"
    assert detail(event) == "told"
    spare.kill()
    assert next_event(supervisor) == Event(EventKind.EXIT, "seat", code=-signal.SIGKILL)
    assert not supervisor.has("seat")
    assert supervisor.promote("seat", "spare") is None


def test_signals_are_events(supervisor: Supervisor):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
        assert next_event(supervisor) == Event(EventKind.SIGNAL, code=number)


def test_stop_ends_children_that_obey_at_once(supervisor: Supervisor):
    for name in ("first", "second"):
        start(supervisor, "channel.send(Ready()); time.sleep(100)", name)
    for _ in range(2):
        detail(next_event(supervisor))
    begin = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - begin < module.STOP_GRACE_S / 2
    ends = [Event(EventKind.EXIT, name, code=-15) for name in ("first", "second")]
    assert sorted(next_event(supervisor) for _ in range(2)) == ends


def test_stop_kills_who_does_not_obey_with_all_it_started(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STOP_GRACE_S", 0.3)
    start(supervisor, f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{TELLS_ITS_CHILD}\ntime.sleep(100)")
    grandchild = int(detail(next_event(supervisor)))
    begin = time.monotonic()
    supervisor.stop()
    assert 0.3 <= time.monotonic() - begin < 3
    assert next_event(supervisor) == Event(EventKind.EXIT, "child", code=-9)
    assert has_died(grandchild, 2)


def test_a_child_reads_the_end_of_its_supervisor(supervisor: Supervisor):
    start(supervisor, "channel.send(Ready()); sys.exit(7 if channel.receive() is None else 8)")
    detail(next_event(supervisor))
    supervisor.children["child"].channel._sock.shutdown(2)  # as the kernel does when the process dies
    assert next_event(supervisor) == Event(EventKind.EXIT, "child", code=7)


def test_a_child_that_listens_to_nothing_dies_with_its_supervisor(tmp_path: Path):
    program = f"""
import sys
from elastic_moe.supervision.supervisor import Supervisor
supervisor = Supervisor()
supervisor.start("deaf", [sys.executable, "-c", {CHILD + "channel.send(Ready(str(__import__('os').getpid()))); time.sleep(100)"!r}])
print(supervisor.events.get().message.detail, flush=True)
supervisor.events.get()
"""  # noqa: E501
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        assert not has_died(child, 0)
        parent.kill()
        assert has_died(child, 2)


def test_a_complaint_is_printed_once_for_all_that_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    for _ in range(3):
        complain("no such key", tmp_path)
    assert capsys.readouterr().err == "elastic_moe: no such key\n"
    for _ in range(2):
        complain("no such key", None)
    assert capsys.readouterr().err == "elastic_moe: no such key\n" * 2
